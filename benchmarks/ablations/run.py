"""What each choice is worth: one change at a time, all runs with the same training time on the same device, and two seeds.

    python -m benchmarks.ablations.run --teacher results/teacher-cifar10                          every variant, 90 s each
    python -m benchmarks.ablations.run --only student midpoint-uniform target-ema --seconds 120 --seeds 0 1 2
    python -m benchmarks.ablations.run --table-only True                          table.md from results.jsonl

Each run is a command line of the training script, or of patches.py around it. A short run first measures the speed of the variant, or
of one with the same cost. The variant then gets as many updates as fit into --seconds, and its schedules have that length. The result
is its last quick evaluation (5,000 images), one line of results.jsonl. What is there already is not run again, so repeat the command
to continue. A variant that is the default of --data is not run; the row of the defaults stands for it. Each visible GPU takes
one run at a time. The program also writes table.md, with a section for each time, data set, device, teacher and further flags, and
gradient_norm.png, in which a collapse shows.
"""

import hashlib
import importlib
import json
import shlex
import statistics
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.ablations.variants import VARIANTS, Variant
from benchmarks.gpus import finish, on_each
from utils import recipes
from utils.config import parse_config, require
from utils.errors import run_script
from utils.json_lines import add_line, read_lines
from utils.pictures import log_scale, pyplot

HERE = Path(__file__).parent
INTRODUCTION = """FD and class accuracy of 5,000 images, always from the same noise; ± half the range of the seeds.
"The defaults" are those of the data set with the section's flags. Spike: the greatest logged gradient norm over the median of
the (up to) 20 logged before it.

"""


# Drawn in gradient_norm.png: Algorithm 1, what makes it collapse, what stops it, and what else collapses.
COLLAPSE = ("student", "algorithm-1", "self-uniform", "self-uniform-power-0", "self-uniform-target-ema", "mixed", "euler")
PROBING: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)     # by folder: one probe serves all that cost the same


@dataclass(frozen=True)
class Config:
    only: tuple[str, ...] = ()                  # names of the variants to run; empty: all
    seeds: tuple[int, ...] = (0, 1)             # one run of each variant per seed
    seconds: float = 90.0                       # training time of a run, without start-up, sampling and evaluation
    probe_steps: int = 100                      # updates of the run that measures the speed; the first half warms up
    teacher: str | None = None                  # teacher of the students
    data: str = "cifar10"                       # data set, as for the training scripts
    data_root: str = "data"                     # folder of mnist and cifar10
    flags: str = ""                             # more flags for every run, as in --flags="--model DiT-B/4"
    results_dir: str = "results/ablations"      # folder for the runs
    out: str = str(HERE)                        # folder of results.jsonl and table.md
    table_only: bool = False                    # only write the table

    def __post_init__(self) -> None:
        known = {variant.name for variant in VARIANTS}
        require(self, "only", set(self.only) <= known, f"among {', '.join(sorted(known))}")
        require(self, "seconds", self.seconds > 0, "above 0")
        require(self, "probe_steps", self.probe_steps >= 4 and self.probe_steps % 2 == 0, "even and at least 4")
        require(self, "seeds", 0 < len(self.seeds) == len(set(self.seeds)), "one or more, each once")


def script(stage: str, data: str) -> str:
    return f"train_{stage}{'_mnist' if data in ('mnist', 'digits') else ''}"


def parse_flags(stage: str, data: str, flags: Sequence[str]) -> Any:
    """The Config that a stage's script makes of its flags.

    Raises:
        SystemExit: bad flags.
    """
    return parse_config(importlib.import_module(script(stage, data)).Config, flags, None, getattr(recipes, stage.upper()))


def is_default(variant: Variant, cfg: Config) -> bool:
    """Whether its flags say what the runs' own flags and the recipe of the data set say anyway."""
    common = ["--data", cfg.data, *shlex.split(cfg.flags)]
    plain, changed = (parse_flags(variant.stage, cfg.data, [*common, *flags]) for flags in ([], variant.flags))
    return variant.flags != [] and variant.patch is None and plain == changed


def under(patch: str | None) -> list[str]:
    """What stands after "python" before a script that runs under a patch."""
    return ["-m", "benchmarks.ablations.patches", patch] if patch else []


def script_line(stage: str, seed: int, name: str, patch: str | None, teacher: str | None, cfg: Any) -> list[str]:
    """A stage's script, under a patch or not, with the flags that every run of a benchmark has: what stands after "python".

    Args:
        teacher: of a student; a teacher has none. cfg: has data, data_root and results_dir.
    """
    of = ["--teacher", teacher] if stage == "student" and teacher else []
    return [*under(patch), f"{script(stage, cfg.data)}.py", "--data", cfg.data, "--data-root", cfg.data_root, "--seed", str(seed),
            "--name", name, "--results-dir", cfg.results_dir, "--comet", "off", *of]


def add_flags(line: Sequence[str], flags: str, told: str) -> list[str]:
    """The line, and the further flags that `told`, a flag of a benchmark, holds.

    Raises:
        ValueError: one is in the line already, as of a run that would then not be found where the line puts it.
    """
    further = shlex.split(flags)
    if twice := {word.partition("=")[0].replace("_", "-") for word in further if word.startswith("--")} & set(line):
        raise ValueError(f"{told} {flags}: must be without {' and '.join(sorted(twice))}, which this program sets itself")
    return [*line, *further]


def command(variant: Variant, seed: int, steps: int, cfg: Config, name: str, log_every: int, eval_every: int | None) -> list[str]:
    line = [*script_line(variant.stage, seed, name, variant.patch, cfg.teacher, cfg), "--steps", str(steps), "--log-every", str(log_every),
            "--sample-every", str(steps), "--save-every", str(steps), "--eval-every", str(eval_every)]
    return [*add_flags(line, cfg.flags, "--flags"), *variant.flags]


def spike(norms: Sequence[float], window: int = 20) -> float:
    """The greatest gradient norm over the median of the `window` logged before it. norms: in order."""
    return max((norm / statistics.median(norms[max(0, i - window) : i]) for i, norm in enumerate(norms) if i >= 3), default=1.0)


def settings(cfg: Config) -> dict[str, Any]:
    """What all runs that are compared share, besides their device."""
    return {"seconds": cfg.seconds, "data": cfg.data, "flags": cfg.flags, "teacher": cfg.teacher}


def measure(variant: Variant, seed: int, cfg: Config, gpu: str | None) -> dict[str, Any]:
    """Train and evaluate one variant. A run that ends in NaN is a result too."""
    folder, half = Path(cfg.results_dir), cfg.probe_steps // 2
    asked = json.dumps([cfg.data, cfg.flags, cfg.teacher, cfg.probe_steps])
    probe = f"probe-{variant.cost}-{hashlib.sha256(asked.encode()).hexdigest()[:6]}"
    with PROBING[str(folder / probe)]:
        alike = next(v for v in VARIANTS if v.name == variant.cost)
        finish(folder / probe, command(alike, 0, cfg.probe_steps, cfg, probe, half, None), gpu)
    config = json.loads((folder / probe / "config.json").read_text())
    speed = read_lines(folder / probe / "metrics.jsonl")[-1]["images_per_second"]
    steps = max(1, round(cfg.seconds * speed / config["global_batch_size"]))
    name = f"{variant.name}-{cfg.seconds:g}s-seed{seed}"
    line = command(variant, seed, steps, cfg, name, max(1, steps // 100), steps)
    result = {"variant": variant.name, "seed": seed, "steps": steps, **settings(cfg), "images_per_second": speed,
              "command": shlex.join(["python", *line])}
    try:
        finish(folder / name, line, gpu)
    except RuntimeError as error:
        if "NonFiniteError" not in str(error):
            raise
        numbers = {"failed": "not finite"}
    else:
        rows, evaluations = read_lines(folder / name / "metrics.jsonl"), read_lines(folder / name / "evaluations.jsonl")
        numbers = {"seconds_taken": rows[-1]["seconds"], "spike": spike([row["grad_norm"] for row in rows]),
                   "norms": [[row["step"], round(row["grad_norm"], 5)] for row in rows],
                   **{key: value for key, value in evaluations[-1].items() if key != "step"}}
    device = json.loads((folder / name / "environment.json").read_text())[-1]["device"]
    return {**result, "device": device, **numbers}


def sections(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Headings, and the runs that may be compared under each, in the order in which they ended."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in results:
        heading = f"{row['data']}, {row['seconds']:g} s a run, {row['device']}"
        heading += (f", `{row['flags']}`" if row["flags"] else "") + (f", of {row['teacher']}" if row["teacher"] else "")
        parts.setdefault(heading, []).append(row)
    return parts


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, a block for each stage: mean of the seeds, and half their range."""
    parts = []
    for stage in ("student", "teacher"):
        variants = [v for v in VARIANTS if v.stage == stage and any(r["variant"] == v.name for r in results)]
        of = {v.name: [r for r in results if r["variant"] == v.name] for v in variants}
        keys = list(dict.fromkeys(key for rows in of.values() for row in rows for key in row if key.startswith(("fd_", "accuracy_"))))
        if not variants:
            continue
        lines = [f"| {stage} | asks | " + " | ".join(keys) + " | spike | updates | seeds |", "|" + "---|" * (len(keys) + 5)]
        for variant in variants:
            rows = of[variant.name]
            good = [row for row in rows if "failed" not in row]
            cells = []
            for key in keys:
                values = [row[key] for row in good if key in row]
                spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
            worst = f"{max(row['spike'] for row in good):.1f}" if good else ""
            failed = f", {len(rows) - len(good)} not finite" if len(good) < len(rows) else ""
            lines.append(f"| {variant.name} | {variant.question} | " + " | ".join(cells)
                         + f" | {worst} | {round(statistics.mean(row['steps'] for row in rows))} | {len(rows)}{failed} |")
        parts.append("\n".join(lines))
    commands = "\n".join(f"- `{row['variant']}`, seed {row['seed']}: `{row['command']}`" for row in results)
    return "\n\n".join(parts) + f"\n\nCommands:\n\n{commands}\n"


def collapse_rows(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The longest run of each of COLLAPSE, of the data, device, flags and teacher that most of them have been run with."""
    groups: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in results:
        if row["variant"] in COLLAPSE and "norms" in row:
            group = groups[json.dumps([row[key] for key in ("data", "device", "flags", "teacher")])]
            group[row["variant"]] = max(group.get(row["variant"], row), row, key=lambda run: run["steps"])
    return max(groups.values(), key=len, default={})


def save_norms(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Curves of the gradient norms, by name."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    for name, row in sorted(rows.items()):
        axis.plot(*zip(*row["norms"]), label=f"{name}, {row['seconds']:g} s, seed {row['seed']}", linewidth=1)
    axis.set(xlabel="update", ylabel="gradient norm")
    log_scale(axis)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right", fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run_all(todo: list[tuple[Variant, int]], cfg: Config, file: Path) -> None:
    """Measure, one run at a time on each GPU, and append each result to `file` as it comes.

    Raises:
        RuntimeError: a run failed; what had begun beside it was finished and written.
    """
    def keep(result: dict[str, Any]) -> None:
        add_line(file, result)
        print({key: value for key, value in result.items() if key not in ("command", "norms")}, flush=True)

    on_each([partial(measure, variant, seed, cfg) for variant, seed in todo], keep)


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.jsonl"
    if not cfg.table_only:
        asked = [variant for variant in VARIANTS if (not cfg.only or variant.name in cfg.only) and not is_default(variant, cfg)]
        known = read_lines(file)
        run_all([(variant, seed) for seed in cfg.seeds for variant in asked     # all variants once before any a second time
                 if not any({"variant": variant.name, "seed": seed, **settings(cfg)}.items() <= row.items() for row in known)], cfg, file)
    results = read_lines(file)
    if not results:
        raise ValueError(f"{file} holds no result yet")
    parts = sections(results)
    (out / "table.md").write_text(INTRODUCTION + "\n".join(f"## {heading}\n\n{table(rows)}" for heading, rows in parts.items()))
    if rows := collapse_rows(results):
        save_norms(rows, out / "gradient_norm.png")
    print(f"{out / 'table.md'}: {len(results)} runs")


if __name__ == "__main__":
    run_script(main)
