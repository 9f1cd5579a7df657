"""Pixels and their range, named data sets, and what guidance needs of them."""

import errno
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.error import URLError

import pytest
import torch
import torchvision
from filelock import FileLock
from runs import make_images

import evaluate
from models import DiT
from utils.checkpoints import write_weights
from utils.data import check_guidance, load_held_out, load_images, to_pixels, to_range

# Range.

def test_every_pixel_value_survives_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = to_range(pixels)
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(to_pixels(x), pixels)


def test_to_pixels_rounds_and_clips():
    x = torch.tensor([-9.0, -1, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 0.999, 1, 9])
    assert to_pixels(x).tolist() == [0, 0, 0, 1, 255, 255, 255]


# Named data sets.

def test_digits():
    images = load_images("digits")
    assert (len(images), images.shape, images.pixels.dtype) == (1797, (1, 8, 8), torch.uint8)
    assert images.classes == list("0123456789") and images.labels.bincount().min() >= 174
    assert (images.pixels.min(), images.pixels.max()) == (0, 255)
    assert not images.flip


def test_digits_resized_keep_their_look():
    """At twice the size, the mean of each block of four pixels follows the pixel that it came from."""
    small, large = load_images("digits").pixels, load_images("digits", image_size=16).pixels
    assert large.shape == (1797, 1, 16, 16)
    blocks = torch.nn.functional.avg_pool2d(large.float(), 2)
    assert torch.stack([blocks.flatten(), small.float().flatten()]).corrcoef()[0, 1] > 0.99


def test_unknown_name_lists_what_is_allowed():
    with pytest.raises(ValueError, match="--data mnits.*mnist, cifar10, digits.*folder or zip"):
        load_images("mnits")


def test_classes_are_checked_once(tmp_path):
    for data, classes in (("digits", list("0123456789")), (make_images(tmp_path / "photos", ["cat", "dog"]), ["cat", "dog"])):
        checked = []
        load_images(str(data), check=checked.append)
        assert checked == [classes]


def test_errors_of_held_out_images_name_their_flag(tmp_path):
    for path, message in (("nowhere", "no such data set"), (str(tmp_path), "holds no image"), (__file__, "neither a folder")):
        with pytest.raises(ValueError, match=f"^--held-out {re.escape(path)}.*{message}"):
            load_held_out(load_images("digits"), path)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/0.png").write_bytes(b"not decoded")    # the classes are told before an hour of decoding
    with pytest.raises(ValueError, match=rf"^--held-out {re.escape(str(tmp_path))} has classes \['cat'\]; --data digits has \['0', "):
        load_held_out(load_images("digits"), str(tmp_path))


@pytest.mark.parametrize("error", [RuntimeError("Error downloading train-images-idx3-ubyte.gz"), URLError("no route to host")])
def test_without_a_network_the_message_offers_digits(monkeypatch, tmp_path, error):
    def offline(*_, **__):
        raise error

    monkeypatch.setattr(torchvision.datasets, "MNIST", offline)
    with pytest.raises(ValueError, match="--data mnist.*here.*--data digits") as raised:
        load_images("mnist", str(tmp_path / "here"))
    assert str(error) in str(raised.value)


def test_one_download_at_a_time(monkeypatch, tmp_path):
    """The processes that torchrun starts on a host all ask for the data at once."""
    busy, alone = threading.Lock(), []

    def download(*_, **__):
        alone.append(busy.acquire(blocking=False))
        time.sleep(0.05)
        busy.release()
        raise RuntimeError("no file yet")

    monkeypatch.setattr(torchvision.datasets, "MNIST", download)
    with ThreadPoolExecutor(3) as pool:
        errors = [future.exception() for future in [pool.submit(load_images, "mnist", str(tmp_path)) for _ in range(3)]]
    assert alone == [True] * 3 and all("no file yet" in str(error) for error in errors)


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(errno.ENOLCK, "No locks available")])
def test_a_file_system_without_locks_may_hold_the_data(monkeypatch, tmp_path, error):
    class Three:
        data, targets, classes = torch.zeros(3, 28, 28, dtype=torch.uint8), torch.arange(3), ["0 - zero", "1 - one", "2 - two"]

        def __init__(self, *_, **__):
            pass

    def acquire(self, timeout=-1):
        raise error

    monkeypatch.setattr(torchvision.datasets, "MNIST", Three)
    monkeypatch.setattr(FileLock, "acquire", acquire)
    assert len(load_images("mnist", str(tmp_path))) == 3


@pytest.mark.parametrize("classes", [[], ["cat"]])
def test_guidance_needs_two_classes(classes):
    with pytest.raises(ValueError, match=f"--guidance-scale 2.5: .*have {len(classes)}; use --guidance-scale 1"):
        check_guidance((1.0, 2.5), classes)
    check_guidance((1.0,), classes)
    check_guidance((1.0, 2.5), ["cat", "dog"])


def test_an_evaluation_tells_of_guidance_and_classes_before_any_image_is_decoded(tmp_path):
    network, photos = DiT("DiT-Nano/4", 8, 1, 0), make_images(tmp_path / "photos", ["cat"])
    write_weights(tmp_path / "teacher.safetensors", network.state_dict(), dict(
        kind="teacher", architecture=network.architecture, classes=[], config={"data": str(photos)}))
    (photos / "cat/torn.png").touch()
    for data, flags, message in ((photos, ["--guidance-scale", "2"], "guidance needs at least 2 classes, and the data have 0"),
                                 (photos, [], r"has classes \['cat'\]; .*teacher.safetensors was trained on \[\]"),
                                 (make_images(tmp_path / "plain", [""]), [], "no classifier .*; there can be none without classes: "),
                                 (tmp_path / "plain", ["--features", "inception"], r"has shape \(3, 8, 8\); .* was trained on 1 channels")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            evaluate.main([str(tmp_path / "teacher.safetensors"), "--data", str(data), *flags, "--device", "cpu"])
