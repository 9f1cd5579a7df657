"""Which noise images get, by how it is chosen among several: what the chosen noise is, together and within a class.

    python -m benchmarks.noise --data digits

Samples start from plain noise, so what is chosen should be plain too, and for a network that is told a class also within that class. One
row for each choice, all in standard deviations of plain noise: its size (root mean square); how far it leans towards the mean image
(1 unit along a unit vector), and that of a class towards what this class has more of than others (mean over classes); its spread along
the direction in which its class varies most; and how far it leans towards its own image, seen from its class's mean. The last makes paths
straight; size 1, no lean and spread 1 are right. On the CPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.ablations.noise_patches import nearest_noise, noise_towards, trade_noise
from utils.config import parse_config, require
from utils.data import load_images, to_range
from utils.errors import run_script
from utils.flow import choose_noise


@dataclass(frozen=True)
class Config:
    data: str = "mnist"         # data set: mnist, cifar10, digits, or the path to images
    data_root: str = "data"     # folder of mnist and cifar10
    image_size: int | None = None   # side of images of your own
    num_noises: int = 4         # noises that an image chooses from
    num_images: int = 12_000    # images, or all if there are fewer
    batch_size: int = 256       # images whose means some choices look at
    seed: int = 0               # seed of images and noise

    def __post_init__(self) -> None:
        require(self, "num_noises", self.num_noises >= 1, "at least 1")
        require(self, "num_images", self.num_images >= self.batch_size, "at least --batch-size")
        require(self, "batch_size", self.batch_size >= 2, "at least 2")


Choice = Callable[[Tensor, Tensor, list[Tensor]], Tensor]       # from images, labels and noises to the chosen noise

CHOICES: dict[str, Choice] = {
    "any": lambda x, y, noises: noises[0],
    "nearest": nearest_noise,
    "by direction, from the mean image": noise_towards,
    "by direction, from its class's mean image": choose_noise,
    "any, then 64 rounds of trades in its class": lambda x, y, noises: trade_noise(x, y, noises[0], 64),
}


def along(eps: Tensor, direction: Tensor) -> Tensor:
    """Components of noise along directions, both (B, ...): (B,)."""
    direction = direction.flatten(1)
    return (eps.flatten(1) * direction).sum(1) / direction.norm(dim=1).clamp(min=1e-12)


def main_direction(images: Tensor) -> Tensor:
    """Unit vector (D,) along which images (N, D) vary most."""
    return torch.pca_lowrank(images, q=min(6, *images.shape), niter=8)[2][:, 0]      # q of 1 would not converge


def measure(x: Tensor, y: Tensor, num_noises: int, batch_size: int, seed: int) -> dict[str, list[float]]:
    """By choice: size, lean towards the mean image, lean of a class towards that class, spread along the main direction of a class, pull
    towards the own image.

    Args:
        x: images (N, ...); an incomplete last batch is left out. y: their labels (N,).
    """
    draw = torch.Generator().manual_seed(seed)
    mean = x.mean(0)
    classes, own = y.unique(return_inverse=True)
    by_class = [x[y == label] for label in classes]
    centres = torch.stack([images.mean(0) for images in by_class])
    with torch.random.fork_rng(devices=[]):                 # pca_lowrank draws from the global generator
        torch.manual_seed(seed)
        main = torch.stack([main_direction(images.flatten(1)) for images in by_class])
    own = own[: len(x) // batch_size * batch_size]
    found: dict[str, list[Tensor]] = {name: [] for name in CHOICES}
    for rows in torch.arange(len(own)).split(batch_size):
        centre = centres[own[rows]]
        noises = [torch.randn(centre.shape, generator=draw) for _ in range(num_noises)]
        for name, choose in CHOICES.items():
            eps = choose(x[rows], y[rows], noises)
            found[name].append(torch.stack([eps.square().flatten(1).mean(1), along(eps, mean.expand_as(eps)), along(eps, centre - mean),
                                            along(eps, main[own[rows]]).square(), along(eps, x[rows] - centre)], dim=1))
    numbers = {}
    for name, batches in found.items():
        square, lean, of_class, spread, pull = torch.cat(batches).double().unbind(1)
        of_classes = torch.stack([of_class[own == index].mean() for index in own.unique()])
        numbers[name] = [square.mean().sqrt().item(), lean.mean().item(), of_classes.mean().item(), spread.mean().sqrt().item(),
                         pull.mean().item()]
    return numbers


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__)
    images = load_images(cfg.data, cfg.data_root, cfg.image_size)
    few = torch.randperm(len(images.pixels), generator=torch.Generator().manual_seed(cfg.seed))[: cfg.num_images]
    if len(few) < cfg.batch_size:
        raise ValueError(f"--batch-size {cfg.batch_size}: must be at most the number of images, {len(few)}")
    x, y = to_range(images.pixels[few]), images.labels[few]
    columns = ["noise", "size", "towards the mean image", "of a class towards the class", "spread along the class", "towards its image"]
    print(f"{images.name}, {len(few)} images, {cfg.num_noises} noises each\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, numbers in measure(x, y, cfg.num_noises, cfg.batch_size, cfg.seed).items():
        print(f"| {name} | " + " | ".join(f"{number:.3f}" for number in numbers) + " |")


if __name__ == "__main__":
    run_script(main)
