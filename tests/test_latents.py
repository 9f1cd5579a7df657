"""Latents: training, sampling, measuring, with a tiny random autoencoder instead of a downloaded one."""

import json
import shutil
import sys
from pathlib import Path

import foreign
import numpy as np
import pytest
import torch
from photos import SCALING, SHIFT, prepare, save_autoencoder
from PIL import Image
from runs import make_images

import evaluate
import import_teacher
import prepare_latents
import sample
import train_classifier
import train_student
import train_teacher
from models import DiT
from pipeline import SplitMeanFlowPipeline
from utils.autoencoder import Autoencoder
from utils.checkpoints import load_network, read_weights
from utils.data import load_data, load_images, to_pixels
from utils.evaluation import Judge
from utils.latents import originals
from utils.sampling import sample_average_velocity
from utils.seeding import generator
from utils.teachers import check_teacher

CPU = torch.device("cpu")
RUN = ["--global-batch-size", "8", "--log-every", "1", "--comet", "off", "--device", "cpu"]


@pytest.fixture(scope="module")
def results(photo_latents):
    run = ["--data", str(photo_latents / "prepared"), *RUN, "--results-dir", str(photo_latents / "results")]
    train_teacher.main([*run, "--steps", "3", "--model", "DiT-Nano/4", "--sample-steps", "2", "--guidance-scale", "2"])
    train_student.main([*run, "--steps", "2", "--num-steps", "1", "2"])     # finds the teacher by its data
    return photo_latents / "results"


def test_latents_of_other_photos_have_another_fingerprint(photo_latents, tmp_path):
    shutil.copytree(photo_latents / "autoencoder", tmp_path / "autoencoder")
    make_images(tmp_path / "photos", ["dog", "cat"])        # of the same names, drawn in another order
    prepare(tmp_path, tmp_path / "prepared")
    first, again, other = (load_data(str(folder / "prepared")).fingerprint() for folder in (photo_latents, photo_latents, tmp_path))
    assert first == again != other


@torch.no_grad()
def test_teacher_student_and_samples(photo_latents, results, tmp_path):
    """A sample is what the autoencoder makes of the network's latent, down to the pixel."""
    entry = json.loads((photo_latents / "prepared/latents.json").read_text())["autoencoder"]
    assert entry.keys() == {"source", "weights", "scaling", "shift"} and (entry["scaling"], entry["shift"]) == (SCALING, SHIFT)
    for stage in ("teacher", "student"):
        assert read_weights(next(results.glob(f"{stage}-prepared/checkpoints/*/ema.safetensors")))[1]["autoencoder"] == entry
    run = results / "student-prepared"
    assert Image.open(run / "samples/2step_step2.png").size[0] == 3 * (10 * 17 + 1)             # tiles of 16 pixels, enlarged
    assert Image.open(run / "samples/trajectory_2step_step2.gif").n_frames == 3

    sample.main([str(run), "--num-images", "4", "--num-steps", "1", "--formats", "grid", "png", "npz", "gif", "--device", "cpu",
                 "--out", str(tmp_path)])
    network, _ = load_network(run, DiT)
    z = torch.randn(4, 4, 8, 8, generator=generator(CPU, 0, "noise"))
    z = sample_average_velocity(network, z, torch.tensor([0, 0, 1, 1]), 1)
    expected = to_pixels(Autoencoder(str(photo_latents / "autoencoder"), CPU).decode(z)).permute(0, 2, 3, 1).numpy().astype(int)
    assert expected.shape == (4, 16, 16, 3) and expected.std() > 5
    assert np.abs(np.load(tmp_path / "1step.npz")["arr_0"] - expected).max() <= 1
    assert np.abs(np.asarray(Image.open(tmp_path / "1step/000003_class1.png")) - expected[3]).max() <= 1
    assert Image.open(tmp_path / "1step.gif").n_frames == 2 and (tmp_path / "1step.png").exists()
    pipe = SplitMeanFlowPipeline.from_pretrained(run).to("cpu")
    images = pipe([0, 0, 1, 1], 1, generator(CPU, 0, "noise"), output_type="np").images
    assert np.abs(images.astype(int) - expected).max() <= 1


def test_evaluation_compares_decoded_samples_with_the_originals(photo_latents, results, tmp_path, monkeypatch):
    judged = []

    def see(pixels):
        judged.append(pixels)
        return pixels.float().mean((2, 3)), pixels.float().mean((2, 3))[:, :2]

    monkeypatch.setattr(evaluate, "find_classifier", lambda *_: None)
    monkeypatch.setattr(evaluate, "classifier_judge", lambda *_: Judge("colours", see, knows_classes=True))
    evaluate.main([str(results / "student-prepared"), "--held-out", str(photo_latents / "photos"), "--num-steps", "1", "--num-images", "12",
                   "--seeds", "1", "--device", "cpu", "--out", str(tmp_path), "--cache", str(tmp_path)])
    real, held_out, samples = judged[1:]                     # before them two, to see how many features there are
    assert real.shape == held_out.shape == samples.shape == (12, 3, 16, 16)
    photos = load_images(str(photo_latents / "photos"), image_size=16).pixels
    assert sorted(map(bytes, real.numpy())) == sorted(map(bytes, photos.numpy()))
    row, = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert row["teacher_distance [colours, n=12]"]["mean"] >= 0 and (tmp_path / "residual.png").exists()


def test_originals_called_like_a_named_set_are_a_folder_still(photo_latents, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_images(Path("digits"), ["cat", "dog"])
    prepare_latents.main(["digits", "latents", "--autoencoder", str(photo_latents / "autoencoder"), "--image-size", "16",
                          "--device", "cpu"])
    assert load_images(originals("latents")).classes == ["cat", "dog"]


def test_autoencoder_missing_moved_or_wrong(photo_latents, results, tmp_path, monkeypatch):
    """Each is told before any work starts, and --autoencoder names another place."""
    shutil.copytree(photo_latents / "prepared", tmp_path / "prepared")
    file = tmp_path / "prepared/latents.json"
    file.write_text(file.read_text().replace(str(photo_latents / "autoencoder"), str(tmp_path / "gone")))
    save_autoencoder(tmp_path / "other", seed=1)
    train = ["--data", str(tmp_path / "prepared"), *RUN, "--steps", "1", "--results-dir", str(tmp_path / "results")]
    draw = [str(results / "student-prepared"), "--out", str(tmp_path / "samples"), "--device", "cpu"]
    with pytest.raises(ValueError, match=r"cannot load the autoencoder .*gone(.|\n)*--autoencoder PATH"):
        train_teacher.main(train)
    for main, arguments in ((train_teacher.main, train), (sample.main, draw), (evaluate.main, draw)):
        with pytest.raises(ValueError, match=r"wrong autoencoder: .*other has weights [0-9a-f]{8}, .* with [0-9a-f]{8} .*--autoencoder"):
            main([*arguments, "--autoencoder", str(tmp_path / "other")])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "diffusers", None)
        for main, arguments in ((train_teacher.main, train), (sample.main, draw)):
            with pytest.raises(ValueError, match="need the package diffusers.*pip install diffusers"):
                main(arguments)
    assert not (tmp_path / "results").exists() and not (tmp_path / "samples").exists()
    shutil.copytree(photo_latents / "autoencoder", tmp_path / "moved")
    sample.main([*draw, "--autoencoder", str(tmp_path / "moved"), "--num-images", "1", "--num-steps", "1"])
    assert Image.open(tmp_path / "samples/1step.png").size == (48, 48)      # 16 pixels, enlarged


@pytest.mark.parametrize(("main", "flags", "message"), [
    (train_teacher.main, ["--image-size", "32"], "--image-size 32: .*images of 16 pixels"),
    (train_teacher.main, ["--eval-every", "5"], "--eval-every: .*holds latents"),
    (train_classifier.main, [], "holds latents, and here images are needed; these are made from .*photos"),
])
def test_latents_where_they_cannot_be(photo_latents, tmp_path, main, flags, message):
    folder = [] if main is train_classifier.main else ["--results-dir", str(tmp_path / "results")]
    with pytest.raises(ValueError, match=message):
        main(["--data", str(photo_latents / "prepared"), "--device", "cpu", *folder, *flags])
    assert not (tmp_path / "results").exists()


def test_pixels_need_no_autoencoder(tmp_path):
    with pytest.raises(ValueError, match="--autoencoder some: here images are pixels"):
        train_teacher.main(["--data", "digits", "--autoencoder", "some", "--device", "cpu", "--results-dir", str(tmp_path)])


def test_teacher_of_other_latents_is_refused(photo_latents, results):
    data = load_data(str(photo_latents / "prepared"), image_size=16)
    path = results / "teacher-prepared"
    metadata = load_network(path, DiT)[1]
    check_teacher(path, {**metadata, "autoencoder": {**data.autoencoder, "source": "elsewhere"}}, data, None)
    for other in (None, {**data.autoencoder, "scaling": 1.0}, {**data.autoencoder, "weights": "00000000"}):
        with pytest.raises(ValueError, match="was trained on latents of"):
            check_teacher(path, {**metadata, "autoencoder": other}, data, None)


def test_imported_teacher_of_latents(photo_latents, tmp_path, monkeypatch):
    monkeypatch.setattr(foreign, "CHANNELS", 4)
    torch.save(foreign.random_state(), tmp_path / "theirs.pt")
    data = str(photo_latents / "prepared")

    def bring(target: str, *flags: str) -> None:
        import_teacher.main([str(tmp_path / "theirs.pt"), str(tmp_path / target), "--num-heads", "3",
                             "--time-direction", "data-at-one", *flags])

    bring("teacher.safetensors", "--data", data)
    metadata = read_weights(tmp_path / "teacher.safetensors")[1]
    assert metadata["autoencoder"] == load_data(data).autoencoder and metadata["classes"] == ["cat", "dog"]
    train_student.main(["--teacher", str(tmp_path / "teacher.safetensors"), "--data", data, *RUN, "--steps", "1", "--num-steps", "1",
                        "--results-dir", str(tmp_path / "results")])
    assert (tmp_path / "results/student-prepared/samples/1step_step1.png").is_file()
    bring("pixels.safetensors")                             # without --data it is taken to be one of pixels
    with pytest.raises(ValueError, match="was trained on latents of None, .*imported without import_teacher.py --data"):
        check_teacher(tmp_path / "pixels.safetensors", read_weights(tmp_path / "pixels.safetensors")[1], load_data(data), None)
    monkeypatch.setattr(foreign, "CHANNELS", 3)
    torch.save(foreign.random_state(), tmp_path / "theirs.pt")
    with pytest.raises(ValueError, match=r"holds latents of shape \[4, 8, 8\]; the weights are for \[3, 8, 8\]"):
        bring("other.safetensors", "--data", data)
