"""How cost grows: images/s and memory of both training steps against the batch, the patches of an image and the network's size.

    python -m benchmarks.growth                         every row
    python -m benchmarks.growth --sweeps size --minutes 3

The training scripts as they are, on random images, as in `benchmarks.throughput`, but one after the other in this process, which
imports PyTorch once. Ends of a curve come before its middle. Writes rows.json, table.md and plot.png into --out, anew after each row;
rows that are there already are not measured again, so the same command goes on.
"""

import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import train_student
import train_teacher
from benchmarks import throughput
from benchmarks.throughput import Row, command, first_teacher, forward_flops, save
from utils.config import parse_config, require
from utils.errors import run_script
from utils.json_lines import read_lines
from utils.pictures import log_scale, pyplot

SCRIPTS = {"train_teacher.py": train_teacher, "train_student.py": train_student}
# What each curve is drawn against, and its points: preset and batch.
SWEEPS = {
    "batch": [("DiT-S/2", batch) for batch in (64, 128, 256, 512, 1024, 2048)],
    "patches": [(f"DiT-S/{patch}", 512) for patch in (8, 4, 2)],
    "size": [(f"DiT-{size}/2", 256) for size in ("Ti", "S", "B", "L", "XL")],
}


@dataclass(frozen=True)
class Config:
    sweeps: tuple[Literal["batch", "patches", "size"], ...] = ("batch", "patches", "size")
    rows: tuple[Literal["teacher", "student", "student-euler"], ...] = ("teacher", "student")
    minutes: float | None = None                # start no further row after this time
    image_size: int = 32                        # side of the random images
    steps: int = 6                              # updates in a window
    windows: int = 3                            # windows that are measured, after one that is not
    compile: bool = True                        # torch.compile the networks
    device: str = "auto"                        # auto, cuda, cpu
    out: str = "results/growth"                 # folder to write to

    def __post_init__(self) -> None:
        for field in ("image_size", "steps", "windows"):
            require(self, field, getattr(self, field) >= 1, "at least 1")
        for field in ("sweeps", "rows"):
            require(self, field, len(getattr(self, field)) > 0, "one or more")
        require(self, "minutes", self.minutes is None or self.minutes > 0, "above 0, or None")


def points(sweeps: Sequence[str]) -> list[tuple[str, int]]:
    """The points of all curves, each once: the ends of each first, then what lies between them."""
    ends_first = [point for name in sweeps for point in (SWEEPS[name][-1], SWEEPS[name][0])]
    return list(dict.fromkeys(ends_first + [point for name in sweeps for point in SWEEPS[name]]))


def run_here(line: list[str]) -> None:
    """Run the command of a training script in this process, on a GPU as empty as at the start."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    script, *flags = line[1:]                               # the first is Python itself
    SCRIPTS[script].main(flags)


def measure(name: str, model: str, batch: int, cfg: Config, folder: Path) -> Row:
    run = f"{name}-{model}-{batch}".replace("/", "-")
    run_here(command(name, model, batch, 1, (cfg.windows + 1) * cfg.steps, cfg, folder, run))
    rows = read_lines(folder / "results" / run / "metrics.jsonl")
    speeds = [row["images_per_second"] for row in rows[1:]]
    flops = forward_flops(model, cfg.image_size) * throughput.FORWARDS[name] * statistics.median(speeds) / 1e12
    return Row(name, model, batch, 1, speeds, rows[-1].get("memory_gib"), None, None, flops)


def rows_so_far(cfg: Config, on_gpu: bool) -> list[Row]:
    """The rows in --out.

    Raises:
        ValueError: they come from another device, version of PyTorch, size of images or number of updates.
    """
    file = Path(cfg.out) / "rows.json"
    if not file.exists():
        return []
    theirs, ours = json.loads(file.read_text()), throughput.settings(cfg, on_gpu)
    if different := [f"{key} {theirs.get(key)}, here {value}" for key, value in ours.items() if theirs.get(key) != value]:
        raise ValueError(f"{file} cannot be gone on with: {'; '.join(different)}. Choose another --out")
    return [Row(**row) for row in theirs["rows"]]


def plot(rows: list[Row], path: Path, device: str) -> None:
    """A panel for each curve, images/s above and memory below."""
    plt = pyplot()
    figure, axes = plt.subplots(2, len(SWEEPS), figsize=(4 * len(SWEEPS), 6), layout="constrained", sharex="col", squeeze=False)
    for column, (sweep, members) in zip(axes.T, SWEEPS.items()):
        labels = {point: str(point[1]) if sweep == "batch" else point[0] for point in members}
        fixed = members[0][0] if sweep == "batch" else f"batch {members[0][1]}"
        for name in dict.fromkeys(row.name for row in rows):
            mine = {(row.model, row.batch_size): row for row in rows if row.name == name}
            shown = [(i, mine[point]) for i, point in enumerate(members) if point in mine]
            column[0].plot([i for i, _ in shown], [row.median for _, row in shown], marker="o", label=name)
            column[1].plot([i for i, _ in shown], [row.memory_gib or 0.0 for _, row in shown], marker="o", label=name)
        column[0].set_title(f"{sweep}, {fixed}")
        log_scale(column[0])
        column[1].set_ylim(bottom=0)
        column[1].set_xticks(range(len(members)), [labels[point] for point in members])
        for axis in column:
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("images/s")
    axes[1, 0].set_ylabel("peak memory, GiB")
    axes[0, 0].legend()
    figure.suptitle(device)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__)
    start = time.monotonic()
    on_gpu = torch.cuda.is_available() and cfg.device != "cpu"
    rows = rows_so_far(cfg, on_gpu)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        throughput.write_images(folder / "images", cfg.image_size)
        ceiling = throughput.matmul_ceiling() if on_gpu else None
        there = {(row.name, row.model, row.batch_size) for row in rows}
        missing = [(name, *point) for point in points(cfg.sweeps) for name in cfg.rows if (name, *point) not in there]
        for name, model, batch in missing:
            if cfg.minutes is not None and time.monotonic() - start > 60 * cfg.minutes:
                tqdm.write(f"{name} {model} batch {batch}: not measured, {cfg.minutes:g} minutes are over", file=sys.stderr)
                continue
            first = first_teacher(model)                    # a student needs some teacher of its size
            if name.startswith("student") and not (folder / "results" / first).exists():
                run_here([*command("teacher", model, 16, 1, 1, cfg, folder, first), "--compile", "False"])
            rows.append(measure(name, model, batch, cfg, folder))
            save(rows, ceiling, cfg, plot)                  # what is measured is kept, whatever the next row does
            tqdm.write(f"{name} {model} batch {batch}: {rows[-1].median:.0f} images/s, {rows[-1].memory_gib} GiB", file=sys.stderr)
    print(throughput.markdown(rows, ceiling))


if __name__ == "__main__":
    run_script(main)
