"""What each choice is worth: one change at a time, all runs given the same time on the same device, two seeds.

    python -m benchmarks.ablations.run --teacher results/teacher-cifar10                          every variant, 90 s each
    python -m benchmarks.ablations.run --only student midpoint-uniform target-ema --seconds 120 --seeds 0 1 2
    python -m benchmarks.ablations.run --table-only True                          table.md from results.jsonl

A run is the training script's own command line, or that of patches.py around it. A short one tells how fast the variant is, or
one of the same cost; then it gets as many updates as fit into --seconds, its schedules included. Its last quick evaluation
(5,000 images) is the result, one line of results.jsonl; what is there already is not run again, so the same command goes on.
A variant that is the default of --data is left to the row of the defaults.
Also writes table.md, a section for each time, data set, device, teacher and further flags, and gradient_norm.png of the
students of the first section.
"""

import importlib
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ablations.variants import VARIANTS, Variant
from utils import recipes
from utils.config import parse_config, require
from utils.pictures import log_scale, pyplot, read_lines

HERE = Path(__file__).parent
INTRODUCTION = """FD and class accuracy of 5,000 images, always from the same noise; ± half the range of the seeds.
"The defaults" are those of the data set with the section's flags. Spike: the greatest logged gradient norm over the median of
the (up to) 20 logged before it.

"""


@dataclass(frozen=True)
class Config:
    only: tuple[str, ...] = ()                  # names of variants; empty: all
    seeds: tuple[int, ...] = (0, 1)             # one run each
    seconds: float = 90.0                       # of training, without start-up, sampling and evaluation
    probe_steps: int = 100                      # updates of the run that tells the speed, the first half of them to warm up
    teacher: str | None = None                  # of the students
    data: str = "cifar10"                       # as for the training scripts
    data_root: str = "data"                     # likewise
    flags: str = ""                             # further flags for every run, as in --flags="--model DiT-B/4"
    results_dir: str = "results/ablations"      # run folders
    out: str = str(HERE)                        # folder of results.jsonl and table.md
    table_only: bool = False                    # only write the table

    def __post_init__(self) -> None:
        known = {variant.name for variant in VARIANTS}
        require(self, "only", set(self.only) <= known, f"among {', '.join(sorted(known))}")
        require(self, "seconds", self.seconds > 0, "above 0")
        require(self, "probe_steps", self.probe_steps >= 4 and self.probe_steps % 2 == 0, "even and at least 4")
        require(self, "seeds", len(self.seeds) > 0, "one or more")


def script(stage: str, data: str) -> str:
    return f"train_{stage}{'_mnist' if data in ('mnist', 'digits') else ''}"


def is_default(variant: Variant, cfg: Config) -> bool:
    """Whether its flags say what the runs' own flags and the recipe of the data set say anyway."""
    config_class = importlib.import_module(script(variant.stage, cfg.data)).Config
    common = ["--data", cfg.data, *shlex.split(cfg.flags)]
    plain, changed = (parse_config(config_class, [*common, *flags], None, getattr(recipes, variant.stage.upper()))
                      for flags in ([], variant.flags))
    return variant.flags != [] and variant.patch is None and plain == changed


def command(variant: Variant, seed: int, steps: int, cfg: Config, name: str, log_every: int, extra: Sequence[str]) -> list[str]:
    teacher = ["--teacher", cfg.teacher] if variant.stage == "student" and cfg.teacher else []
    patched = ["-m", "benchmarks.ablations.patches", variant.patch] if variant.patch else []
    return [*patched, f"{script(variant.stage, cfg.data)}.py", "--data", cfg.data, "--data-root", cfg.data_root, "--seed", str(seed),
            "--steps", str(steps), "--name", name, "--results-dir", cfg.results_dir, "--log-every", str(log_every),
            "--sample-every", str(steps), "--save-every", str(steps), "--comet", "off", *teacher, *extra, *shlex.split(cfg.flags),
            *variant.flags]



def start(line: list[str]) -> None:
    """Run a training script.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    done = subprocess.run([sys.executable, *line], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(line)} ended with {done.returncode}:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")


def spike(norms: Sequence[float], window: int = 20) -> float:
    """The greatest gradient norm over the median of the `window` logged before it. norms: in order."""
    return max((norm / statistics.median(norms[max(0, i - window) : i]) for i, norm in enumerate(norms) if i >= 3), default=1.0)


def settings(cfg: Config) -> dict[str, Any]:
    """What all runs that are compared share, besides their device."""
    return {"seconds": cfg.seconds, "data": cfg.data, "flags": cfg.flags, "teacher": cfg.teacher}


def measure(variant: Variant, seed: int, cfg: Config) -> dict[str, Any]:
    """Train and evaluate one variant. A run that ends in NaN is a result too."""
    folder, half = Path(cfg.results_dir), cfg.probe_steps // 2
    probe = f"probe-{variant.cost}"
    if not (folder / probe / "metrics.jsonl").is_file():
        start(command(next(v for v in VARIANTS if v.name == variant.cost), 0, cfg.probe_steps, cfg, probe, half, []))
    config, environment = (json.loads((folder / probe / f"{file}.json").read_text()) for file in ("config", "environment"))
    speed = read_lines(folder / probe / "metrics.jsonl")[-1]["images_per_second"]
    steps = max(1, round(cfg.seconds * speed / config["global_batch_size"]))
    name = f"{variant.name}-{cfg.seconds:g}s-seed{seed}"
    line = command(variant, seed, steps, cfg, name, max(1, steps // 100), ["--eval-every", str(steps)])
    result = {"variant": variant.name, "seed": seed, "steps": steps, **settings(cfg), "device": environment[-1]["device"],
              "images_per_second": speed, "command": shlex.join(["python", *line])}
    try:
        start(line)
    except RuntimeError as error:
        if "NonFiniteError" not in str(error):
            raise
        return {**result, "failed": "not finite"}
    rows, evaluations = read_lines(folder / name / "metrics.jsonl"), read_lines(folder / name / "evaluations.jsonl")
    norms = [row["grad_norm"] for row in rows]
    return {**result, "spike": spike(norms), "norms": [[row["step"], round(row["grad_norm"], 5)] for row in rows],
            **{key: value for key, value in evaluations[-1].items() if key != "step"}}


def sections(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Headings, and the runs that may be compared under each, in the order in which they were begun."""
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


def save_norms(results: list[dict[str, Any]], path: Path) -> None:
    """Gradient norms of the first seed of each student variant, where a collapse shows."""
    stages = {variant.name: variant.stage for variant in VARIANTS}
    curves = {row["variant"]: row["norms"] for row in reversed(results) if "norms" in row and stages[row["variant"]] == "student"}
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    for i, (name, norms) in enumerate(sorted(curves.items())):
        axis.plot(*zip(*norms), label=name, linewidth=1, linestyle=["-", "--", ":", "-."][i // 10 % 4])
    axis.set(xlabel="update", ylabel="gradient norm")
    log_scale(axis)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right", fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.jsonl"
    if not cfg.table_only:
        for seed in cfg.seeds:                              # all variants once before any a second time
            for variant in VARIANTS:
                this = {"variant": variant.name, "seed": seed, **settings(cfg)}
                known = any(this.items() <= row.items() for row in read_lines(file))
                if (cfg.only and variant.name not in cfg.only) or known or is_default(variant, cfg):
                    continue
                result = measure(variant, seed, cfg)
                with open(file, "a") as lines:
                    lines.write(json.dumps(result) + "\n")
                print({key: value for key, value in result.items() if key not in ("command", "norms")}, flush=True)
    results = read_lines(file)
    if not results:
        raise ValueError(f"{file} holds no result yet")
    parts = sections(results)
    (out / "table.md").write_text(INTRODUCTION + "\n".join(f"## {heading}\n\n{table(rows)}" for heading, rows in parts.items()))
    save_norms(next(iter(parts.values())), out / "gradient_norm.png")
    print(f"{out / 'table.md'}: {len(results)} runs")


if __name__ == "__main__":
    main()
