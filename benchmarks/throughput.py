"""Images per second of the training scripts as a user runs them, beside a textbook loop and a MeanFlow step by JVP.

    python -m benchmarks.throughput                                          all rows at batch 512, on one GPU
    python -m benchmarks.throughput --rows teacher student --batch-size 64 128 256 512 1024 2048 --cold False
    python -m benchmarks.throughput --rows teacher student --num-gpus 1 2    each GPU keeps its batch
    python -m benchmarks.throughput --rows teacher teacher+ema-every-8       a change that no flag makes (benchmarks/ablations/patches.py)

Every row is a process of its own on random images. Training scripts are started by their own command line and read by their
metrics.jsonl: nothing of them is copied here. They run twice, first on an empty compile cache for one update, then for
`--windows` x `--steps` updates after a warm-up, as the others do on an empty cache; medians over the windows, with the least
and the greatest. With --cold False they run once, with your own compile cache, and the time until their first update is not told.
Writes rows.json, table.md and plot.png into --out.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import train_student
from benchmarks.ablations.patches import PATCHES
from benchmarks.report import markdown, plot
from models import DiT
from utils.config import parse_config, require
from utils.errors import run_script
from utils.json_lines import read_lines

# Forward passes an image, a backward pass counted as two: the teacher's guided velocity takes two on every image, or with legs of the
# student's own on the boundary's; the rest of a target three (midpoint leg), one (Euler) or two (its own). A JVP is counted as two.
BOUNDARY = train_student.Config.boundary_share
FORWARDS = {"teacher": 3.0, "student": 3 + 2 + 3 * (1 - BOUNDARY), "student-euler": 3 + 2 + (1 - BOUNDARY),
            "student-self": 5.0, "textbook-fp32": 3.0, "textbook-bf16": 3.0, "meanflow": 4.0}
CLASSES = 10


def parts(name: str) -> tuple[str, str]:
    """A row and the patch under which its script runs, or "": "teacher+ema-every-8" is both."""
    row, _, patch = name.partition("+")
    return row, patch


def known(name: str) -> bool:
    row, patch = parts(name)
    return row in FORWARDS and (not patch or (patch in PATCHES and row.startswith(("teacher", "student"))))


@dataclass(frozen=True)
class Config:
    rows: tuple[str, ...] = ("teacher", "student", "student-euler", "student-self", "textbook-fp32", "textbook-bf16", "meanflow")
    model: tuple[str, ...] = ("DiT-S/2",)       # presets
    batch_size: tuple[int, ...] = (512,)        # images an update on each GPU
    num_gpus: tuple[int, ...] = (1,)            # more than one: torchrun on this machine, training scripts only
    image_size: int = 32                        # side of the random images
    steps: int = 20                             # updates in a window
    windows: int = 5                            # windows that are measured
    cold: bool = True                           # time a training script's first update too, on an empty and on a filled compile cache
    num_workers: int = 8                        # worker processes of the textbook loop
    compile: bool = True                        # torch.compile where the row would
    device: str = "auto"                        # auto, cuda, cpu
    out: str = "results/throughput"             # folder to write to

    def __post_init__(self) -> None:
        for field in ("image_size", "steps", "windows", "num_workers"):
            require(self, field, getattr(self, field) >= 1, "at least 1")
        for field in ("rows", "model", "batch_size", "num_gpus"):
            require(self, field, len(getattr(self, field)) > 0, "one or more values")
            require(self, field, len(set(getattr(self, field))) == len(getattr(self, field)), "each named once")
        for field in ("batch_size", "num_gpus"):
            require(self, field, min(getattr(self, field)) >= 1, "counts of at least 1")
        require(self, "rows", all(known(name) for name in self.rows),
                f"of {', '.join(FORWARDS)}; teacher and students also as ROW+PATCH, a patch of benchmarks/ablations")


@dataclass
class Row:
    """What one row measured; times in seconds, throughput over all GPUs, None where it was not measured."""

    name: str
    model: str
    batch_size: int
    num_gpus: int
    images_per_second: list[float]
    memory_gib: float | None
    first_update_cold: float | None
    first_update_warm: float | None
    tflops: float

    @property
    def median(self) -> float:
        return statistics.median(self.images_per_second)


def write_images(folder: Path, size: int, count: int = 2048) -> None:
    """A class-folder tree of random PNGs: loaders decode it, and no kernel runs faster on it than on real images."""
    pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    for i, image in enumerate(pixels):
        path = folder / f"class{i % CLASSES}" / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        imageio.imwrite(path, image)


def forward_flops(model: str, image_size: int, num_channels: int = 3) -> float:
    """Floating-point operations of one image's forward pass, matrix products only, two for a multiply and add."""
    with torch.device("meta"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network, one = DiT(model, image_size, num_channels, CLASSES, interval=True), torch.zeros(1)
        network(torch.zeros(1, num_channels, image_size, image_size), one, one, one.long())
    return float(counter.get_total_flops())


def first_teacher(model: str) -> str:
    """Run folder of the teacher that the students of a size start from."""
    return f"first-teacher-{model.replace('/', '-')}"


def command(name: str, model: str, batch: int, gpus: int, steps: int, cfg: Any, folder: Path, run: str) -> list[str]:
    """The command line of one row, which leaves its metrics in folder/results/<run>/metrics.jsonl. cfg: as for `save`, with `device`
    and `compile`; of rivals also `num_workers`."""
    common = ["--data", str(folder / "images"), "--image-size", str(cfg.image_size), "--results-dir", str(folder / "results"),
              "--name", run, "--steps", str(steps), "--log-every", str(min(steps, cfg.steps)), "--device", cfg.device]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"] if gpus > 1 else []
    script = ["--global-batch-size", str(batch * gpus), "--sample-every", str(steps), "--save-every", str(steps), "--comet", "off",
              "--compile", str(cfg.compile), "--num-workers", "8"]
    name, patch = parts(name)
    if patch:
        launcher += ["-m", "benchmarks.ablations.patches", patch]
    if name == "teacher":
        row = [*launcher, "train_teacher.py", "--model", model, *script, "--sample-steps", "1", "--guidance-scale", "1"]
    elif name.startswith("student"):
        leg = name.removeprefix("student").removeprefix("-") or "midpoint"
        row = [*launcher, "train_student.py", *script, "--teacher", str(folder / "results" / first_teacher(model)),
               "--first-leg", leg, "--num-steps", "1"]
    else:
        kind, _, how = name.partition("-")
        row = ["-m", f"benchmarks.{kind}", "--model", model, "--batch-size", str(batch)]
        row += (["--precision", how, "--num-workers", str(cfg.num_workers)] if kind == "textbook"
                else ["--compile", str(cfg.compile)])
    return [sys.executable, *row, *common]


def launch(line: list[str], metrics: Path, cache: Path | None) -> tuple[float, list[dict]]:
    """Run a command, with a compile cache of its own or the user's. Returns the seconds from its start to its first line of
    metrics, and all lines.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if cache is not None:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    with tempfile.TemporaryFile("w+") as printed:
        start, first = time.monotonic(), None
        process = subprocess.Popen(line, stdout=printed, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            if first is None and metrics.exists() and metrics.stat().st_size:
                first = time.monotonic() - start
            time.sleep(0.05)
        printed.seek(0)
        if process.returncode or first is None:
            raise RuntimeError(f"{' '.join(line)} ended with {process.returncode}:\n{printed.read()[-3000:]}")
    return first, read_lines(metrics)


def measure(name: str, model: str, batch: int, gpus: int, cfg: Config, folder: Path) -> Row:
    """Run one row: once cold, if asked for, then warm."""
    run = f"{name}-{model}-{batch}-{gpus}".replace("/", "-")
    script, cold = name.startswith(("teacher", "student")), None
    cache = folder / "caches" / run if cfg.cold or not script else None
    for kind, steps in (("cold", 1), ("warm", (cfg.windows + 1) * cfg.steps)):
        if kind == "cold" and not (cfg.cold and script):
            continue
        line = command(name, model, batch, gpus, steps, cfg, folder, f"{kind}-{run}")
        first, rows = launch(line, folder / "results" / f"{kind}-{run}" / "metrics.jsonl", cache)
        cold = first if kind == "cold" else cold
    speeds = [row["images_per_second"] for row in rows[1:]]                     # the first window holds compilation
    warm = None if cache is None else first - (cfg.steps - 1) * batch * gpus / statistics.median(speeds)   # told after a window
    flops = forward_flops(model, cfg.image_size) * FORWARDS[parts(name)[0]] * statistics.median(speeds) / 1e12
    return Row(name, model, batch, gpus, speeds, rows[-1].get("memory_gib"), cold, warm, flops)


def matmul_ceiling() -> float:
    """TFLOP/s of a bf16 matrix product of random data on this GPU: the median of 20."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * size**3 / statistics.median(times[3:]) / 1e12


def settings(cfg: Any, on_gpu: bool) -> dict[str, Any]:
    """What rows that are compared share. cfg: this module's, or another with its `steps` and `image_size`."""
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    return {"device": device, "torch": torch.__version__, "steps": cfg.steps, "image_size": cfg.image_size}


def save(rows: list[Row], ceiling: float | None, cfg: Any, draw: Callable[[list[Row], Path, str], None] = plot) -> None:
    """Write rows.json, table.md and plot.png into cfg.out."""
    out, shared = Path(cfg.out), settings(cfg, on_gpu=ceiling is not None)
    out.mkdir(parents=True, exist_ok=True)
    (out / "rows.json").write_text(json.dumps({**shared, "matmul_tflops": ceiling, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    (out / "table.md").write_text(markdown(rows, ceiling))
    draw(rows, out / "plot.png", shared["device"])


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__)
    on_gpu = torch.cuda.is_available() and cfg.device != "cpu"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(folder / "images", cfg.image_size)
        ceiling = matmul_ceiling() if on_gpu else None
        for model in cfg.model:
            if any(name.startswith("student") for name in cfg.rows):            # a student needs some teacher of its size
                first = first_teacher(model)
                line = command("teacher", model, min(cfg.batch_size), 1, 1, cfg, folder, first)
                launch([*line, "--compile", "False"], folder / "results" / first / "metrics.jsonl", None)
            for gpus in cfg.num_gpus:
                for batch in cfg.batch_size:
                    for name in cfg.rows:
                        if gpus > 1 and name.startswith(("textbook", "meanflow")):
                            continue
                        rows.append(measure(name, model, batch, gpus, cfg, folder))
                        save(rows, ceiling, cfg)            # what is measured is kept, whatever the next row does
                        tqdm.write(f"{name} {model} batch {batch} x {gpus}: {rows[-1].median:.0f} images/s", file=sys.stderr)
    print(markdown(rows, ceiling))


if __name__ == "__main__":
    run_script(main)
