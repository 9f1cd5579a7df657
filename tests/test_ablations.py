"""The ablation runner: every variant is a valid command, and results become a table as they are."""

import json
import shlex
import shutil
import threading
from pathlib import Path

import pytest
import torch

import train_student
import train_teacher
from benchmarks import gpus
from benchmarks.ablations import run
from benchmarks.ablations.patches import PATCHES
from benchmarks.ablations.variants import VARIANTS
from utils import recipes
from utils.checkpoints import write_weights
from utils.config import parse_config, to_dict

SCRIPTS = {"student": (train_student, recipes.STUDENT), "teacher": (train_teacher, recipes.TEACHER)}
FORMER = {"student": ["--first-leg", "euler", "--lam-law", "anneal(0.3, 0.05, 0.8)", "--pinned-share", "0.15", "--boundary-share", "0.5",
                      "--edge-weight", "0", "--lr", "5e-4", "--muon-lr", "0.01", "--decay-share", "0.4"],      # flags of many sections
          "teacher": ["--num-noises", "1"]}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_variant_differs_from_the_defaults_as_it_says(variant):
    script, recipe = SCRIPTS[variant.stage]
    different = set()
    for flags in ([], FORMER[variant.stage]):         # a variant of the one may be the default of the other
        plain = to_dict(parse_config(script.Config, flags, "", recipe))
        changed = to_dict(parse_config(script.Config, [*flags, *variant.flags], "", recipe))
        different |= {key for key in plain if plain[key] != changed[key]}
    assert different == {flag[2:].replace("-", "_") for flag in variant.flags if flag.startswith("--")}
    assert [v.name for v in VARIANTS].count(variant.name) == 1
    assert variant.patch is None or variant.patch in PATCHES
    assert next(v for v in VARIANTS if v.name == variant.cost).stage == variant.stage


@pytest.mark.parametrize("data", ["mnist", "cifar10", "digits"])
def test_every_variant_can_be_asked_of_a_data_set(data):
    assert sum(run.is_default(variant, run.Config(data=data)) for variant in VARIANTS) in range(1, len(VARIANTS) // 2)


def test_a_variant_is_the_default_of_a_data_set_and_of_flags():
    fewer, more = (next(v for v in VARIANTS if v.name == name) for name in ("pinned-0.15", "pinned-0.6"))
    assert run.is_default(more, run.Config()) and not run.is_default(fewer, run.Config())
    flags = run.Config(flags="--pinned-share 0.15")         # what the flags turn round is a variant again
    assert run.is_default(fewer, flags) and not run.is_default(more, flags)


def test_spike():
    assert run.spike([1.0, 1.0, 1.0, 1.0, 12.0, 1.0]) == 12.0
    assert run.spike([50.0, 1.0, 1.0, 1.0, 1.0, 1.0]) == pytest.approx(1.0)     # the first ones have nothing to be compared with


def leave(line, **numbers):
    """What a training script would leave in its run folder. Returns its flags."""
    flags = dict(zip(line[1::2], line[2::2]))
    folder = Path(flags["--results-dir"], flags["--name"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"global_batch_size": 100, "steps": int(flags["--steps"])}))
    (folder / "environment.json").write_text(json.dumps([{"device": "some card", "command": line}]))
    rows = [{"step": int(flags["--steps"]) * i // 4, "images_per_second": 2000.0, "grad_norm": 1.0 + i, "seconds": 25.0} for i in range(5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "evaluations.jsonl").write_text(json.dumps({"step": 5, **numbers}) + "\n")
    (last := folder / f"checkpoints/step_{int(flags['--steps']):08d}").mkdir(parents=True, exist_ok=True)
    write_weights(last / "ema.safetensors", {"weight": torch.zeros(1)}, {})
    return flags


def test_runs_results_and_table(tmp_path, monkeypatch):
    started = []

    def start(line, gpu):
        flags = leave(line, fd_1step=2.0 + int(line[line.index("--seed") + 1]), accuracy_1step=0.9)
        started.append(flags)
        if "pinned-0.15" in flags["--name"] and flags["--eval-every"] != "None":
            raise RuntimeError("... NonFiniteError: step 12 is not finite")

    monkeypatch.setattr(gpus, "start", start)
    monkeypatch.setattr(gpus, "visible_gpus", lambda: [None])
    flags = ["--only", "student", "pinned-0.15", "--seconds", "30", "--seeds", "0", "1", "--out", str(tmp_path),
             "--results-dir", str(tmp_path / "runs"), "--teacher", "t.safetensors", "--flags=--global-batch-size 100"]
    run.main(flags)
    assert [f["--steps"] for f in started] == ["100", "600", "600", "600", "600"]  # one probe: they cost alike
    assert all(f["--teacher"] == "t.safetensors" and f["--global-batch-size"] == "100" for f in started)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["variant"], row["seed"], row.get("fd_1step")) for row in rows] == [
        ("student", 0, 2.0), ("pinned-0.15", 0, None), ("student", 1, 3.0), ("pinned-0.15", 1, None)]
    assert shlex.split(rows[1]["command"])[:2] == ["python", "train_student.py"] and "--pinned-share 0.15" in rows[1]["command"]
    text = (tmp_path / "table.md").read_text()
    heading = run.INTRODUCTION + "## cifar10, 30 s a run, some card, `--global-batch-size 100`, of t.safetensors\n\n"
    assert text.startswith(heading + "| student | asks |")
    assert "| student | the defaults | 2.500 ± 0.500 | 0.900 ± 0.000 | 2.0 | 600 | 2 |" in text
    assert "| pinned-0.15 | 15 % of the intervals pinned |  |  |  | 600 | 2, 2 not finite |" in text
    assert (tmp_path / "gradient_norm.png").is_file() and rows[0]["norms"][0] == [0, 1.0]
    run.main(flags)                                         # what is there is not run again
    run.main([flags[0], "midpoint-0.2", *flags[3:]])      # nor a variant that is the default of CIFAR-10
    assert len(started) == 5
    run.main([*flags[:3], "--seconds", "60", *flags[5:]])   # what is not comparable has a table of its own
    text = (tmp_path / "table.md").read_text()
    assert text.count("\n## ") == 2 and text.count("| student | the defaults |") == 2

    (tmp_path / "again").mkdir()                            # as if it had been killed before it wrote the results of finished runs
    count = len(started)
    run.main([*flags, "--only", "student", "--out", str(tmp_path / "again")])
    assert len(started) == count and len((tmp_path / "again/results.jsonl").read_text().splitlines()) == 2

    monkeypatch.setattr(gpus, "start", lambda line, gpu: (_ for _ in ()).throw(RuntimeError("CUDA out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):                    # any other failure is no result
        run.main(["--only", "student", "--seconds", "30", "--seeds", "7", "--out", str(tmp_path), "--results-dir", str(tmp_path / "runs")])
    with pytest.raises(ValueError, match="among adamw, algorithm-1"):
        run.Config(only=("nonsense",))


def test_flags_that_are_set_here_are_refused_before_the_first_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "start", lambda line, gpu: pytest.fail("training began"))
    with pytest.raises(ValueError, match="--flags --lr 1e-3 --seed=7 --eval_every 5: must be without --eval-every and --seed, which this"):
        run.main(["--only", "student", "--flags=--lr 1e-3 --seed=7 --eval_every 5", "--out", str(tmp_path), "--results-dir", str(tmp_path)])


def test_each_gpu_takes_a_run_and_a_failure_loses_no_other(tmp_path, monkeypatch):
    both = threading.Barrier(2, timeout=30)                 # broken, and the test failed, unless two runs are under way at once
    started = []

    def start(line, gpu):
        flags = leave(line, fd_1step=2.0)
        started.append((flags["--name"], gpu))
        if flags["--eval-every"] != "None":
            both.wait()
            if "pinned-0.15" in flags["--name"]:
                raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(gpus, "start", start)
    monkeypatch.setattr(gpus, "visible_gpus", lambda: ["2", "5"])
    with pytest.raises(RuntimeError, match="out of memory"):
        run.main(["--only", "student", "pinned-0.15", "--seeds", "0", "--seconds", "30", "--out", str(tmp_path),
                  "--results-dir", str(tmp_path / "runs")])
    probes = [name for name, _ in started if name.startswith("probe-student-")]
    assert len(probes) == 1 and {gpu for name, gpu in started if name not in probes} == {"2", "5"}
    assert [json.loads(row)["variant"] for row in (tmp_path / "results.jsonl").read_text().splitlines()] == ["student"]


def test_a_probe_that_was_cut_off_is_run_again(tmp_path, monkeypatch):
    """And one of other data or flags is another one."""
    started = []

    def start(line, gpu):
        name = leave(line, fd_1step=2.0)["--name"]
        started.append(name)
        if len(started) == 1:                               # stopped as by Ctrl-C: it ends as if nothing were wrong
            shutil.rmtree(tmp_path / "runs" / name / "checkpoints")

    monkeypatch.setattr(gpus, "start", start)
    monkeypatch.setattr(gpus, "visible_gpus", lambda: [None])
    flags = ["--only", "student", "--seeds", "0", "--out", str(tmp_path), "--results-dir", str(tmp_path / "runs")]
    with pytest.raises(RuntimeError, match="was stopped before its end"):
        run.main(flags)
    run.main(flags)
    run.main([*flags, "--data", "mnist"])
    probe, again, first, other, second = started
    assert probe == again != other and other.startswith("probe-student-") and first == second == "student-90s-seed0"


def test_after_a_failure_no_other_job_is_begun(monkeypatch):
    monkeypatch.setattr(gpus, "visible_gpus", lambda: [None])
    begun, kept = [], []

    def fail(gpu):
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        gpus.on_each([begun.append, fail, begun.append], kept.append)
    assert begun == kept == [None]


def test_a_command_sees_its_gpu_alone():
    program = ["-c", "import os; print('saw', os.environ['CUDA_VISIBLE_DEVICES']); exit(os.environ['CUDA_VISIBLE_DEVICES'] != '7')"]
    gpus.start(program, "7")
    with pytest.raises(RuntimeError, match="ended with 1:\nsaw 8"):
        gpus.start(program, "8")


def test_gpus(monkeypatch):
    monkeypatch.setattr(gpus.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-65cf")
    assert gpus.visible_gpus() == ["3", "GPU-65cf"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpus.visible_gpus() == ["0", "1"]
    monkeypatch.setattr(gpus.torch.cuda, "device_count", lambda: 0)
    assert gpus.visible_gpus() == [None]


def test_the_curves_are_the_longest_runs_of_one_teacher():
    rows = [{"variant": name, "steps": steps, "norms": [[1, 1.0]], "data": "cifar10", "device": "a", "flags": "", "teacher": teacher}
            for name, steps, teacher in [("student", 10, "t"), ("algorithm-1", 10, "t"), ("algorithm-1", 30, "t"), ("student", 90, "other"),
                                         ("edges-0", 90, "t")]]
    assert {name: row["steps"] for name, row in run.collapse_rows(rows).items()} == {"student": 10, "algorithm-1": 30}
