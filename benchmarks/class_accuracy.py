"""How often an independent classifier gives a sample the class that was asked for.

    python -m benchmarks.class_accuracy checkpoints/student-mnist.safetensors --data mnist
    python -m benchmarks.class_accuracy results/student-train --data /tmp/cifar10/train --test-data /tmp/cifar10/test

Trains a small convolutional network on the data's training split, prints its accuracy on the test split, then samples
each checkpoint (student: 1, 2 and 4 steps; teacher: 25 Euler steps at each guidance scale) and prints, over `--seeds` seeds,
the accuracy and the Frechet distance of the classifier's features from those of the training images. The same two numbers
for real test images are the floor. The classifier differs from call to call: compare rows of one call only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from models import build_network
from utils import distributed
from utils.checkpoints import load_network
from utils.config import parse_config
from utils.data import Batches, Images, load_images, load_torchvision, to_pixels, to_range
from utils.evaluation import even_labels
from utils.guidance import guided_velocity
from utils.sampling import sample_average_velocity, sample_velocity
from utils.seeding import generator


@dataclass(frozen=True)
class Config:
    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional]      # files, checkpoint folders or run folders
    data: str = "mnist"                         # mnist, cifar10, or the path of the training images
    test_data: str | None = None                # path of the test images, if data is a path
    data_root: str = "data"                     # where mnist and cifar10 are, or are downloaded to
    num_images: int = 10_000                    # samples of each row, spread evenly over the classes
    seeds: int = 3                              # repetitions with other noise
    guidance_scale: tuple[float, ...] = (1.0, 1.5, 2.5)     # of a teacher's rows
    epochs: int = 15                            # of the classifier's training
    device: str = "auto"                        # auto, cuda, cpu


class Classifier(nn.Module):
    """Residual convolutional network; `features` are its 256 pooled channels."""

    def __init__(self, num_channels: int, num_classes: int):
        super().__init__()
        def conv(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
        self.stem = nn.Sequential(conv(num_channels, 64), conv(64, 128), nn.MaxPool2d(2))
        self.middle = nn.Sequential(conv(128, 128), conv(128, 128))
        self.deep = nn.Sequential(conv(128, 256), nn.MaxPool2d(2))
        self.last = nn.Sequential(conv(256, 256), conv(256, 256))
        self.out = nn.Linear(256, num_classes)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.deep(x + self.middle(x))
        return (x + self.last(x)).amax((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.features(x))


def train_classifier(images: Images, epochs: int, ranks: distributed.Ranks) -> Classifier:
    """AdamW, one-cycle learning rate, random shifts by up to 2 pixels (and mirror images where the data set has them)."""
    torch.manual_seed(0)
    network = Classifier(images.shape[0], len(images.classes)).to(ranks.device)
    batches, size = Batches(images, 512, 0, ranks), images.shape[-1]
    steps = epochs * len(images) // 512
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    shifts = torch.randint(0, 5, (steps, 2), generator=torch.Generator().manual_seed(0)).tolist()
    for step in range(1, steps + 1):
        x, y = batches(step)
        top, left = shifts[step - 1]
        x = F.pad(x, (2, 2, 2, 2), value=-1.0)[:, :, top : top + size, left : left + size]
        with ranks.autocast():
            loss = F.cross_entropy(network(x), y, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def judge(network: Classifier, pixels: Tensor, labels: Tensor, ranks: distributed.Ranks) -> tuple[float, Tensor]:
    """Accuracy and features (N, 256) of uint8 images."""
    features = torch.cat([network.features(to_range(part.to(ranks.device))) for part in pixels.split(1000)])
    return (network.out(features).argmax(1) == labels.to(ranks.device)).double().mean().item(), features


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features (N, D)."""
    a, b = a.double(), b.double()
    root_a = torch.linalg.eigh(a.T.cov())
    half = root_a.eigenvectors * root_a.eigenvalues.clamp(min=0).sqrt() @ root_a.eigenvectors.T
    cross = torch.linalg.eigvalsh(half @ b.T.cov() @ half).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * cross).item()


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__)
    ranks = distributed.start(cfg.device)
    images = load_images(cfg.data, cfg.data_root)
    if cfg.test_data:
        held_out = load_images(cfg.test_data)
        test_pixels, test_labels = held_out.pixels, held_out.labels
    else:
        test_pixels, test_labels, _ = load_torchvision(cfg.data, cfg.data_root, train=False)
    with torch.enable_grad():
        classifier = train_classifier(images, cfg.epochs, ranks)
    _, reference = judge(classifier, images.pixels, images.labels, ranks)
    accuracy, features = judge(classifier, test_pixels, test_labels, ranks)
    print(f"real test images: accuracy {accuracy:.4f}, Frechet distance {frechet_distance(features, reference):.4f}", flush=True)

    y = even_labels(cfg.num_images, images)
    for checkpoint in cfg.checkpoints:
        network, metadata = load_network(checkpoint, build_network, ranks.device)
        if metadata["kind"] == "student":
            rows = [(f"{n} steps", partial(sample_average_velocity, network, num_steps=n)) for n in (1, 2, 4)]
        else:
            guided = [(w, guided_velocity(network.velocity, network.null_class, w)) for w in cfg.guidance_scale]
            rows = [(f"25 steps, guidance {w}", partial(sample_velocity, v, num_steps=25)) for w, v in guided]
        for name, sample in rows:
            results = []
            for seed in range(cfg.seeds):
                noise = generator(ranks.device, seed, "noise")
                pixels = []
                for labels in y.split(1000):
                    z = torch.randn(len(labels), *images.shape, generator=noise, device=ranks.device)
                    with ranks.autocast():
                        pixels.append(to_pixels(sample(z=z, y=labels.to(ranks.device))))
                accuracy, features = judge(classifier, torch.cat(pixels), y, ranks)
                results.append([accuracy, frechet_distance(features, reference)])
            mean, spread = torch.tensor(results).mean(0), torch.tensor(results).std(0) if cfg.seeds > 1 else torch.zeros(2)
            print(f"{checkpoint}, {name}: accuracy {mean[0]:.4f} +- {spread[0]:.4f}, Frechet distance {mean[1]:.4f} +- {spread[1]:.4f} "
                  f"(n = {cfg.num_images}, {cfg.seeds} seeds)", flush=True)


if __name__ == "__main__":
    main()
