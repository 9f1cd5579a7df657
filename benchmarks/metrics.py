"""What the loops that are measured against share: flags, and metrics.jsonl."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.json_lines import add_line


@dataclass(frozen=True)
class RivalConfig:
    """Flags of every rival; `benchmarks.throughput` gives all of them."""

    data: str                                   # a class-folder tree
    image_size: int = 32                        # side in pixels
    model: str = "DiT-S/2"                      # preset
    batch_size: int = 512                       # images an update
    steps: int = 120                            # updates
    log_every: int = 20                         # updates between lines of metrics
    device: str = "auto"                        # auto, cuda, cpu
    results_dir: str = "results"                # where <name>/metrics.jsonl goes
    name: str = "rival"


class Metrics:
    """One line every few updates, with the keys of a run's own metrics.jsonl."""

    def __init__(self, results_dir: str, name: str, batch_size: int, device: torch.device):
        self.file = Path(results_dir) / name / "metrics.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.batch_size, self.device = batch_size, device
        self.last = (0, time.monotonic())

    def line(self, step: int, **values: float) -> None:
        """Write a line. The values are numbers already, so the device has finished."""
        now = time.monotonic()
        row = {"step": step, **values, "images_per_second": (step - self.last[0]) * self.batch_size / (now - self.last[1])}
        if self.device.type == "cuda":
            row["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.last = (step, now)
        add_line(self.file, row)
