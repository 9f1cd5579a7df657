"""benchmarks.half_hour: both stages and their numbers, for each seed; it goes on where it was stopped."""

import importlib
import json
import shutil
import sys

import pytest
from PIL import Image
from runs import STEPS

import evaluate
import train_classifier
from benchmarks import gpus, half_hour
from utils.checkpoints import read_metadata, step_folders

TINY = f"--steps {STEPS} --global-batch-size 16 --log-every 2 --sample-every 6 --device cpu --warmup-steps 2"


@pytest.fixture
def flags(tmp_path):
    train_classifier.main(["--data", "digits", "--out", str(tmp_path / "judge.safetensors"), "--epochs", "1", "--width", "8",
                           "--min-accuracy", "0.1", "--device", "cpu"])
    return ["--name", "tiny", "--data", "digits", "--results-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "rows.jsonl"),
            f"--teacher-flags={TINY} --model DiT-Test/4 --sample-steps 2", f"--student-flags={TINY}",
            f"--evaluate-flags=--num-steps 1 2 --num-images 300 --seeds 1 --device cpu --classifier {tmp_path / 'judge.safetensors'}"]


def test_both_stages_and_numbers_of_each_seed(flags, tmp_path, monkeypatch):
    started = []

    def start(line, gpu):
        started.append((line[0], *(flag for flag in line if "-seed" in flag)))
        if len(started) == 5:                               # of seed 1: its student's first start
            raise RuntimeError("CUDA out of memory")
        monkeypatch.setattr("sys.argv", line)               # which a run notes as its command
        importlib.import_module(line[0].removesuffix(".py")).main(line[1:])

    monkeypatch.setattr(half_hour, "start", start)          # of evaluate.py
    monkeypatch.setattr(gpus, "start", start)
    monkeypatch.setattr(half_hour, "on_each", lambda jobs, keep: [keep(job(None)) for job in jobs])     # signals are the main thread's
    with pytest.raises(RuntimeError, match="out of memory"):
        half_hour.main(flags)
    file, runs = tmp_path / "rows.jsonl", tmp_path / "runs"
    assert [json.loads(line)["seed"] for line in file.read_text().splitlines()] == [0]
    half_hour.main(flags)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["name"], row["seed"]) for row in rows] == [("tiny", 0), ("tiny", 1)]
    assert [line[0] for line in started[5:]] == ["train_student_mnist.py", "evaluate.py"]                  # the teacher is there
    for seed, row in enumerate(rows):
        assert row["teacher"]["steps"] == row["student"]["steps"] == STEPS
        assert row["student"]["seconds"] > row["student"]["seconds_of_updates"] > 0
        assert [found["name"] for found in row["evaluation"]["rows"]] == ["1 step", "2 steps"] and row["evaluation"]["floor"]
        weights = [read_metadata(step_folders(runs / f"tiny-{stage}-seed{seed}/checkpoints")[-1] / "ema.safetensors")
                   for stage in ("teacher", "student")]
        assert [each["config"]["seed"] for each in weights] == [seed, seed]
        assert f"--teacher {runs}/tiny-teacher-seed{seed}" in row["student"]["command"]
    half_hour.main(flags)                                   # all is there
    assert len(started) == 7
    with pytest.raises(ValueError, match="holds a row of seed 0 by another command(.|\n)*t-law uniform"):
        half_hour.main([*flags, f"--student-flags={TINY} --t-law uniform", "--seeds", "0"])


def test_done_is_a_run_of_the_same_command_that_is_at_its_end(results, tmp_path):
    """`results`: the runs of conftest.py."""
    shutil.copytree(results / "teacher-digits", tmp_path / "run")
    file = tmp_path / "run/environment.json"
    starts = json.loads(file.read_text())
    for before, command in ((["train_teacher_mnist.py"], ["train_teacher_mnist.py"]),
                            (["-m", "benchmarks.ablations.patches"], ["/somewhere/patches.py"])):
        starts[-1]["command"] = [*command, "--seed", "0"]
        file.write_text(json.dumps(starts))
        assert gpus.is_done(tmp_path / "run", [*before, "--seed", "0"])
        assert not gpus.is_done(tmp_path / "run", [*before, "--seed", "1"])
        assert not gpus.is_done(tmp_path / "nowhere", [*before, "--seed", "0"])
    shutil.rmtree(step_folders(tmp_path / "run/checkpoints")[-1])
    assert not gpus.is_done(tmp_path / "run", [*before, "--seed", "0"])


def test_patches_and_a_given_teacher():
    cfg = half_hour.Config(name="near", teacher_patch="silu", student_patch="warm-start")
    assert half_hour.run_command("teacher", 0, cfg)[1][:4] == ["-m", "benchmarks.ablations.patches", "silu", "train_teacher.py"]
    assert half_hour.run_command("student", 0, cfg)[1][2] == "warm-start"
    shape = half_hour.Config(network_patch="depth-0.5")     # of another shape: no process without the patch reads such weights
    lines = [half_hour.run_command("teacher", 0, shape), half_hour.run_command("student", 0, shape), half_hour.evaluate_command(0, shape)]
    assert {tuple(line[:3]) for _, line in lines} == {("-m", "benchmarks.ablations.patches", "depth-0.5")}
    with pytest.raises(ValueError, match="--network-patch depth-0.5: must be left out, or the patches of a stage are"):
        half_hour.Config(network_patch="depth-0.5", student_patch="warm-start")
    given = half_hour.Config(teacher="mine.safetensors")
    assert half_hour.stages(given) == ["student"] and "mine.safetensors" in half_hour.run_command("student", 3, given)[1]
    with pytest.raises(ValueError, match="--teacher mine.safetensors: must be left out"):
        half_hour.Config(teacher="mine.safetensors", teacher_flags="--steps 3")
    with pytest.raises(ValueError, match="--seeds .*: must be one or more, each once"):
        half_hour.Config(seeds=(0, 0))                      # a spread of none
    with pytest.raises(ValueError, match="without slashes"):
        half_hour.Config(name="a/b")
    with pytest.raises(ValueError, match="--student-patch nearest: must be among silu, gelu"):
        half_hour.Config(student_patch="nearest")


@pytest.mark.parametrize("bad, message", [
    ("--student-flags=--lam-law linear", "unknown law 'linear'"), ("--evaluate-flags=--num-steps 0", "num-steps 0"),
    ("--teacher-flags=--stepps 5", "stepps"),
])
def test_bad_flags_of_a_late_stage_are_told_before_the_first(flags, bad, message, monkeypatch, capsys):
    monkeypatch.setattr(half_hour, "on_each", lambda jobs, keep: pytest.fail("training began"))
    with pytest.raises(SystemExit) as exit:
        half_hour.main([*flags, bad])
    assert message in str(exit.value.code) + capsys.readouterr().err


@pytest.mark.parametrize("stage, flag", [
    ("teacher", "--seed 7"), ("student", "--results-dir elsewhere"), ("student", "--teacher mine"), ("evaluate", "--out elsewhere")])
def test_so_are_flags_that_are_set_here(stage, flag):
    with pytest.raises(ValueError, match=f"--{stage}-flags --device cpu {flag}: must be without {flag.split()[0]}, which"):
        half_hour.check_flags(half_hour.Config(**{f"{stage}_flags": f"--device cpu {flag}"}))


def test_so_is_a_classifier_that_is_not_there():
    for flags, file in (("--num-steps 1", "classifier-digits.safetensors"), ("--classifier nowhere", "nowhere")):
        with pytest.raises(ValueError, match=f"no classifier .*{file}: make one .*, and name it with --classifier in --evaluate-flags"):
            half_hour.check_flags(half_hour.Config(data="digits", evaluate_flags=flags))
    half_hour.check_flags(half_hour.Config(data="digits", evaluate_flags="--features inception"))


@pytest.mark.parametrize(("data", "size", "found"), [
    ("digits", "16", "1, 16, .'0'"), ("{photos}/photos", "8", "3, 8, .'cat', 'dog'"), ("{photos}/prepared", "None", "3, 16, .'cat', 'dog'"),
])
def test_so_is_a_classifier_of_other_images(flags, photo_latents, monkeypatch, data, size, found):
    monkeypatch.setattr(half_hour, "on_each", lambda jobs, keep: pytest.fail("training began"))
    sized = [f"--{stage}-flags={TINY} --image-size {size}" for stage in ("teacher", "student")]
    with pytest.raises(ValueError, match=f"judge.safetensors judges 1 channels, size 8, .*; the data have {found}"):
        half_hour.main([*flags, "--data", data.format(photos=photo_latents), *sized])


@pytest.mark.parametrize(("flag", "message"), [
    ("--held-out nowhere", "--held-out nowhere: no such data set or path"), ("--held-out {few}", "held-out images: 10 images are too few"),
    ("--num-images 32", "--num-images 32: must be at least 33"),
])
def test_so_are_images_that_cannot_be_compared(flags, tmp_path, monkeypatch, flag, message):
    for name in map(str, range(10)):
        (tmp_path / "few" / name).mkdir(parents=True)
        Image.new("L", (8, 8), 200).save(tmp_path / "few" / name / "a.png")
    monkeypatch.setattr(half_hour, "on_each", lambda jobs, keep: pytest.fail("training began"))
    with pytest.raises(ValueError, match=message):
        half_hour.main([*flags[:-1], f"{flags[-1]} {flag.format(few=tmp_path / 'few')}"])


@pytest.mark.parametrize(("flag", "message"), [
    ("--inception-weights nowhere", "--inception-weights nowhere: no such file"), ("--held-out nowhere", "--held-out nowhere: no such"),
])
def test_so_are_they_by_inception(flags, monkeypatch, flag, message):
    inception = evaluate.inception_judge
    monkeypatch.setattr(evaluate, "inception_judge", lambda weights, ranks: weights and inception(weights, ranks))      # no download
    monkeypatch.setattr(half_hour, "on_each", lambda jobs, keep: pytest.fail("training began"))
    with pytest.raises(ValueError, match=message):
        half_hour.main([*flags[:-1], f"--evaluate-flags=--features inception {flag}"])


def test_so_is_a_missing_package(flags, monkeypatch):
    monkeypatch.setattr(half_hour, "on_each", lambda jobs, keep: pytest.fail("training began"))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.delitem(sys.modules, "torch_fidelity.metric_prc", raising=False)
    with pytest.raises(ModuleNotFoundError, match="torch_fidelity"):
        half_hour.main(flags)


def test_so_is_the_judge_of_the_students_quick_evaluations(flags, monkeypatch):
    monkeypatch.setattr(half_hour, "on_each", lambda jobs, keep: pytest.fail("training began"))
    with pytest.raises(FileNotFoundError, match="no classifier nowhere"):
        half_hour.main([*flags, f"--student-flags={TINY} --eval-every 3 --classifier nowhere"])


def test_so_are_the_students_quick_evaluations_of_latents(flags, photo_latents, monkeypatch):
    monkeypatch.setattr(half_hour, "on_each", lambda jobs, keep: pytest.fail("training began"))
    with pytest.raises(ValueError, match="--eval-every: --data .*prepared holds latents"):
        half_hour.main([*flags, "--data", str(photo_latents / "prepared"), f"--student-flags={TINY} --eval-every 3"])


def test_so_are_flags_that_a_stages_patch_needs_or_cannot_go_with(flags, monkeypatch):
    monkeypatch.setattr(half_hour, "on_each", lambda jobs, keep: pytest.fail("training began"))
    with pytest.raises(ValueError, match="whole-features-1 needs --guidance-range and --one-step-from"):
        half_hour.main([*flags, "--student-patch", "whole-features-1"])
    with pytest.raises(ValueError, match="soft-guidance knows students of one guidance scale only"):
        half_hour.main([*flags, "--student-patch", "soft-guidance", f"--student-flags={TINY} --guidance-range 1 3"])
    with pytest.raises(ValueError, match="whole-features-1 needs --guidance-range and --one-step-from"):        # the evaluation has neither
        half_hour.check_flags(half_hour.Config(data="cifar10", teacher="x", network_patch="whole-features-1",
                                               student_flags="--guidance-range 1 3 --one-step-from 4"))
