"""What a run's folder says of the run, and with what the run goes on."""

import json
import os
import shutil
from pathlib import Path

import pytest
from runs import COMMON, TEACHER, make_images

import train_student
import train_student_mnist
import train_teacher
import train_teacher_mnist
from utils.checkpoints import read_weights, step_folders, write_weights
from utils.run_log import Run


def test_a_run_goes_on_with_the_images_it_began_with(tmp_path, monkeypatch):
    """Renamed classes would swap labels, more images the batches, and other ones teach something else."""
    data = make_images(tmp_path / "photos", ["ant", "bee"])
    own = ["--data", str(data), "--steps", "2", "--global-batch-size", "4", "--comet", "off", "--device", "cpu", "--image-size", "16",
           "--model", "DiT-Nano/4", "--sample-steps", "1", "--results-dir", str(tmp_path / "results")]
    monkeypatch.setattr(Run, "asked_to_stop", lambda self, step, stop: step == 1)
    train_teacher.main(own)
    monkeypatch.undo()
    (data / "ant").rename(data / "wasp")
    with pytest.raises(ValueError, match=r"another run \(classes: \['bee', 'wasp'\], was \['ant', 'bee'\]; fingerprint: "):
        train_teacher.main(own)
    (data / "wasp").rename(data / "ant")
    (data / "bee/0.jpg").rename(tmp_path / "0.jpg")
    with pytest.raises(ValueError, match=r"another run \(images: 11, was 12; fingerprint: "):
        train_teacher.main(own)
    (tmp_path / "0.jpg").rename(data / "bee/0.jpg")
    data.rename(tmp_path / "first")
    make_images(data, ["bee", "ant"])                       # as many, drawn in another order
    file = tmp_path / "results/teacher-photos/config.json"
    with pytest.raises(ValueError, match=rf"other images .* --data {data} .*\(fingerprint: .*delete \"fingerprint\" from {file}"):
        train_teacher.main(own)
    shutil.rmtree(data)
    (tmp_path / "first").rename(data)
    began = json.loads(file.read_text())
    unsaid = json.dumps({key: value for key, value in began.items() if key not in ("images", "classes", "fingerprint")})
    file.write_text(unsaid)
    shutil.copytree(data, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"another run \(data: \S*elsewhere, was \S*photos\)"):
        train_teacher.main([*own, "--data", str(tmp_path / "elsewhere"), "--name", "teacher-photos"])
    train_teacher.main(own)                                 # as runs of before say none of these
    assert json.loads(file.read_text()) == began


def test_images_may_have_moved(tmp_path, monkeypatch):
    """And may be named from another working folder; other images, or a named data set, make another run."""
    own = ["--steps", "2", "--global-batch-size", "4", "--comet", "off", "--device", "cpu", "--image-size", "8", "--model", "DiT-Nano/4",
           "--sample-steps", "1", "--results-dir", str(tmp_path / "results"), "--name", "t"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    make_images(Path("photos"), ["ant", "bee"])
    make_images(Path("more"), ["ant", "bee"], 7)
    monkeypatch.setattr(Run, "asked_to_stop", lambda self, step, stop: step == 1)
    train_teacher.main([*own, "--data", "photos"])
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"another run \(data: here/more, was photos; images: 14, was 12; fingerprint: "):
        train_teacher.main([*own, "--data", "here/more"])
    with pytest.raises(ValueError, match=r"another run \(data: digits, was photos; warmup_steps: "):
        train_teacher.main([*own, "--data", "digits"])
    train_teacher.main([*own, "--data", "here/photos"])
    assert json.loads((tmp_path / "results/t/config.json").read_text())["data"] == "here/photos"


@pytest.mark.parametrize(("script", "flags", "message"), [
    (train_teacher, ["--start-from", "nowhere"], "no checkpoint at nowhere"),
    (train_teacher, ["--eval-every", "1", "--image-size", "8"], r"classifier-photos.safetensors; .* --data {data} --image-size 8 \("),
    (train_student, ["--eval-every", "1", "--classifier", "c.safetensors"], "no classifier c.safetensors; .* --out c.safetensors"),
    (train_student, ["--teacher", "nowhere"], "no checkpoint at nowhere"),
    (train_student, ["--teacher", __file__], "no safetensors file"),
    (train_student, ["--name", "teacher-digits"], r"another run \(.*stage: student, was teacher"),
    (train_teacher_mnist, [*TEACHER], "finished at step 6"),
    (train_teacher, ["--name", "file"], "file exists and is no run folder"),
])
def test_what_needs_no_images_is_told_before_they_are_read(results, tmp_path, monkeypatch, script, flags, message):
    for name in ("teacher-digits", "student-digits"):
        shutil.copytree(results / name, tmp_path / name)
    (tmp_path / "file").touch()
    monkeypatch.delattr(script, "load_data")
    data = make_images(tmp_path / "photos", ["ant", "bee"])
    with pytest.raises((ValueError, FileNotFoundError), match=message.format(data=data)):
        script.main(["--data", str(data), "--device", "cpu", *flags, "--results-dir", str(tmp_path)])


def test_a_place_where_nothing_may_be_written_is_told_then_too(tmp_path, monkeypatch):
    monkeypatch.delattr(train_teacher, "load_data")
    with pytest.raises(ValueError, match=f"--results-dir {__file__}: must be a folder, not a file"):
        train_teacher.Config(results_dir=__file__)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)              # root may write to any
    with pytest.raises(ValueError, match=f"teacher-digits: {tmp_path} is no folder, or may not be written to"):
        train_teacher.main(["--data", "digits", "--device", "cpu", "--results-dir", str(tmp_path)])


def test_what_is_learned_from_and_what_is_left_out_are_told(tmp_path, capsys):
    """Also of a class whose name is not UTF-8."""
    own = ["--steps", "1", "--global-batch-size", "4", "--comet", "off", "--device", "cpu", "--image-size", "8", "--model", "DiT-Nano/4",
           "--sample-steps", "1", "--results-dir", str(tmp_path / "results")]
    data = make_images(tmp_path / "photos", ["ant", "caf\udce9"], 1)
    (data / "dog").mkdir()
    (data / "dog/1.HEIC").touch()
    train_teacher.main(["--data", str(data), *own])
    said = capsys.readouterr().out
    for text in (r"2 images of 2 classes (ant, caf\udce9)", f"note: --data {data}: files that Pillow does not read as images were left "
                 "out: 1 .heic (no image at all in dog)\n"):
        assert said.count(text) == 1 and (tmp_path / "results/teacher-photos/log.txt").read_text().count(text) == 1
    make_images(tmp_path / "loose/top", [""], 2)
    train_teacher.main(["--data", str(tmp_path / "loose/top"), *own, "--guidance-scale", "1"])
    assert "2 images without classes\n" in (said := capsys.readouterr().out) and "left out" not in said


def test_a_torn_config_is_named_before_anything_is_written(tmp_path):
    file = tmp_path / "teacher-digits/config.json"
    file.parent.mkdir()
    file.write_text('{"stage": "teacher", "da')
    with pytest.raises(ValueError, match=rf"{file} is torn or no JSON .*; repair it, or move its folder away"):
        train_teacher.main(["--data", "digits", "--device", "cpu", "--comet", "off", "--results-dir", str(tmp_path)])
    assert list(file.parent.iterdir()) == [file]


def test_a_student_goes_on_with_its_own_teacher_alone(results, tmp_path, monkeypatch):
    """Its copy is gone, and another teacher is the newest by then."""
    own = [*COMMON, "--results-dir", str(tmp_path)]
    shutil.copytree(results / "teacher-digits", tmp_path / "teacher-digits")
    monkeypatch.setattr(Run, "asked_to_stop", lambda self, step, stop: step == 2)
    train_student_mnist.main(own)
    monkeypatch.undo()
    copy = tmp_path / "student-digits/teacher.safetensors"
    copy.rename(tmp_path / "aside")
    weights, metadata = read_weights(tmp_path / "aside")
    write_weights(step_folders(tmp_path / "teacher-digits/checkpoints")[-1] / "ema.safetensors",
                  {name: weight + 1 for name, weight in weights.items()}, metadata)
    with pytest.raises(ValueError, match=rf"learns from teacher \w{{8}}, and its own copy of it is gone; found was \w{{8}}. .*{copy}"):
        train_student_mnist.main(own)
    (tmp_path / "aside").rename(copy)
    train_student_mnist.main(own)
    assert step_folders(tmp_path / "student-digits/checkpoints")[-1].name == "step_00000006"
