"""evaluate.py, on the digits inside scikit-learn."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import evaluate
import release
from benchmarks import perfect_student, sensitivity
from evaluate import free_folder
from models import Classifier, DiT
from utils import distributed
from utils.checkpoints import read_weights, write_weights
from utils.data import load_images
from utils.evaluation import classifier_judge
from utils.flow import choose_noise
from utils.seeding import generator


def run(digits, checkpoint, *flags):
    (digits / "out" / "metrics.json").unlink(missing_ok=True)               # or it would not be overwritten
    judge = [] if "inception" in flags else ["--classifier", str(digits / "judge.safetensors")]
    evaluate.main([str(digits / checkpoint), *judge, "--num-images", "300", "--seeds", "1", "--out", str(digits / "out"),
                   "--cache", str(digits / "cache"), "--device", "cpu", *flags])
    result = json.loads((digits / "out" / "metrics.json").read_text())
    suffix = f" [{result['protocol']['features']}, n=300]"                  # part of every metric's name
    for part in (result["floor"], *result["rows"]):
        for key in [key for key in part if key not in ("name", "evaluations")]:
            part[key.removesuffix(suffix)] = part.pop(key)
    return result


def test_student(digits, capsys):
    result = run(digits, "student-digits.safetensors", "--num-steps", "1", "2", "--seeds", "2")
    assert [(row["name"], row["evaluations"]) for row in result["rows"]] == [("1 step", 1), ("2 steps", 2)]
    assert result["floor"]["class_accuracy"] > 0.9 and result["floor"]["precision"] > 0.6
    first = result["rows"][0]
    assert first["frechet_distance"]["mean"] > 3 * result["floor"]["frechet_distance"]       # untrained
    assert first["frechet_distance"]["std"] > 0 and 0 <= first["recall"]["mean"] < 0.5
    assert first["teacher_distance"]["mean"] > 0                            # the teacher beside it was found
    assert result["protocol"]["features"].startswith("judge-") and result["protocol"]["floor"] == "179 held-out images"
    for name in ("table.md", "plot.png", "neighbours.png", "residual.png"):
        assert (digits / "out" / name).stat().st_size > 100
    assert "| real held-out images: the floor |" in capsys.readouterr().out

    release.main([str(digits / "student-digits.safetensors"), str(digits / "hub"), "--evaluation", str(digits / "out")])
    assert "| 2 steps | 2 |" in (digits / "hub" / "README.md").read_text()
    with pytest.raises(ValueError, match="is of the weights EMA [0-9a-f]{8}, not of these, EMA"):
        release.main([str(digits / "teacher-digits.safetensors"), str(digits / "other"), "--evaluation", str(digits / "out")])

    weights, metadata = read_weights(digits / "student-digits.safetensors")         # those being trained are not called EMA
    write_weights(digits / "raw.safetensors", weights, metadata | {"weights": "raw"})
    raw = run(digits, "raw.safetensors", "--num-steps", "1")["protocol"]["weights"]
    assert raw == result["protocol"]["weights"].replace("EMA", "raw") != result["protocol"]["weights"]
    release.main([str(digits / "raw.safetensors"), str(digits / "raw"), "--evaluation", str(digits / "out")])
    assert f"weights {raw}" in (digits / "raw" / "README.md").read_text()


def test_the_residual_is_of_pairs_of_image_and_noise_as_in_training(digits, monkeypatch):
    pairs = []

    def residual_map(u, z_at, y):
        pairs.append((z_at(torch.zeros(32)), y, z_at(torch.ones(32))))
        return torch.ones(8, 8)

    monkeypatch.setattr(evaluate, "residual_map", residual_map)
    weights, metadata = read_weights(digits / "student-digits.safetensors")
    noise = generator("cpu", 0, "map")
    noises = [torch.randn(32, 1, 8, 8, generator=noise) for _ in range(4)]
    for num_noises in (1, 4):
        config = {**metadata["config"], "num_noises": num_noises}
        write_weights(digits / "student-near.safetensors", weights, {**metadata, "config": config})
        run(digits, "student-near.safetensors", "--num-steps", "1")
        x, y, eps = pairs[-1]
        assert torch.equal(eps, choose_noise(x, y, noises[:num_noises]))
    assert not torch.equal(eps, noises[0])


def test_what_is_not_there_is_told_of_before_images_are_read(digits, monkeypatch):
    monkeypatch.delattr(evaluate, "load_images")
    with pytest.raises(ValueError, match="--held-out nowhere: no such data set or path"):
        run(digits, "student-digits.safetensors", "--held-out", "nowhere")
    with pytest.raises(ValueError, match="--inception-weights nowhere.pth: no such file"):
        run(digits, "student-digits.safetensors", "--features", "inception", "--inception-weights", "nowhere.pth")


def test_a_teacher_is_checked_before_work_starts(digits, capsys):
    """One of another size is refused; another one of its size is told of; a teacher's checkpoint has none."""
    for name, network in (("larger", DiT("DiT-Test/4", 16, 1, 10)), ("other", DiT("DiT-Test/4", 8, 1, 10))):
        write_weights(digits / f"{name}.safetensors", network.state_dict(),
                      dict(kind="teacher", architecture=network.architecture, classes=[], config={}, step=1))
    weights, metadata = read_weights(digits / "student-digits.safetensors")
    write_weights(digits / "student-knows.safetensors", weights, {**metadata, "teacher": "01234567"})
    for checkpoint, teacher, message in (("student-digits", "larger", "has image_size 16, the student 8"),
                                         ("teacher-digits", "other", "only a student has one")):
        with pytest.raises(ValueError, match=message):
            run(digits, f"{checkpoint}.safetensors", "--teacher", str(digits / f"{teacher}.safetensors"))
    (digits / "larger.safetensors").rename(digits / "teacher-knows.safetensors")         # found by its name, and left out
    found = run(digits, "student-knows.safetensors", "--num-steps", "1")
    assert "teacher_distance" not in found["rows"][0] and "has image_size 16, the student 8: no distance" in capsys.readouterr().out
    (digits / "other.safetensors").replace(digits / "teacher-knows.safetensors")         # likewise
    found = run(digits, "student-knows.safetensors", "--num-steps", "1")
    assert "teacher_distance" not in found["rows"][0] and "learnt from 01234567: no distance" in capsys.readouterr().out
    given = run(digits, "student-knows.safetensors", "--num-steps", "1", "--teacher", str(digits / "teacher-knows.safetensors"))
    assert "teacher_distance" in given["rows"][0] and "the student learnt from 01234567\n" in capsys.readouterr().out


def test_a_judge_that_may_know_the_held_out_images(digits, capsys):
    run(digits, "student-digits.safetensors", "--num-steps", "1")
    assert "held out" not in capsys.readouterr().out
    weights, metadata = read_weights(digits / "judge.safetensors")
    for name, told in (("other", {"held_out": "01234567"}), ("older", {})):
        write_weights(digits / f"{name}.safetensors", weights, {key: value for key, value in metadata.items() if key != "held_out"} | told)
        run(digits, "student-digits.safetensors", "--num-steps", "1", "--classifier", str(digits / f"{name}.safetensors"))
        assert f"note: {name}-" in (text := capsys.readouterr().out) and "was trained with other images held out" in text


def test_an_evaluation_by_other_flags_is_not_overwritten(digits):
    run(digits, "student-digits.safetensors", "--num-steps", "1")
    before = (digits / "out/metrics.json").read_bytes()
    with pytest.raises(ValueError, match="--out .*out holds an evaluation by other flags or of other weights, which stays"):
        evaluate.main([str(digits / "student-digits.safetensors"), "--out", str(digits / "out"), "--device", "cpu"])
    assert (digits / "out/metrics.json").read_bytes() == before


def test_a_cpu_computes_in_float32_whatever_is_asked(digits):
    assert run(digits, "student-digits.safetensors", "--num-steps", "1", "--bfloat16", "True")["protocol"]["arithmetic"] == "float32"


def test_the_protocol_says_in_what_is_computed():
    assert (evaluate.arithmetic(False), evaluate.arithmetic(True)) == ("float32", "bfloat16")
    torch.set_float32_matmul_precision("high")              # as `distributed.start` does on a GPU
    try:
        assert evaluate.arithmetic(False) == "float32, products in TF32"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_an_error_while_comparing_ends_it(digits, monkeypatch):
    """Comparisons run in the background: what fails there must not pass for a result."""
    def fail(judge, samples, labels, reference):
        raise ValueError("features are not all finite")

    monkeypatch.setattr(evaluate, "compare", fail)
    with pytest.raises(ValueError, match="not all finite"):
        run(digits, "student-digits.safetensors", "--num-steps", "1")
    assert not (digits / "out" / "metrics.json").exists()


def test_too_few_images_are_told_before_work_starts(digits, monkeypatch):
    part = replace(images := load_images("digits"), pixels=images.pixels[:20], labels=images.labels[:20])
    monkeypatch.delattr(evaluate, "reference_features")
    for what, split in (("training", (part, images)), ("held-out", (images, part))):
        monkeypatch.setattr(evaluate, "load_held_out", lambda *_, split=split: split)
        with pytest.raises(ValueError, match=f"{what} images: 20 images are too few; these metrics need at least 33"):
            run(digits, "student-digits.safetensors")


def test_a_full_disk_leaves_no_torn_numbers(digits, monkeypatch):       # the next evaluation could not read them
    def full(path, text):
        path.write_bytes(text[:9].encode())
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        run(digits, "student-digits.safetensors", "--num-steps", "1")
    assert not (digits / "out" / "metrics.json").exists()


def test_teacher_rows_count_guided_evaluations_twice(digits):
    result = run(digits, "teacher-digits.safetensors", "--num-steps", "3", "--guidance-scale", "1", "2")
    assert [row["evaluations"] for row in result["rows"]] == [3, 6]
    assert "teacher_distance" not in result["rows"][0]
    late = run(digits, "teacher-digits.safetensors", "--num-steps", "3", "--guidance-scale", "1", "2", "--guidance-interval", "0.5", "1")
    assert [row["name"] for row in late["rows"]] == ["3 Euler steps, guidance 1.0", "3 Euler steps, guidance 2.0 at 0.5 to 1"]
    assert late["rows"][0] == result["rows"][0]             # what is not guided knows no interval
    assert late["rows"][1]["frechet_distance"] != result["rows"][1]["frechet_distance"]
    with pytest.raises(ValueError, match="--guidance-interval 0.5 1: nothing is guided without a --guidance-scale other than 1"):
        run(digits, "teacher-digits.safetensors", "--guidance-scale", "1", "--guidance-interval", "0.5", "1")
    heun = run(digits, "teacher-digits.safetensors", "--num-steps", "3", "--method", "heun", "--guidance-scale", "1", "2")
    assert [row["name"] for row in heun["rows"]] == ["3 Heun steps, guidance 1.0", "3 Heun steps, guidance 2.0"]
    assert [row["evaluations"] for row in heun["rows"]] == [5, 10]
    assert heun["rows"][0]["frechet_distance"] != result["rows"][0]["frechet_distance"]


def test_a_perfect_student_is_its_teacher_in_a_few_steps(digits):
    flags = ["--classifier", str(digits / "judge.safetensors"), "--num-images", "300", "--seeds", "1", "--cache", str(digits / "cache"),
             "--device", "cpu", "--guidance-scale", "2", "--guidance-interval", "0.5", "1"]
    teacher, rows = str(digits / "teacher-digits.safetensors"), []
    for i, legs in enumerate((["midpoint", "self"], ["euler", "self"], ["self", "midpoint"])):
        out = digits / f"perfect{i}"
        perfect_student.main([teacher, "--share", "1", "0.5", "--first-leg", legs[0], "--last-leg", legs[1], "--out", str(out), *flags])
        rows += json.loads((out / "metrics.json").read_text())["rows"]
    assert [row["evaluations"] for row in rows] == [4, 28, 2, 14, 4, 28]        # 1 and 7 steps, 2 evaluations of a midpoint, guided
    with pytest.raises(ValueError, match="is of samples of a perfect-student, not of what this network makes"):
        release.main([teacher, str(digits / "no"), "--evaluation", str(out)])
    assert rows[5]["name"] == "last leg midpoint, share 0.5, guidance 2 at 0.5 to 1"
    distances = [next(value["mean"] for key, value in row.items() if key.startswith("frechet_distance")) for row in rows]
    assert distances[0] == distances[4]                                         # one step from end to end, whichever leg it is called
    assert len(set(distances)) == 5                                             # otherwise they are not one solver, if barely trained


def test_a_perfect_student_refuses(digits):
    for fields, message in ((dict(num_steps=(4,)), "--num-steps 4: must be left out: --share decides"),
                            (dict(method="heun"), "--method heun: must be left out"),
                            (dict(share=(0.5, 0.0)), r"--share 0.5 0.0: must be in \(0, 1\]"),
                            (dict(last_leg="euler"), "--last-leg euler: must be self if --first-leg is not"),
                            (dict(seeds=0), "--seeds 0: must be at least 1")):
        with pytest.raises(ValueError, match=message):
            perfect_student.Config("x", **fields)
    with pytest.raises(ValueError, match=r"student-digits.safetensors is a student; a teacher's flow is solved here"):
        perfect_student.main([str(digits / "student-digits.safetensors"), "--device", "cpu"])


def test_same_seeds_give_the_same_numbers(digits):
    first, second = (run(digits, "student-digits.safetensors", "--num-steps", "1", "--batch-size", "100", "--seeds", "2") for _ in range(2))
    assert first["rows"] == second["rows"]


def test_samples_may_start_from_larger_noise(digits):
    plain, larger = (run(digits, "student-digits.safetensors", "--num-steps", "1", "--seeds", "1", "--noise-scale", scale)
                     for scale in ("1", "1.5"))
    assert (plain["protocol"].get("noise_scale"), larger["protocol"]["noise_scale"]) == (None, 1.5)
    (one,), (other,) = plain["rows"], larger["rows"]
    metric = next(key for key in one if key.startswith("frechet_distance"))
    assert abs(one[metric]["mean"] - other[metric]["mean"]) > 0.01 * one[metric]["mean"]


@pytest.mark.parametrize(("flags", "error", "message"), [
    (["--guidance-scale", "2"], ValueError, "has its guidance inside"),
    (["--guidance-interval", "0.2", "0.8"], ValueError, "--guidance-interval 0.2 0.8: a student has its guidance inside"),
    (["--method", "heun"], ValueError, "only a teacher's flow is solved"),
    (["--classifier", "nowhere.safetensors"], FileNotFoundError, "py --data digits --image-size 8 --out nowhere.safetensors$"),
    (["--data", "nowhere"], ValueError, "no such data set or path"),
    (["--num-images", "20"], ValueError, "--num-images 20: must be at least 33"),
    (["--teacher", "student-digits.safetensors"], ValueError, "--teacher student-digits.safetensors is a student; the distance is"),
    (["--features", "inception", "--inception-weights", "nowhere.pth"], ValueError, "nowhere.pth: no such file"),
    (["--features", "inception", "--inception-weights", __file__], ValueError, "has SHA-256"),
])
def test_errors(digits, flags, error, message, monkeypatch):
    monkeypatch.chdir(digits)
    with pytest.raises(error, match=message):
        run(digits, "student-digits.safetensors", *flags)


def test_a_judge_of_other_classes_gives_inception_scores(digits, monkeypatch):
    own = classifier_judge(str(digits / "judge.safetensors"), Classifier, load_images("digits"), distributed.start("cpu"))
    monkeypatch.setattr(evaluate, "inception_judge", lambda weights, ranks: replace(own, name="inception-x", knows_classes=False))
    row, = run(digits, "student-digits.safetensors", "--num-steps", "1", "--features", "inception")["rows"]
    assert 1 <= row["inception_score"]["mean"] <= 10 and "class_accuracy" not in row


def test_an_evaluation_by_other_flags_or_of_other_weights_has_its_own_folder(tmp_path):
    for seeds, weights, name in ((1, "a", "run"), (2, "a", "run-2"), (2, "b", "run-3"), (2, "a", "run-2"), (1, "a", "run")):
        found = free_folder(tmp_path / "run", {"seeds": seeds}, weights)
        assert found == tmp_path / name
        found.mkdir(exist_ok=True)
        (found / "metrics.json").write_text(json.dumps({"config": {"seeds": seeds}, "protocol": {"weights": weights}}))


def test_a_run_that_was_trained_on_is_evaluated_beside_its_earlier_evaluation(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights, metadata = read_weights(digits / "student-digits.safetensors")
    flags = ["--num-steps", "1", "--num-images", "300", "--seeds", "1", "--classifier", str(digits / "judge.safetensors"),
             "--cache", str(digits / "cache"), "--device", "cpu"]
    write_weights(tmp_path / "s.safetensors", weights, metadata)
    for out in ([], ["--out", "mine"]):
        evaluate.main(["s.safetensors", *flags, *out])
    write_weights(tmp_path / "s.safetensors", {name: tensor * 2 for name, tensor in weights.items()}, metadata)
    with pytest.raises(ValueError, match="--out mine holds an evaluation by other flags or of other weights"):
        evaluate.main(["s.safetensors", *flags, "--out", "mine"])
    for _ in range(2):
        evaluate.main(["s.safetensors", *flags])
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["evaluation-s", "evaluation-s-2"]


def test_damage_is_seen_by_the_metric_that_should(digits, capsys):
    sensitivity.main(["--data", "digits", "--classifier", str(digits / "judge.safetensors"), "--copies", "40", "--out", str(digits / "s"),
                      "--cache", str(digits / "cache"), "--device", "cpu"])
    lines = [line.split("|")[1:-1] for line in (digits / "s" / "table.md").read_text().splitlines() if line.startswith("|")]
    columns = [cell.strip() for cell in lines[0]]
    real, blurred, noisy, dropped, repeated, copied = (
        {key: float(cell.split()[0]) for key, cell in zip(columns, line) if cell.strip() and key not in ("", "evaluations")}
        for line in lines[2:])
    assert blurred["FD"] > 5 * real["FD"] and blurred["recall"] < 0.1 * real["recall"]     # docs/results.md: precision on MNIST alone
    assert blurred["class accuracy"] < 0.5 * real["class accuracy"] and blurred["neighbour ratio"] > 1.5
    assert noisy["FD"] > real["FD"]
    assert dropped["FD"] > 1.5 * real["FD"] and dropped["precision"] > 0.9 * real["precision"]
    assert repeated["recall"] < 0.5 * real["recall"] and repeated["precision"] > 0.9 * real["precision"]
    assert copied["near copies"] > 5 * real["near copies"] and copied["FD"] < 1.5 * real["FD"]
