"""What a checkpoint holds, and how it survives a crash.

    checkpoints/step_00001000/
        ema.safetensors         averaged weights, which are sampled, evaluated, released, and taught by
        raw.safetensors         the weights being trained
        target.safetensors      what makes the student's part of targets, if that is not the student itself (--target)
        training.pt             optimizer and counters

A safetensors file carries the network's architecture and the run's config in its metadata, so one file is enough to
rebuild the network. A checkpoint is written into a hidden folder, flushed, and renamed, so it exists whole or not at all.
Nothing here unpickles arbitrary objects.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = "splitmeanflow/1"
MODEL_FILE = "model.safetensors"                            # of a model folder, see `models.hub`
RELEASED = Path(__file__).parent.parent / "checkpoints"     # weights that come with the project
UMASK = os.umask(0o077)                                     # it can be read only by setting it
os.umask(UMASK)
STEP_FOLDER = re.compile(r"step_(\d{8})")


class CheckpointError(ValueError):
    """A file that is no checkpoint of ours, or a torn one."""


def fingerprint(*parts: Tensor | bytes) -> str:
    """First 8 hexadecimal digits of a hash over tensors' bytes: names frozen weights, and sets of images."""
    digest = hashlib.blake2b(digest_size=4)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def weights_id(network: nn.Module) -> str:
    """`fingerprint` of a network's weights as they are released, in bf16: alike for a run and for its released file."""
    return fingerprint(*(tensor.bfloat16() for tensor in network.state_dict().values()))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write one safetensors file through a temporary one: it is there whole or not at all.

    Raises:
        OSError: it could not be written.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)
        temporary.chmod(0o666 & ~UMASK)                     # safetensors leaves it to its owner alone
        flush(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"could not write {path}: {error}") from error


def write_weights(path: Path, weights: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
    """`write_tensors` with metadata (JSON-able) and the format's name."""
    write_tensors(path, weights, {"format": FORMAT, **{key: json.dumps(value) for key, value in metadata.items()}})


def save_model_folder(folder: Path, network: nn.Module, metadata: dict[str, Any]) -> None:
    """Write a network as a model folder: its own `save_pretrained`, in which the weights are a checkpoint's file too.

    Args:
        network: of `models`, in the precision that it is to have there.
        metadata: "kind", "architecture", "config", ...; see `read_weights`.
    """
    information = {key: value for key, value in metadata.items() if key != "architecture"}
    network.save_pretrained(folder, config={**metadata["architecture"], **information})
    write_weights(folder / MODEL_FILE, network.state_dict(), metadata)


@contextmanager
def opened(path: Path | str) -> Iterator[Any]:
    """One safetensors file, to read from, on the CPU.

    Raises:
        FileNotFoundError, PermissionError: there is no such file, or it may not be read.
        CheckpointError: it is torn, or something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    if not os.access(path, os.R_OK):                        # safetensors would say that it does not exist
        raise PermissionError(f"{path} may not be read")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is torn or no safetensors file: {error}") from error


def read_metadata(path: Path | str) -> dict[str, Any]:
    """What one file says of its weights, which are not read.

    Raises:
        FileNotFoundError, PermissionError: there is no such file, or it may not be read.
        CheckpointError: it is torn, or not one of ours.
    """
    with opened(path) as file:
        text = file.metadata() or {}
    if text.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this project: its metadata lacks format {FORMAT!r}")
    return {key: json.loads(value) for key, value in text.items()}


def read_weights(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read weights and metadata of one file.

    Raises:
        FileNotFoundError, PermissionError, CheckpointError: see `read_metadata`.
    """
    with opened(path) as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}
    return weights, read_metadata(path)


def flush(path: Path) -> None:
    """Make sure that a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def step_folders(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step_*") if STEP_FOLDER.fullmatch(path.name))


def is_finished(folder: Path, steps: int) -> bool:
    """Whether the newest checkpoint of a run is that of its last update, and its EMA weights are whole."""
    folders = step_folders(folder)
    if not folders or folders[-1].name != f"step_{steps:08d}":
        return False
    try:
        read_metadata(folders[-1] / "ema.safetensors")
    except (FileNotFoundError, CheckpointError):            # the same command goes on from the one before, and says so
        return False
    return True


def save_checkpoint(folder: Path, step: int, networks: Mapping[str, Mapping[str, Tensor]], training: dict[str, Any],
                    metadata: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step` completed updates, then delete all but the newest `keep`.

    Args:
        folder: the run's checkpoint folder.
        networks: file name to weights by name: "ema", "raw" and, of a student with other targets than its own, "target".
        training: optimizer states and counters: tensors and plain values only.
        metadata: "kind", "architecture", "config", ...; see `read_weights`.

    Raises:
        OSError: it could not be written (a full disk, say). Earlier checkpoints are untouched.
    """
    target, temporary = folder / f"step_{step:08d}", folder / f".step_{step:08d}.writing"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step_*.writing"):         # of a process that was killed
            shutil.rmtree(leftover)
        temporary.mkdir()
        for name, weights in networks.items():
            write_weights(temporary / f"{name}.safetensors", weights, {**metadata, "step": step, "weights": name})
        torch.save({**training, "step": step}, temporary / "training.pt")
        flush(temporary / "training.pt")
        flush(temporary)
        stale = folder / f".step_{step:08d}.stale.writing"
        if target.exists():
            os.replace(target, stale)
        os.replace(temporary, target)
        flush(folder)
        shutil.rmtree(stale, ignore_errors=True)
    except (OSError, RuntimeError) as error:                     # torch.save turns a full disk into a RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
        raise OSError(f"could not write checkpoint {target} ({free / 2**20:.0f} MiB free on that disk): {error}") from error
    for old in step_folders(folder)[:-keep]:
        try:
            shutil.rmtree(old)
        except OSError as error:                                # NFS keeps a folder while one of its files is read
            warnings.warn(f"could not delete {old}, which the next save will try again: {error}", stacklevel=2)
    return target


def read_checkpoint(path: Path, names: Sequence[str]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Weights by file name (`names`) and the training state of one checkpoint folder.

    Raises:
        CheckpointError, PermissionError: any of its files is torn, missing or foreign; or may not be read.
    """
    try:
        weights = {name: read_weights(path / f"{name}.safetensors")[0] for name in names}
        training = torch.load(path / "training.pt", map_location="cpu", weights_only=True)
    except (PermissionError, CheckpointError):
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is incomplete: {error}") from error
    except Exception as error:      # the many ways in which a torn zip file or a foreign pickle fails; none is swallowed
        raise CheckpointError(f"{path / 'training.pt'} is torn or foreign: {error}") from error
    return weights, training


def read_latest(folder: Path, names: Sequence[str], warn: Callable[[str], None],
                ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The newest good checkpoint of a run, or None if it has none at all.

    A bad one is named through `warn` and set aside as *.bad, never deleted.

    Raises:
        CheckpointError: there are checkpoints, but none is good.
    """
    folders = step_folders(folder)
    bad = []
    for path in reversed(folders):
        try:
            result = read_checkpoint(path, names)
        except CheckpointError as error:
            bad.append((path, error))
            continue
        for bad_path, error in bad:
            taken = sum(1 for _ in folder.glob(f"{bad_path.name}.bad*"))
            aside = bad_path.with_name(f"{bad_path.name}.bad{taken + 1 if taken else ''}")
            warn(f"{error}. Set aside as {aside}; going on from the previous good one, {path}")
            with suppress(FileNotFoundError):                   # another rank was faster
                bad_path.rename(aside)
        return result
    if bad:
        raise CheckpointError(f"no checkpoint in {folder} is good: " + "; ".join(str(error) for _, error in bad))
    return None


def resolve_weights(path: Path | str) -> Path:
    """The EMA weights that a path means: a file itself, a checkpoint folder, a run folder's newest checkpoint, or a model folder's.

    Raises:
        FileNotFoundError: there is nothing at that path.
        CheckpointError: a folder without checkpoints.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint at {path}")
    for name in ("ema.safetensors", MODEL_FILE):
        if (path / name).is_file():
            return path / name
    folders = step_folders(path / "checkpoints") or step_folders(path)
    if not folders:
        raise CheckpointError(f"{path} holds no checkpoint (step_XXXXXXXX/ema.safetensors)")
    return folders[-1] / "ema.safetensors"


def start_from(network: nn.Module, path: Path | str) -> dict[str, Any]:
    """Give a fresh network the EMA weights of another run, but where its classes are fewer or more, or one is told its augmentation and
    the other not, the embeddings of these.

    A network that is told its guidance may start from one that is not, and from one that was told other scales; one with extra blocks, or
    with a share of its input, from one without.

    Args:
        path: anything that `resolve_weights` takes.

    Returns:
        The file's metadata.

    Raises:
        FileNotFoundError, CheckpointError: as above.
        ValueError: they are another network's.
    """
    weights, metadata = read_weights(resolve_weights(path))
    theirs, ours = metadata["architecture"], network.architecture
    different = sorted(key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key))
    parts = {"num_classes": "label_embed.", "augment_dim": "augment_embed.", "guidance_range": "guidance_embed.",
             "input_skip": "input_skip."}
    if "guidance_range" in theirs and "guidance_range" in ours:
        different = [key for key in different if not key.startswith("guidance_")]       # neither range nor default shapes a weight
    less = any(key in theirs and key not in ours for key in ("guidance_range", "input_skip"))
    moved = "extra_blocks" in theirs and "extra_blocks" in different        # other blocks lie between
    if less or moved or not set(different) <= {*parts, "guidance_scale", "extra_blocks"}:
        facts = "; ".join(f"{key} {theirs.get(key)}, here {ours.get(key)}" for key in different)
        raise ValueError(f"--start-from {path} is another network: {facts}")
    fresh = tuple(parts[key] for key in different if key in parts)
    if "extra_blocks" in different:
        weights, between = network.spread_blocks(weights, len(network.blocks) - ours["extra_blocks"])
        fresh += between
    kept = {name: weight for name, weight in weights.items() if not name.startswith(fresh)}
    network.load_state_dict({**kept, **{name: weight for name, weight in network.state_dict().items() if name.startswith(fresh)}})
    return metadata


def load_network(path: Path | str, network_class: Callable[..., nn.Module], device: torch.device | str = "cpu",
                 ) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild a network from one file, in float32 and in evaluation mode, with the file's metadata.

    Args:
        path: anything that `resolve_weights` takes.
        network_class: called with the architecture in the metadata.

    Raises:
        FileNotFoundError, CheckpointError: as above; if a file is torn or gone, the message offers the run's previous one.
    """
    file = resolve_weights(path)
    try:
        weights, metadata = read_weights(file)
    except (CheckpointError, FileNotFoundError) as error:
        earlier = [folder for folder in step_folders(file.parent.parent) if folder < file.parent]
        raise CheckpointError(f"{error}." + (f" The previous one is {earlier[-1]}" if earlier else "")) from error
    try:
        network = network_class(**metadata["architecture"])
    except TypeError as error:
        raise CheckpointError(f"{file} is a {metadata['kind']}, a network of another kind than is needed here, or of another version of "
                              "this project") from error
    network.load_state_dict(weights)
    return network.to(device).eval().requires_grad_(False), metadata
