"""The scripts as users run them: teacher, student, own images, bad input."""

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from runs import COMMON, STEPS, TEACHER, assert_same, make_images

import release
import sample
import train_student
import train_student_mnist
import train_teacher
import train_teacher_mnist
from models import DiT
from utils import distributed
from utils.checkpoints import load_network, step_folders
from utils.run_log import environment


def test_run_folder(results):
    for name, pictures in (("teacher-digits", ["cfg1.0", "cfg2.5", "cfg5.0"]), ("student-digits", ["1step", "2step", "4step"])):
        folder = results / name
        config = json.loads((folder / "config.json").read_text())
        assert config["steps"] == STEPS and config["data"] == "digits"
        (start,) = json.loads((folder / "environment.json").read_text())
        assert start["torch"] == torch.__version__ and start["device"].startswith("cpu")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [2, 4, 6]
        assert all(np.isfinite(value) and value >= 0 for row in rows for value in row.values())
        assert (folder / "curves.png").stat().st_size > 10_000 and "step 6" in (folder / "log.txt").read_text()
        for picture in pictures:
            assert Image.open(folder / "samples" / f"{picture}_step6.png").size[0] > 300
        assert [path.name for path in step_folders(folder / "checkpoints")] == ["step_00000004", "step_00000006"]
    assert Image.open(results / "teacher-digits/samples/trajectory_cfg2.5_step6.gif").n_frames == 3
    assert Image.open(results / "student-digits/samples/trajectory_4step_step6.gif").n_frames == 5


def test_student_started_as_its_teacher_and_moved(results):
    student, metadata = load_network(results / "student-digits", DiT)
    teacher, _ = load_network(results / "teacher-digits", DiT)
    assert metadata["kind"] == "student" and metadata["architecture"]["interval"]
    changed = [name for name, p in teacher.state_dict().items() if not torch.equal(p, student.state_dict()[name])]
    assert len(changed) == len(teacher.state_dict())
    assert student.interval_embed.out.weight.abs().max() > 0


def test_a_clone_without_git_installed(monkeypatch):
    """Such as one that is mounted into a slim container: the commit is not known, and training goes on."""
    monkeypatch.setenv("PATH", "")
    assert environment(distributed.start("cpu"))["git_commit"] is None


def test_seed_matters_and_repeats(results, tmp_path):
    train_teacher_mnist.main([*TEACHER, "--results-dir", str(tmp_path), "--name", "again"])
    train_teacher_mnist.main([*TEACHER, "--results-dir", str(tmp_path), "--name", "other", "--seed", "1"])
    assert_same(results / "teacher-digits", tmp_path / "again")
    with pytest.raises(AssertionError, match="differ"):
        assert_same(results / "teacher-digits", tmp_path / "other")


STILL = ["--lr", "1e-9", "--muon-lr", "1e-9"]


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_start_from_another_run(results, tmp_path, stage):
    """With learning rates of nearly nothing a run ends where it was told to start."""
    script, flags = train_teacher_mnist, TEACHER
    if stage == "student":
        script, flags = train_student_mnist, [*COMMON, "--teacher", str(results / "teacher-digits")]
    script.main([*flags, "--results-dir", str(tmp_path), "--start-from", str(results / f"{stage}-digits"), *STILL])
    ours, theirs = (load_network(folder / f"{stage}-digits", DiT)[0].state_dict() for folder in (tmp_path, results))
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 1e-6


def test_targets_by_the_start_stand_still(results, tmp_path):
    """The network that makes them is what the run started from, to the last bit, and the student is not."""
    train_student_mnist.main([*COMMON, "--teacher", str(results / "teacher-digits"), "--results-dir", str(tmp_path),
                              "--start-from", str(results / "student-digits"), "--target", "start"])
    start, _ = load_network(results / "student-digits", DiT)
    last = step_folders(tmp_path / "student-digits/checkpoints")[-1]
    for name, alike in (("target", True), ("raw", False)):
        found = load_network(last / f"{name}.safetensors", DiT)[0].state_dict()
        assert all(torch.equal(found[key], weight) for key, weight in start.state_dict().items()) == alike


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_what_a_run_started_from_may_be_gone_when_it_goes_on(results, tmp_path, stage):
    script, flags = train_teacher_mnist, TEACHER
    if stage == "student":
        script, flags = train_student_mnist, [*COMMON, "--teacher", str(results / "teacher-digits")]
    start = tmp_path / "start.safetensors"
    release.main([str(results / f"{stage}-digits"), str(start)])
    flags = [*flags, "--results-dir", str(tmp_path), "--start-from", str(start)]
    script.main([*flags, "--max-minutes", "0.00001"])
    start.unlink()
    script.main(flags)
    assert step_folders(tmp_path / f"{stage}-digits/checkpoints")[-1].name == f"step_{STEPS:08d}"


def test_a_student_of_another_teacher_is_told_apart(results, tmp_path, capsys):
    """By the weights as released: a run and its bf16 file are one teacher; a changed one is another, which is said."""
    teacher = results / "teacher-digits"
    release.main([str(teacher), str(tmp_path / "released.safetensors")])
    flags = [*COMMON, "--results-dir", str(tmp_path), "--start-from", str(results / "student-digits")]
    train_student_mnist.main([*flags, "--teacher", str(tmp_path / "released.safetensors"), "--name", "same"])
    assert "learnt from teacher" not in capsys.readouterr().out
    train_teacher_mnist.main([*TEACHER, "--results-dir", str(tmp_path), "--name", "other", "--seed", "1"])
    train_student_mnist.main([*flags, "--teacher", str(tmp_path / "other"), "--name", "other-student"])
    ids = [load_network(tmp_path / name, DiT)[1]["teacher"] for name in ("same", "other-student")]
    assert f"learnt from teacher {ids[0]}, this run's teacher is {ids[1]}" in capsys.readouterr().out


def test_start_from_with_other_classes(results, tmp_path):
    """Only the label embedding is fresh; what is another network altogether is refused."""
    make_images(tmp_path / "photos", ["cats", "dogs"])
    flags = [*TEACHER[2:], "--data", str(tmp_path / "photos"), "--results-dir", str(tmp_path / "results"), *STILL]
    start_from = ["--start-from", str(results / "teacher-digits")]
    with pytest.raises(ValueError, match=r"--start-from .* is another network: image_size 8, here 32; num_channels 1, here 3"):
        train_teacher.main([*flags, *start_from])
    for file in [path for path in (tmp_path / "photos").rglob("*") if path.is_file()]:
        Image.open(file).convert("L").save(file.with_suffix(".png"))
        if file.suffix != ".png":
            file.unlink()
    train_teacher.main([*flags, *start_from, "--image-size", "8", "--name", "photos"])
    runs = (tmp_path / "results" / "photos", results / "teacher-digits")
    ours, theirs = (load_network(folder, DiT)[0].state_dict() for folder in runs)
    assert ours["label_embed.weight"].shape[0] == 3
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs if name != "label_embed.weight")


def test_finished_or_different_runs_are_refused(results):
    before = {file: file.stat().st_mtime_ns for file in results.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"finished at step 6.*--name"):
        train_teacher_mnist.main([*TEACHER, "--results-dir", str(results)])
    with pytest.raises(ValueError, match=r"another run \(lr: 0.5, was 0.001\).*--name"):
        train_teacher_mnist.main([*TEACHER, "--results-dir", str(results), "--lr", "0.5"])
    with pytest.raises(ValueError, match=r"another run \(.*stage"):
        train_student_mnist.main([*COMMON, "--results-dir", str(results), "--name", "teacher-digits"])
    assert before == {file: file.stat().st_mtime_ns for file in results.rglob("*") if file.is_file()}


@pytest.mark.parametrize("device", ["foo", "meta", "mps"])
def test_unknown_device(device):
    with pytest.raises(ValueError, match=f"--device {device}: must be auto, cuda, cuda:1"):
        distributed.start(device)


def test_one_device_for_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--device cuda:1: 2 processes would share it"):
        distributed.start("cuda:1")


OWN = ["--image-size", "16", "--steps", "2", "--global-batch-size", "16", "--log-every", "1", "--comet", "off", "--device", "cpu"]


@pytest.mark.parametrize(("classes", "guidance"), [(["cat", "dog"], ["--guidance-scale", "2"]), ([""], ["--guidance-scale", "1"])])
def test_own_images(tmp_path, classes, guidance):
    """A folder of images, with and without classes, through the CIFAR-10 scripts."""
    data = make_images(tmp_path / "photos", classes)
    own = ["--data", str(data), *OWN, *guidance, "--results-dir", str(tmp_path / "results")]
    train_teacher.main([*own, "--model", "DiT-Nano/4", "--sample-steps", "1"])
    train_student.main(own)
    sample.main([str(tmp_path / "results/student-photos"), "--num-images", "4", "--num-steps", "1", "--formats", "npz", "--device", "cpu",
                 "--out", str(tmp_path / "out")])
    assert np.load(tmp_path / "out/1step.npz")["arr_0"].shape == (4, 16, 16, 3)


@pytest.mark.parametrize(("change", "message"), [
    (["--data", "imagenet"], "imagenet: no such data set or path.*mnist, cifar10, digits"),
    (["--data", "{one}", "--guidance-scale", "2.5"], "--guidance-scale 2.5: guidance needs at least 2 classes.*have 1"),
    (["--data", "{empty}"], "holds no image"),
    (["--data", "{broken}"], "cannot read image .*torn.png"),
    *([(["--device", "cuda"], "no CUDA device")] if not torch.cuda.is_available() else []),
])
def test_bad_teacher_input(tmp_path, change, message):
    """Every mistake is told before any work starts, and leaves no run folder behind."""
    (tmp_path / "empty").mkdir()
    for name, classes in (("one", ["cat"]), ("broken", ["cat", "dog"])):         # the former is refused before any image is decoded
        (make_images(tmp_path / name, classes) / "cat/torn.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
    change = [text.format(**{name: tmp_path / name for name in ("one", "empty", "broken")}) for text in change]
    with pytest.raises(ValueError, match=message):
        train_teacher.main(["--data", "digits", "--model", "DiT-Nano/4", *OWN, "--results-dir", str(tmp_path / "results"), *change])
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("change", "message"), [
    (["--image-size", "16"], "trained on 1 channels, size 8, 10 classes; --data digits has 1 channels, size 16, 10 classes"),
    (["--data", "{colour}", "--image-size", "8"], "--data .*colour has 3 channels, size 8, 2 classes"),
    (["--teacher", "{student}"], "is a student; a student needs a teacher"),
    (["--teacher", "{nowhere}"], "no checkpoint at"),
    (["--model", "DiT-S/2"], "--model DiT-S/2: .*DiT-Test/4"),
    (["--teacher", "{foreign}"], "no checkpoint of this project|torn or no safetensors"),
])
def test_bad_student_input(results, tmp_path, change, message):
    (tmp_path / "foreign").write_bytes(b"something else")
    places = {"colour": make_images(tmp_path / "colour", ["cat", "dog"]), "student": results / "student-digits",
              "nowhere": tmp_path / "nowhere", "foreign": tmp_path / "foreign"}
    change = [text.format(**places) for text in change]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_student_mnist.main([*COMMON, "--teacher", str(results / "teacher-digits"), "--results-dir", str(tmp_path / "results"),
                                  *change])
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("flags", "message"), [
    (["--one-step-from", "4", "--pinned-share", "0.1", "--pinned-steps", "1"], "--one-step-from 4: of 12 splitting rows 1 are .* of 2"),
    (["--one-step-from", "4", "--pinned-share", "0.9", "--pinned-steps", "1"], "--one-step-from 4: of 12 splitting rows 11 are .* of 2"),
    (["--boundary-share", "0.3"], "5 boundary samples .* do not divide among 2 processes"),
])
def test_every_process_needs_rows_of_each_kind(results, tmp_path, monkeypatch, flags, message):
    """Else some would call the network more often than others, which then wait for ever where they split it."""
    monkeypatch.setattr(train_student_mnist.distributed, "start", lambda device, shard: distributed.Ranks(0, 2, torch.device("cpu")))
    with pytest.raises(ValueError, match=message):
        train_student_mnist.main([*COMMON, *flags, "--teacher", str(results / "teacher-digits"),
                                  "--results-dir", str(tmp_path / "results")])
    assert not (tmp_path / "results").exists()


def test_no_teacher_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"no teacher for --data digits.*python train_teacher_mnist.py --data digits"):
        train_student_mnist.main([*COMMON, "--results-dir", str(tmp_path)])


@pytest.mark.parametrize("key", [None, "a-key-that-no-server-will-be-asked-about"])
def test_comet_archive_without_key_or_network(tmp_path, monkeypatch, capsys, key):
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("COMET_API_KEY", key)
        monkeypatch.setenv("COMET_GET_OR_ADD_EXPERIMENT_RETRY_TOTAL", "0")
        monkeypatch.setenv("COMET_HTTP_SESSION_RETRY_TOTAL", "0")
        monkeypatch.setenv("COMET_URL_OVERRIDE", "http://127.0.0.1:9/clientlib/")       # nobody listens there
    train_teacher_mnist.main([*TEACHER, "--results-dir", str(tmp_path), "--comet", "auto"])
    (archive,) = (tmp_path / "teacher-digits/comet").iterdir()
    contents = [zipfile.ZipFile(archive).read(name) for name in zipfile.ZipFile(archive).namelist()]
    assert any(b"grad_norm" in content and b"label_dropout" in content for content in contents)
    assert sum(content.startswith((b"\x89PNG", b"GIF8")) for content in contents) == 4         # three grids and a trajectory
    assert f"comet upload {archive}" in capsys.readouterr().out


