"""Where the time of a training step goes: a training script, as it is, under torch.profiler for some of its updates.

    python -m benchmarks.profile_step --stage teacher --out results/profile-teacher

Writes summary.md (kernels by kind, then the longest ones) and trace.json.gz, to open in a browser at ui.perfetto.dev.
"""

import re
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

import train_student
import train_teacher
from benchmarks.throughput import write_images
from utils.config import parse_config, require
from utils.errors import run_script
from utils.run_log import Run

# The first pattern that is found in a kernel's name says what kind it is.
KINDS = [
    ("attention", r"sdpa|flash|fmha|attention|dot_do_o|convert_dq"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|addmm|splitKreduce|aten::mm|aten::bmm"),
    ("optimizer and EMA", r"multi_tensor|foreach|Adam"),
    ("compiled pointwise and reductions", r"triton"),
    ("copies", r"[Mm]emcpy|[Mm]emset|direct_copy"),
]


@dataclass(frozen=True)
class Config:
    stage: Literal["teacher", "student"] = "teacher"
    model: str = "DiT-S/2"                      # preset
    batch_size: int = 512                       # images an update
    image_size: int = 32                        # side of the random images
    skip: int = 15                              # updates before
    steps: int = 3                              # updates that are recorded
    device: str = "auto"                        # auto, cuda, cpu
    out: str = "results/profile"                # folder to write to

    def __post_init__(self) -> None:
        for field in ("batch_size", "image_size", "skip", "steps"):
            require(self, field, getattr(self, field) >= 1, "at least 1")


def kind(name: str) -> str:
    """What sort of kernel this is."""
    return next((label for label, pattern in KINDS if re.search(pattern, name)), "other")


def summary(times: dict[str, float], steps: int) -> str:
    """Markdown from kernel name to microseconds over all recorded steps."""
    total, by_kind = sum(times.values()), defaultdict(float)
    for name, time in times.items():
        by_kind[kind(name)] += time
    lines = ["| kind | ms an update | share |", "|---|---|---|"]
    kinds = sorted(by_kind.items(), key=lambda x: -x[1])
    lines += [f"| {label} | {time / steps / 1e3:.2f} | {time / total:.1%} |" for label, time in kinds]
    lines += [f"| all | {total / steps / 1e3:.2f} | |", "", "| kernel | ms an update |", "|---|---|"]
    longest = sorted(times.items(), key=lambda x: -x[1])[:25]
    return "\n".join([*lines, *(f"| `{name[:100]}` | {time / steps / 1e3:.3f} |" for name, time in longest)]) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__)
    on_gpu = torch.cuda.is_available() and cfg.device != "cpu"
    recorder = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
    advance, count = Run.advance, 0

    def counting(run: Run) -> None:                         # the loop calls this once after each update
        nonlocal count
        count += 1
        if run.config.name == "profiled" and count in (cfg.skip, cfg.skip + cfg.steps):
            if on_gpu:
                torch.cuda.synchronize()
            recorder.start() if count == cfg.skip else recorder.stop()
        advance(run)

    with tempfile.TemporaryDirectory() as temporary:
        write_images(Path(temporary, "images"), cfg.image_size)
        common = ["--data", f"{temporary}/images", "--image-size", str(cfg.image_size), "--results-dir", temporary, "--comet", "off",
                  "--global-batch-size", str(cfg.batch_size), "--device", cfg.device, "--num-workers", "8"]
        steps = str(cfg.skip + cfg.steps)
        teacher = [*common, "--model", cfg.model, "--sample-steps", "1", "--guidance-scale", "1"]
        if cfg.stage == "student":                          # it needs some teacher
            train_teacher.main([*teacher, "--name", "teacher", "--steps", "1", "--compile", "False"])
        Run.advance, count = counting, 0
        try:
            if cfg.stage == "teacher":
                train_teacher.main([*teacher, "--name", "profiled", "--steps", steps])
            else:
                student = [*common, "--teacher", f"{temporary}/teacher", "--num-steps", "1"]
                train_student.main([*student, "--name", "profiled", "--steps", steps])
        finally:
            Run.advance = advance
    times: dict[str, float] = {}
    for event in recorder.key_averages():
        times[event.key] = times.get(event.key, 0.0) + own_time(event, on_gpu)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    recorder.export_chrome_trace(str(out / "trace.json.gz"))
    text = summary({name: time for name, time in times.items() if time > 0}, cfg.steps)
    (out / "summary.md").write_text(text)
    print(text)


def own_time(event: Any, on_gpu: bool) -> float:
    """Microseconds in the kernel itself, on a GPU; on a CPU in the operation itself."""
    if not on_gpu:
        return event.self_cpu_time_total
    is_kernel = event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation     # not a range around kernels
    return event.self_device_time_total if is_kernel else 0.0


if __name__ == "__main__":
    run_script(main)
