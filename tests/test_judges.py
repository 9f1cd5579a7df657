"""The networks that images are judged by: the classifier, its training, Inception; and runs that are judged on their way."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import TEACHER, make_images
from torch_fidelity import feature_extractor_inceptionv3

import evaluate
import train_classifier
import train_student_mnist
import train_teacher_mnist
from models import Classifier
from utils import distributed
from utils.checkpoints import read_weights
from utils.data import load_images
from utils.evaluation import classifier_judge
from utils.run_log import Run


def test_inception_sees_gray_images_as_colour_ones(monkeypatch):
    """The network of torch-fidelity, with random weights for the ones that would be downloaded."""
    def fill(network, weights):
        for module in network.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                torch.nn.init.kaiming_normal_(module.weight, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *args, **flags: {})
    monkeypatch.setattr(feature_extractor_inceptionv3.FeatureExtractorInceptionV3, "load_state_dict", fill)
    judge = evaluate.inception_judge(None, distributed.start("cpu"))
    gray = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen, colour = judge(gray), judge(gray.expand(-1, 3, -1, -1))
    assert seen.features.shape == (3, 2048) and seen.logits.shape == (3, 1008)
    assert seen.features.isfinite().all() and seen.features.std(0).mean() > 0.01 * seen.features.mean().abs()
    assert torch.equal(seen.features, colour.features)
    assert judge.name.startswith("inception-") and not judge.knows_classes


def test_bad_judge_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"below --min-accuracy 0.99: nothing was written"):
        train_classifier.main(["--data", "digits", "--epochs", "0.1", "--min-accuracy", "0.99", "--out", str(tmp_path / "a")])
    assert not list(tmp_path.iterdir())


def test_judge_needs_held_out_images(tmp_path):
    data = make_images(tmp_path / "photos", ["cat", "dog"], per_class=2)
    with pytest.raises(ValueError, match="of 4 images a tenth is none.*--held-out"):
        train_classifier.main(["--data", str(data), "--out", str(tmp_path / "a.safetensors")])
    assert not (tmp_path / "a.safetensors").exists()


def test_judge_without_classes_is_refused_before_any_image_is_decoded(tmp_path):
    (make_images(tmp_path / "photos", [""]) / "torn.png").touch()
    with pytest.raises(ValueError, match="a classifier needs at least 2 classes, and there are 0"):
        train_classifier.main(["--data", str(tmp_path / "photos"), "--out", str(tmp_path / "a.safetensors")])


@pytest.mark.parametrize("size", [8, 28, 32])
def test_classifier_reads_every_size(size):
    network = Classifier(3, 5, 4).eval()
    x = torch.randn(2, 3, size, size)
    features, logits = network.see(x)
    assert features.shape == (2, 16) and logits.shape == (2, 5) and torch.equal(logits, network(x))
    assert not torch.equal(features[0], features[1]) and not torch.equal(logits[0], logits[1])


def test_first_layer_whitens():
    """On the images it was set with, the filters' outputs have mean 0, variance 1, and no correlation but with their negatives."""
    x = torch.nn.functional.avg_pool2d(torch.randn(400, 3, 20, 20), 3, 1) * 0.7 - 0.4       # neighbours are alike, as in images
    network = Classifier(3, 5, 4)
    network.set_whitening(x)
    y = network.whiten(x).detach().transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(y[:12].cov(), torch.eye(12).double(), atol=0.02, rtol=0)
    torch.testing.assert_close(y[:12], -y[12:])
    assert y.mean(1).abs().max() < 1e-3


def test_shifts_are_each_image_s_own():
    x = torch.rand(64, 2, 9, 9)
    moved = train_classifier.shifted(x, 2, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, (2,) * 4, mode="reflect")
    found = [[(i, j) for i in range(5) for j in range(5) if torch.equal(padded[k, :, i : i + 9, j : j + 9], moved[k])] for k in range(64)]
    assert all(len(places) == 1 for places in found) and len({places[0] for places in found}) > 15


def test_judge_of_other_images_is_refused(digits):
    images = load_images("digits")
    with pytest.raises(ValueError, match="judges 1 channels, size 8"):
        classifier_judge(str(digits / "judge.safetensors"), Classifier, replace(images, classes=["a", "b"]), distributed.start("cpu"))


def test_judge_is_never_overwritten(digits):
    before = (digits / "judge.safetensors").read_bytes()
    with pytest.raises(ValueError, match="a judge is frozen"):
        train_classifier.main(["--data", "digits", "--out", str(digits / "judge.safetensors")])
    assert (digits / "judge.safetensors").read_bytes() == before


def test_judge_says_what_it_is(digits):
    _, metadata = read_weights(digits / "judge.safetensors")
    assert metadata["kind"] == "classifier" and metadata["accuracy"] > 0.9 and metadata["image_size"] == 8
    assert "out" not in metadata["config"] and "data_root" not in metadata["config"]


def test_training_evaluates_on_its_way_and_keeps_the_best(digits, tmp_path):
    """Evaluation changes nothing of the training, and a run that goes on does not repeat its lines."""
    def train(name, *flags):
        train_student_mnist.main([
            "--data", "digits", "--teacher", str(digits / "teacher-digits.safetensors"), "--results-dir", str(tmp_path), "--name", name,
            "--steps", "6", "--global-batch-size", "32", "--num-steps", "1", "2", "--log-every", "2", "--save-every", "2",
            "--sample-every", "6", "--comet", "off", "--device", "cpu", *flags])
        return read_weights(tmp_path / name / "checkpoints" / "step_00000006" / "raw.safetensors")[0]

    judged = train("judged", "--eval-every", "3", "--classifier", str(digits / "judge.safetensors"))
    plain = train("plain")
    assert all(torch.equal(judged[name], plain[name]) for name in plain)
    lines = [json.loads(line) for line in (tmp_path / "judged" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    assert list(lines[0]) == ["step", "judge", "fd_1step", "accuracy_1step", "fd_2step", "accuracy_2step"]
    _, metadata = read_weights(tmp_path / "judged" / "best.safetensors")
    best = min(lines, key=lambda line: line["fd_1step"])
    assert metadata["step"] == best["step"] and metadata["best"]["fd_1step"] == best["fd_1step"]
    assert not (tmp_path / "plain" / "best.safetensors").exists()


def test_a_torn_best_is_set_aside(tmp_path):
    said: list[str] = []
    run = SimpleNamespace(ranks=SimpleNamespace(is_main=True), folder=tmp_path, judge="judge", comet=None, note=said.append)
    best = tmp_path / "best.safetensors"
    best.write_bytes(b"torn")
    for step, fd in ((1, 0.5), (2, 0.7)):
        Run.evaluation(run, step, {"fd": fd}, torch.nn.Linear(1, 1), {"kind": "student", "architecture": {}, "classes": [], "config": {}})
    assert "is torn" in said[1] and Path(f"{best}.bad").read_bytes() == b"torn" and read_weights(best)[1]["best"] == {"fd": 0.5}


def test_a_run_keeps_the_judge_that_it_began_with(digits, tmp_path, monkeypatch):
    """Numbers of two judges are not to be compared, and best.safetensors is the best by one."""
    train_classifier.main(["--data", "digits", "--out", str(tmp_path / "second.safetensors"), "--epochs", "1", "--width", "8",
                           "--min-accuracy", "0", "--device", "cpu"])
    command = [*TEACHER, "--results-dir", str(tmp_path), "--guidance-scale", "1", "--eval-every", "2", "--classifier"]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "asked_to_stop", lambda self, step, stop: step == 2)
        train_teacher_mnist.main([*command, str(digits / "judge.safetensors")])
    with pytest.raises(ValueError, match=r"evaluations.jsonl is judge-\w{8}, this command's is second-\w{8}; .*--classifier"):
        train_teacher_mnist.main([*command, str(tmp_path / "second.safetensors")])
    file = tmp_path / "teacher-digits/evaluations.jsonl"
    row = json.loads(file.read_text())
    del row["judge"]
    file.write_text(json.dumps(row) + '\n{"step": 4, "jud')     # of before, and torn
    train_teacher_mnist.main([*command, str(tmp_path / "second.safetensors")])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[0] == row and [row["step"] for row in rows] == [2, 4, 6] and {row["judge"][:7] for row in rows[1:]} == {"second-"}


def test_training_without_its_judge_stops_before_it_starts(digits, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train_classifier.py --data digits \(there can be none without classes: "):
        train_teacher_mnist.main(["--data", "digits", "--results-dir", str(tmp_path), "--eval-every", "5", "--device", "cpu"])
    assert not list(tmp_path.iterdir())
