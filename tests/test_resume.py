"""Runs that are stopped, torn, killed, poisoned, or spread over processes: each goes on as if nothing had happened."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from runs import COMMON, ROOT, TEACHER, assert_same, everything
from tqdm import tqdm

import train_student_mnist
import train_teacher_mnist
from models import DiT
from utils.checkpoints import load_network, read_checkpoint, step_folders
from utils.interrupt import StopRequest
from utils.meter import NonFiniteError
from utils.optim import Optimizer
from utils.run_log import Run


@pytest.fixture(params=["teacher", "student", "student with EMA target", "student with its start as target", "student told its guidance"])
def stage(request, results, tmp_path):
    """(main, its arguments in a fresh results folder, that run's folder, names of its networks)."""
    if request.param == "teacher":
        arguments, main, names = TEACHER, train_teacher_mnist.main, ("ema", "raw")
    else:
        arguments, main, names = [*COMMON, "--teacher", str(results / "teacher-digits")], train_student_mnist.main, ("ema", "raw")
        if "EMA" in request.param:
            arguments, names = [*arguments, "--target", "ema", "--first-leg", "self"], (*names, "target")
        if "start" in request.param:
            arguments, names = [*arguments, "--target", "start", "--start-from", str(results / "student-digits")], (*names, "target")
        if "told" in request.param:
            arguments = [*arguments, "--guidance-range", "1", "4"]
    return main, [*arguments, "--results-dir", str(tmp_path)], tmp_path / f"{request.param.split()[0]}-digits", names


def test_resume_is_bit_exact(stage, monkeypatch, tmp_path_factory):
    main, arguments, folder, names = stage
    monkeypatch.setattr(Run, "asked_to_stop", lambda self, step, stop: step == 3)
    main(arguments)
    stopped = step_folders(folder / "checkpoints")[-1]
    assert stopped.name == "step_00000003"
    torch.save({**read_checkpoint(stopped, names)[1], "seconds": 1e6}, stopped / "training.pt")
    monkeypatch.undo()
    main(arguments)
    assert read_checkpoint(step_folders(folder / "checkpoints")[-1], names)[1]["seconds"] > 1e6         # the time goes on, too
    other = tmp_path_factory.mktemp("uninterrupted")
    main([*arguments[:-1], str(other)])
    assert_same(folder, other / folder.name, names)
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [2, 3, 4, 6]


@pytest.fixture
def hang_up():
    """Sets what SIGHUP does during the test: that of the tests' own process may be nohup's."""
    before = signal.getsignal(signal.SIGHUP)
    yield partial(signal.signal, signal.SIGHUP)
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_saves_and_leaves(results, tmp_path, monkeypatch, hang_up, number):
    def closed(text):
        raise OSError(errno.EIO, "Input/output error")

    def advance(self):
        if next(count) == 3:
            os.kill(os.getpid(), number)
            if number == signal.SIGHUP:
                monkeypatch.setattr(tqdm, "write", closed)

    arguments = [*TEACHER, "--results-dir", str(tmp_path)]
    count = itertools.count(1)
    hang_up(signal.SIG_DFL)
    monkeypatch.setattr(Run, "advance", advance)
    with pytest.raises(SystemExit) as stop:
        train_teacher_mnist.main(arguments)
    assert stop.value.code == 128 + number
    assert step_folders(tmp_path / "teacher-digits/checkpoints")[-1].name == "step_00000003"
    monkeypatch.undo()
    train_teacher_mnist.main(arguments)
    assert_same(results / "teacher-digits", tmp_path / "teacher-digits")


def test_nohup_stays(hang_up):
    hang_up(signal.SIG_IGN)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
    assert not stop


@pytest.mark.parametrize("by_torchrun", [False, True])
@pytest.mark.parametrize(("first", "second", "acts"), [(signal.SIGTERM, signal.SIGTERM, False), (signal.SIGINT, signal.SIGTERM, False),
                                                       (signal.SIGINT, signal.SIGINT, True), (signal.SIGTERM, signal.SIGINT, True)])
def test_a_second_ctrl_c_acts_as_usual_but_sigterm_may_come_twice(first, second, acts, by_torchrun, monkeypatch):
    """Under torchrun, which forwards them, both may."""
    if by_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        acts = False
    with StopRequest() as usual, StopRequest() as stop:     # the outer one stands for what the signals did before
        signal.raise_signal(first)
        assert stop.signal_number == first
        signal.raise_signal(second)
        assert stop.signal_number == first and usual.signal_number == (second if acts else None)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_loss_stops_before_the_update(results, tmp_path, monkeypatch, poison):
    arguments = [*TEACHER, "--results-dir", str(tmp_path)]
    count, honest = itertools.count(1), train_teacher_mnist.flow_matching_loss
    monkeypatch.setattr(train_teacher_mnist, "flow_matching_loss", lambda *a: honest(*a) * (poison if next(count) == 3 else 1))
    with pytest.raises(NonFiniteError, match=r"step 3 .*loss=(nan|inf).*grad_norm="):
        train_teacher_mnist.main(arguments)
    assert [path.name for path in step_folders(tmp_path / "teacher-digits/checkpoints")] == ["step_00000002"]
    monkeypatch.undo()
    train_teacher_mnist.main(arguments)
    assert_same(results / "teacher-digits", tmp_path / "teacher-digits")


@pytest.mark.parametrize("file", ["ema.safetensors", "raw.safetensors", "training.pt"])
def test_torn_checkpoint_is_named_and_the_previous_one_used(results, tmp_path, monkeypatch, capsys, file):
    arguments = [*TEACHER, "--results-dir", str(tmp_path)]
    monkeypatch.setattr(Run, "asked_to_stop", lambda self, step, stop: step == 4)
    train_teacher_mnist.main(arguments)
    monkeypatch.undo()
    torn = tmp_path / "teacher-digits/checkpoints/step_00000004" / file
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    train_teacher_mnist.main(arguments)
    output = capsys.readouterr().out
    assert str(torn) in output and "step_00000002" in output
    assert (torn.parent.parent / "step_00000004.bad" / file).exists()
    assert_same(results / "teacher-digits", tmp_path / "teacher-digits")


def test_kill_during_a_checkpoint_write(results, tmp_path):
    """The process dies by SIGKILL inside its third checkpoint; the same command goes on from the second."""
    arguments = [*TEACHER, "--results-dir", str(tmp_path)]
    program = (
        "import itertools, os, signal, sys, torch\n"
        "import runs, train_teacher_mnist\n"
        "torch.set_num_threads(2)\n"
        "count, save = itertools.count(1), torch.save\n"
        "torch.save = lambda *a: os.kill(os.getpid(), signal.SIGKILL) if next(count) == 3 else save(*a)\n"
        "train_teacher_mnist.main(sys.argv[1:])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT / "tests")})
    checkpoints = tmp_path / "teacher-digits/checkpoints"
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(path.name for path in checkpoints.iterdir()) == [".step_00000006.writing", "step_00000002", "step_00000004"]
    train_teacher_mnist.main(arguments)
    assert_same(results / "teacher-digits", tmp_path / "teacher-digits")


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs that holds one checkpoint but not three."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs needs root: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)      # lazy: safetensors maps files until collected


def test_full_disk(results, small_disk):
    arguments = [*TEACHER, "--results-dir", str(small_disk)]
    ballast = small_disk / "ballast"
    size = 40 * 2**20 - 2 * sum(file.stat().st_size for file in step_folders(results / "teacher-digits/checkpoints")[0].iterdir())
    ballast.write_bytes(bytes(size))
    with pytest.raises(OSError, match=r"could not write .*step_0000000\d"):
        train_teacher_mnist.main(arguments)
    good = step_folders(small_disk / "teacher-digits/checkpoints")
    assert good and not list((small_disk / "teacher-digits/checkpoints").glob(".step*"))
    read_checkpoint(good[-1], ("ema", "raw"))
    ballast.unlink()
    train_teacher_mnist.main(arguments)
    assert_same(results / "teacher-digits", small_disk / "teacher-digits")


def by_two_processes(*script: str, timeout: float | None = None) -> subprocess.CompletedProcess:
    """A script and its arguments under torchrun."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *script], cwd=ROOT,
                          capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


@pytest.fixture(scope="module")
def twelve(results, tmp_path_factory):
    """Run folders of 12 updates by one process, by two, and by two that split the networks (FSDP2), all from one launch."""
    longer = ["--steps", "12", "--save-every", "4", "--keep", "3", "--sample-every", "12"]
    arguments = {"teacher": [*TEACHER, *longer], "student": [*COMMON, *longer, "--teacher", str(results / "teacher-digits")]}
    folders = {way: tmp_path_factory.mktemp(way) for way in ("one", "two", "split")}
    train_teacher_mnist.main([*arguments["teacher"], "--results-dir", str(folders["one"])])
    train_student_mnist.main([*arguments["student"], "--results-dir", str(folders["one"])])
    # The teachers go on where one process left them, the students start anew.
    for way in ("two", "split"):
        shutil.copytree(folders["one"] / "teacher-digits", folders[way] / "teacher-digits")
        for folder in step_folders(folders[way] / "teacher-digits/checkpoints"):
            if folder.name != "step_00000004":
                shutil.rmtree(folder)
    apart = {"two": [], "split": ["--shard", "True", "--sample-every", "6"]}            # samples between updates, too
    jobs = [[f"train_{stage}_mnist", *arguments[stage], "--results-dir", str(folders[way]), *apart[way]]
            for way in ("two", "split") for stage in arguments]
    with_target = [*arguments["student"], "--steps", "4", "--target", "ema", "--guidance-range", "1", "4", "--extra-blocks", "2",
                   "--input-skip", "True", "--one-step-from", "2", "--pinned-share", "0.75", "--pinned-steps", "1", "1", "2",
                   "--name", "student-target", "--results-dir"]
    train_student_mnist.main([*with_target, str(folders["one"])])
    jobs.append(["train_student_mnist", *with_target, str(folders["split"]), "--shard", "True"])
    done = by_two_processes("tests/two_processes.py", json.dumps(jobs))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("finished 12 updates") == 4                        # only rank 0 speaks
    assert done.stdout.count("going on after step 4") == 2
    return folders


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("way", ["two", "split"])
@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_two_processes_equal_one(twelve, stage, way):
    one, other = twelve["one"] / f"{stage}-digits", twelve[way] / f"{stage}-digits"
    assert_close(everything(one, steps=12), everything(other, steps=12))
    rows, other_rows = ([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, other))
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in other_rows], rel=1e-3)


def test_split_target_network_equals_a_whole_one(twelve):
    assert_close(*(everything(twelve[way] / "student-target", ("ema", "raw", "target"), steps=4) for way in ("one", "split")))


def test_what_two_processes_split_one_goes_on_with(twelve, results, monkeypatch):
    """A checkpoint of split networks is whole: it loads into one process, bit for bit."""
    folder = twelve["split"] / "student-digits"
    weights, training = read_checkpoint(step_folders(folder / "checkpoints")[-1], ("ema", "raw"))
    student, _ = load_network(folder, DiT)
    assert weights["ema"].keys() == student.state_dict().keys()
    optimizer = Optimizer(student.requires_grad_(), "muon", 1e-3, 0.01)
    optimizer.load_state_dict(training["optimizer"])
    for saved, loaded in zip(training["optimizer"], optimizer.state_dict(), strict=True):
        for i, values in saved["state"].items():
            assert all(torch.equal(value, loaded["state"][i][key]) for key, value in values.items())


def test_a_rank_that_dies_takes_the_others_along(results, tmp_path, capsys):
    """No process is left waiting for it, what was saved is whole, and the same flags go on, in one process too."""
    arguments = [*TEACHER, "--results-dir", str(tmp_path)]
    done = by_two_processes("tests/dying_rank.py", str(tmp_path), "train_teacher_mnist", *arguments, timeout=180)
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    for rank in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"rank{rank}.pid").read_text()), 0)
    checkpoints = tmp_path / "teacher-digits/checkpoints"
    assert step_folders(checkpoints)[-1].name == "step_00000004" and not list(checkpoints.glob(".step*"))
    train_teacher_mnist.main(arguments)
    assert "going on after step 4" in capsys.readouterr().out
    assert_close(everything(results / "teacher-digits"), everything(tmp_path / "teacher-digits"))


def test_nothing_to_split_among_one_process(tmp_path):
    with pytest.raises(ValueError, match="--shard True: there is one process"):
        train_teacher_mnist.main([*TEACHER, "--results-dir", str(tmp_path), "--shard", "True",
                                  "--data", "nowhere"])                     # which is not even looked for
    assert not list(tmp_path.iterdir())


def test_max_minutes_stops_and_goes_on(results, tmp_path):
    arguments = [*TEACHER, "--results-dir", str(tmp_path)]
    train_teacher_mnist.main([*arguments, "--max-minutes", "0.00001"])
    assert step_folders(tmp_path / "teacher-digits/checkpoints")[-1].name == "step_00000001"
    train_teacher_mnist.main(arguments)
    assert_same(results / "teacher-digits", tmp_path / "teacher-digits")
