"""The judge that evaluate.py measures with: a classifier of the data set's own training split, then frozen.

    python train_classifier.py --data mnist             to checkpoints/classifier-mnist.safetensors
    python train_classifier.py --data photos --held-out photos-test --image-size 64         for your own class folders

Numbers of two judges cannot be compared. The released ones are frozen, and evaluate.py names the one it used by its hash.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from models import Classifier
from utils import distributed
from utils.checkpoints import write_weights
from utils.config import parse_config, require, to_dict
from utils.data import Batches, Images, load_held_out, load_images, to_range
from utils.distributed import Ranks
from utils.seeding import fold, generator

RECIPES = {
    "mnist": dict(width=32, epochs=4, min_accuracy=0.993),
    "cifar10": dict(width=64, epochs=30, min_accuracy=0.93),
    "digits": dict(width=16, epochs=30, min_accuracy=0.95, batch_size=128),
    "path": dict(),
}


@dataclass(frozen=True)
class Config:
    data: str = "mnist"                         # mnist, cifar10, digits, or the path of class folders
    held_out: str | None = None                 # path of other images of the same classes, if --data is a path
    data_root: str = "data"                     # where mnist and cifar10 are, or are downloaded to
    image_size: int | None = None               # side in pixels; None: the data set's own, 32 for a path
    width: int = 64                             # channels of the first layer; there are 4 times as many features
    epochs: float = 30                          # passes over the training split
    batch_size: int = 512                       # images an update
    lr: float = 2e-3                            # the highest learning rate of the one cycle, of AdamW
    weight_decay: float = 0.05                  # decoupled
    label_smoothing: float = 0.1                # share of each label spread over all classes
    min_accuracy: float = 0.8                   # on the held-out images; below, nothing is written
    seed: int = 0                               # of everything random
    device: str = "auto"                        # auto, cuda, cpu
    num_workers: int = 4                        # threads that decode image files
    out: str | None = None                      # file to write; None: checkpoints/classifier-<data>.safetensors
    replace: bool = False                       # overwrite a file that is there

    def __post_init__(self) -> None:
        for field in ("width", "epochs", "batch_size", "lr"):
            require(self, field, getattr(self, field) > 0, "above 0")
        for field in ("label_smoothing", "min_accuracy"):
            require(self, field, 0 <= getattr(self, field) < 1, "in [0, 1)")


def shifted(x: Tensor, by: int, draw: torch.Generator) -> Tensor:
    """Move a batch by up to `by` pixels in both directions, one draw for all, the new border black."""
    top, left = torch.randint(0, 2 * by + 1, (2,), generator=draw).tolist()
    size = x.shape[-1]
    return F.pad(x, (by,) * 4, value=-1.0)[:, :, top : top + size, left : left + size]


def erased(x: Tensor, side: int, draw: torch.Generator) -> Tensor:
    """Gray out one square of each image (cutout, arXiv 1708.04552), at its own place. draw: a generator on x's device."""
    centre = torch.randint(0, x.shape[-1], (2, len(x), 1), generator=draw, device=x.device)
    rows, columns = ((torch.arange(x.shape[-1], device=x.device) - c).abs() < side / 2 for c in centre)     # (B, H), (B, W)
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


@torch.no_grad()
def accuracy(network: Classifier, images: Images, device: torch.device) -> float:
    """Share of images that get their own class."""
    right = [network(to_range(x.to(device))).argmax(1).cpu() == y for x, y in zip(images.pixels.split(500), images.labels.split(500))]
    return torch.cat(right).double().mean().item()


def train(images: Images, cfg: Config, ranks: Ranks) -> Classifier:
    """AdamW, one-cycle learning rate; shifts, mirror images where the data has them, and a gray square."""
    torch.manual_seed(fold(cfg.seed, "classifier"))
    network = Classifier(images.shape[0], len(images.classes), cfg.width).to(ranks.device)
    batches = Batches(images, min(cfg.batch_size, len(images)), cfg.seed, ranks)
    steps = max(1, round(cfg.epochs * len(images) / batches.size))
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=cfg.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg.lr, steps + 1)
    bar = tqdm(range(1, steps + 1), "classifier", disable=None)
    for step in bar:
        x, y = batches(step)
        x = shifted(x, max(1, images.shape[-1] // 14), generator("cpu", cfg.seed, "shift", step))
        x = erased(x, images.shape[-1] / 4, generator(ranks.device, cfg.seed, "erase", step))
        with ranks.autocast():
            loss = F.cross_entropy(network(x), y, label_smoothing=cfg.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            bar.set_postfix_str(f"loss {loss.item():.4f}")
    return network.eval().requires_grad_(False)


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__, RECIPES)
    target = Path(cfg.out or f"checkpoints/classifier-{Path(cfg.data).stem}.safetensors")
    if target.exists() and not cfg.replace:
        raise ValueError(f"{target} exists; a judge is frozen. Use another --out, or --replace True")
    ranks = distributed.start(cfg.device)
    images = load_images(cfg.data, cfg.data_root, cfg.image_size, cfg.num_workers)
    if len(images.classes) < 2:
        raise ValueError(f"--data {cfg.data}: a classifier needs at least 2 classes, and there are {len(images.classes)}")
    images, held_out = load_held_out(images, cfg.held_out, cfg.data_root, cfg.num_workers)
    start = time.monotonic()
    network = train(images, cfg, ranks)
    weights = {name: tensor.half() if tensor.dim() > 1 else tensor for name, tensor in network.state_dict().items()}
    network.load_state_dict(weights)                        # judged as it is released
    right = accuracy(network, held_out, ranks.device)
    print(f"{len(images)} images in {time.monotonic() - start:.0f} s; accuracy {right:.4f} on {len(held_out)} held-out images")
    if right < cfg.min_accuracy:
        raise ValueError(f"accuracy {right:.4f} is below --min-accuracy {cfg.min_accuracy}: nothing was written; more --epochs may help")
    target.parent.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in to_dict(cfg).items() if key not in ("data_root", "device", "num_workers", "out", "replace")}
    metadata = dict(kind="classifier", architecture=network.architecture, classes=images.classes, config=config,
                    image_size=images.shape[-1], accuracy=right)
    write_weights(target, weights, metadata)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
