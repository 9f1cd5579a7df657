"""Latents: what is written, going on, and refusing to. With a tiny random autoencoder instead of a downloaded one."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from photos import SCALING, SHIFT, contents, encoded, prepare, save_autoencoder

import prepare_latents
from utils import autoencoder as autoencoders
from utils import latents
from utils.autoencoder import Autoencoder
from utils.checkpoints import fingerprint
from utils.data import Batches, load_data, load_images, to_range
from utils.distributed import Ranks
from utils.folders import ImageFolder

CPU = torch.device("cpu")


# What is written.

def test_latents_are_the_scaled_means_of_each_image_and_of_its_mirror_image(photo_latents):
    data, images = load_data(str(photo_latents / "prepared")), load_images(str(photo_latents / "photos"), image_size=16)
    assert (len(data), data.shape, data.image_size, data.classes) == (12, (4, 8, 8), 16, ["cat", "dog"])
    assert torch.equal(data.labels, images.labels) and [len(part) for part in data.shards.parts] == [5, 5, 2]
    x, values = to_range(images.pixels), data.shards.to(CPU)
    assert values.dtype == torch.float16 and values.std() > 0.05
    torch.testing.assert_close(values[:, 0].float(), encoded(photo_latents, x), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(values[:, 1].float(), encoded(photo_latents, x.flip(-1)), atol=2e-3, rtol=1e-3)
    assert (values[:, 1] - values[:, 0].flip(-1)).abs().max() > 0.01        # no mirrored latent would do
    assert torch.equal(data.shards[torch.tensor([11, 0, 5])], values[[11, 0, 5]])


def test_batches_choose_images_and_mirror_images_as_those_of_pixels_do(photo_latents):
    images = load_images(str(photo_latents / "photos"), image_size=16)
    ranks = Ranks(1, 2, CPU)
    pixels, z = (Batches(data, 10, 3, ranks) for data in (images, load_data(str(photo_latents / "prepared"))))
    for step in (1, 2, 7):
        (x, y), (z_x, z_y) = pixels(step), z(step)
        assert torch.equal(y, z_y) and z_x.dtype == torch.float32
        torch.testing.assert_close(z_x, encoded(photo_latents, x), atol=2e-3, rtol=1e-3)


def test_without_mirror_images(photo_latents, tmp_path):
    prepare(photo_latents, tmp_path / "out", "--flip", "False", "--dtype", "float32")
    data, images = load_data(str(tmp_path / "out")), load_images(str(photo_latents / "photos"), image_size=16)
    batch, plain = (Batches(each, 6, 0, Ranks(0, 1, CPU))(1)[0] for each in (data, replace(images, flip=False)))
    torch.testing.assert_close(batch, encoded(photo_latents, plain), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="--flip True: .* holds no mirror images' latents"):
        Batches(data, 6, 0, Ranks(0, 1, CPU), True)


def test_decode_is_diffusers_own_in_chunks_of_any_shape(photo_latents, monkeypatch, draw):
    from diffusers import AutoencoderKL

    autoencoder = Autoencoder(str(photo_latents / "autoencoder"), CPU)
    z = torch.randn(2, 3, 4, 8, 8, generator=draw)
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(photo_latents / "autoencoder").decode(z.flatten(0, 1) / SCALING + SHIFT).sample
    monkeypatch.setattr(autoencoders, "CHUNK_PIXELS", 4 * 16 * 16)
    torch.testing.assert_close(autoencoder.decode(z), expected.unflatten(0, (2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(autoencoder.decode(z[0]), expected[:3], atol=1e-5, rtol=1e-4)


# Going on, and refusing to.

def test_missing_and_torn_shards_are_written_again_alike(photo_latents, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(photo_latents / "prepared", out)
    (out / "shard_00000.safetensors").unlink()
    whole, torn = out / "shard_00001.safetensors", out / "shard_00002.safetensors"
    torn.write_bytes(torn.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"shard_00000.* is missing.*repairs it"):
        load_data(str(out))
    shutil.copy(photo_latents / "prepared/shard_00001.safetensors", out / "shard_00000.safetensors")     # whole, but in another one's place
    before = whole.stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"shard_00002.* is torn.*repairs it"):
        load_data(str(out))
    (out / "shard_00000.safetensors").unlink()
    prepare(photo_latents, out)
    assert contents(out) == contents(photo_latents / "prepared") and whole.stat().st_mtime_ns == before


def test_a_shard_that_may_not_be_read_is_not_written_again(photo_latents, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(photo_latents / "prepared", out)
    shard, before = out / "shard_00001.safetensors", contents(out)
    monkeypatch.setattr(os, "access", lambda path, mode, plain=os.access: Path(path) != shard and plain(path, mode))    # root may read any
    for read in (lambda: load_data(str(out)), lambda: prepare(photo_latents, out)):
        with pytest.raises(PermissionError, match=f"{shard} may not be read"):
            read()
    assert contents(out) == before


def test_stopped_in_the_middle(photo_latents, tmp_path, monkeypatch):
    """What was written stays, training refuses the rest, and the same command goes on to the same bytes."""
    calls = []

    def interrupted(self, x, encode=Autoencoder.encode):
        calls.append(len(x))
        if len(calls) > 6:                                  # a shard has two batches of two views
            raise KeyboardInterrupt
        return encode(self, x)

    monkeypatch.setattr(Autoencoder, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(photo_latents, tmp_path / "out")
    monkeypatch.undo()
    assert sorted(contents(tmp_path / "out")) == ["preparing.json", "shard_00000.safetensors"]
    with pytest.raises(ValueError, match="not finished; the same prepare_latents.py command goes on"):
        load_data(str(tmp_path / "out"))
    prepare(photo_latents, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(photo_latents / "prepared")


def test_ranks_share_the_shards(photo_latents, tmp_path, monkeypatch):
    """Each rank writes its own; together they write what one process does."""
    written = []
    for rank in (1, 0):                                     # the main one last, since here nobody waits
        monkeypatch.setattr(prepare_latents.distributed, "start", lambda device, rank=rank: Ranks(rank, 2, CPU))
        monkeypatch.setattr(Ranks, "wait", lambda self: None)
        monkeypatch.setattr(latents, "is_whole", lambda *_: False)              # both look before either writes
        (tmp_path / "out").mkdir(exist_ok=True)
        if rank == 1:
            monkeypatch.setattr(latents, "is_latents", lambda path: True)       # the main one has begun
            monkeypatch.setattr(latents, "begin", lambda *_: None)
        prepare(photo_latents, tmp_path / "out")
        written.append({name for name in contents(tmp_path / "out") if name.startswith("shard")})
    assert written[0] == {"shard_00001.safetensors"} and contents(tmp_path / "out") == contents(photo_latents / "prepared")


@pytest.mark.parametrize(("flags", "message"), [
    (["--flip", "False"], "other latents .*flip: False, was True"),
    (["--image-size", "32"], "image_size: 32, was 16"),
    (["--dtype", "float32"], "dtype: float32, was float16"),
    (["--shard-size", "6"], "shard_size: 6, was 5"),
    (["--autoencoder", "{other}"], "autoencoder_weights: [0-9a-f]{8}, was"),
    (["--autoencoder", "{nowhere}"], "cannot load the autoencoder .*nowhere(.|\n)*--autoencoder PATH"),
    (["--image-size", "15"], "--image-size 15: must be divisible by 2"),
])
def test_other_options_are_refused(photo_latents, tmp_path, flags, message):
    save_autoencoder(tmp_path / "other", seed=1)
    out = photo_latents / "prepared"
    before = contents(out)
    with pytest.raises(ValueError, match=message):
        prepare(photo_latents, out, *(flag.format(other=tmp_path / "other", nowhere=tmp_path / "nowhere") for flag in flags))
    assert contents(out) == before


def test_other_images_and_foreign_folders_are_refused(photo_latents, tmp_path):
    for name in ("photos", "autoencoder", "prepared"):
        shutil.copytree(photo_latents / name, tmp_path / name)
    with pytest.raises(ValueError, match=r"OUT .* exists and holds no latents"):
        prepare(photo_latents, tmp_path)
    prepare(tmp_path, tmp_path / "prepared")                # the same images and weights, which have moved
    assert load_data(str(tmp_path / "prepared")).autoencoder["source"] == str(tmp_path / "autoencoder")
    (tmp_path / "photos/cat/0.jpg").rename(tmp_path / "photos/cat/9.jpg")
    with pytest.raises(ValueError, match="other latents .listing"):
        prepare(tmp_path, tmp_path / "prepared")
    with pytest.raises(ValueError, match=r"SOURCE .*prepared holds no image"):
        prepare_latents.main([str(photo_latents / "prepared"), str(tmp_path / "out"), "--device", "cpu"])


def test_names_need_not_be_utf8():
    folder = ImageFolder(Path("photos"), ["caf\udce9/1.png"], lambda name: b"", ["caf\udce9"], [0])
    description = prepare_latents.describe(prepare_latents.Config("photos", "out"), folder,
                                           SimpleNamespace(factor=8, num_channels=4, entry={"source": "x"}))
    assert description["listing"] == fingerprint(b"caf\xe9/1.png") and latents.identity(description)
