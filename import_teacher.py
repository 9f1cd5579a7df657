"""Import another project's flow-matching transformer as a teacher: weights in the layout of DiT's or SiT's state dict.

    python import_teacher.py SiT-XL-2-256.pt sit.safetensors --time-direction data-at-one --data latents/imagenet       SiT
    python import_teacher.py repa.pt repa.safetensors --time-direction noise-at-one --ignore projectors --data latents/imagenet       REPA
    python import_teacher.py mine.safetensors mine-teacher.safetensors --time-direction noise-at-one --time-scale 1000 --num-heads 6

Then train with python train_student.py --teacher sit.safetensors --data ... Sizes, classes and learn_sigma are read from the weights.
The direction of time cannot be read from them, and a wrong one gives noise: look at samples first (python sample.py sit.safetensors).
The weights must predict a velocity along the straight path from data to noise; a DiT that predicts noise cannot be used.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from models.foreign import choose_preset, read_shapes, translate, unwrap
from utils.checkpoints import write_weights
from utils.config import check_file, check_writable, parse_config, require
from utils.data import NAMES
from utils.errors import run_script
from utils.foreign import read_state
from utils.latents import is_latents, read_description


@dataclass(frozen=True)
class Config:
    source: Annotated[str, tyro.conf.Positional]    # file (.safetensors, .pt, .pth) of a state dict, or of one in ema, model, state_dict
    target: Annotated[str, tyro.conf.Positional]    # file to write, ending in .safetensors
    time_direction: Literal["data-at-one", "noise-at-one"]  # what these weights have at time 1: the data (SiT) or the noise (REPA, SD3)
    time_scale: float = 1.0                     # factor of these weights' time before its sinusoid: 1 (SiT, REPA) or 1000 (SD3)
    preset: str | None = None                   # SiT-S, B, L, XL or depth x width x heads as in SiT-6x256x4, and /patch; None: as found
    num_heads: int | None = None                # attention heads; None: those of the preset or known size
    image_size: int | None = None               # side of the images or latents; None: as found; a number must match that
    num_classes: int | None = None              # classes, without the null class; None: as found; a number must match that
    class_names: str | None = None              # text file, a class name a line, in the labels' order; None: those of latents, or 0, 1, ...
    data: str | None = None                     # what it was trained on, as for --data of train_student.py; needed if that is latents
    ignore: tuple[str, ...] = ()                # prefixes of names to leave out: parts that only training used
    precision: Literal["float32", "bfloat16"] = "float32"   # number format of the weights in the file
    replace: bool = False                       # overwrite an existing file

    def __post_init__(self) -> None:
        require(self, "time_scale", 0 < self.time_scale < math.inf, "above 0")
        require(self, "num_heads", self.num_heads is None or self.num_heads >= 1, "at least 1, or None")
        require(self, "target", self.target.endswith(".safetensors"), "a file name that ends in .safetensors")
        check_file(self, "target")


def read_classes(file: str | None, num_classes: int) -> list[str]:
    """One name a class, in the order of the labels.

    Raises:
        ValueError: no such file, another number of names, or a name twice.
    """
    if file is None:
        return [str(i) for i in range(num_classes)]
    if not Path(file).is_file():
        raise ValueError(f"--class-names {file}: no such file")
    names = Path(file).read_text(encoding="utf-8").splitlines()
    if len(names) != num_classes or len(set(names)) != len(names) or not all(name.strip() for name in names):
        raise ValueError(f"--class-names {file} has {len(names)} lines, {len(set(names))} of them different; the weights have "
                         f"{num_classes} classes, and each needs a name of its own")
    return names


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__)
    target = Path(cfg.target)
    if target.exists() and not cfg.replace:
        raise ValueError(f"{target} exists; use --replace True to overwrite it")
    check_writable(target)
    if target.exists() and Path(cfg.source).exists() and target.samefile(cfg.source):
        raise ValueError(f"{target} is the source itself; name another file to write")
    require(cfg, "data", cfg.data in (None, *NAMES) or Path(cfg.data).exists(), f"{', '.join(NAMES)}, a path that is there, or left out")
    found, entry = read_state(cfg.source)
    state = unwrap(found, cfg.ignore)
    shapes = read_shapes(state)
    for field in ("image_size", "num_classes"):
        require(cfg, field, getattr(cfg, field) in (None, getattr(shapes, field)), f"{getattr(shapes, field)}, as in the weights")
    preset = choose_preset(shapes, cfg.preset, cfg.num_heads)
    latents = read_description(Path(cfg.data)) if cfg.data and is_latents(Path(cfg.data)) else None
    shape = [shapes.num_channels, shapes.image_size, shapes.image_size]
    if latents and latents["shape"] != shape:
        raise ValueError(f"--data {cfg.data} holds latents of shape {latents['shape']}; the weights are for {shape}")
    classes = read_classes(cfg.class_names, shapes.num_classes)
    if latents and cfg.class_names is None and len(latents["classes"]) == len(classes):
        classes = latents["classes"]
    architecture = dict(network="SiT", preset=preset, image_size=shapes.image_size, num_channels=shapes.num_channels,
                        num_classes=shapes.num_classes, interval=False, time_direction=cfg.time_direction, time_scale=cfg.time_scale)
    weights = translate(state, shapes, architecture)
    bad = [name for name, tensor in weights.items() if not tensor.is_floating_point() or not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"{cfg.source}: {bad[0]} holds values that are no finite numbers")

    with open(cfg.source, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    origin = dict(imported_from=Path(cfg.source).name, sha256=digest, entry=entry, ignored=list(cfg.ignore),
                  learn_sigma=shapes.learn_sigma)
    metadata = dict(kind="teacher", architecture=architecture, classes=classes, config=dict(data=cfg.data, **origin), step=0,
                    weights="ema", autoencoder=latents and latents["autoencoder"])
    target.parent.mkdir(parents=True, exist_ok=True)
    write_weights(target, {name: tensor.to(getattr(torch, cfg.precision)) for name, tensor in weights.items()}, metadata)
    left_out = f", {len(found) - len(state)} left out by --ignore" if cfg.ignore else ""
    print(f"{cfg.source}: {len(state)} tensors ({entry}){left_out}; depth {shapes.depth}, width {shapes.width}, "
          f"patch size {shapes.patch_size}, images {shapes.num_channels} x {shapes.image_size} x {shapes.image_size}, "
          f"{shapes.num_classes} classes, learn_sigma {shapes.learn_sigma}")
    print(f"{target}: teacher {preset}, time {cfg.time_direction} x {cfg.time_scale:g}, {cfg.precision}, "
          f"{target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main)
