"""A data set of an autoencoder's latents: the folder that prepare_latents.py writes and the training scripts read.

    latents.json                what the folder holds; called preparing.json until every shard is there
    shard_00000.safetensors     latents (n, V, C, h, h) and labels (n,) of the first `shard_size` images; and so on

V = 2: the latents of an image and of its mirror image, which is not the mirrored latent. V = 1: no mirror images.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from utils.checkpoints import CheckpointError, fingerprint, flush, opened, write_tensors
from utils.config import differences, is_vacant, write_json
from utils.folders import chunked

FORMAT = "splitmeanflow-latents/1"
FINISHED, UNFINISHED = "latents.json", "preparing.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class ShardError(ValueError):
    """A shard that is missing, torn, or of other latents."""


class Shards:
    """Latents that stay in their files, mapped into memory: processes of one machine share them, and only what is asked for is read."""

    def __init__(self, parts: Sequence[Tensor]):
        """parts: of equal length but for the last one."""
        self.parts, self.size = parts, len(parts[0])

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Rows (B, V, C, h, h) of indices (B,)."""
        return torch.stack([self.parts[i // self.size][i % self.size] for i in indices.tolist()])

    def to(self, device: torch.device) -> Tensor:
        """All of them as one tensor, copied shard by shard."""
        whole = torch.empty(len(self), *self.parts[0].shape[1:], dtype=self.parts[0].dtype, device=device)
        for rows, part in zip(whole.split(self.size), self.parts):
            rows.copy_(part)
        return whole


@dataclass(frozen=True)
class Latents:
    """A data set of latents; takes the place of `utils.data.Images` in a training script.

    shards: (N, V, C, h, h), see above. labels, classes: as of Images. image_size: side of the images in pixels.
    autoencoder: `utils.autoencoder.Autoencoder.entry` of what made and decodes them.
    """

    name: str
    shards: Shards
    labels: Tensor
    classes: list[str]
    image_size: int
    autoencoder: dict[str, Any]
    left_out: ClassVar[str] = ""                            # prepare_latents.py has said it

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of what the network sees: (C, h, h)."""
        return tuple(self.shards.parts[0].shape[2:])

    @property
    def flip(self) -> bool:
        return self.shards.parts[0].shape[1] == 2

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.shards.parts)

    def fingerprint(self) -> str:
        """Of the labels and of 4 latents of each shard: reading all of them, which stay in their files, could take minutes."""
        return fingerprint(self.labels, *(part[:: -(-len(part) // 4)] for part in self.shards.parts))

    def on(self, home: torch.device) -> Tensor | Shards:
        """All values where they are to live; to be indexed by a tensor."""
        return self.shards if home.type == "cpu" else self.shards.to(home)

    @staticmethod
    def x(values: Tensor, mirrored: Tensor | None) -> Tensor:
        """What the network sees (B, C, h, h), float32, from values (B, V, C, h, h); mirrored: (B,) bool, or None for none."""
        if mirrored is None:
            return values[:, 0].float()
        return torch.where(mirrored[:, None, None, None], values[:, 1], values[:, 0]).float()


def comparable(description: dict[str, Any]) -> dict[str, Any]:
    """A description without what may change: places. The listing's hash and the weights' hash say what was there."""
    weights = {f"autoencoder_{key}": value for key, value in description["autoencoder"].items() if key != "source"}
    return {**{key: value for key, value in description.items() if key not in ("source", "autoencoder")}, **weights}


def identity(description: dict[str, Any]) -> str:
    """Short hash of a description, which each of its shards carries."""
    return fingerprint(json.dumps(comparable(description), sort_keys=True).encode())


def is_latents(path: Path) -> bool:
    """Whether a folder is one of prepare_latents.py, finished or not."""
    return any((path / name).is_file() for name in (FINISHED, UNFINISHED))


def begin(folder: Path, description: dict[str, Any]) -> None:
    """Check that a folder is new, or was begun with this description.

    Raises:
        ValueError: it holds other latents (names the difference), or something else.
    """
    if is_vacant(folder):
        return
    if not is_latents(folder):
        raise ValueError(f"OUT {folder} exists and holds no latents; choose another one")
    file = next(folder / name for name in (FINISHED, UNFINISHED) if (folder / name).is_file())
    old, new = comparable(json.loads(file.read_text())), comparable(description)
    if changed := differences(old, new):
        raise ValueError(f"OUT {folder} holds other latents ({'; '.join(changed)}); choose another OUT, or go on with the same options and "
                         "the same images")


def finish(folder: Path, description: dict[str, Any]) -> None:
    """Every shard is there: preparing.json becomes latents.json."""
    write_json(folder / FINISHED, description)
    (folder / UNFINISHED).unlink(missing_ok=True)
    flush(folder)


def shard_rows(description: dict[str, Any]) -> list[range]:
    """The indices of the images of each shard."""
    return chunked(range(description["num_images"]), description["shard_size"])


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:05d}.safetensors"


def write_shard(folder: Path, description: dict[str, Any], number: int, latents: Tensor, labels: Tensor) -> None:
    """Write one shard; it is there whole or not at all. One metadata key only: the order of several is not fixed."""
    write_tensors(shard_path(folder, number), {"latents": latents, "labels": labels}, {"latents": identity(description)})


def read_shard(folder: Path, description: dict[str, Any], number: int) -> tuple[Tensor, Tensor]:
    """Latents (n, V, C, h, h) and labels (n,), mapped: their values are read when they are used.

    Raises:
        ShardError: it is missing, torn, or of other latents.
        PermissionError: it may not be read.
    """
    path = shard_path(folder, number)
    try:
        with opened(path) as file:
            text = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError as error:
        raise ShardError(f"{path} is missing") from error
    except CheckpointError as error:
        raise ShardError(str(error)) from error
    if text.get("latents") != identity(description):
        raise ShardError(f"{path} is of other latents than {folder} says")
    rows, views = len(shard_rows(description)[number]), 2 if description["flip"] else 1
    latents, labels = tensors["latents"], tensors["labels"]
    assert (tuple(latents.shape), latents.dtype) == ((rows, views, *description["shape"]), DTYPES[description["dtype"]])
    assert labels.shape == (rows,)
    return latents, labels


def is_whole(folder: Path, description: dict[str, Any], number: int) -> bool:
    try:
        read_shard(folder, description, number)
    except ShardError:
        return False
    return True


def read_description(folder: Path) -> dict[str, Any]:
    """latents.json of a finished folder.

    Raises:
        ValueError: it is not finished, or of another format.
    """
    if not (folder / FINISHED).is_file():
        raise ValueError(f"--data {folder}: these latents are not finished; the same prepare_latents.py command goes on")
    description = json.loads((folder / FINISHED).read_text())
    if description.get("format") != FORMAT:
        raise ValueError(f"--data {folder}: {FINISHED} has format {description.get('format')!r}; this program reads {FORMAT!r}")
    return description


def originals(data: str) -> str:
    """The images that a folder of latents was made from; what is no folder of latents is its own original."""
    if not is_latents(Path(data)):
        return data
    source = read_description(Path(data))["source"]
    return source if os.path.dirname(source) else os.path.join(".", source)     # always a path, also if it is called mnist


def load_latents(folder: Path, image_size: int | None) -> Latents:
    """Open what prepare_latents.py wrote.

    Args:
        image_size: as asked for by --image-size; must be the images' or None.

    Raises:
        ValueError: the folder is not finished, a shard is missing or torn, or the size is another.
    """
    description = read_description(folder)
    if image_size not in (None, description["image_size"]):
        raise ValueError(f"--image-size {image_size}: --data {folder} holds latents of images of {description['image_size']} pixels; leave "
                         "it out, or prepare latents of that size")
    try:
        shards = [read_shard(folder, description, number) for number in range(len(shard_rows(description)))]
    except ShardError as error:
        raise ValueError(f"--data {folder}: {error}. The prepare_latents.py command that made this folder repairs it") from error
    return Latents(str(folder), Shards([latents for latents, _ in shards]), torch.cat([labels for _, labels in shards]),
                   description["classes"], description["image_size"], description["autoencoder"])
