"""Images as one uint8 tensor, and batches as a function of the step."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from filelock import FileLock
from torch import Tensor
from torch.nn import functional as F

from utils.checkpoints import fingerprint
from utils.distributed import Ranks
from utils.folders import load_folder, open_folder
from utils.latents import Latents, is_latents, load_latents, originals
from utils.locks import lock_if_possible
from utils.recipes import NAMES
from utils.seeding import fold, generator

WITH_TEST_SPLIT = ("mnist", "cifar10")                      # which is held out from all training
PATH_SIZE = 32                                              # side of images of a path, unless it is given


@dataclass(frozen=True)
class Images:
    """A data set in memory.

    name: one of `NAMES`, or a path. pixels: (N, C, H, H) uint8. labels: (N,) long. classes: their names; empty for an unconditional
    set, whose labels are all 0, which is then the null class. flip: whether an image's mirror image belongs to the data too.
    left_out: files of a path that were not read, by their endings, in words.
    """

    name: str
    pixels: Tensor
    labels: Tensor
    classes: list[str]
    flip: bool
    left_out: str = ""
    autoencoder: ClassVar[None] = None                      # `utils.latents.Latents`, which may stand here too, has one

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.pixels.shape[1:])

    @property
    def image_size(self) -> int:
        return self.pixels.shape[-1]

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes

    def fingerprint(self) -> str:
        """Hash of all pixels and labels, in order; takes a quarter of a second for CIFAR-10."""
        return fingerprint(self.pixels, self.labels)

    def on(self, home: torch.device) -> Tensor:
        """All values on the device `home`, to be indexed by a tensor."""
        return self.pixels.to(home)

    @staticmethod
    def x(values: Tensor, mirrored: Tensor | None) -> Tensor:
        """What the network sees, float (B, C, H, H) in [-1, 1], from uint8 values. mirrored: (B,) bool, or None for no image."""
        x = to_range(values)
        return x if mirrored is None else torch.where(mirrored[:, None, None, None], x.flip(-1), x)


def to_range(pixels: Tensor) -> Tensor:
    """uint8 0..255 to float [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pixels(x: Tensor) -> Tensor:
    """Float to uint8 0..255: clipped to [-1, 1] and rounded to the nearest."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def load_digits() -> tuple[Tensor, Tensor, list[str]]:
    """The 1,797 handwritten 8x8 digits that scikit-learn carries (UCI, Alpaydin & Kaynak 1998)."""
    from sklearn.datasets import load_digits as load  # only this data set needs scikit-learn

    digits = load()
    pixels = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
    return pixels, torch.from_numpy(digits.target).long(), [str(digit) for digit in range(10)]


def load_torchvision(name: str, root: str, train: bool = True) -> tuple[Tensor, Tensor, list[str]]:
    """MNIST or CIFAR-10, training or test split, downloaded to `root` if missing.

    Raises:
        ValueError: it is missing and cannot be downloaded.
    """
    import torchvision  # as slow to import as PyTorch itself, and few scripts need it

    lock = FileLock(Path(root, ".download.lock"))
    data_class = {"mnist": torchvision.datasets.MNIST, "cifar10": torchvision.datasets.CIFAR10}[name]
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        # All processes of a host come here at once, and torchvision would have each write the same files.
        if os.access(root, os.W_OK):
            lock_if_possible(lock)
        data = data_class(root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"--data {name} is not in --data-root {root} and could not be downloaded ({error}). Without a network, "
                         f"use --data digits, --data PATH with images of your own, or --data-root with a copy") from error
    finally:
        lock.release()
    pixels = torch.as_tensor(data.data)
    pixels = pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
    return pixels.contiguous(), torch.as_tensor(data.targets), [str(c).split(" - ")[0] for c in data.classes]


def resize(pixels: Tensor, size: int) -> Tensor:
    """Resize square uint8 images (N, C, H, H) to side `size`."""
    if pixels.shape[-1] == size:
        return pixels
    return torch.cat([to_pixels(F.interpolate(to_range(part), size, mode="bicubic", antialias=True)) for part in pixels.split(1024)])


def check_source(data: str, flag: str = "--data") -> None:
    """Raise ValueError unless there are images of this name or path. flag: as of `load_images`."""
    if is_latents(Path(data)):
        raise ValueError(f"{flag} {data} holds latents, and here images are needed; these are made from {originals(data)}")
    if data not in NAMES and not Path(data).exists():
        raise ValueError(f"{flag} {data}: no such data set or path; use one of {', '.join(NAMES)}, or the path of a folder or zip")


def load_images(data: str, data_root: str = "data", image_size: int | None = None, num_workers: int = 4,
                num_channels: int | None = None, check: Callable[[list[str]], None] = lambda classes: None,
                flag: str = "--data") -> Images:
    """Load a data set by name or path.

    Args:
        data: "mnist", "cifar10", "digits", or a folder or zip of images; see `utils.folders`.
        data_root: folder of mnist and cifar10.
        image_size: side to resize to. None keeps a named set's own size, and means 32 for a path.
        num_channels: 3 gives gray images three equal channels; None leaves them one.
        check: called once, with the class names, before any image of a path is decoded; raises if they are not what is needed.
        flag: the flag that named the data set, for the errors.

    Raises:
        ValueError: an unknown name, no images, an unreadable image, no network, or latents.
    """
    check_source(data, flag)
    left_out = ""
    if data in NAMES:
        pixels, labels, classes = load_digits() if data == "digits" else load_torchvision(data, data_root)
        check(classes)
    else:
        folder = open_folder(Path(data), flag)
        labels, classes, left_out = torch.tensor(folder.labels), folder.classes, folder.left_out
        check(classes)
        pixels = load_folder(folder, image_size or PATH_SIZE, num_workers)
    pixels = resize(pixels, image_size or pixels.shape[-1])
    if num_channels == 3 and pixels.shape[1] == 1:
        pixels = pixels.expand(-1, 3, -1, -1)
    return Images(data, pixels, labels, classes, data not in ("mnist", "digits"), left_out)


def load_data(data: str, data_root: str = "data", image_size: int | None = None, num_workers: int = 4,
              guidance_scales: tuple[float, ...] = ()) -> Images | Latents:
    """What a training script learns from: images as `load_images` reads them, or the folder of prepare_latents.py.

    Raises:
        ValueError: as by `load_images`, `load_latents` and `check_guidance`.
    """
    check = partial(check_guidance, guidance_scales)
    if not is_latents(Path(data)):
        return load_images(data, data_root, image_size, num_workers, check=check)
    latents = load_latents(Path(data), image_size)
    check(latents.classes)
    return latents


def hash_order(images: Images) -> Tensor:
    """Indices (N,) that sort the images by a hash of their pixels: as good as random, whatever the order of the files."""
    hashes = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images.pixels.numpy()]
    labels = images.labels.tolist()
    return torch.tensor(sorted(range(len(images)), key=lambda i: (hashes[i], labels[i])), dtype=torch.long)       # of none, too


def load_held_out(images: Images, path: str | None, data_root: str = "data", num_workers: int = 4) -> tuple[Images, Images]:
    """A training split and a held-out one of the same classes and size.

    Args:
        images: what `load_images` returned: the training split of mnist and cifar10, otherwise all images.
        path: held-out images of the user. None: the test split of mnist and cifar10; otherwise a tenth of `images`, chosen by
            a hash of their pixels, is taken out.

    Raises:
        ValueError: the held-out images have other classes or another shape.
    """
    def check(classes: list[str]) -> None:
        if classes != images.classes:
            raise ValueError(f"--held-out {path} has classes {classes}; --data {images.name} has {images.classes}")

    if path is not None:
        held_out = load_images(path, data_root, images.shape[-1], num_workers, images.shape[0], check, "--held-out")
        if held_out.shape != images.shape:
            raise ValueError(f"--held-out {path} has shape {held_out.shape}; --data {images.name} has {images.shape}")
        return images, held_out
    if images.name in WITH_TEST_SPLIT:
        pixels, labels, _ = load_torchvision(images.name, data_root, train=False)
        return images, replace(images, pixels=resize(pixels, images.shape[-1]), labels=labels)
    order = hash_order(images)
    rest, tenth = order[len(images) // 10 :], order[: len(images) // 10]
    return tuple(replace(images, pixels=images.pixels[part], labels=images.labels[part]) for part in (rest, tenth))


def check_guidance(guidance_scales: tuple[float, ...], classes: list[str], interval: tuple[float, float] = (0.0, 1.0)) -> None:
    """Raise ValueError if guidance (a scale other than 1) is asked for and there are no classes to guide to, or if it is to act at some
    times and is not asked for."""
    on = [scale for scale in guidance_scales if scale != 1]
    if on and len(classes) < 2:
        raise ValueError(f"--guidance-scale {on[0]}: guidance needs at least 2 classes, and the data have {len(classes)}; "
                         "use --guidance-scale 1 and no --guidance-range")
    if interval != (0, 1) and not on:
        raise ValueError("--guidance-interval {:g} {:g}: nothing is guided without a --guidance-scale other than 1".format(*interval))


class Batches:
    """Endless batches. The same seed gives the same `batches(step)`, whenever and by however many processes it is called.

    The data set is shuffled anew each epoch, and an epoch's last images share a batch with the first of the next. Images live
    on the device if they take at most a quarter of its free memory, otherwise on the host.

    Args:
        flip: whether to mirror half of the images, at random; None: as the data set's own `flip` says.

    Raises:
        ValueError: a batch does not divide among the processes, or latents without mirror images are to be mirrored.
    """

    def __init__(self, images: Images | Latents, global_batch_size: int, seed: int, ranks: Ranks, flip: bool | None = None):
        if flip and images.autoencoder is not None and not images.flip:
            raise ValueError(f"--flip True: {images.name} holds no mirror images' latents; make them with prepare_latents.py --flip True")
        if global_batch_size % ranks.world_size:
            raise ValueError(f"--global-batch-size {global_batch_size} is not divisible by {ranks.world_size} processes")
        self.size, self.seed, self.ranks, self.flip = global_batch_size, seed, ranks, images.flip if flip is None else flip
        fits = ranks.device.type != "cuda" or images.nbytes <= torch.cuda.mem_get_info(ranks.device)[0] / 4
        self.home = ranks.device if fits else torch.device("cpu")
        self.x, self.values, self.labels = images.x, images.on(self.home), images.labels.to(self.home)
        self.orders: dict[int, Tensor] = {}

    def order(self, epoch: int) -> Tensor:
        """The shuffled indices of one epoch, (N,). Only those of one batch's epochs are kept at a time."""
        if epoch not in self.orders:
            shuffle = torch.Generator().manual_seed(fold(self.seed, "epoch", epoch))    # on the CPU: alike on every device
            self.orders[epoch] = torch.randperm(len(self.labels), generator=shuffle).to(self.home, non_blocking=True)
        return self.orders[epoch]

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's rows of batch `step` (1 is the first): x (B, C, H, W) in [-1, 1], or latents, and y (B,) long."""
        first = (step - 1) * self.size
        epochs = range(first // len(self.labels), (first + self.size - 1) // len(self.labels) + 1)
        self.orders = {epoch: order for epoch, order in self.orders.items() if epoch in epochs}
        indices = torch.cat([self.order(epoch) for epoch in epochs])
        start = first - epochs[0] * len(self.labels)
        indices = self.ranks.rows(indices[start : start + self.size])
        device, mirrored = self.ranks.device, None
        values = self.values[indices].to(device, non_blocking=True)
        y = self.labels[indices].to(device, non_blocking=True)
        if self.flip:
            coin = torch.rand(self.size, generator=generator(device, self.seed, "flip", step), device=device)
            mirrored = self.ranks.rows(coin) < 0.5
        return self.x(values, mirrored), y
