"""What a student would score if it learnt perfectly: its teacher's flow, solved as `splitting_bias` says, by leg, its share and guidance.

    python -m benchmarks.perfect_student results/teacher-cifar10 --share 0.1 0.3 0.5 --guidance-scale 1.5 2 --guidance-interval 0.2 0.8

The real student's distance from this is what training longer can gain; what remains is for the teacher, its guidance and the leg's share
to gain. Measured as evaluate.py measures, by its flags (but --num-steps, --method and --teacher), into results/perfect-student-<teacher>.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import evaluate
from benchmarks.splitting_bias import solve, unrolled_times
from models import DiT, SiT
from utils.config import require
from utils.errors import run_script
from utils.evaluation import Sample
from utils.guidance import guided_velocity
from utils.losses import Leg


@dataclass(frozen=True)
class Config(evaluate.Config):
    guidance_scale: tuple[float, ...] = (2.0,)  # of the teacher's velocity, a row each
    first_leg: Leg = "midpoint"                 # as for train_student.py: one of the two is the teacher's
    last_leg: Leg = "self"
    share: tuple[float, ...] = (0.2,)           # of the interval that this leg takes, a row each
    least: float = 0.02                         # below this length one step takes all that remains

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("share", "guidance_scale"):
            require(self, field, len(getattr(self, field)) > 0, "one or more values")
        require(self, "share", all(0 < share <= 1 for share in self.share), "in (0, 1]")
        require(self, "least", 0 < self.least < 1, "in (0, 1)")
        require(self, "last_leg", (self.first_leg == "self") != (self.last_leg == "self"), "self if --first-leg is not, and only then")
        require(self, "num_steps", not self.num_steps, "left out: --share decides how many there are")
        require(self, "method", self.method == "euler", "left out: the leg is the solver")


def rows_of(network: DiT | SiT, student: bool, cfg: Config) -> list[tuple[str, int, float, Sample]]:
    """As `evaluate.rows_of`, a row for each guidance and share. A midpoint step takes 2 evaluations, guided ones twice as many."""
    if student:
        raise ValueError(f"{cfg.checkpoint} is a student; a teacher's flow is solved here")
    last, (low, high) = cfg.last_leg != "self", cfg.guidance_interval
    leg = cfg.last_leg if last else cfg.first_leg
    rows = []
    for w in cfg.guidance_scale:
        v = guided_velocity(network.velocity, network.null_class, w, cfg.guidance_interval)
        for share in cfg.share:
            num_steps = len(unrolled_times(share, last, cfg.least)) - 1
            rows.append((f"{'last' if last else 'first'} leg {leg}, share {share:g}, guidance {w:g} at {low:g} to {high:g}",
                         num_steps * {"euler": 1, "midpoint": 2}[leg] * (1 if w == 1 else 2), w,
                         partial(solve, v, share=share, first_leg=cfg.first_leg, last_leg=cfg.last_leg, least=cfg.least)))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    evaluate.main(argv, Config, rows_of, __doc__, "perfect-student")


if __name__ == "__main__":
    run_script(main)
