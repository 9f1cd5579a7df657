"""Gray images of more than 8 bits: one scale for all of a format, or none."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from own_images import read_folder
from PIL import Image


def gray16(values: np.ndarray, path: Path) -> None:
    Image.fromarray(values.astype(np.uint16)).save(path)


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    gray16(np.arange(256).reshape(16, 16) << 8 | 0x7F, tmp_path / "a.png")
    pixels, _, _ = read_folder(tmp_path, 16, 1)
    assert torch.equal(pixels.flatten(), torch.arange(256, dtype=torch.uint8))


def test_sixteen_bits_of_either_byte_order(tmp_path):
    values = (np.arange(256).reshape(16, 16) << 8 | 0x7F).astype(">u2")
    Image.frombytes("I;16B", (16, 16), values.tobytes()).save(tmp_path / "a.tif")
    assert Image.open(tmp_path / "a.tif").mode == "I;16B"
    assert torch.equal(read_folder(tmp_path, 16, 1)[0].flatten(), torch.arange(256, dtype=torch.uint8))


def test_dark_images_of_sixteen_bits_have_the_scale_of_bright_ones(tmp_path):
    for name in ("a.pgm", "a.png", "a.tif"):
        gray16(np.arange(256).reshape(16, 16), tmp_path / name)
    (tmp_path / "b.pgm").write_bytes(b"P5 16 16 1000\n" + np.full(256, 250, ">u2").tobytes())          # of 1000, not of 65535
    assert Image.open(tmp_path / "a.pgm").mode == "I"
    pixels = read_folder(tmp_path, 16, 1)[0]
    assert [image.unique().tolist() for image in pixels] == [[0], [0], [0], [64]]


@pytest.mark.parametrize(("values", "mode"), [
    (np.linspace(0, 1, 256, dtype=np.float32), "F"),
    (np.linspace(0, 130_000, 256).astype(np.int32), "I"),
    (np.linspace(0, 250, 256).astype(np.int32), "I"),
], ids=["floats", "32 bits", "dark"])
def test_grays_without_a_known_range_are_refused(tmp_path, values, mode):
    Image.fromarray(values.reshape(16, 16)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=rf"cannot read image .*a\.tif: its pixels \(TIFF, mode {mode}\) are not known.*with 8 bits"):
        read_folder(tmp_path, 16, 1)


@pytest.mark.parametrize(("tag", "value"), [(258, 12), (262, 0), (339, 2)], ids=["12 bits", "white is 0", "signed"])
def test_other_tiffs_of_up_to_sixteen_bits_are_refused(tmp_path, tag, value):
    """Pillow gives their numbers as they are."""
    tags = {256: 16, 257: 16, 258: 16, 259: 1, 262: 1, 273: 8, 277: 1, 278: 16, 279: 512, 339: 1} | {tag: value}
    entries = b"".join(struct.pack("<HHII", key, 4 if key in (273, 279) else 3, 1, number) for key, number in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "a.tif").write_bytes(struct.pack("<2sHI", b"II", 42, 520) + np.full(256, 3000, "<i2").tobytes() + directory)
    with pytest.raises(ValueError, match=r"a\.tif: its pixels \(TIFF, mode I.*16 without sign"):
        read_folder(tmp_path, 16, 1)
