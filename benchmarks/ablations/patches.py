"""Variants that the training scripts have no flag for: each changes one thing in the process that runs a script as it is.

    python -m benchmarks.ablations.patches gelu train_teacher.py --name gelu --steps 1000

What wins here moves into the scripts; what loses leaves no trace in them. The weights of a changed network load only into a
process with the same change. Run folder, weights and evaluation name the patch as a setting of theirs, so that a run goes on with it only.
"""

import importlib
import sys
from collections.abc import Callable, Sequence

from torch.nn import functional as F
from torch.nn.attention import SDPBackend

import evaluate
from benchmarks.ablations import network_patches, noise_patches, speed_patches, student_patches
from benchmarks.ablations.changes import STUDENTS, TEACHERS, change
from models import dit
from utils import run_log
from utils.config import to_dict
from utils.errors import run_script

PATCHES: dict[str, Callable[[], None]] = {
    "silu": lambda: network_patches.activation(F.silu),
    "gelu": lambda: network_patches.activation(lambda x: F.gelu(x, approximate="tanh")),
    "dropout-0.1": lambda: network_patches.dropout(0.1),
    "compile-whole": lambda: change([dit.DiT], "compile_blocks", lambda self: self.compile(dynamic=False)),
    "shift": network_patches.shift,
    "heads-of-128": lambda: network_patches.head_size(128),
    "depth-0.5": lambda: network_patches.depth(0.5),
    "depth-1.5": lambda: network_patches.depth(1.5),
    "parallel": lambda: change([dit], "Block", network_patches.ParallelBlock),
    "long-skips": network_patches.long_skips,
    "noise-nearest": lambda: noise_patches.choose(noise_patches.nearest_noise),
    "noise-direction": lambda: noise_patches.choose(noise_patches.noise_towards),
    "noise-trade": lambda: noise_patches.noise_trade(64),
    "noise-trade-16": lambda: noise_patches.noise_trade(16),
    "ema-short": lambda: network_patches.ema_ramp(24),
    "ema-long": lambda: network_patches.ema_ramp(4),
    "mixed-leg": student_patches.mixed_leg,
    "two-steps": lambda: student_patches.several_steps(2),
    "two-hops": lambda: student_patches.several_steps(2, 0.7),
    "three-hops": lambda: student_patches.several_steps(3, 0.7),
    "own-leg-in-two": lambda: student_patches.own_leg_in_steps(2),
    "pin-data-end": student_patches.pin_data_end,
    "pin-chain": lambda: student_patches.pin_chain(0.3),
    "whole-below-0.1": lambda: student_patches.whole_below(0.1),
    "more-to-data": lambda: student_patches.more_to_data(0.25),
    "soft-guidance": lambda: student_patches.soft_guidance(0.2),
    "mean-guidance": student_patches.mean_guidance,
    "wider-modulation": lambda: student_patches.wider_modulation(4),
    "shared-states": student_patches.shared_states,
    "teacher-features-0.3": lambda: student_patches.teacher_features(0.3),
    "teacher-features-1": lambda: student_patches.teacher_features(1),
    "whole-features-1": lambda: student_patches.whole_features(1),
    "warm-start": lambda: student_patches.warm_start(100),
    "guidance-at-once": speed_patches.guidance_at_once,
    "ema-every-8": lambda: speed_patches.ema_every(8),
    "muon-every-4": lambda: speed_patches.muon_every(4),
    "drawn-once": speed_patches.drawn_once,
    "attention-cudnn": lambda: speed_patches.attention_by(SDPBackend.CUDNN_ATTENTION),
    "attention-flash": lambda: speed_patches.attention_by(SDPBackend.FLASH_ATTENTION),
    "attention-plain": lambda: speed_patches.attention_by(SDPBackend.MATH),
}


# These change what guidance is, or how a loss handles labels.
OF_ONE_SCALE = {"guidance-at-once", "soft-guidance", "mean-guidance", "shared-states", "teacher-features-0.3", "teacher-features-1"}
# And this one is for what two flags make.
NEED = {"whole-features-1": ["--guidance-range", "--one-step-from"]}


def check(name: str, flags: Sequence[str]) -> None:
    """Whether a script under a patch can be given these flags.

    Raises:
        ValueError: unknown patch, or flags that it cannot go with, or needs.
    """
    if name not in PATCHES:
        raise ValueError(f"unknown patch {name!r}; known are {', '.join(PATCHES)}")
    if name in OF_ONE_SCALE and "--guidance-range" in flags:
        raise ValueError(f"--guidance-range: the patch {name} knows students of one guidance scale only; leave it out")
    if missing := [flag for flag in NEED.get(name, ()) if flag not in flags]:
        raise ValueError(f"the patch {name} needs {' and '.join(missing)}")


def main(argv: Sequence[str] | None = None) -> None:
    name, script, *flags = sys.argv[1:] if argv is None else argv
    check(name, flags)
    PATCHES[name]()
    change([*TEACHERS, *STUDENTS, run_log, evaluate], "to_dict", lambda config: {**to_dict(config), "patch": name})
    importlib.import_module(script.removesuffix(".py").replace("/", ".")).main(flags)


if __name__ == "__main__":
    run_script(main)
