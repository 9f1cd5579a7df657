"""A user's own images: folders and zips, what is read from them and what is refused."""

import errno
import io
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from own_images import photo, read_folder, save, zipped
from PIL import Image, features

from utils.data import load_images

RED, GREEN, BLUE, GRAY = (220, 20, 40), (20, 200, 60), (30, 60, 210), (128, 128, 128)


def flat(colour, size=(24, 24), mode="RGB"):
    return Image.new("RGB", size, colour).convert(mode)


def rotated_jpeg(path: Path) -> None:
    """Red on the left as stored; the orientation tag asks the viewer to turn it, and then red is on top."""
    image = flat(GREEN, (48, 48))
    image.paste(RED, (0, 0, 24, 48))
    exif = Image.Exif()
    exif[0x0112] = 6
    save(path, image, quality=95, subsampling=0, exif=exif)


def gray16(values, path: Path) -> None:
    save(path, Image.fromarray(np.asarray(values, dtype=np.uint16)))


def centre(pixels):
    return pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2].tolist()


# A user's own images.

def test_mixed_formats_in_class_folders(tmp_path):
    """Sorted by class, then by name; transparent pixels are white, 16 bits are scaled, and the orientation tag is obeyed."""
    save(tmp_path / "b/1.PNG", flat(GRAY, mode="L"))
    save(tmp_path / "b/2.jpg", flat(RED), quality=95, subsampling=0)
    save(tmp_path / "a/3.webp", flat(GREEN), lossless=True)
    save(tmp_path / "a/4.gif", flat(BLUE, mode="P"))
    save(tmp_path / "a/10.bmp", flat(BLUE))
    save(tmp_path / "c/clear.png", Image.new("RGBA", (24, 24), (*RED, 0)))
    save(tmp_path / "c/half.png", Image.new("RGBA", (24, 24), (0, 0, 0, 128)))
    gray16(np.full((24, 24), 0x4321), tmp_path / "c/deep.png")
    rotated_jpeg(tmp_path / "d/turned.jpeg")

    pixels, labels, classes = read_folder(tmp_path, 8, 2)
    assert classes == ["a", "b", "c", "d"] and labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3]
    expected = [BLUE, GREEN, BLUE, GRAY, RED, (255,) * 3, (0x43,) * 3, (127,) * 3]             # 10.bmp, 3.webp, 4.gif, ...
    for image, colour in zip(pixels, expected):
        assert centre(image) == pytest.approx(list(colour), abs=3)
    turned = pixels[8].float()
    torch.testing.assert_close(turned[:, 0].mean(1), torch.tensor(RED).float(), rtol=0, atol=12)
    torch.testing.assert_close(turned[:, -1].mean(1), torch.tensor(GREEN).float(), rtol=0, atol=12)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.bmp", "x.gif", "bit.png", "deep.png", "alpha.png"])
def test_one_channel_if_every_image_is_gray(tmp_path, name):
    mode = {"bit.png": "1", "alpha.png": "LA"}.get(name, "L")
    if name == "deep.png":
        gray16(np.full((24, 24), 0xFFFF), tmp_path / name)
    else:
        save(tmp_path / name, flat((255, 255, 255), mode=mode))
    save(tmp_path / "y.png", flat(GRAY, mode="L"))
    pixels, _, _ = read_folder(tmp_path, 8, 2)
    assert pixels.shape[1] == 1 and pixels[0].min() == 255 and pixels[1].unique().tolist() == [128]


def test_three_channels_if_one_image_has_colour(tmp_path):
    save(tmp_path / "a.png", flat(GRAY, mode="L"))
    save(tmp_path / "b.png", flat(RED))
    pixels, _, _ = read_folder(tmp_path, 8, 2)
    assert pixels[:, :, 4, 4].tolist() == [list(GRAY), list(RED)]


def test_gray_images_may_be_read_as_colour(class_folders, tmp_path):
    """A network of colour images, or of latents, sees three channels whatever the images are."""
    save(tmp_path / "gray" / "a.png", flat(GRAY, mode="L"))
    one, three = (load_images(str(tmp_path / "gray"), image_size=8, num_channels=n) for n in (None, 3))
    assert one.shape == (1, 8, 8) and three.shape == (3, 8, 8) and torch.equal(three.pixels, one.pixels.expand(-1, 3, -1, -1))
    assert load_images(str(class_folders), image_size=8, num_channels=1).shape == (3, 8, 8)


def test_linked_class_folder(class_folders, tmp_path):
    (tmp_path / "linked").mkdir()
    for folder in class_folders.iterdir():
        (tmp_path / "linked" / folder.name).symlink_to(folder, target_is_directory=True)
    one, other = read_folder(class_folders, 8, 1), read_folder(tmp_path / "linked", 8, 1)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and one[2] == other[2]


def test_zip_with_backslashes_and_a_folder_that_ends_like_an_image(class_folders, tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.mkdir("odd.png")
        for file in class_folders.rglob("*.*"):
            info = zipfile.ZipInfo("x")
            info.filename = str(file.relative_to(class_folders)).replace("/", "\\")
            archive.writestr(info, file.read_bytes())
    one, other = read_folder(class_folders, 8, 1), read_folder(tmp_path / "photos.zip", 8, 1)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and one[2] == other[2]


def test_transparent_palette_shows_white(tmp_path):
    image = Image.new("P", (24, 24), 0)
    image.putpalette([*RED, *GREEN])
    save(tmp_path / "a.png", image, transparency=0)
    assert centre(read_folder(tmp_path, 8, 1)[0][0]) == [255]       # white alone is gray


@pytest.mark.parametrize("size", [(90, 30), (30, 90)])
def test_centre_crop(tmp_path, size):
    """Of three squares in a row only the middle one is left, shrunk; the filter lets a trace of its neighbours in at the edge."""
    image = flat(RED, size)
    image.paste(BLUE, (30, 0, 60, 30) if size[0] > 30 else (0, 30, 30, 60))
    save(tmp_path / "a.png", image)
    pixels, _, _ = read_folder(tmp_path, 10, 1)
    assert pixels.shape == (1, 3, 10, 10)
    assert centre(pixels[0]) == pytest.approx(list(BLUE), abs=3)
    assert (pixels[0] - torch.tensor(BLUE).view(3, 1, 1)).abs().max() < 30


def test_path_has_size_32_unless_told(loose_images):
    assert load_images(str(loose_images)).shape == (3, 32, 32)
    assert load_images(str(loose_images), image_size=12).shape == (3, 12, 12)


def test_folder_without_classes(loose_images):
    images = load_images(str(loose_images), image_size=12)
    assert images.classes == [] and images.labels.tolist() == [0, 0, 0]
    assert images.flip


def test_files_that_are_no_images_are_passed_over(loose_images):
    pixels, _, _ = read_folder(loose_images, 8, 1)
    for name in ("notes.txt", ".hidden.png", ".thumbnails/0.png", "__MACOSX/._0.png"):
        (loose_images / name).parent.mkdir(exist_ok=True)
        (loose_images / name).write_text("no image")
    assert torch.equal(read_folder(loose_images, 8, 1)[0], pixels)


def test_a_pdf_is_no_image(loose_images):
    """Pillow writes PDF but does not read it."""
    (loose_images / "paper.pdf").write_bytes(b"%PDF-1.4")
    assert len(read_folder(loose_images, 8, 1)[0]) == 3


@pytest.mark.parametrize("clutter", [False, True], ids=["clean", "clutter"])
@pytest.mark.parametrize("top", ["", "top/", "top/photos/"])
@pytest.mark.parametrize("kind", ["class_folders", "loose_images"])
def test_zip_is_the_same_as_its_folder(request, tmp_path, kind, top, clutter):
    folder = request.getfixturevalue(kind)
    archive = zipped(tmp_path / "photos.zip", folder, top, clutter)
    pixels, labels, classes = read_folder(folder, 8, 2)
    found_pixels, found_labels, found_classes = read_folder(archive, 8, 2)
    assert torch.equal(found_pixels, pixels)
    assert torch.equal(found_labels, labels)
    assert found_classes == classes


def test_number_of_threads_does_not_matter(class_folders):
    one, many = read_folder(class_folders, 8, 1), read_folder(class_folders, 8, 8)
    assert torch.equal(one[0], many[0]) and torch.equal(one[1], many[1])


# What a user can get wrong.

def refused(path, match, size=8):
    with pytest.raises(ValueError, match=match) as raised:
        load_images(str(path), image_size=size)
    return str(raised.value)


@pytest.mark.parametrize(("at", "said"), [(b"PK\1\2", "photos.zip: Bad magic number.*zip the images again"),
                                          (b"\x5d\0\0", "cannot read .*photos.zip: cat/1.png: ")], ids=["list", "LZMA"])
def test_a_damaged_zip(tmp_path, at, said):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("cat/1.png", bytes(1000))
    content = (tmp_path / "photos.zip").read_bytes()
    (tmp_path / "photos.zip").write_bytes(content.replace(at, bytes([255] * len(at)), 1))
    refused(tmp_path / "photos.zip", said)


@pytest.mark.parametrize(("at", "content", "said"), [
    (6, b"\xff", r"--data .*photos.zip: zip file version 25\.5"),
    (20, b"\0\0\1\0\0\0\1\0", "cannot read .*photos.zip: cat/1.png: it ends too early"),
], ids=["version", "sizes"])
def test_a_zip_with_a_wrong_list(tmp_path, at, content, said):
    """Of what zipfile raises other errors."""
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("cat/1.png", bytes(1000))
    whole = (tmp_path / "photos.zip").read_bytes()
    at += whole.index(b"PK\1\2")
    (tmp_path / "photos.zip").write_bytes(whole[:at] + content + whole[at + len(content) :])
    refused(tmp_path / "photos.zip", said)


def test_empty_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    refused(tmp_path, f"--data {re.escape(str(tmp_path))} holds no image.*png.*; it holds 1 .txt")
    (tmp_path / "1.heic").write_text("no image")
    refused(tmp_path, r"it holds 1 .heic, 1 .txt")


def test_neither_folder_nor_zip(tmp_path):
    (tmp_path / "photos.rar").write_bytes(b"Rar!")
    refused(tmp_path / "photos.rar", r"photos\.rar is neither a folder nor a zip")


def test_unreadable_image_is_named(class_folders):
    (class_folders / "dog/broken.png").write_text("no image")
    refused(class_folders, r"cannot read image .*dog/broken\.png: its 8 bytes are no image that Pillow reads$")
    (class_folders / "dog/broken.png").write_bytes(b"")
    refused(class_folders, r"cannot read image .*dog/broken\.png: its 0 bytes are no image")


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    photo(0, (64, 64)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("in_zip", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_truncated_image_is_named(class_folders, tmp_path, kind, in_zip):
    content = encoded(kind)
    (class_folders / f"dog/torn.{kind.lower()}").write_bytes(content[: len(content) // 2])
    path = zipped(tmp_path / "photos.zip", class_folders) if in_zip else class_folders
    refused(path, rf"cannot read image .*dog/torn\.{kind.lower()}")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_damaged_avif_is_named(class_folders):
    """Pillow's AVIF reader raises RuntimeError where others raise OSError."""
    head, tail = encoded("AVIF").split(b"mdat")
    (class_folders / "dog/torn.avif").write_bytes(head + b"mdat" + bytes(len(tail)))
    refused(class_folders, r"cannot read image .*dog/torn\.avif")


def test_damaged_member_of_a_zip_is_named(class_folders, tmp_path):
    path = zipped(tmp_path / "photos.zip", class_folders)
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("dog/1.png").header_offset + 100
    content = bytearray(path.read_bytes())
    content[start] ^= 0xFF
    path.write_bytes(content)
    refused(path, r"dog/1\.png")


@pytest.mark.parametrize(("link", "target", "named"), [
    ("cat/loop", "..", "cat/loop"), ("loop", ".", "loop"), ("cat/up", "../..", "cat/up"), ("cat/out", "../../other", "cat/out/back"),
])
def test_a_link_that_leads_back_is_refused(class_folders, tmp_path, link, target, named, monkeypatch):
    """Its images would be there many times, under wrong classes. A hidden one does no harm."""
    if link == "cat/out":
        (tmp_path / "other").mkdir()
        (tmp_path / "other/back").symlink_to(class_folders / "cat", target_is_directory=True)
    (class_folders / link).symlink_to(target, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    for path in (class_folders, "photos", "photos/../photos"):
        refused(path, f"--data {re.escape(str(path))}: the link {re.escape(str(path))}/{named} leads to a folder that it is in")
    (class_folders / link).rename(class_folders / ".hidden")
    assert len(read_folder(class_folders, 8, 1)[0]) == 4


@pytest.mark.parametrize("link", ["eel", "cat/3.png"], ids=["class folder", "image"])
def test_a_link_that_leads_nowhere_is_refused(class_folders, link):
    """What it led to may be on a disk that is not mounted. A hidden one does no harm."""
    (class_folders / link).symlink_to("/nowhere")
    refused(class_folders, f"the link {re.escape(str(class_folders / link))} leads nowhere")
    (class_folders / link).rename(class_folders / ".hidden")
    assert len(read_folder(class_folders, 8, 1)[0]) == 4


def test_a_folder_that_cannot_be_listed_is_no_empty_one(class_folders, monkeypatch):
    """But for lost+found, which belongs to root, on a disk of one's own."""
    def scandir(folder, scan=os.scandir):
        if Path(folder).name in ("dog", "lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="photos/dog"):
        read_folder(class_folders, 8, 1)
    (class_folders / "dog").rename(class_folders / "lost+found")
    assert read_folder(class_folders, 8, 1)[2] == ["cat", "owl"]


def test_loose_images_beside_class_folders(class_folders):
    save(class_folders / "zebra.png", photo(9))
    refused(class_folders, r"mixes class folders and loose images \(zebra\.png\)")


@pytest.mark.parametrize("splits", [("train", "test"), ("train", "val"), ("Train", "Validation", "Test"), ("Training", "Testing"),
                                    ("training_set", "test_set"), ("trainset", "Eval-Set", "dev set"), ("train", "development", "test")])
def test_splits_are_no_classes(tmp_path, splits):
    """The message offers the training split."""
    for split in splits:
        save(tmp_path / split / "cat/1.png", photo(0))
    message = refused(tmp_path, "splits and not classes")
    assert message.endswith(f"use --data {tmp_path / splits[0]}")


@pytest.mark.parametrize("classes", [["cat", "dev"], ["sun set", "test"], ["set", "valid"], ["trainer", "training"]])
def test_a_class_may_be_called_like_a_split(tmp_path, classes):
    for name in classes:
        save(tmp_path / name / "1.png", photo(0))
    assert read_folder(tmp_path, 8, 1)[2] == classes


@pytest.mark.parametrize("in_zip", [False, True], ids=["folder in a folder", "zip"])
def test_only_a_split_that_exists_is_offered(tmp_path, in_zip):
    for split in ("train", "test"):
        for number in range(2):
            save(tmp_path / "photos/top" / split / f"cat/{number}.png", photo(number))
    path = zipped(tmp_path / "photos.zip", tmp_path / "photos/top") if in_zip else tmp_path / "photos"
    offer = re.search("use --data (.*)", refused(path, "splits and not classes"))
    assert offer is None or Path(offer[1]).exists()
