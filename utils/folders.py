"""A user's own images: a tree of class folders, a folder without classes, or a zip of either, in any format that Pillow reads."""

import io
import lzma
import os
import re
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

# Gray from 0 to 65535, by format and Pillow's mode; Pillow scales PPM and JPEG 2000 to that. Others are signed, floats or of 32 bits.
SIXTEEN_BITS = {("PNG", "I;16"), ("PNG", "I"), ("PPM", "I"), ("JPEG2000", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B")}
UNSIGNED_TIFF = (16,), 1                                    # tags: not of 12 bits, and 0 is black
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "development", "eval", "evaluation"}


def list_images(path: Path, flag: str) -> tuple[list[str], list[str], Callable[[str], bytes]]:
    """Names (relative, with slashes, sorted) of all image files in a folder or zip, those of its other files that are not hidden, and a
    function that reads one.

    Raises:
        ValueError: the path is neither a folder nor a zip file, or a link in it leads back up or nowhere.
        OSError: a folder in it cannot be listed.
    """
    formats = {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN}

    def is_hidden(name: str) -> bool:
        return name.startswith((".", "__MACOSX")) or name == "lost+found"       # of a disk; only root may list it

    def sort(names: list[str]) -> tuple[list[str], list[str]]:
        names = sorted(name for name in names if not any(map(is_hidden, PurePosixPath(name).parts)))
        images = [name for name in names if PurePosixPath(name).suffix.lower() in formats]
        return images, sorted({*names} - {*images})

    def fail(error: OSError) -> None:                       # os.walk would pass over the folder
        raise error

    if path.is_dir():
        names = []
        for folder, folders, files in os.walk(path, onerror=fail, followlinks=True):
            folders[:] = [name for name in folders if not is_hidden(name)]
            for link in filter(Path.is_symlink, (Path(folder, name) for name in folders)):
                if any(map(link.samefile, link.absolute().parents)):
                    raise ValueError(f"{flag} {path}: the link {link} leads to a folder that it is in, whose images would be read again "
                                     "and again; remove it (links to other folders are followed)")
            for file in (Path(folder, name) for name in files if not is_hidden(name)):
                if file.is_file():
                    names.append(file.relative_to(path).as_posix())
                elif file.is_symlink():
                    raise ValueError(f"{flag} {path}: the link {file} leads nowhere; bring back the images that it led to, or remove it")
        return *sort(names), lambda name: (path / name).read_bytes()
    if zipfile.is_zipfile(path):
        try:
            archive = zipfile.ZipFile(path)                 # it locks its reads, so threads may share it
        except (zipfile.BadZipFile, NotImplementedError) as error:         # the latter: a version that there is not
            raise ValueError(f"{flag} {path}: {error}; zip the images again, or copy the file once more") from error
        # Some programs of Windows write backslashes; a folder may end like an image.
        members = {info.filename.replace("\\", "/"): info for info in archive.infolist() if not info.is_dir()}
        return *sort(list(members)), lambda name: archive.read(members[name])
    raise ValueError(f"{flag} {path} is neither a folder nor a zip file of images")


def split_of(name: str) -> str | None:
    """The split that a folder's name means: "test" for Test, test_set and testset; None for any other name."""
    name = re.sub(r"[ _-]?set$", "", name.lower())
    return name if name in SPLITS else None


def split_classes(path: Path, names: list[str], flag: str) -> tuple[list[str], list[int]]:
    """Class names and one label a file. Files in no folder have no class: ([], zeros).

    Folders that everything lies in are passed over, as in a zip of one folder; in a real folder, the last one is a class.

    Raises:
        ValueError: files beside class folders, or folders that are splits, not classes.
    """
    parts = [PurePosixPath(name).parts for name in names]
    least, passed = (2 if path.is_dir() else 1), path
    while all(len(p) > least for p in parts) and len({p[0] for p in parts}) == 1:
        passed = passed / parts[0][0]
        parts = [p[1:] for p in parts]
    if all(len(p) == 1 for p in parts):
        return [], [0] * len(names)
    if any(len(p) == 1 for p in parts):
        loose = next(name for name, p in zip(names, parts) if len(p) == 1)
        raise ValueError(f"{flag} {path} mixes class folders and loose images ({loose}); put every image into a class folder, or none")
    classes = sorted({p[0] for p in parts})
    if len(classes) > 1 and all(map(split_of, classes)):    # one beside other names may be a class
        train = next((name for name in classes if split_of(name) in ("train", "training")), classes[0])
        remedy = f"use {flag} {passed / train}" if path.is_dir() else f"zip only the folder {train}"
        raise ValueError(f"{flag} {path} holds {' and '.join(classes)}, which are splits and not classes; {remedy}")
    numbers = {name: i for i, name in enumerate(classes)}
    return classes, [numbers[p[0]] for p in parts]


def left_out(others: list[str], names: list[str]) -> str:
    """How many files are not read, by their endings, and which folders hold nothing else, in words; "" if none. Both: see `list_images`."""
    endings = Counter(PurePosixPath(name).suffix.lower() or "without ending" for name in others)
    with_images = {folder for name in names for folder in PurePosixPath(name).parents}
    without = sorted({str(folder) for name in others if (folder := PurePosixPath(name).parent) not in with_images})
    nowhere = f" (no image at all in {few(without)})" if names and without else ""
    text = few([f"{count} {ending}" for ending, count in endings.most_common()]) + nowhere
    return text.encode("utf-8", "backslashreplace").decode()                    # names need not be UTF-8, and this will be printed


def few(names: Sequence[str], most: int = 5) -> str:
    """The first of some names, as a list in words."""
    return ", ".join([*names[:most], *["..."] * (len(names) > most)])


def decode(name: str, content: bytes, size: int) -> tuple[np.ndarray, bool]:
    """One image as RGB uint8 (size, size, 3), upright, centre-cropped to a square and resized; and whether all of it is gray.

    Transparent pixels show white.

    Raises:
        ValueError: Pillow cannot read it, or its range of gray values is not known; names the file.
    """
    try:
        with Image.open(io.BytesIO(content)) as file:
            file.load()
            ImageOps.exif_transpose(file, in_place=True)
            image = file
    except UnidentifiedImageError as error:                 # names the object in memory
        raise ValueError(f"cannot read image {name}: its {len(content)} bytes are no image that Pillow reads") from error
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read image {name}: {error}") from error
    if image.mode[0] in "FI":                               # gray of more than 8 bits
        tags = (file.tag_v2.get(258), file.tag_v2.get(262)) if file.format == "TIFF" else UNSIGNED_TIFF
        if (file.format, image.mode) not in SIXTEEN_BITS or tags != UNSIGNED_TIFF:
            raise ValueError(f"cannot read image {name}: its pixels ({file.format}, mode {image.mode}) are not known to go from 0, black, "
                             "to 65535; save it with 8 bits, or 16 without sign")
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))       # 16 bits to the upper 8
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels, bool((pixels == pixels[..., :1]).all())


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder or zip, listed but not read; see `open_folder`.

    names: sorted. read: one file's bytes. labels: one a file. classes: their names, none for an unconditional set.
    left_out: files that are not read, in words.
    """

    path: Path
    names: list[str]
    read: Callable[[str], bytes]
    classes: list[str]
    labels: list[int]
    left_out: str = ""

    def load(self, indices: range, size: int) -> tuple[np.ndarray, bool]:
        """RGB uint8 (len(indices), size, size, 3), and whether all of them are gray.

        Raises:
            ValueError: a file cannot be read; names it.
        """
        pixels, gray = np.empty((len(indices), size, size, 3), np.uint8), True
        for row, i in enumerate(indices):
            try:
                content = self.read(self.names[i])
            except (OSError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError) as error:     # the last: encrypted
                raise ValueError(f"cannot read {self.path}: {self.names[i]}: {str(error) or 'it ends too early'}") from error
            pixels[row], is_gray = decode(f"{self.path}: {self.names[i]}", content, size)
            gray = gray and is_gray
        return pixels, gray

    def stream(self, chunks: Sequence[range], size: int, num_workers: int) -> Iterator[tuple[np.ndarray, bool]]:
        """`load` of each chunk, in order. Threads work a few chunks ahead, so memory is bounded."""
        with ThreadPoolExecutor(num_workers) as pool:
            waiting: deque[Future[tuple[np.ndarray, bool]]] = deque()
            for chunk in chunks:
                waiting.append(pool.submit(self.load, chunk, size))
                if len(waiting) > 2 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


def chunked(indices: range, length: int) -> list[range]:
    """A range in parts of `length`, the last one shorter if need be."""
    return [indices[i : i + length] for i in range(0, len(indices), length)]


def open_folder(path: Path, flag: str) -> ImageFolder:
    """List the images of a folder or zip, and their classes.

    Args:
        flag: what the path was given as, for the errors.

    Raises:
        ValueError: no images, or a layout that is not understood.
    """
    names, others, read = list_images(path, flag)
    if not names:
        raise ValueError(f"{flag} {path} holds no image that Pillow knows by its ending (.png, .jpg, .webp, ...)"
                         + (f"; it holds {left_out(others, names)}" if others else ""))
    return ImageFolder(path, names, read, *split_classes(path, names, flag), left_out(others, names))


def load_folder(folder: ImageFolder, image_size: int, num_workers: int) -> Tensor:
    """All images, (N, C, image_size, image_size) uint8, with one channel if every image is gray and three otherwise.

    Raises:
        ValueError: one cannot be read; names it.
    """
    chunks = chunked(range(len(folder.names)), 64)          # small images: a task for each would cost more than they do
    pixels, all_gray = np.empty((len(folder.names), image_size, image_size, 3), np.uint8), True
    parts = zip(chunks, folder.stream(chunks, image_size, num_workers))
    for chunk, (part, gray) in tqdm(parts, f"reading {len(folder.names)} images", len(chunks), disable=None, leave=False):
        pixels[chunk.start : chunk.stop] = part
        all_gray = all_gray and gray
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return pixels[:, :1].clone() if all_gray else pixels
