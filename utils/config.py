"""From a frozen dataclass to a command line, and to JSON.

A script's Config holds its flags: a field's name is the flag, its comment the help text, and its default the published
recipe. `utils/recipes.py` holds what differs for other data sets, so `--data digits --help` shows the recipe of digits.
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from utils.checkpoints import flush
from utils.recipes import NAMES
from utils.times import parse_law


@dataclass(frozen=True)
class RunConfig:
    """Flags that every training script has. Scripts derive their Config from it and add the method's own."""

    data: str = "mnist"                 # data set: mnist, cifar10, digits, or the path to images (folder or zip) or latents
    data_root: str = "data"             # folder of mnist and cifar10; a missing one is downloaded into it
    image_size: int | None = None       # side in pixels to which images are resized; None: the data set's own, 32 for a path
    flip: bool | None = None            # mirror half of the images at random; None: a student as its teacher, else all but mnist and digits
    steps: int = 10_000                 # updates in all
    max_minutes: float | None = None    # save and stop after this many minutes; the same command continues later
    start_from: str | None = None       # weights to start from: file, checkpoint or run of the same network; None: none, or its teacher
    global_batch_size: int = 512        # images per update, over all processes
    seed: int = 0                       # seed of everything random
    device: str = "auto"                # auto, cuda, cuda:1, ..., or cpu
    compile: bool = True                # torch.compile the networks' blocks (on CUDA only)
    cuda_graph: bool = True             # record the kernels of loss and gradients once and replay them (on CUDA only, not with --shard)
    shard: bool = False                 # split weights and optimizer state among the processes (FSDP2), for large models
    results_dir: str = "results"        # folder in which run folders are made
    name: str | None = None             # name of the run folder; None: stage and data set, such as teacher-mnist
    log_every: int = 50                 # updates between log lines; training waits for the GPU only at these
    sample_every: int = 2_000           # updates between sample grids
    save_every: int = 2_000             # updates between checkpoints
    keep: int = 2                       # newest checkpoints to keep
    eval_every: int | None = None       # updates between quick evaluations of 5,000 images; None: none
    classifier: str | None = None       # file of train_classifier.py for --eval-every; None: checkpoints/classifier-<data>.safetensors
    num_workers: int = 4                # threads that decode image files
    autoencoder: str | None = None      # latents only: Hub id or folder of their autoencoder; None: where it was when they were made
    comet: Literal["auto", "offline", "off"] = "auto"   # log to comet.com; auto: online if a key is configured, else offline

    def __post_init__(self) -> None:
        for field in ("steps", "global_batch_size", "log_every", "sample_every", "save_every", "keep", "num_workers"):
            require(self, field, getattr(self, field) >= 1, "at least 1")
        require(self, "eval_every", self.eval_every is None or self.eval_every >= 1, "at least 1, or None")
        require(self, "classifier", self.classifier is None or self.eval_every is not None, "left out without --eval-every")
        require(self, "max_minutes", self.max_minutes is None or self.max_minutes > 0, "above 0, or None")
        require(self, "image_size", self.image_size is None or self.image_size >= 1, "at least 1, or None")
        require(self, "name", self.name is None or (self.name not in ("", ".", "..") and not set(self.name) & set("/\\")),
                "a folder's name, without slashes")
        check_folder(self, "results_dir")


# A run may be continued with other values of these: they do not change what it computes.
FREE_FIELDS = {"max_minutes", "device", "compile", "cuda_graph", "shard", "results_dir", "name", "log_every", "sample_every", "save_every",
               "keep", "eval_every", "classifier", "num_workers", "comet", "data_root", "autoencoder"}

# Paths among the others, which may be written in several ways.
PATHS = ("data", "teacher", "start_from")

# What a run did before there was such a field.
ADDED_LATER = {"augment": 0.0, "edge_weight": 0.0, "guidance_range": None, "extra_blocks": 0, "input_skip": False, "flip": None,
               "one_step_from": 0, "num_noises": 1}

ConfigT = TypeVar("ConfigT")


def require(config: Any, field: str, good: bool, allowed: str) -> None:
    """Raise ValueError, with the flag, its value and what is allowed, unless `good`."""
    if not good:
        value = getattr(config, field)
        text = " ".join(map(str, value)) if isinstance(value, tuple) else value
        raise ValueError(f"--{field.replace('_', '-')} {text}: must be {allowed}")


def check_text(config: Any) -> None:
    """Raise ValueError, with the flag, if a text is empty and its default is not: an unset variable would mean something else."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.default != "" and (value == "" or (isinstance(value, tuple) and "" in value)):
            raise ValueError(f"--{field.name.replace('_', '-')} '': must not be empty (an unset variable of the shell?)")


def check_law(config: Any, field: str, known: Mapping[str, int]) -> None:
    """Raise ValueError, with the flag, unless the field's text is one of the known laws; see `utils.times.parse_law`."""
    try:
        parse_law(getattr(config, field), known)
    except ValueError as error:
        raise ValueError(f"--{field.replace('_', '-')}: {error}") from None


def check_interval(config: Any, field: str) -> None:
    """Raise ValueError, with the flag, unless the field is a pair of times in order."""
    low, high = getattr(config, field)
    require(config, field, 0 <= low <= high <= 1, "two times, 0 <= low <= high <= 1")


def check_folder(config: Any, field: str) -> None:
    """Raise ValueError, with the flag, if the field's path, or what it lies in, is a file."""
    require(config, field, not any(map(Path.is_file, Path(getattr(config, field) or "", "x").parents)), "a folder, not a file")


def check_file(config: Any, field: str) -> None:
    """Raise ValueError, with the flag, if the field's path is a folder."""
    value = getattr(config, field)
    require(config, field, not (value and Path(value).is_dir()), "a file, not a folder")


def parse_config(config_class: type[ConfigT], argv: Sequence[str] | None, description: str | None,
                 recipes: Mapping[str, Mapping[str, Any]] | None = None) -> ConfigT:
    """Read a Config from the command line; an unknown flag ends the program with the nearest known one.

    Args:
        argv: arguments, or None for the program's own.
        recipes: fields that differ from the class's defaults, by the value of --data; the key "path" stands for a path.

    Raises:
        SystemExit: bad flags, an empty text among them, or --help.
    """
    default = None
    try:
        if recipes is not None:
            peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            peek.add_argument("--data", default=config_class.data)
            data = peek.parse_known_args(argv)[0].data
            recipe = recipes.get(data, recipes["path"] if Path(data).exists() else {})
            default = config_class(**{"data": data, **recipe})
        config = tyro.cli(config_class, args=argv, default=default, description=description,
                          config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands))
        check_text(config)
        return config
    except ValueError as error:
        sys.exit(f"error: {error}")


def check_writable(target: Path) -> None:
    """Raise ValueError unless a file or folder may be written there: told now and not after the work."""
    for folder in (next(filter(Path.exists, target.absolute().parents)), *filter(Path.is_dir, [target])):
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise ValueError(f"{target}: {folder} is no folder, or may not be written to; choose another place")


def is_vacant(path: Path) -> bool:
    """Whether nothing is there, or an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def first_free(folder: Path, is_free: Callable[[Path], bool]) -> Path:
    """Where to write if no --out says it: the folder itself, or the first of folder-2, folder-3, ... that `is_free`."""
    numbered = (folder.with_name(f"{folder.name}-{i}") for i in itertools.count(2))
    return next(filter(is_free, itertools.chain([folder], numbered)))


def read_config(file: Path) -> dict[str, Any]:
    """What the config.json of a run says.

    Raises:
        ValueError: it is torn, or no JSON object; names the file.
    """
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is torn or no JSON ({error}); repair it, or move its folder away") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no JSON object; repair it, or move its folder away")
    return config


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` at the end: a full disk, say, leaves no half of a file there.

    Raises:
        OSError: it could not be written.
    """
    temporary = path.with_name(f".{path.stem}.writing{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"could not write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write through a temporary file, so that a crash leaves the old or the new text."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text)
    flush(temporary)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Likewise, a value as JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def to_dict(config: Any) -> dict[str, Any]:
    """A Config as JSON-able values."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()}


def place(path: str | None) -> str | None:
    """What a path leads to, in whichever way it is written: photos/ is ./photos, but ./mnist is a folder and mnist a named data set."""
    return path if path is None or path in NAMES else os.path.abspath(path)


def short_name(data: str) -> str:
    """What runs and classifiers of a data set are called by: its own name, or that of the folder or zip that a path leads to."""
    path = Path(os.path.abspath(data))
    return path.stem if path.suffix.lower() == ".zip" else path.name


def differences(config: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What in `other` makes it another run: "field: value, was value", for all but `FREE_FIELDS`."""
    def value(values: dict[str, Any], key: str) -> Any:
        return place(values.get(key)) if key in PATHS else values.get(key)

    keys = [key for key in {**config, **other} if key not in FREE_FIELDS and value(other, key) != value(config, key)]
    return [f"{key}: {other.get(key)}, was {config.get(key)}" for key in keys]


def public_path(path: str) -> str:
    """A path as others may read it: an absolute one from the working folder on or, if it lies elsewhere, its last part alone."""
    if not os.path.isabs(path):
        return path
    whole, here = Path(os.path.normpath(path)), Path.cwd()
    short = str(whole.relative_to(here)) if whole.is_relative_to(here) else whole.name
    return os.path.join(".", short) if short in NAMES else short              # no folder becomes a named data set


def public(metadata: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's metadata as others may read them: without `FREE_FIELDS`, folders and the like, other paths by `public_path`."""
    config = {key: public_path(value) if key in PATHS and value else value
              for key, value in metadata["config"].items() if key not in FREE_FIELDS}
    if autoencoder := metadata.get("autoencoder"):
        metadata = {**metadata, "autoencoder": {**autoencoder, "source": public_path(autoencoder["source"])}}
    return {**metadata, "config": config}
