"""Folders and zips of images, as a user may have them, and all that is read from one."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils.folders import load_folder, open_folder


def save(path: Path, image: Image.Image, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def photo(seed: int, size=(20, 12)) -> Image.Image:
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def zipped(path: Path, folder: Path, top: str = "", clutter: bool = False) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):                    # in another order than the sorted one
            archive.write(file, f"{top}{file.relative_to(folder)}")
            if clutter and file.is_file():
                archive.writestr(f"__MACOSX/{top}{file.relative_to(folder).parent}/._{file.name}", b"no image")
        if clutter:
            archive.writestr(f"{top}.DS_Store", b"no image")
    return path


def read_folder(path: Path, image_size: int, num_workers: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Pixels, labels and names of the classes of a folder or zip."""
    folder = open_folder(path, "--data")
    return load_folder(folder, image_size, num_workers), torch.tensor(folder.labels), folder.classes
