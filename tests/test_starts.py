"""How a run begins and goes on: from which teacher, with whom, and over what an earlier start left."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from runs import COMMON, TEACHER, assert_same

import evaluate
import sample
import train_student
import train_student_mnist
import train_teacher_mnist
from models import DiT
from utils import distributed
from utils.checkpoints import read_metadata, read_weights, write_weights
from utils.evaluation import Judge
from utils.run_log import Run


def stop_at_3(monkeypatch, script, arguments):
    with monkeypatch.context() as patch:
        patch.setattr(Run, "asked_to_stop", lambda self, step, stop: step == 3)
        script.main(arguments)


def test_one_process_trains_a_run(results, tmp_path, monkeypatch):
    arguments = [*TEACHER, "--results-dir", str(tmp_path)]
    stop_at_3(monkeypatch, train_teacher_mnist, arguments)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.json*")}
    with FileLock(tmp_path / "teacher-digits/.lock"), pytest.raises(ValueError, match="another process is training this run"):
        train_teacher_mnist.main(arguments)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.json*")}
    train_teacher_mnist.main(arguments)
    assert_same(results / "teacher-digits", tmp_path / "teacher-digits")


@pytest.mark.parametrize("error", [NotImplementedError("FileSystem does not appear to support flock"),
                                   OSError(errno.ENOLCK, "No locks available"), OSError(errno.EOPNOTSUPP, "Operation not supported")])
def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, capsys, error):
    def acquire(self, timeout):
        raise error

    monkeypatch.setattr(FileLock, "acquire", acquire)
    train_teacher_mnist.main([*TEACHER, "--results-dir", str(tmp_path)])
    assert "this file system has no locks" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_lock_that_a_dead_process_of_another_host_left_is_named(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    lock = tmp_path / "teacher-digits/.lock"
    lock.parent.mkdir()
    lock.write_text("1\nanother-host\n")
    with pytest.raises(ValueError, match=f"another process is training this run; .* If none is, delete {lock}$"):
        train_teacher_mnist.main([*TEACHER, "--results-dir", str(tmp_path)])
    lock.unlink()
    train_teacher_mnist.main([*TEACHER, "--results-dir", str(tmp_path)])
    assert not lock.exists()


@pytest.mark.parametrize(("what", "shown"), [("the number of updates done", "0, 255"), ("the hash of the teacher's weights", "0, ff"),
                                            ("the number of images", "1797, 2052")])
def test_processes_that_would_not_go_on_together(tmp_path, monkeypatch, what, shown):
    """Hosts of which one does not see the checkpoints, say, would average gradients of different networks."""
    def check_same(self, name, *number):
        if name == what:
            monkeypatch.setattr(distributed.Ranks, "gather", lambda self, values: torch.stack([values, values + 255]))
        plain(self, name, *number)

    plain = distributed.Ranks.check_same
    monkeypatch.setattr(distributed.Ranks, "check_same", check_same)
    with pytest.raises(ValueError, match=f"{what} differs from process to process: {shown}. Every host needs"):
        train_teacher_mnist.main([*TEACHER, "--results-dir", str(tmp_path)])
    assert not (tmp_path / "teacher-digits").exists()


def test_a_start_that_was_cut_off_before_it_wrote_anything(results, tmp_path):
    (tmp_path / "teacher-digits/samples").mkdir(parents=True)
    (tmp_path / "teacher-digits/.lock").touch()
    train_teacher_mnist.main([*TEACHER, "--results-dir", str(tmp_path)])
    assert_same(results / "teacher-digits", tmp_path / "teacher-digits")
    (tmp_path / "student-digits").mkdir()
    (tmp_path / "student-digits/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is no run folder"):
        train_student_mnist.main([*COMMON, "--results-dir", str(tmp_path)])


def test_a_start_that_saved_nothing_may_find_a_better_teacher(tmp_path, results, monkeypatch, capsys):
    train_teacher_mnist.main([*TEACHER, "--results-dir", str(tmp_path), "--name", "first", "--seed", "1"])
    arguments = [*COMMON, "--results-dir", str(tmp_path)]
    monkeypatch.setattr(Run, "scalars", lambda *args, **values: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_student_mnist.main(arguments)
    monkeypatch.undo()
    (tmp_path / "first").rename(tmp_path.parent / f"{tmp_path.name}-first")
    with pytest.raises(ZeroDivisionError):
        monkeypatch.setattr(Run, "scalars", lambda *args, **values: 1 / 0)
        train_student_mnist.main(arguments)                 # from its own copy
    monkeypatch.undo()
    train_teacher_mnist.main([*TEACHER, "--results-dir", str(tmp_path), "--name", "second"])
    capsys.readouterr()
    train_student_mnist.main(arguments)
    assert "teacher " in (said := capsys.readouterr().out) and "second" in said
    assert_same(results / "student-digits", tmp_path / "student-digits")
    assert read_metadata(tmp_path / "student-digits/teacher.safetensors")["config"]["name"] == "second"


def test_a_student_says_that_its_teacher_stopped_early(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Run, "asked_to_stop", lambda self, step, stop: step == 3)
    train_teacher_mnist.main([*TEACHER, "--results-dir", str(tmp_path)])
    train_student_mnist.main([*COMMON, "--results-dir", str(tmp_path)])
    assert "ema.safetensors; note: it stopped after 3 of 6 updates" in capsys.readouterr().out


def test_student_goes_on_without_its_teachers_folder(tmp_path, results, monkeypatch):
    """The run keeps a copy of its teacher, so a newer or vanished teacher run does not matter."""
    train_teacher_mnist.main([*TEACHER, "--results-dir", str(tmp_path), "--name", "t"])
    arguments = [*COMMON, "--results-dir", str(tmp_path)]
    stop_at_3(monkeypatch, train_student_mnist, arguments)
    (tmp_path / "t").rename(tmp_path.parent / f"{tmp_path.name}-moved")
    train_teacher_mnist.main([*TEACHER, "--results-dir", str(tmp_path), "--name", "newer", "--seed", "1"])
    train_student_mnist.main(arguments)
    assert_same(results / "student-digits", tmp_path / "student-digits")


def unnamed(file: Path, target: Path) -> None:
    """Write a student's file as before it said which teacher it learnt from."""
    weights, metadata = read_weights(file)
    write_weights(target, weights, {key: value for key, value in metadata.items() if key != "teacher"})


def test_a_student_that_names_no_teacher_goes_on_as_one_that_does(results, tmp_path, monkeypatch, capsys):
    """From its last checkpoint with the teacher that is found, though its own copy is gone, and as the start of another run."""
    arguments = [*COMMON, "--teacher", str(results / "teacher-digits"), "--results-dir", str(tmp_path)]
    stop_at_3(monkeypatch, train_student_mnist, arguments)
    run = tmp_path / "student-digits"
    for name in ("ema", "raw"):
        file = run / f"checkpoints/step_00000003/{name}.safetensors"
        unnamed(file, file)
    (run / "teacher.safetensors").unlink()
    train_student_mnist.main([*arguments, "--name", "other", "--start-from", str(run)])
    assert "learnt from teacher" not in capsys.readouterr().out
    last = "checkpoints/step_00000006/ema.safetensors"
    train_student_mnist.main(arguments)
    assert "going on after step 3" in capsys.readouterr().out
    assert_same(results / "student-digits", run)
    assert read_metadata(run / last)["teacher"] == read_metadata(results / "student-digits" / last)["teacher"]


def test_it_is_sampled_and_measured_as_one_that_does(results, tmp_path, monkeypatch, capsys):
    """Its distance is from the teacher beside it, of which nothing is said."""
    monkeypatch.setattr(evaluate, "find_classifier", lambda *_: None)
    monkeypatch.setattr(evaluate, "classifier_judge", lambda *_: Judge("rows", lambda x: (x.float().mean((1, 2)),) * 2, False))
    unnamed(results / "student-digits/checkpoints/step_00000006/ema.safetensors", tmp_path / "old.safetensors")
    shutil.copy(results / "student-digits/teacher.safetensors", tmp_path)
    flags, images, rows = ["--num-steps", "2", "--num-images", "20", "--device", "cpu"], [], []
    for i, path in enumerate((results / "student-digits", tmp_path / "old.safetensors")):
        sample.main([str(path), *flags, "--formats", "npz", "--out", str(tmp_path / f"s{i}")])
        images.append(np.load(tmp_path / f"s{i}/2step.npz")["arr_0"])
        evaluate.main([str(path), *flags, "--seeds", "1", "--out", str(tmp_path / f"e{i}"), "--cache", str(tmp_path)])
        rows.append(json.loads((tmp_path / f"e{i}/metrics.json").read_text())["rows"])
    assert np.array_equal(*images) and rows[0] == rows[1] and "teacher_distance [rows, n=20]" in rows[0][0]
    assert "learnt from" not in capsys.readouterr().out


@pytest.mark.parametrize("script", [train_student_mnist, train_student])
def test_a_student_sees_mirror_images_if_its_teacher_did(script, tmp_path, monkeypatch):
    asked = []

    def batches(images, size, seed, ranks, flip):
        asked.append(flip)
        raise InterruptedError                              # what follows is the same whatever the images are

    monkeypatch.setattr(script, "Batches", batches)
    network = DiT("DiT-Test/4", 8, 1, 10)
    for theirs, ours, expected in ((True, None, True), (False, None, False), (None, None, None), (True, False, False)):
        file = tmp_path / "teacher.safetensors"
        write_weights(file, network.state_dict(), dict(kind="teacher", architecture=network.architecture, config={"flip": theirs},
                                                       classes=[str(i) for i in range(10)]))
        said = [] if ours is None else ["--flip", str(ours)]
        with pytest.raises(InterruptedError):
            script.main([*COMMON, *said, "--teacher", str(file), "--results-dir", str(tmp_path)])
        assert asked.pop() is expected


@pytest.mark.parametrize("script", [train_student_mnist, train_student])
def test_a_student_chooses_among_as_many_noises_as_its_teacher(script, tmp_path, monkeypatch, capsys):
    """And says so if the teacher's images had the nearest of several, as none have any more."""
    chosen = []

    def choose_noise(x, y, noises, gather):
        chosen.append(len(noises))
        raise InterruptedError

    monkeypatch.setattr(script, "choose_noise", choose_noise)
    network, file = DiT("DiT-Test/4", 8, 1, 10), tmp_path / "teacher.safetensors"
    cases = ({"num_noises": 3}, 3), ({}, 1), ({"noise_candidates": 1}, 1), ({"noise_candidates": 4}, 1)
    for i, (theirs, expected) in enumerate(cases):
        write_weights(file, network.state_dict(), dict(kind="teacher", architecture=network.architecture, config=theirs,
                                                       classes=[str(label) for label in range(10)]))
        with pytest.raises(InterruptedError):
            script.main([*COMMON, "--teacher", str(file), "--results-dir", str(tmp_path), "--name", str(i)])
        assert chosen.pop() == expected
        note = f"note: the images of teacher {file} had the nearest of 4 noises, which no flag makes any more; those of this student get"
        assert (note in capsys.readouterr().out) is (theirs == {"noise_candidates": 4})


def test_a_run_of_before_noises_were_chosen_by_direction_goes_on_if_it_had_one(tmp_path, monkeypatch):
    arguments = [*TEACHER, "--num-noises", "1", "--results-dir", str(tmp_path)]
    stop_at_3(monkeypatch, train_teacher_mnist, arguments)
    file = tmp_path / "teacher-digits/config.json"
    config = json.loads(file.read_text())
    del config["num_noises"]
    file.write_text(json.dumps(config | {"noise_candidates": 4}))
    with pytest.raises(ValueError, match="teacher-digits began with the nearest of 4 noises for each image, which no flag makes any more"):
        train_teacher_mnist.main(arguments)
    file.write_text(json.dumps(config | {"noise_candidates": 1}))
    train_teacher_mnist.main(arguments)
    assert (tmp_path / "teacher-digits/checkpoints/step_00000006").exists()


def test_a_student_that_began_with_the_nearest_noise_does_not_go_on_with_other_noise(tmp_path, results, monkeypatch):
    """Its flags do not say so; its checkpoints do."""
    arguments = [*COMMON, "--teacher", str(results / "teacher-digits"), "--results-dir", str(tmp_path)]
    stop_at_3(monkeypatch, train_student_mnist, arguments)
    file = tmp_path / "student-digits/checkpoints/step_00000003/ema.safetensors"
    weights, metadata = read_weights(file)
    write_weights(file, weights, metadata | {"config": metadata["config"] | {"noise_candidates": 4}})
    with pytest.raises(ValueError, match="student-digits began with the nearest of 4 noises for each image, which no flag makes any more"):
        train_student_mnist.main(arguments)
    assert file.exists() and not list(file.parent.parent.glob("*.bad"))
