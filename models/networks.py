"""Build the network that a checkpoint's architecture describes, and a student from its teacher."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from models.dit import DiT
from models.sit import SiT

NETWORKS = {"DiT": DiT, "SiT": SiT}


def build_network(network: str = "DiT", **architecture) -> DiT | SiT:
    """The network of an architecture, as a checkpoint's metadata holds it.

    Args:
        network: its class; a checkpoint that names none is a DiT's.
        architecture: the arguments of that class.

    Raises:
        ValueError: an unknown class; and what the class raises.
    """
    if network not in NETWORKS:
        raise ValueError(f"unknown network {network!r}; known are {', '.join(NETWORKS)}")
    return NETWORKS[network](**architecture)


def from_pretrained(source: str | Path, **hub_arguments) -> tuple[DiT | SiT, dict[str, Any]]:
    """The network of a model folder or Hub id, of whichever class its config.json names, and that config.

    Raises:
        OSError: an id that cannot be downloaded; and what `HubModel.from_pretrained` raises.
    """
    folder = Path(source)
    file = folder / "config.json" if folder.is_dir() else hf_hub_download(str(source), "config.json", **hub_arguments)
    config = json.loads(Path(file).read_text())
    return NETWORKS[config.get("network", "DiT")].from_pretrained(source, **hub_arguments), config


def student_from_teacher(teacher: DiT | SiT, *, extra_blocks: int = 0, input_skip: bool = False,
                         guidance_range: Sequence[float] | None = None, guidance_scale: float = 1.0) -> DiT | SiT:
    """A student of its teacher's class that starts as its teacher: u(z, r, t, y) == v(z, t, y) for every r, and every guidance.

    Args:
        extra_blocks: how many it has more than the teacher, evenly among the teacher's; their gates are closed at first (adaLN-Zero).
        input_skip, guidance_range, guidance_scale: see `models.dit.DiT`.

    Raises:
        ValueError: the teacher has an interval input, that is, it is a student already; and what the class raises.
        RuntimeError: any weight but those of the embeddings of interval and guidance, of extra blocks and of the input's share is missing
            or unexpected.
    """
    if teacher.interval_embed is not None:
        raise ValueError("the teacher has an interval embedding: it is a student's network, and cannot teach velocities")
    architecture = {key: value for key, value in teacher.architecture.items() if key != "augment_dim"}      # a student sees samples only
    more = dict(extra_blocks=extra_blocks, input_skip=input_skip, guidance_range=guidance_range, guidance_scale=guidance_scale)
    student = build_network(**{**architecture, "interval": True, **more}).to(teacher.position.device)
    weights, between = student.spread_blocks(teacher.state_dict(), len(teacher.blocks))
    weights.pop("augment_embed.weight", None)
    result = student.load_state_dict(weights, strict=False)
    new = ("interval_embed.", "guidance_embed.", "input_skip.", *between)
    allowed = {name for name in student.state_dict() if name.startswith(new)}
    if set(result.missing_keys) != allowed or result.unexpected_keys:
        raise RuntimeError(f"the teacher's weights do not fit: missing {result.missing_keys}, unexpected {result.unexpected_keys}; "
                           f"only {sorted(allowed)} may be missing")
    return student
