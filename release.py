"""Release a run: write its EMA weights in bfloat16, as one file or as a folder for the Hugging Face Hub.

    python release.py results/student-mnist checkpoints/student-mnist.safetensors
    python release.py results/student-mnist hub/mnist --evaluation results/evaluation-student-mnist
    python release.py results/student-mnist hub/mnist --evaluation results/evaluation-student-mnist --replace True --push someone/mnist
    python release.py results/student-a results/mean.safetensors --mean-with results/student-b
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from models import build_network
from utils.autoencoder import without_source
from utils.checkpoints import load_network, resolve_weights, save_model_folder, weights_id, write_weights
from utils.config import check_file, check_writable, is_vacant, parse_config, place, public, require
from utils.errors import run_script
from utils.model_card import model_card


@dataclass(frozen=True)
class Config:
    source: Annotated[str, tyro.conf.Positional]            # run folder (its newest checkpoint), checkpoint folder, or file
    target: Annotated[str, tyro.conf.Positional]            # file (.safetensors) or folder to write
    evaluation: str | None = None                           # folder only: output folder of evaluate.py, for the model card
    push: str | None = None                                 # folder only: upload it to this Hub id, such as someone/splitmeanflow-mnist
    replace: bool = False                                   # overwrite an existing target
    mean_with: tuple[str, ...] = ()                         # more runs or files, trained on from the same network: write the mean of all

    def __post_init__(self) -> None:
        if is_file := self.target.endswith(".safetensors"):
            check_file(self, "target")
        for field in ("evaluation", "push"):
            require(self, field, getattr(self, field) is None or not is_file, "left out with a .safetensors target: a file has no card")
        require(self, "push", self.push is None or len(self.push.split("/")) == 2, "of the form user/name")


def mean_of(sources: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The mean, in float32, of the weights of networks alike (a model soup: Wortsman et al., arXiv 2203.05482).

    Returns:
        The weights and the metadata of the first, in which "mean_of" lists the ids of all, if there are several.

    Raises:
        ValueError: one is of another kind, architecture, teacher, autoencoder, classes, data or, of students, guidance than another one.
            Of a folder of images, one that was released tells no more than `utils.config.public_path` leaves, often its name.
    """
    def same(metadata: dict[str, Any]) -> dict[str, Any]:
        learned = ("guidance_scale", "guidance_interval") if metadata["kind"] == "student" else ()         # a teacher's is of grids
        return ({key: metadata.get(key) for key in ("kind", "architecture", "teacher", "classes")}
                | {"autoencoder": without_source(metadata.get("autoencoder"))}
                | {key: metadata["config"].get(key) for key in learned} | {"data": place(metadata["config"].get("data"))})

    networks, metadata = zip(*(load_network(source, build_network) for source in sources), strict=True)
    for (first, one), (second, other) in combinations(zip(sources, metadata, strict=True), 2):
        if any(each == public(each) for each in (one, other)):              # released already
            one, other = public(one), public(other)
        for key, value in same(one).items():
            if same(other)[key] != value:
                raise ValueError(f"--mean-with {second} has {key} {same(other)[key]}, {first} {value}: their mean means nothing")
    parts = [network.state_dict() for network in networks]
    weights = {name: torch.stack([part[name].float() for part in parts]).mean(0) for name in parts[0]}
    told = {"mean_of": [weights_id(network) for network in networks]} if len(networks) > 1 else {}
    return weights, metadata[0] | told


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__)
    target = Path(cfg.target)
    vacant = is_vacant(target)
    if not vacant and not cfg.replace:
        raise ValueError(f"{target} exists; use --replace True to overwrite it")
    check_writable(target)
    weights, metadata = mean_of([cfg.source, *cfg.mean_with])
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    metadata = public(metadata)
    target.parent.mkdir(parents=True, exist_ok=True)
    what = f"{metadata['kind']}, step {metadata['step']}" + (f", mean of {1 + len(cfg.mean_with)}" if cfg.mean_with else "")
    if target.suffix == ".safetensors":
        write_weights(target, weights, metadata)
        print(f"{target}: {what}, {target.stat().st_size / 1e6:.1f} MB")
        return

    if not vacant and not (target / "model.safetensors").is_file():
        raise ValueError(f"{target} is no model folder: not overwritten")
    source = resolve_weights(cfg.source)
    places = {"ema.safetensors": source.parent.parent.parent, "best.safetensors": source.parent}       # run/checkpoints/step_X/ema...
    run = places.get(source.name, source.with_suffix(""))
    network = build_network(**metadata["architecture"])
    network.load_state_dict(weights)
    evaluation = Path(cfg.evaluation) if cfg.evaluation else None
    card = model_card(cfg.push or target.name, metadata, weights_id(network), run, evaluation)
    with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        # A class's name is its folder's, which need not be UTF-8; the card shows it as Python does.
        Path(temporary, "README.md").write_text(card, "utf-8", "backslashreplace")
        save_model_folder(Path(temporary), network.bfloat16(), metadata)
        target.mkdir(exist_ok=True)
        names = sorted(os.listdir(temporary), reverse=True)             # whatever else is there, a repository's .git say, stays
        for name in names:
            os.replace(Path(temporary, name), target / name)
    print(f"{target}: {what}, {(target / 'model.safetensors').stat().st_size / 1e6:.1f} MB")
    if cfg.push:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(cfg.push, exist_ok=True)
        print(api.upload_folder(repo_id=cfg.push, folder_path=target, allow_patterns=names))


if __name__ == "__main__":
    run_script(main)
