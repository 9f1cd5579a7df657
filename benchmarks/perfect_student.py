"""What a student would score if it learnt perfectly: its teacher's flow, solved as `splitting_bias` says, by leg, its share and guidance.

    python -m benchmarks.perfect_student results/teacher-cifar10 --share 0.1 0.3 0.5 --guidance-scale 1.5 2 --guidance-interval 0.2 0.8

The real student's distance from this is what training longer can gain; what remains is for the teacher, its guidance and the leg's share
to gain. Frechet distance and class accuracy as in a training run's quick evaluation: few samples, always from the same noise.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import tyro

from benchmarks.splitting_bias import solve
from models import Classifier, build_network
from utils import distributed
from utils.checkpoints import load_network
from utils.config import check_interval, parse_config, require
from utils.data import check_guidance, load_images
from utils.evaluation import QuickEvaluation
from utils.guidance import guided_velocity
from utils.losses import Leg


@dataclass(frozen=True)
class Config:
    teacher: Annotated[str, tyro.conf.Positional]           # file, checkpoint or run folder
    first_leg: Leg = "midpoint"                 # as for train_student.py: one of the two is the teacher's
    last_leg: Leg = "self"
    share: tuple[float, ...] = (0.3,)           # of the interval that this leg takes
    guidance_scale: tuple[float, ...] = (2.0,)  # of the teacher's velocity
    guidance_interval: tuple[float, float] = (0.0, 1.0)     # times at which it is guided
    least: float = 0.02                         # below this length one step takes all that remains
    num_images: int = 5_000                     # samples of each row
    data_root: str = "data"                     # where mnist and cifar10 are
    classifier: str | None = None               # file of train_classifier.py; None: the released one of the data set
    results_dir: str = "results"                # keeps the training split's features
    device: str = "auto"                        # auto, cuda, cpu

    def __post_init__(self) -> None:
        for field in ("share", "guidance_scale"):
            require(self, field, len(getattr(self, field)) > 0, "one or more values")
        require(self, "share", all(0 < share <= 1 for share in self.share), "in (0, 1]")
        require(self, "least", 0 < self.least < 1, "in (0, 1)")
        require(self, "last_leg", (self.first_leg == "self") != (self.last_leg == "self"), "self if --first-leg is not, and only then")
        check_interval(self, "guidance_interval")


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__)
    ranks = distributed.start(cfg.device)
    teacher, metadata = load_network(cfg.teacher, build_network, ranks.device)
    if metadata["kind"] != "teacher":
        raise ValueError(f"{cfg.teacher} is a {metadata['kind']}; a teacher's flow is solved here")
    images = load_images(metadata["config"]["data"], cfg.data_root, metadata["architecture"]["image_size"])
    check_guidance(images, cfg.guidance_scale)
    evaluate = QuickEvaluation(cfg.classifier, Classifier, images, ranks, cfg.results_dir, cfg.num_images)
    if ranks.device.type == "cuda":
        teacher.compile_blocks()
    print(f"n = {cfg.num_images}, guidance at times {cfg.guidance_interval[0]:g} to {cfg.guidance_interval[1]:g}\n\n"
          "| guidance | first leg | last leg | share | FD | class accuracy |\n|---|---|---|---|---|---|")
    for w, share in itertools.product(cfg.guidance_scale, cfg.share):
        v = guided_velocity(teacher.velocity, teacher.null_class, w, cfg.guidance_interval)
        with torch.no_grad():
            found = evaluate({"row": partial(solve, v, share=share, first_leg=cfg.first_leg, last_leg=cfg.last_leg, least=cfg.least)})
        accuracy = found.get("accuracy_row", float("nan"))
        print(f"| {w:g} | {cfg.first_leg} | {cfg.last_leg} | {share:g} | {found['fd_row']:.3f} | {accuracy:.3f} |", flush=True)


if __name__ == "__main__":
    main()
