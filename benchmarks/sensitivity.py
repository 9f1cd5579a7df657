"""Which metric sees which fault: real held-out images, damaged on purpose, evaluated as samples are.

    python -m benchmarks.sensitivity --data mnist

Writes table.md into --out: each row a damage, each number as evaluate.py computes it, with its multiple of the undamaged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from models import Classifier
from utils import distributed, metrics, report
from utils.config import parse_config
from utils.data import load_held_out, load_images
from utils.errors import run_script
from utils.evaluation import classifier_judge, compare, reference_features, shuffled


@dataclass(frozen=True)
class Config:
    data: str = "mnist"                         # mnist, cifar10, digits, or the path of class folders
    held_out: str | None = None                 # path of held-out images, if --data is a path
    data_root: str = "data"                     # where mnist and cifar10 are
    image_size: int | None = None               # side in pixels; None: the data set's own, 32 for a path
    classifier: str | None = None               # None: checkpoints/classifier-<data>.safetensors
    copies: int = 100                           # images that are repeated, or taken from the training split
    device: str = "auto"                        # auto, cuda, cpu
    out: str = "results/sensitivity"            # folder to write to
    cache: str = "results/features"             # folder that keeps the training split's features


def damages(pixels: Tensor, labels: Tensor, training: tuple[Tensor, Tensor], copies: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Name to pixels (N, C, H, H) and labels (N,): the undamaged held-out images first."""
    draw = torch.Generator().manual_seed(0)
    noise = 25 * torch.randn(pixels.shape, generator=draw)
    kept = torch.where(labels != 0)[0]
    repeated = torch.arange(len(pixels)) % copies
    return {
        "real held-out images": (pixels, labels),
        "blurred, sigma 1 pixel": (gaussian_blur(pixels, 5, 1.0), labels),
        "noise of 10 % of the range": ((pixels + noise).round().clamp(0, 255).to(torch.uint8), labels),
        "the first class dropped": (pixels[kept], labels[kept]),
        f"only {copies} images, repeated": (pixels[repeated], labels[repeated]),
        f"{copies} of them training images": tuple(torch.cat([theirs[:copies], ours[copies:]])
                                                   for theirs, ours in zip(training, (pixels, labels))),
    }


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__)
    ranks = distributed.start(cfg.device)
    images, held_out = load_held_out(load_images(cfg.data, cfg.data_root, cfg.image_size), cfg.held_out, cfg.data_root)
    judge = classifier_judge(cfg.classifier, Classifier, images, ranks)
    training = shuffled(images)
    reference = reference_features(judge, training[0], Path(cfg.cache))
    rows, near = [], None
    for name, (pixels, labels) in damages(*shuffled(held_out), training, cfg.copies).items():
        seen = judge(pixels)
        distances = metrics.nearest(seen.features[:2000], reference.features)[0][:, 0]
        near = distances if near is None else near
        numbers = compare(judge, seen, labels, reference)
        numbers["neighbour_ratio"], numbers["near_copies"] = metrics.memorisation(distances, near)
        rows.append({"name": name, "evaluations": "", **{key: {"mean": value, "std": None} for key, value in numbers.items()}})
    floor = {key: value["mean"] for key, value in rows[0].items() if isinstance(value, dict)}
    text = report.table(rows, floor, {"features": judge.name, "images": len(held_out)}, floor_row=False)
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    (Path(cfg.out) / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    run_script(main)
