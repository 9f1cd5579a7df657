"""metrics.jsonl of the loops that are measured against."""

import json
import time
from pathlib import Path

import torch


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
        with open(self.file, "a") as file:
            file.write(json.dumps(row) + "\n")
