"""sample.py as a user runs it, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT

import sample
from models import DiT, build_network
from utils.checkpoints import load_network, read_weights, resolve_weights, write_weights
from utils.data import to_pixels
from utils.sampling import sample_average_velocity
from utils.seeding import generator


def test_sample(results, tmp_path, capsys):
    run = str(results / "student-digits")
    sample.main([run, "--num-images", "20", "--formats", "grid", "png", "npz", "gif", "--out", str(tmp_path / "s"), "--device", "cpu"])
    arrays = {n: np.load(tmp_path / "s" / f"{n}step.npz") for n in (1, 2, 4)}
    assert arrays[1]["arr_0"].shape == (20, 8, 8, 1) and arrays[1]["arr_0"].dtype == np.uint8
    assert arrays[1]["labels"].tolist() == [i // 2 for i in range(20)]
    assert not np.array_equal(arrays[1]["arr_0"], arrays[4]["arr_0"])
    single = np.asarray(Image.open(tmp_path / "s/1step/000003_class1.png"))
    assert np.array_equal(single, arrays[1]["arr_0"][3, :, :, 0])
    assert Image.open(tmp_path / "s/4step.gif").n_frames == 5 and (tmp_path / "s/2step.png").exists()

    for name, ending in {"grid": ".png", "png": "", "npz": ".npz", "gif": ".gif"}.items():
        with pytest.raises(ValueError, match=rf"s/2step{ending} is there already, and is not overwritten"):
            sample.main([run, "--num-images", "4", "--num-steps", "2", "--formats", name, "--out", str(tmp_path / "s"), "--device", "cpu"])

    sample.main([run, "--num-images", "20", "--formats", "grid", "npz", "--out", str(tmp_path / "t"), "--num-steps", "1",
                 "--batch-size", "7", "--device", "cpu"])
    whole, parts = (np.asarray(Image.open(tmp_path / folder / "1step.png")).astype(int) for folder in "st")
    assert whole.shape == parts.shape and np.abs(whole - parts).max() <= 1    # all 20, not the first batch
    again = np.load(tmp_path / "t/1step.npz")["arr_0"]
    assert np.abs(again.astype(int) - arrays[1]["arr_0"]).max() <= 1          # batches of any size, the same images

    teacher = str(results / "teacher-digits/checkpoints/step_00000006/ema.safetensors")
    for scale in ("1", "100"):
        sample.main([teacher, "--guidance-scale", scale, "--classes", "7", "3", "--num-images", "4", "--num-steps", "2", "--method", "heun",
                     "--formats", "npz", "--out", str(tmp_path / scale), "--device", "cpu"])
    sample.main([teacher, "--guidance-scale", "100", "--guidance-interval", "0", "0.1", "--classes", "7", "3", "--num-images", "4",
                 "--num-steps", "2", "--method", "heun", "--formats", "npz", "--out", str(tmp_path / "late"), "--device", "cpu"])
    one, strong, late = (np.load(tmp_path / scale / "2step.npz") for scale in ("1", "100", "late"))
    assert not np.array_equal(late["arr_0"], strong["arr_0"])
    assert one["labels"].tolist() == [7, 7, 3, 3] and not np.array_equal(one["arr_0"], strong["arr_0"])


def test_samples_may_start_from_larger_noise(results, tmp_path):
    """The same noise, as many times as asked."""
    def samples(name, scale):
        sample.main([str(results / "student-digits"), "--num-images", "4", "--num-steps", "1", "--formats", "npz", "--device", "cpu",
                     "--out", str(tmp_path / name), "--noise-scale", scale])
        return np.load(tmp_path / name / "1step.npz")["arr_0"]

    network, _ = load_network(results / "student-digits", build_network)
    z = torch.randn(4, 1, 8, 8, generator=generator(torch.device("cpu"), 0, "noise"))
    y = torch.arange(4) * 10 // 4
    expected = to_pixels(sample_average_velocity(network.at_guidance(None), 1.5 * z, y, 1)).permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(samples("larger", "1.5").astype(int) - expected).max() <= 1
    assert np.abs(samples("plain", "1").astype(int) - expected).max() > 10


def test_samples_of_before_stay(results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for few in (("1",), ("2",), ("2", "4"), ("4",)):
        sample.main([str(results / "student-digits"), "--num-images", "10", "--num-steps", *few, "--device", "cpu"])
    written = {str(file) for file in Path().rglob("*.png")}
    assert written == {"samples/1step.png", "samples/2step.png", "samples-2/2step.png", "samples-2/4step.png", "samples/4step.png"}


@pytest.mark.parametrize("formats", [["grid", "npz"], ["grid", "gif", "npz"]])
def test_a_grid_of_many_images_shows_every_class(results, tmp_path, formats, monkeypatch):
    """100 of them, at even distances, not the first 100."""
    seen = {}
    monkeypatch.setattr(sample, "save_grid", lambda path, x: seen.update(grid=x))
    monkeypatch.setattr(sample, "save_gif", lambda path, states: seen.update(gif=states))
    sample.main([str(results / "student-digits"), "--num-images", "230", "--num-steps", "2", "--formats", *formats, "--out", str(tmp_path),
                 "--device", "cpu"])
    arrays = np.load(tmp_path / "2step.npz")
    few = np.arange(100) * 230 // 100
    assert set(arrays["labels"][few]) == set(range(10))
    shown = torch.from_numpy(arrays["arr_0"][few]).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(seen["grid"], shown)
    if "gif" in formats:
        assert len(seen["gif"]) == 3
        torch.testing.assert_close(seen["gif"][-1].clamp(-1, 1), shown, rtol=0, atol=1 / 127)


@pytest.mark.parametrize(("arguments", "message"), [
    (["student-digits", "--guidance-scale", "2"], "guidance scale 2.0: this student has its guidance inside"),
    (["student-digits", "--guidance-interval", "0", "0.8"], "are a teacher's"),
    (["student-digits", "--method", "heun"], "are a teacher's"),
    (["teacher-digits", "--guidance-interval", "0.2", "0.8"], "--guidance-interval 0.2 0.8: nothing is guided without a --guidance-scale"),
    (["teacher-digits", "--guidance-interval", "0.2", "0.8", "--guidance-scale", "1"], "nothing is guided"),
    (["student-digits", "--classes", "eleven"], "eleven.*0, 1, 2"),
    (["teacher-digits", "--renoise", "True"], "only a student"),
    (["nowhere"], "no checkpoint"),
    ([str(ROOT / "checkpoints/classifier-mnist.safetensors")], "is a classifier, a network of another kind"),
])
def test_sample_errors(results, tmp_path, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sample.main([str(results / arguments[0]), *arguments[1:], "--out", str(tmp_path / "x"), "--device", "cpu"])
    assert not (tmp_path / "x").exists()
    weights, metadata = read_weights(resolve_weights(results / "teacher-digits"))
    write_weights(tmp_path / "one.safetensors", weights, metadata | {"classes": ["cat"]})
    said = "--guidance-scale 2.0: guidance needs at least 2 classes, and the data have 1; use --guidance-scale 1"
    with pytest.raises(ValueError, match=said):
        sample.main([str(tmp_path / "one.safetensors"), "--guidance-scale", "2", "--out", str(tmp_path / "x"), "--device", "cpu"])
    with pytest.raises(ValueError, match="--guidance-scale nan: must be a number"):
        sample.Config("x", guidance_scale=float("nan"))
    for file in (__file__, f"{__file__}/images"):
        with pytest.raises(ValueError, match=f"--out {file}: must be a folder, not a file"):
            sample.Config("x", out=file)


@pytest.mark.parametrize("formats", [["grid"], ["png"], ["gif"], ["npz", "grid"]])
def test_channels_that_no_picture_has_are_told_before_drawing(tmp_path, formats):
    """As of a teacher of latents that was imported without them; arrays hold any number."""
    network, path = DiT("DiT-Test/4", 8, 4, 0), tmp_path / "t.safetensors"
    command = [str(path), "--num-images", "2", "--num-steps", "1", "--out", str(tmp_path / "out"), "--device", "cpu", "--formats"]
    write_weights(path, network.state_dict(),
                  dict(kind="teacher", architecture=network.architecture, classes=[], config={}, step=0))
    with pytest.raises(ValueError, match=rf"--formats {' '.join(formats)}: must be npz alone: .*t\.safetensors makes 4 channels"):
        sample.main([*command, *formats])
    assert not (tmp_path / "out").exists()
    sample.main([*command, "npz"])
    assert np.load(tmp_path / "out/1step.npz")["arr_0"].shape == (2, 8, 8, 4)


@pytest.mark.parametrize(("classes", "asked", "name"), [
    (["1", "10", "2"], "10", "class10"), (["1", "10", "a/b 2"], "a/b 2", "classa_b_2"),    # the first would be 1 by its number
    (["cat", "dog"], "dog", "class1"), ([], None, "class0")])
def test_single_images_name_their_class_as_it_was_asked_for(tmp_path, classes, asked, name):
    network, path = DiT("DiT-Test/4", 8, 1, len(classes)), tmp_path / "t.safetensors"
    write_weights(path, network.state_dict(),
                  dict(kind="teacher", architecture=network.architecture, classes=classes, config={}, step=0))
    sample.main([str(path), *(["--classes", asked] if asked else []), "--num-images", "1", "--num-steps", "1", "--formats", "png",
                 "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert [file.name for file in (tmp_path / "out/1step").iterdir()] == [f"000000_{name}.png"]


def test_a_full_disk_leaves_no_half_of_an_array(results, tmp_path, monkeypatch):
    def cut_short(file, **_):
        file.touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", cut_short)
    with pytest.raises(OSError, match=r"could not write \S*1step.npz"):
        sample.main([str(results / "student-digits"), "--num-images", "1", "--num-steps", "1", "--formats", "npz", "--device", "cpu",
                     "--out", str(tmp_path / "out")])
    assert not list((tmp_path / "out").iterdir())
