"""Tiny runs of the scripts, images to run them on, and how two runs are compared."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.dit import PRESETS, Preset
from utils.checkpoints import read_checkpoint, step_folders

PRESETS["DiT-Test/4"] = Preset(depth=2, width=32, num_heads=2), 4           # where the network is not what is tested
ROOT = Path(__file__).parent.parent
STEPS = 6
COMMON = ["--data", "digits", "--steps", str(STEPS), "--global-batch-size", "16", "--log-every", "2", "--sample-every", "6",
          "--save-every", "2", "--comet", "off", "--device", "cpu", "--warmup-steps", "2"]
TEACHER = [*COMMON, "--model", "DiT-Test/4", "--sample-steps", "2"]


def everything(folder: Path, names=("ema", "raw"), steps: int = STEPS) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint: weights and optimizer states."""
    weights, training = read_checkpoint(step_folders(folder / "checkpoints")[-1], names)
    assert training["step"] == steps
    tensors = {f"{name}.{key}": tensor for name in names for key, tensor in weights[name].items()}
    for i, part in enumerate(training["optimizer"]):
        for index, state in part["state"].items():
            tensors.update({f"optimizer{i}.{index}.{key}": value for key, value in state.items()})
    return tensors


def losses(folder: Path) -> list[float]:
    """Of a run, line by line of its metrics."""
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(folder: Path, other: Path, names=("ema", "raw")) -> None:
    a, b = everything(folder, names), everything(other, names)
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, f"{len(different)} tensors differ, such as {different[:3]}"


def make_images(folder: Path, classes: list[str], per_class: int = 6) -> Path:
    """Mixed PNG and JPEG, gray and colour, of different shapes."""
    draw = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            size = (20 + i, 24, 3) if i % 2 else (20, 20 + i)
            Image.fromarray(draw.integers(0, 256, size, dtype=np.uint8)).save(folder / name / f"{i}.{'png' if i % 3 else 'jpg'}")
    return folder
