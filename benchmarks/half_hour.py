"""The half-hour run: train a teacher and its student from scratch, then measure the student, once for each seed, on one GPU each.

    python -m benchmarks.half_hour                                    the defaults, seeds 0 and 1
    python -m benchmarks.half_hour --name small --seeds 0 --teacher-flags="--model DiT-Ti/2 --steps 45000" --student-flags="--steps 16000"
    python -m benchmarks.half_hour --name uniform --seeds 0 --teacher TEACHER --student-flags="--t-law uniform"     with a given teacher

Repeat the command to continue: finished runs are left alone, stopped ones go on. Each seed's row of --out (JSON lines) has the
commands, the time from their start to their end, the largest rise of a gradient norm, and what evaluate.py measured.
"""

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import evaluate
from benchmarks.ablations.patches import PATCHES, check
from benchmarks.ablations.run import add_flags, parse_flags, script_line, spike, under
from benchmarks.gpus import finish, on_each, start
from models import Classifier
from utils import distributed
from utils.config import parse_config, require, write_json
from utils.data import load_data, load_held_out, load_images
from utils.errors import run_script
from utils.evaluation import check_counts, classifier_file, quick_judge
from utils.json_lines import add_line, read_lines
from utils.latents import originals


@dataclass(frozen=True)
class Config:
    name: str = "defaults"                      # name of this choice of flags, with which the names of its runs begin
    seeds: tuple[int, ...] = (0, 1)             # seeds, one GPU each, as many at once as there are GPUs
    data: str = "cifar10"                       # data set, as for the training scripts
    data_root: str = "data"                     # folder of mnist and cifar10
    teacher: str | None = None                  # teacher of all students; None: each seed trains its own first
    teacher_flags: str = ""                     # more flags for the teacher's run, as in --teacher-flags="--model DiT-Ti/2"
    student_flags: str = ""                     # more flags for the student's run
    evaluate_flags: str = "--num-steps 1 2 4"   # flags for evaluate.py
    teacher_patch: str | None = None            # patch of the teacher's run, from benchmarks.ablations.patches
    student_patch: str | None = None            # patch of the student's run
    network_patch: str | None = None            # patch of both and of the evaluation, as one that changes the network's shape
    results_dir: str = "results/half-hour"      # folder for the runs and evaluations
    out: str = "results/half-hour/rows.jsonl"   # file that gets a row for each seed when it is done

    def __post_init__(self) -> None:
        require(self, "seeds", 0 < len(self.seeds) == len(set(self.seeds)), "one or more, each once")
        require(self, "name", self.name != "" and not set(self.name) & set("/\\"), "a part of a folder's name, without slashes")
        for field in ("teacher_patch", "student_patch", "network_patch"):
            require(self, field, getattr(self, field) in (None, *PATCHES), f"among {', '.join(PATCHES)}")
        require(self, "teacher", self.teacher is None or not (self.teacher_flags or self.teacher_patch),
                "left out, or the teacher's flags and patch are")
        require(self, "network_patch", not (self.network_patch and (self.teacher_patch or self.student_patch)),
                "left out, or the patches of a stage are")


def stages(cfg: Config) -> list[str]:
    return ["teacher", "student"] if cfg.teacher is None else ["student"]


def run_command(stage: str, seed: int, cfg: Config) -> tuple[Path, list[str]]:
    """Run folder, and what stands after "python", of "teacher" or "student"."""
    patch, flags = (cfg.teacher_patch, cfg.teacher_flags) if stage == "teacher" else (cfg.student_patch, cfg.student_flags)
    patch = patch or cfg.network_patch
    folder = Path(cfg.results_dir, f"{cfg.name}-{stage}-seed{seed}")
    teacher = None if stage == "teacher" else cfg.teacher or str(run_command("teacher", seed, cfg)[0])
    return folder, add_flags(script_line(stage, seed, folder.name, patch, teacher, cfg), flags, f"--{stage}-flags")


def evaluate_command(seed: int, cfg: Config) -> tuple[Path, list[str]]:
    """Likewise, of evaluate.py: the folder that it writes to."""
    student = run_command("student", seed, cfg)[0]
    out = student.with_name(f"{student.name}-evaluation")
    line = [*under(cfg.network_patch), "evaluate.py", str(student), "--data-root", cfg.data_root, "--out", str(out),
            "--cache", str(Path(cfg.results_dir, "features"))]
    return out, add_flags(line, cfg.evaluate_flags, "--evaluate-flags")


def flags_of(line: list[str]) -> list[str]:
    """The flags of a script, under a patch or not; a patch that cannot go with them, or needs others, raises ValueError."""
    if line[0] != "-m":
        return line[1:]
    patch, flags = line[2], line[4:]
    check(patch, flags)
    return flags


def check_flags(cfg: Config) -> tuple[Any, evaluate.Config]:
    """Parse what all stages will be given, so that bad flags are told now and not after a training.

    Returns:
        The student's settings, and evaluate.py's.

    Raises:
        SystemExit: bad flags.
        ValueError: flags that are set here, or that a stage's patch cannot go with, or needs; no classifier for the evaluation.
    """
    *_, student = [parse_flags(stage, cfg.data, flags_of(run_command(stage, cfg.seeds[0], cfg)[1])) for stage in stages(cfg)]
    measured = parse_config(evaluate.Config, flags_of(evaluate_command(cfg.seeds[0], cfg)[1]), None)
    file = classifier_file(measured.classifier, originals(measured.data or cfg.data))
    if measured.features == "classifier" and not file.is_file():
        raise ValueError(f"no classifier {file}: make one with train_classifier.py, and name it with --classifier in --evaluate-flags")
    return student, measured


def check_images(cfg: Config, student: Any, measured: evaluate.Config) -> None:
    """Read the images and their judge as the evaluation will, for what it would refuse; and the judge of the student's quick evaluations.

    Raises:
        FileNotFoundError, ValueError: no judge, or one of other images; held-out images of other classes, or too few images to compare.
        ModuleNotFoundError: torch-fidelity, which compares them, is not installed.
    """
    data, ranks = originals(measured.data or cfg.data), distributed.start("cpu")
    images = load_data(cfg.data, cfg.data_root, student.image_size, student.num_workers)
    if student.eval_every:
        quick_judge(student.classifier, Classifier, images, ranks)
    if data != cfg.data:                                    # what latents were made from, or other images
        images = load_images(data, cfg.data_root, images.image_size, measured.num_workers, 3 if images.autoencoder else images.shape[0])
    judge = evaluate.judge_of(measured, images, ranks)
    images, held_out = load_held_out(images, measured.held_out, cfg.data_root, measured.num_workers)
    check_counts(judge, measured.num_images, images.pixels, held_out.pixels)


def train(stage: str, seed: int, cfg: Config, gpu: str | None) -> dict[str, Any]:
    """Train one stage to its end, and tell what it took."""
    folder, line = run_command(stage, seed, cfg)
    times = folder.with_name(f"{folder.name}.seconds.json") # of all starts of the run by this command
    seconds = json.loads(times.read_text()) if times.is_file() else 0.0
    began = time.monotonic()
    try:
        finish(folder, line, gpu)
    finally:
        seconds += time.monotonic() - began
        times.parent.mkdir(parents=True, exist_ok=True)
        write_json(times, seconds)
    rows = read_lines(folder / "metrics.jsonl")
    environment = json.loads((folder / "environment.json").read_text())[-1]
    return {"command": shlex.join(["python", *line]), "steps": rows[-1]["step"], "seconds": round(seconds, 1),
            "seconds_of_updates": round(rows[-1]["seconds"], 1), "spike": round(spike([row["grad_norm"] for row in rows]), 2),
            "device": environment["device"], "torch": environment["torch"]}


def one_seed(seed: int, cfg: Config, gpu: str | None) -> dict[str, Any]:
    """All of a seed. Returns its row."""
    row: dict[str, Any] = {"name": cfg.name, "seed": seed}
    for stage in stages(cfg):
        row[stage] = train(stage, seed, cfg, gpu)
    out, line = evaluate_command(seed, cfg)
    start(line, gpu)
    row["evaluation"] = {key: value for key, value in json.loads((out / "metrics.json").read_text()).items() if key != "config"}
    print((out / "table.md").read_text(), flush=True)
    return row


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__)
    student, measured = check_flags(cfg)
    done = {row["seed"]: row for row in read_lines(Path(cfg.out)) if row["name"] == cfg.name}
    for seed in set(cfg.seeds) & done.keys():
        for stage in stages(cfg):
            asked, was = shlex.join(["python", *run_command(stage, seed, cfg)[1]]), done[seed].get(stage, {}).get("command")
            if asked != was:
                raise ValueError(f"--name {cfg.name}: {cfg.out} holds a row of seed {seed} by another command; choose another --name.\n"
                                 f"asked: {asked}\nwas: {was}")
    jobs = [partial(one_seed, seed, cfg) for seed in cfg.seeds if seed not in done]
    if jobs:
        check_images(cfg, student, measured)
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    on_each(jobs, partial(add_line, Path(cfg.out)))


if __name__ == "__main__":
    run_script(main)
