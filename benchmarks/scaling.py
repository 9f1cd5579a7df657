"""What many GPUs would give: the measured step and all-reduce, and a stated model of the network between hosts.

    python -m benchmarks.throughput --rows teacher student --model DiT-S/2 DiT-XL/2 --batch-size 64
    torchrun --nproc-per-node=8 -m benchmarks.scaling --rows results/throughput/rows.json

After its backward pass a rank has one flat buffer of float32 gradients, which one all-reduce averages; nothing overlaps with
it. On one host of g GPUs that takes the time measured here. On m hosts the buffer is reduced and scattered inside each host,
averaged between hosts by g links at once, and gathered again:

    seconds = measured + 2 (m - 1) / m * bytes / (g * link) + 2 log2(m) * latency,    efficiency = step / (step + seconds)

The link and the latency are assumptions, so what spans hosts is an estimate, and the table says so.
"""

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from models import DiT
from utils import distributed
from utils.config import parse_config, require
from utils.distributed import Ranks
from utils.errors import run_script


@dataclass(frozen=True)
class Config:
    rows: str                                   # rows.json of benchmarks.throughput: the steps on one GPU
    num_gpus: tuple[int, ...] = (8, 64, 512)    # to tell the efficiency of
    link: float = 50.0                          # between hosts, GB/s for each GPU: 50 is a 400 Gbit/s card
    latency: float = 20.0                       # of one message between hosts, microseconds
    repeats: int = 20                           # all-reduces that are measured, after 5 that are not
    device: str = "auto"                        # auto, cuda, cpu

    def __post_init__(self) -> None:
        require(self, "rows", Path(self.rows).is_file(), "a rows.json that benchmarks.throughput wrote")
        for field in ("link", "latency"):
            require(self, field, 0 < getattr(self, field) < math.inf, "above 0")
        require(self, "num_gpus", len(self.num_gpus) > 0 and min(self.num_gpus) >= 1, "counts of at least 1")
        require(self, "repeats", self.repeats >= 1, "at least 1")


def gradient_bytes(model: str, image_size: int) -> int:
    """Bytes of a student's gradients in float32, without making the network."""
    with torch.device("meta"):
        return sum(p.numel() * 4 for p in DiT(model, image_size, 3, 10, interval=True).parameters())


def measure_all_reduce(num_bytes: int, repeats: int, ranks: Ranks) -> float:
    """Median seconds of one all-reduce of this many bytes among the ranks."""
    flat = torch.zeros(num_bytes // 4, device=ranks.device)
    seconds = []
    for _ in range(repeats + 5):
        ranks.wait()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        dist.all_reduce(flat)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[5:])


def between_hosts(num_bytes: int, gpus: int, per_host: int, link: float, latency: float) -> float:
    """Seconds that hosts add to an all-reduce, by the formula above. link: GB/s; latency: microseconds."""
    hosts = math.ceil(gpus / per_host)
    return 2 * (hosts - 1) / hosts * num_bytes / (per_host * link * 1e9) + 2 * math.log2(hosts) * latency * 1e-6


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__)
    ranks = distributed.start(cfg.device)
    if ranks.world_size == 1:
        raise ValueError("one process has nothing to reduce; start it with torchrun --nproc-per-node=N, N the GPUs of a host")
    measured = json.loads(Path(cfg.rows).read_text())
    rows = [row for row in measured["rows"] if row["num_gpus"] == 1 and row["name"].startswith(("teacher", "student"))]
    if not rows:
        raise ValueError(f"{cfg.rows} holds no teacher or student row of one GPU")
    sizes = {row["model"]: gradient_bytes(row["model"], measured["image_size"]) for row in rows}
    reduce_seconds = {model: measure_all_reduce(size, cfg.repeats, ranks) for model, size in sizes.items()}
    lines = ["| step | network | batch a GPU | ms | gradients, MB | all-reduce on a host, ms | "
             + " | ".join(f"{gpus} GPUs" for gpus in cfg.num_gpus) + " |", "|" + "---|" * (6 + len(cfg.num_gpus))]
    for row in rows:
        size, reduced = sizes[row["model"]], reduce_seconds[row["model"]]
        step = row["batch_size"] / statistics.median(row["images_per_second"])
        added = [between_hosts(size, gpus, ranks.world_size, cfg.link, cfg.latency) for gpus in cfg.num_gpus]
        shares = [step / (step + reduced + seconds) for seconds in added]
        lines.append(f"| {row['name']} | {row['model']} | {row['batch_size']} | {1e3 * step:.1f} | {size / 1e6:.0f} "
                     f"| {1e3 * reduced:.2f} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    if ranks.is_main:
        print("\n".join(lines))
        print(f"\nOne host: {ranks.world_size} x {measured['device']}, measured. More hosts: an estimate, {cfg.link:g} GB/s a GPU and "
              f"{cfg.latency:g} microseconds between hosts assumed.")
    distributed.finish()


if __name__ == "__main__":
    run_script(main)
