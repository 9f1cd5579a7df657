"""Train the judge that evaluate.py measures with: a classifier of the data set's own training split, then frozen.

    python train_classifier.py --data mnist --out mine.safetensors                          how the released judge of MNIST was made
    python train_classifier.py --data photos --held-out photos-test --image-size 64         for your own class folders

Numbers from two judges cannot be compared. The released judges stay as they are, and evaluate.py names the judge it used by its hash.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from models import Classifier
from utils import distributed
from utils.checkpoints import fingerprint, write_weights
from utils.config import check_file, check_writable, parse_config, require, to_dict
from utils.data import Images, check_source, load_held_out, load_images, to_range
from utils.distributed import Ranks
from utils.errors import run_script
from utils.evaluation import classifier_file, shuffled
from utils.seeding import fold

RECIPES = {
    "mnist": dict(width=32, epochs=4, min_accuracy=0.993),
    "cifar10": dict(epochs=10, batch_size=1024, min_accuracy=0.93),
    "digits": dict(width=16, min_accuracy=0.95),
    "path": dict(),
}


@dataclass(frozen=True)
class Config:
    data: str = "mnist"                         # data set: mnist, cifar10, digits, or the path to class folders
    held_out: str | None = None                 # path to other images of the same classes, if --data is a path
    data_root: str = "data"                     # folder of mnist and cifar10; a missing one is downloaded into it
    image_size: int | None = None               # side in pixels to which images are resized; None: the data set's own, 32 for a path
    flip: bool | None = None                    # mirror each image in every other epoch; None: all but mnist and digits
    width: int = 64                             # channels of the first layer; there are 4 times as many features
    epochs: float = 30                          # passes over the training split
    batch_size: int = 128                       # images per update
    lr: float = 1.5e-3                          # highest learning rate, per image of a batch
    weight_decay: float = 2e-6                  # decoupled weight decay, per image of a batch
    label_smoothing: float = 0.2                # share of each label that is spread over all classes
    min_accuracy: float = 0.8                   # accuracy on the held-out images below which nothing is written
    seed: int = 0                               # seed of everything random
    device: str = "auto"                        # auto, cuda, cuda:1, ..., or cpu
    num_workers: int = 4                        # threads that decode image files
    out: str | None = None                      # file to write; None: checkpoints/classifier-<data>.safetensors
    replace: bool = False                       # overwrite an existing file

    def __post_init__(self) -> None:
        for field in ("width", "epochs", "batch_size", "lr"):
            require(self, field, 0 < getattr(self, field) < math.inf, "above 0, and finite")
        require(self, "weight_decay", 0 <= self.weight_decay < math.inf, "at least 0, and finite")
        require(self, "num_workers", self.num_workers >= 1, "at least 1")
        require(self, "image_size", self.image_size is None or self.image_size >= 2, "at least 2, or None")
        for field in ("label_smoothing", "min_accuracy"):
            require(self, field, 0 <= getattr(self, field) < 1, "in [0, 1)")
        check_file(self, "out")


def shifted(x: Tensor, by: int, draw: torch.Generator) -> Tensor:
    """Move each image by its own up to `by` pixels in both directions, its border mirrored. x: (B, C, H, W)."""
    size = x.shape[-1]
    rows, columns = (torch.randint(0, 2 * by + 1, (len(x), 1), generator=draw) + torch.arange(size) for _ in range(2))     # (B, H), (B, W)
    rows, columns, image = rows.to(x.device), columns.to(x.device), torch.arange(len(x), device=x.device)
    return F.pad(x, (by,) * 4, mode="reflect")[image[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def triangle(progress: float) -> float:
    """Factor of the learning rate, for progress 0 to 1: from 0.2 up to 1 at 0.23, down to 0.07."""
    return 0.2 + 0.8 * progress / 0.23 if progress < 0.23 else 1 - 0.93 * (progress - 0.23) / 0.77


@torch.no_grad()
def accuracy(network: Classifier, images: Images, device: torch.device) -> float:
    """Share of images that get their own class."""
    right = [network(to_range(x.to(device))).argmax(1).cpu() == y for x, y in zip(images.pixels.split(500), images.labels.split(500))]
    return torch.cat(right).double().mean().item()


def train(images: Images, cfg: Config, ranks: Ranks) -> Classifier:
    """The recipe of Jordan (2024): whitened patches, SGD with the same learning rate per image for any batch size, batch-norm
    biases 64 times as fast, each image mirrored in every other epoch, slow weights (Lookahead) that end as the average."""
    torch.manual_seed(fold(cfg.seed, "classifier"))
    size, count = min(cfg.batch_size, len(images)), len(images)
    network = Classifier(images.shape[0], len(images.classes), cfg.width)
    few = min(5000, 5_120_000 // images.image_size**2 + 1)  # 5 million patches are enough, and fit
    network.set_whitening(to_range(images.pixels[torch.randperm(count)[:few]]))
    network.to(ranks.device, memory_format=torch.channels_last)
    learned = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    groups = [dict(params=[p for name, p in learned if ("norms" in name) == biases], base_lr=cfg.lr * size * factor,
                   weight_decay=cfg.weight_decay / (cfg.lr * factor)) for biases, factor in ((False, 1), (True, 64))]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.85, nesterov=True)
    fast = {name: tensor for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
    slow = {name: tensor.clone() for name, tensor in fast.items()}
    steps = max(1, round(cfg.epochs * count / size))
    pixels, labels = images.pixels.to(ranks.device), images.labels.to(ranks.device)
    mirrored = torch.rand(count) < 0.5
    order = torch.cat([torch.randperm(count) + epoch * count for epoch in range(math.ceil(steps * size / count))])
    bar = tqdm(range(steps), "classifier", disable=None)
    for step in bar:
        places = order[step * size : (step + 1) * size]
        chosen, epochs = places % count, places // count
        flip = (mirrored[chosen] ^ (epochs % 2 == 1)).to(ranks.device) if (images.flip if cfg.flip is None else cfg.flip) else None
        chosen = chosen.to(ranks.device)
        x = shifted(images.x(pixels[chosen], flip), max(1, images.image_size // 14), torch.default_generator)
        with ranks.autocast():
            loss = F.cross_entropy(network(x), labels[chosen], label_smoothing=cfg.label_smoothing)
        network.whiten.bias.requires_grad_(step < 0.3 * steps)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * triangle(step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 4 or step == steps - 1:
            pull = 0.0 if step == steps - 1 else 1 - 0.95**5 * (step / steps) ** 3
            for name, tensor in slow.items():
                fast[name].copy_(tensor.lerp_(fast[name], pull))
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.4f}")
    return network.eval().requires_grad_(False)


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__, RECIPES)
    target = classifier_file(cfg.out, cfg.data)
    if target.exists() and not cfg.replace:
        raise ValueError(f"{target} exists; a judge is frozen. Use another --out, or --replace True")
    check_writable(target)
    ranks = distributed.start(cfg.device)

    def check(classes: list[str]) -> None:
        if len(classes) < 2:
            raise ValueError(f"--data {cfg.data}: a classifier needs at least 2 classes, and there are {len(classes)}")

    if cfg.held_out:
        check_source(cfg.held_out, "--held-out")
    images = load_images(cfg.data, cfg.data_root, cfg.image_size, cfg.num_workers, check=check)
    if images.left_out:
        print(f"note: --data {cfg.data}: files that Pillow does not read as images were left out: {images.left_out}")
    images, held_out = load_held_out(images, cfg.held_out, cfg.data_root, cfg.num_workers)
    if len(held_out) == 0:
        raise ValueError(f"--data {cfg.data}: of {len(images)} images a tenth is none, and the accuracy is measured on that; name others "
                         "with --held-out")
    start = time.monotonic()
    network = train(images, cfg, ranks)
    weights = {name: tensor.half() if tensor.dim() > 1 else tensor for name, tensor in network.state_dict().items()}
    network.load_state_dict(weights)                        # judged as it is released
    right = accuracy(network, held_out, ranks.device)
    print(f"{len(images)} images in {time.monotonic() - start:.0f} s; accuracy {right:.4f} on {len(held_out)} held-out images")
    if right < cfg.min_accuracy:
        raise ValueError(f"accuracy {right:.4f} is below --min-accuracy {cfg.min_accuracy}: nothing was written; more --epochs may help")
    config = {key: value for key, value in to_dict(cfg).items() if key not in ("data_root", "device", "num_workers", "out", "replace")}
    metadata = dict(kind="classifier", architecture=network.architecture, classes=images.classes, config=config,
                    image_size=images.shape[-1], accuracy=right, held_out=fingerprint(shuffled(held_out)[0]))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_weights(target, weights, metadata)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main)
