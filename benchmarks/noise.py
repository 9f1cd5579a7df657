"""Which noise images get, by how it is chosen among several: what the chosen noise is, together and within a class.

    python -m benchmarks.noise --data digits

Samples start from plain noise, so what is chosen should be plain too, and for a network that is told a class also within that class. One
row for each choice, all in standard deviations of plain noise: its size (root mean square); how far it leans towards the mean image
(1 unit along a unit vector), and that of a class towards what this class has more of than others (mean over classes); and how far
towards its own image, seen from its class's mean. The last makes paths straight; size 1 and no lean are right. On the CPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.ablations.noise_patches import by_direction
from utils.config import parse_config, require
from utils.data import load_images, to_range
from utils.flow import nearest_noise


@dataclass(frozen=True)
class Config:
    data: str = "mnist"         # data set: mnist, cifar10, digits, or the path to images
    data_root: str = "data"     # folder of mnist and cifar10
    image_size: int | None = None   # side of images of your own
    candidates: int = 4         # noises that an image chooses from
    num_images: int = 12_000    # images, or all if there are fewer
    batch_size: int = 256       # images whose means some choices look at
    seed: int = 0               # seed of images and noise

    def __post_init__(self) -> None:
        require(self, "candidates", self.candidates >= 1, "at least 1")
        require(self, "num_images", self.num_images >= self.batch_size, "at least --batch-size")
        require(self, "batch_size", self.batch_size >= 2, "at least 2")


Choice = Callable[[Tensor, Tensor, list[Tensor]], Tensor]       # from images, labels and noises to the chosen noise

CHOICES: dict[str, Choice] = {
    "any": lambda x, y, noises: noises[0],
    "nearest": lambda x, y, noises: nearest_noise(x, noises),
    "by direction": lambda x, y, noises: by_direction(x, noises),
    "by direction from its class's mean": lambda x, y, noises: by_direction(x, noises, y),
}


def along(eps: Tensor, direction: Tensor) -> Tensor:
    """Components of noise along directions, both (B, ...): (B,)."""
    direction = direction.flatten(1)
    return (eps.flatten(1) * direction).sum(1) / direction.norm(dim=1).clamp(min=1e-12)


def measure(x: Tensor, y: Tensor, choose: Choice, candidates: int, batch_size: int, seed: int) -> list[float]:
    """Size, lean towards the mean image, lean towards the own class, pull towards the own image, of images x (N, ...) with labels y (N,).

    An incomplete last batch is left out.
    """
    draw = torch.Generator().manual_seed(seed)
    mean = x.mean(0)
    classes, own = y.unique(return_inverse=True)
    of_class = torch.stack([x[y == label].mean(0) for label in classes])
    sums, counts = torch.zeros(3 + len(classes), dtype=torch.float64), torch.zeros(len(classes), dtype=torch.float64)
    for rows in torch.arange(len(x) // batch_size * batch_size).split(batch_size):
        centre = of_class[own[rows]]
        eps = choose(x[rows], y[rows], [torch.randn(x[rows].shape, generator=draw) for _ in range(candidates)])
        sums[:3] += torch.stack([eps.square().flatten(1).mean(1).sum(), along(eps, mean.expand_as(eps)).sum(),
                                 along(eps, x[rows] - centre).sum()])
        sums[3:].index_add_(0, own[rows], along(eps, centre - mean).double())
        counts += own[rows].bincount(minlength=len(classes))
    size, lean, pull = (sums[:3] / counts.sum()).tolist()
    return [size**0.5, lean, (sums[3:] / counts.clamp(min=1)).mean().item(), pull]


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__)
    images = load_images(cfg.data, cfg.data_root, cfg.image_size)
    few = torch.randperm(len(images.pixels), generator=torch.Generator().manual_seed(cfg.seed))[: cfg.num_images]
    if len(few) < cfg.batch_size:
        raise ValueError(f"--batch-size {cfg.batch_size}: must be at most the number of images, {len(few)}")
    x, y = to_range(images.pixels[few]), images.labels[few]
    columns = ["noise", "size", "towards the mean image", "of a class towards the class", "towards its image"]
    print(f"{images.name}, {len(few)} images, {cfg.candidates} noises each\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, choose in CHOICES.items():
        numbers = measure(x, y, choose, cfg.candidates, cfg.batch_size, cfg.seed)
        print(f"| {name} | " + " | ".join(f"{number:.3f}" for number in numbers) + " |", flush=True)


if __name__ == "__main__":
    main()
