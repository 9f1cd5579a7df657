"""Checkpoints of tiny networks, and what becomes of them."""

from pathlib import Path

import torch
from torch import nn

from utils.checkpoints import save_checkpoint

NAMES = ("ema", "raw")
ARCHITECTURE = dict(in_features=64, out_features=64)
NETWORKS = {name: nn.Linear(**ARCHITECTURE) for name in NAMES}              # small: most tests are about files


def training(step: int) -> dict:
    return {"optimizer": {"state": {0: {"momentum": torch.full((3,), float(step))}}, "lr": 0.1}, "seconds": 1.5}


def weights_of(networks: dict[str, nn.Module]) -> dict:
    return {name: network.state_dict() for name, network in networks.items()}


def save(folder: Path, step: int, keep: int = 9) -> Path:
    return save_checkpoint(folder, step, weights_of(NETWORKS), training(step), dict(kind="teacher", architecture=ARCHITECTURE), keep)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def killed_while_writing(folder: Path, step: int) -> Path:
    """What a process that was killed in the middle of a save leaves behind."""
    leftover = folder / f".step_{step:08d}.writing"
    leftover.mkdir()
    (leftover / "ema.safetensors").write_bytes((folder / "step_00000003/ema.safetensors").read_bytes())
    (leftover / ".raw.safetensors.writing").write_bytes(b"half")
    return leftover


def same(weights: dict, others: dict) -> bool:
    return weights.keys() == others.keys() and all(torch.equal(weights[key], others[key]) for key in weights)
