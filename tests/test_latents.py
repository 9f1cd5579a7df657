"""Latents: prepared, trained on, sampled and measured, with a tiny random autoencoder instead of a downloaded one."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import foreign
import numpy as np
import pytest
import torch
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
from utils import autoencoder as autoencoders
from utils import latents
from utils.autoencoder import Autoencoder
from utils.checkpoints import load_network, read_weights
from utils.data import Batches, load_data, load_images, to_pixels, to_range
from utils.distributed import Ranks
from utils.evaluation import Judge
from utils.sampling import sample_average_velocity
from utils.seeding import generator
from utils.teachers import check_teacher

CPU = torch.device("cpu")
SCALING, SHIFT = 1.7, 0.3


def save_autoencoder(folder: Path, seed: int = 0):
    """Two levels: 16 x 16 pixels become 8 x 8 x 4."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    network = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=SCALING, shift_factor=SHIFT)
    network.save_pretrained(folder)
    return network.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """12 photos in two classes, an autoencoder, and the photos' latents in shards of 5, 5 and 2."""
    folder = tmp_path_factory.mktemp("latents")
    make_images(folder / "photos", ["cat", "dog"])
    save_autoencoder(folder / "autoencoder")
    prepare(folder, folder / "prepared")
    return folder


def prepare(made: Path, out: Path, *flags: str) -> None:
    prepare_latents.main([str(made / "photos"), str(out), "--autoencoder", str(made / "autoencoder"), "--image-size", "16", "--shard-size",
                          "5", "--batch-size", "3", "--device", "cpu", *flags])


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@torch.no_grad()
def encoded(made: Path, x: torch.Tensor) -> torch.Tensor:
    """By diffusers alone."""
    from diffusers import AutoencoderKL

    return (AutoencoderKL.from_pretrained(made / "autoencoder").encode(x).latent_dist.mean - SHIFT) * SCALING


# What is written.

def test_latents_are_the_scaled_means_of_each_image_and_of_its_mirror_image(made):
    data, images = load_data(str(made / "prepared")), load_images(str(made / "photos"), image_size=16)
    assert (len(data), data.shape, data.image_size, data.classes) == (12, (4, 8, 8), 16, ["cat", "dog"])
    assert torch.equal(data.labels, images.labels) and [len(part) for part in data.shards.parts] == [5, 5, 2]
    x, values = to_range(images.pixels), data.shards.to(CPU)
    assert values.dtype == torch.float16 and values.std() > 0.05
    torch.testing.assert_close(values[:, 0].float(), encoded(made, x), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(values[:, 1].float(), encoded(made, x.flip(-1)), atol=2e-3, rtol=1e-3)
    assert (values[:, 1] - values[:, 0].flip(-1)).abs().max() > 0.01        # no mirrored latent would do
    assert torch.equal(data.shards[torch.tensor([11, 0, 5])], values[[11, 0, 5]])


def test_batches_choose_images_and_mirror_images_as_those_of_pixels_do(made):
    images = load_images(str(made / "photos"), image_size=16)
    ranks = Ranks(1, 2, CPU)
    pixels, z = (Batches(data, 10, 3, ranks) for data in (images, load_data(str(made / "prepared"))))
    for step in (1, 2, 7):
        (x, y), (z_x, z_y) = pixels(step), z(step)
        assert torch.equal(y, z_y) and z_x.dtype == torch.float32
        torch.testing.assert_close(z_x, encoded(made, x), atol=2e-3, rtol=1e-3)


def test_without_mirror_images(made, tmp_path):
    prepare(made, tmp_path / "out", "--flip", "False", "--dtype", "float32")
    data, images = load_data(str(tmp_path / "out")), load_images(str(made / "photos"), image_size=16)
    batch, plain = (Batches(each, 6, 0, Ranks(0, 1, CPU))(1)[0] for each in (data, replace(images, flip=False)))
    torch.testing.assert_close(batch, encoded(made, plain), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="--flip True: .* holds no mirror images' latents"):
        Batches(data, 6, 0, Ranks(0, 1, CPU), True)


def test_decode_is_diffusers_own_in_chunks_of_any_shape(made, monkeypatch, draw):
    from diffusers import AutoencoderKL

    autoencoder = Autoencoder(str(made / "autoencoder"), CPU)
    z = torch.randn(2, 3, 4, 8, 8, generator=draw)
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(made / "autoencoder").decode(z.flatten(0, 1) / SCALING + SHIFT).sample
    monkeypatch.setattr(autoencoders, "CHUNK_PIXELS", 4 * 16 * 16)
    torch.testing.assert_close(autoencoder.decode(z), expected.unflatten(0, (2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(autoencoder.decode(z[0]), expected[:3], atol=1e-5, rtol=1e-4)


# Going on, and refusing to.

def test_missing_and_torn_shards_are_written_again_alike(made, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(made / "prepared", out)
    (out / "shard_00000.safetensors").unlink()
    whole, torn = out / "shard_00001.safetensors", out / "shard_00002.safetensors"
    torn.write_bytes(torn.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"shard_00000.* is missing.*repairs it"):
        load_data(str(out))
    shutil.copy(made / "prepared/shard_00001.safetensors", out / "shard_00000.safetensors")     # whole, but in another one's place
    before = whole.stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"shard_00002.* is torn.*repairs it"):
        load_data(str(out))
    (out / "shard_00000.safetensors").unlink()
    prepare(made, out)
    assert contents(out) == contents(made / "prepared") and whole.stat().st_mtime_ns == before


def test_stopped_in_the_middle(made, tmp_path, monkeypatch):
    """What was written stays, training refuses the rest, and the same command goes on to the same bytes."""
    calls = []

    def interrupted(self, x, encode=Autoencoder.encode):
        calls.append(len(x))
        if len(calls) > 6:                                  # a shard has two batches of two views
            raise KeyboardInterrupt
        return encode(self, x)

    monkeypatch.setattr(Autoencoder, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(made, tmp_path / "out")
    monkeypatch.undo()
    assert sorted(contents(tmp_path / "out")) == ["preparing.json", "shard_00000.safetensors"]
    with pytest.raises(ValueError, match="not finished; the same prepare_latents.py command goes on"):
        load_data(str(tmp_path / "out"))
    prepare(made, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(made / "prepared")


def test_ranks_share_the_shards(made, tmp_path, monkeypatch):
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
        prepare(made, tmp_path / "out")
        written.append({name for name in contents(tmp_path / "out") if name.startswith("shard")})
    assert written[0] == {"shard_00001.safetensors"} and contents(tmp_path / "out") == contents(made / "prepared")


@pytest.mark.parametrize(("flags", "message"), [
    (["--flip", "False"], "other latents .*flip: False, was True"),
    (["--image-size", "32"], "image_size: 32, was 16"),
    (["--dtype", "float32"], "dtype: float32, was float16"),
    (["--shard-size", "6"], "shard_size: 6, was 5"),
    (["--autoencoder", "{other}"], "autoencoder_weights: [0-9a-f]{8}, was"),
    (["--autoencoder", "{nowhere}"], "cannot load the autoencoder .*nowhere(.|\n)*--autoencoder PATH"),
    (["--image-size", "15"], "--image-size 15: must be divisible by 2"),
])
def test_other_options_are_refused(made, tmp_path, flags, message):
    save_autoencoder(tmp_path / "other", seed=1)
    before = contents(made / "prepared")
    with pytest.raises(ValueError, match=message):
        prepare(made, made / "prepared", *(flag.format(other=tmp_path / "other", nowhere=tmp_path / "nowhere") for flag in flags))
    assert contents(made / "prepared") == before


def test_other_images_and_foreign_folders_are_refused(made, tmp_path):
    for name in ("photos", "autoencoder", "prepared"):
        shutil.copytree(made / name, tmp_path / name)
    with pytest.raises(ValueError, match=r"OUT .* exists and holds no latents"):
        prepare(made, tmp_path)
    prepare(tmp_path, tmp_path / "prepared")                # the same images and weights, which have moved
    assert load_data(str(tmp_path / "prepared")).autoencoder["source"] == str(tmp_path / "autoencoder")
    (tmp_path / "photos/cat/0.jpg").rename(tmp_path / "photos/cat/9.jpg")
    with pytest.raises(ValueError, match="other latents .listing"):
        prepare(tmp_path, tmp_path / "prepared")
    with pytest.raises(ValueError, match=r"SOURCE .*prepared holds no image"):
        prepare_latents.main([str(made / "prepared"), str(tmp_path / "out"), "--device", "cpu"])


# Training, sampling, measuring.

RUN = ["--global-batch-size", "8", "--log-every", "1", "--comet", "off", "--device", "cpu"]


@pytest.fixture(scope="module")
def results(made):
    run = ["--data", str(made / "prepared"), *RUN, "--results-dir", str(made / "results")]
    train_teacher.main([*run, "--steps", "3", "--model", "DiT-Nano/4", "--sample-steps", "2", "--guidance-scale", "2"])
    train_student.main([*run, "--steps", "2", "--num-steps", "1", "2"])     # finds the teacher by its data
    return made / "results"


@torch.no_grad()
def test_teacher_student_and_samples(made, results, tmp_path):
    """A sample is what the autoencoder makes of the network's latent, down to the pixel."""
    entry = json.loads((made / "prepared/latents.json").read_text())["autoencoder"]
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
    expected = to_pixels(Autoencoder(str(made / "autoencoder"), CPU).decode(z)).permute(0, 2, 3, 1).numpy().astype(int)
    assert expected.shape == (4, 16, 16, 3) and expected.std() > 5
    assert np.abs(np.load(tmp_path / "1step.npz")["arr_0"] - expected).max() <= 1
    assert np.abs(np.asarray(Image.open(tmp_path / "1step/000003_class1.png")) - expected[3]).max() <= 1
    assert Image.open(tmp_path / "1step.gif").n_frames == 2 and (tmp_path / "1step.png").exists()
    pipe = SplitMeanFlowPipeline.from_pretrained(run).to("cpu")
    images = pipe([0, 0, 1, 1], 1, generator(CPU, 0, "noise"), output_type="np").images
    assert np.abs(images.astype(int) - expected).max() <= 1


def test_evaluation_compares_decoded_samples_with_the_originals(made, results, tmp_path, monkeypatch):
    judged = []

    def see(pixels):
        judged.append(pixels)
        return pixels.float().mean((2, 3)), pixels.float().mean((2, 3))[:, :2]

    monkeypatch.setattr(evaluate, "classifier_judge", lambda *_: Judge("colours", see, knows_classes=True))
    evaluate.main([str(results / "student-prepared"), "--held-out", str(made / "photos"), "--num-steps", "1", "--num-images", "12",
                   "--seeds", "1", "--device", "cpu", "--out", str(tmp_path), "--cache", str(tmp_path)])
    real, held_out, samples = judged[1:]                     # before them two, to see how many features there are
    assert real.shape == held_out.shape == samples.shape == (12, 3, 16, 16)
    originals = load_images(str(made / "photos"), image_size=16).pixels
    assert sorted(map(bytes, real.numpy())) == sorted(map(bytes, originals.numpy()))
    row, = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert row["teacher_distance [colours, n=12]"]["mean"] >= 0 and (tmp_path / "residual.png").exists()


def test_autoencoder_missing_moved_or_wrong(made, results, tmp_path, monkeypatch):
    """Each is told before any work starts, and --autoencoder names another place."""
    shutil.copytree(made / "prepared", tmp_path / "prepared")
    file = tmp_path / "prepared/latents.json"
    file.write_text(file.read_text().replace(str(made / "autoencoder"), str(tmp_path / "gone")))
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
    shutil.copytree(made / "autoencoder", tmp_path / "moved")
    sample.main([*draw, "--autoencoder", str(tmp_path / "moved"), "--num-images", "1", "--num-steps", "1"])
    assert Image.open(tmp_path / "samples/1step.png").size == (48, 48)      # 16 pixels, enlarged


@pytest.mark.parametrize(("main", "flags", "message"), [
    (train_teacher.main, ["--image-size", "32"], "--image-size 32: .*images of 16 pixels"),
    (train_teacher.main, ["--eval-every", "5"], "--eval-every: .*holds latents"),
    (train_classifier.main, [], "holds latents, and here images are needed; these are made from .*photos"),
])
def test_latents_where_they_cannot_be(made, tmp_path, main, flags, message):
    folder = [] if main is train_classifier.main else ["--results-dir", str(tmp_path / "results")]
    with pytest.raises(ValueError, match=message):
        main(["--data", str(made / "prepared"), "--device", "cpu", *folder, *flags])
    assert not (tmp_path / "results").exists()


def test_pixels_need_no_autoencoder(made, tmp_path):
    with pytest.raises(ValueError, match="--autoencoder some: here images are pixels"):
        train_teacher.main(["--data", "digits", "--autoencoder", "some", "--device", "cpu", "--results-dir", str(tmp_path)])


def test_teacher_of_other_latents_is_refused(made, results):
    data = load_data(str(made / "prepared"), image_size=16)
    path = results / "teacher-prepared"
    metadata = load_network(path, DiT)[1]
    check_teacher(path, {**metadata, "autoencoder": {**data.autoencoder, "source": "elsewhere"}}, data, None)
    for other in (None, {**data.autoencoder, "scaling": 1.0}, {**data.autoencoder, "weights": "00000000"}):
        with pytest.raises(ValueError, match="was trained on latents of"):
            check_teacher(path, {**metadata, "autoencoder": other}, data, None)


def test_imported_teacher_of_latents(made, tmp_path, monkeypatch):
    monkeypatch.setattr(foreign, "CHANNELS", 4)
    torch.save(foreign.random_state(), tmp_path / "theirs.pt")
    data = str(made / "prepared")

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
    with pytest.raises(ValueError, match="was trained on latents of None"):
        check_teacher(tmp_path / "pixels.safetensors", read_weights(tmp_path / "pixels.safetensors")[1], load_data(data), None)
    monkeypatch.setattr(foreign, "CHANNELS", 3)
    torch.save(foreign.random_state(), tmp_path / "theirs.pt")
    with pytest.raises(ValueError, match=r"holds latents of shape \[4, 8, 8\]; the weights are for \[3, 8, 8\]"):
        bring("other.safetensors", "--data", data)
