"""The parts of evaluate.py: sets of samples, features that are kept, summaries, the plot."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from threadpoolctl import threadpool_info

import evaluate
import train_classifier
from models import Classifier, DiT
from utils import distributed, evaluation, metrics, report
from utils.checkpoints import write_weights
from utils.data import load_held_out, load_images
from utils.evaluation import Judge, TeacherDistance, classifier_file, fingerprint, reference_features, residual_map, shuffled, summary


def test_comparing_takes_few_threads(monkeypatch):
    """And gives the others back."""
    def threads() -> list[int]:
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    seen, distance = [], metrics.frechet_distance
    monkeypatch.setattr(metrics, "frechet_distance", lambda *features: (seen.extend(threads()), distance(*features))[1])
    monkeypatch.setattr(evaluation, "BLAS_THREADS", 1)
    before, draw = threads(), torch.Generator().manual_seed(0)
    some = metrics.Features(torch.randn(100, 4, generator=draw), torch.randn(100, 2, generator=draw))
    found = evaluation.compare(Judge("judge", None, True), some, torch.zeros(100).long(), some)
    assert set(seen) == {1} and threads() == before and found["frechet_distance"] == pytest.approx(0, abs=1e-6)


def test_held_out_images_are_not_in_the_training_split():
    images, held_out = load_held_out(load_images("digits"), None)
    assert len(images) + len(held_out) == 1797 and len(held_out) == 179
    everything = torch.cat([images.pixels, held_out.pixels]).flatten(1).float().sum()
    assert everything == load_images("digits").pixels.float().sum()


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """Noise in the place of MNIST, and an untrained teacher of it."""
    class Dataset:
        classes = tuple(f"{digit} - name" for digit in range(10))

        def __init__(self, root, train, download):
            draw = torch.Generator().manual_seed(int(train))
            self.data = torch.randint(0, 256, (200 if train else 150, 28, 28), dtype=torch.uint8, generator=draw)
            self.targets = torch.arange(len(self.data)) % 10

    monkeypatch.setattr(torchvision.datasets, "MNIST", Dataset)
    network = DiT("DiT-Test/4", 28, 1, 10)
    write_weights(tmp_path / "teacher.safetensors", network.state_dict(), dict(
        kind="teacher", architecture=network.architecture, classes=list("0123456789"), config={"data": "mnist"}))
    return tmp_path


def measure(folder: Path, *flags: str) -> None:
    evaluate.main([str(folder / "teacher.safetensors"), "--data-root", str(folder), "--num-steps", "1", "--num-images", "140",
                   "--seeds", "1", "--out", str(folder / "out"), "--cache", str(folder / "cache"), "--device", "cpu", *flags])


def test_a_named_sets_test_split_is_held_out_from_its_released_judge(mnist, capsys):
    images, held_out = load_held_out(load_images("mnist", str(mnist), 14), None, str(mnist))
    assert images.shape == held_out.shape == (1, 14, 14) and (len(images), len(held_out)) == (200, 150)
    assert not torch.equal(images.pixels[:150], held_out.pixels)
    measure(mnist)
    said = capsys.readouterr().out
    assert "features: classifier-mnist-" in said and "reference: 200 training images  floor: 140 held-out images" in said
    assert "it may know some of these" not in said


def test_own_images_called_like_a_named_set_have_a_judge_of_their_own(mnist, monkeypatch, capsys):
    """Though the released one fits in size, channels and names of classes."""
    own, draw = mnist / "clothes/mnist", torch.Generator().manual_seed(2)
    for digit in range(10):
        (own / str(digit)).mkdir(parents=True)
        for i in range(15):
            pixels = torch.randint(0, 256, (28, 28), dtype=torch.uint8, generator=draw)
            Image.fromarray(pixels.numpy()).save(own / str(digit) / f"{i}.png")
    with pytest.raises(FileNotFoundError, match=f"classifier-own-mnist.*train_classifier.py --data {own} --image-size 28$"):
        measure(mnist, "--data", str(own), "--held-out", str(own))
    monkeypatch.setattr(evaluation, "RELEASED", mnist / "judges")
    train_classifier.main(["--data", str(own), "--image-size", "28", "--epochs", "0.1", "--width", "2", "--min-accuracy", "0",
                           "--device", "cpu"])
    measure(mnist, "--data", str(own), "--held-out", str(own))
    assert "features: classifier-own-mnist-" in capsys.readouterr().out
    assert classifier_file(None, "photos.zip").name == "classifier-photos.safetensors"
    assert classifier_file(None, "a/photos.v2/").name == "classifier-photos.v2.safetensors"
    assert classifier_file("mine", str(own)) == Path("mine")


def test_the_order_of_the_files_does_not_matter():
    images = load_images("digits")
    other = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    moved = replace(images, pixels=images.pixels[other], labels=images.labels[other])
    (pixels, labels), again = shuffled(images), shuffled(moved)
    assert torch.equal(pixels, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(pixels, images.pixels) and pixels.float().sum() == images.pixels.float().sum()
    assert labels[:300].bincount(minlength=10).min() > 15                   # each class about 30 times: a fair sample
    tenth, same = (load_held_out(each, None)[1] for each in (images, moved))
    assert torch.equal(shuffled(tenth)[0], pixels[:179]) and torch.equal(shuffled(same)[0], pixels[:179])


def test_features_are_kept_under_the_names_of_judge_and_images(tmp_path, monkeypatch):
    calls = []

    def see(pixels):
        calls.append(len(pixels))
        return pixels.flatten(1).float(), pixels.flatten(1).float()

    pixels, _ = shuffled(load_images("digits"))
    for judge in (Judge("a", see, False), Judge("a", see, False), Judge("b", see, False)):
        features = reference_features(judge, pixels[:700], tmp_path)
        assert torch.equal(features.features, pixels[:700].flatten(1).float())
    assert calls == [500, 200, 500, 200]                        # the second time from the file, the third is another judge
    reference_features(Judge("a", see, False), pixels[:600], tmp_path)
    assert calls[4:] == [500, 100]
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    reference_features(Judge("a", see, False), pixels[:600], tmp_path)      # from a place that may only be read
    with pytest.raises(ValueError, match=r"c-\w{8}.pt: .* is no folder, or may not be written to"):
        reference_features(Judge("c", see, False), pixels[:600], tmp_path)
    assert len(calls) == 6


def test_two_runs_make_features_at_once(tmp_path, monkeypatch):
    """The second begins and ends while the first is about to rename its file."""
    pixels, replace_file = torch.arange(2 * 16, dtype=torch.uint8).view(2, 1, 4, 4), Path.replace
    judge = Judge("a", lambda pixels: (pixels.flatten(1).float(), torch.zeros(len(pixels), 2)), False)

    def other_first(path, target):
        monkeypatch.setattr(Path, "replace", replace_file)
        assert torch.equal(reference_features(judge, pixels, tmp_path).features, pixels.flatten(1).float())
        return replace_file(path, target)

    monkeypatch.setattr(Path, "replace", other_first)
    assert torch.equal(reference_features(judge, pixels, tmp_path).features, pixels.flatten(1).float())
    (file,) = tmp_path.iterdir()                            # nothing half-written is left
    for size in (0, 100, file.stat().st_size - 10):         # torn ones are made anew
        file.write_bytes(file.read_bytes()[:size])
        assert torch.equal(reference_features(judge, pixels, tmp_path).features, pixels.flatten(1).float())
        assert torch.load(file)["features"].shape == (2, 16)


def test_residual_map_vanishes_for_a_consistent_flow_only():
    y = torch.zeros(4, dtype=torch.long)
    eps = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    consistent = residual_map(lambda z, r, t, y: torch.ones_like(z), lambda t: eps, y, 4)
    assert consistent.isnan().sum() == 6 and consistent[~consistent.isnan()].max() < 1e-12
    wrong = residual_map(lambda z, r, t, y: z * (t - r).view(-1, 1, 1, 1), lambda t: eps, y, 4)
    assert wrong[3, 0] > wrong[0, 0] > 0


def test_teacher_and_student_start_from_noise_of_the_scale_asked_for():
    labels, ranks = torch.zeros(500, dtype=torch.long), distributed.start("cpu")
    plain, larger = (TeacherDistance(lambda z, y: 0 * z, labels, (1, 4, 4), ranks, scale)(lambda z, y: z, 0) for scale in (1, 1.5))
    assert plain == pytest.approx(1, abs=0.05) and larger == pytest.approx(2.25 * plain)


def test_summary():
    result = summary([{"a": 1.0}, {"a": 3.0}])
    assert result == {"a": {"mean": 2.0, "std": pytest.approx(2**0.5)}} and summary([{"a": 1.0}])["a"]["std"] is None


def test_fingerprint_sees_one_bit():
    a = torch.zeros(8)
    b = a.clone()
    b[7] = 1e-45
    assert fingerprint(a) != fingerprint(b) and fingerprint(a) == fingerprint(a.clone()) and len(fingerprint(a)) == 8


def test_evaluating_on_the_way_needs_more_images_than_features(monkeypatch, tmp_path):
    """Said before training, not at its first evaluation."""
    judge = Judge("wide", lambda pixels: (torch.zeros(len(pixels), 2000), torch.zeros(len(pixels), 10)), knows_classes=True)
    monkeypatch.setattr(evaluation, "classifier_judge", lambda *_: judge)
    with pytest.raises(ValueError, match="--eval-every: 1797 images are too few for a distance of 2000 features"):
        evaluation.QuickEvaluation(None, Classifier, load_images("digits"), distributed.start("cpu"), str(tmp_path))


def test_a_missing_package_is_told_before_images_are_looked_at(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.delitem(sys.modules, "torch_fidelity.metric_fid", raising=False)
    with pytest.raises(ModuleNotFoundError, match="torch_fidelity"):
        evaluation.QuickEvaluation("nowhere", Classifier, None, None, "nowhere")


@pytest.mark.parametrize("distances", [(0.046, 0.041), (0.22, 0.15), (3.0, 0.05)])
def test_the_plot_has_its_numbers(distances, tmp_path, monkeypatch):
    """Both axes are labelled, also where all distances lie within one decade."""
    plt = report.pyplot()
    monkeypatch.setattr(plt, "close", lambda figure: None)
    rows = [{"evaluations": n, "frechet_distance": {"mean": mean, "std": 0.001}} for n, mean in zip((1, 4), distances)]
    report.save_plot(tmp_path / "plot.png", rows, {"frechet_distance": 0.03})
    axis = plt.gca()
    inside = [label.get_text() for label in axis.get_yticklabels() if axis.get_ylim()[0] <= label.get_position()[1] <= axis.get_ylim()[1]]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "4"] and len([text for text in inside if text]) >= 2
    monkeypatch.undo()
    plt.close(axis.figure)


def test_results_are_named_after_their_run(tmp_path):
    run = tmp_path / "student-photos"
    run.mkdir()
    (run / "config.json").write_text("{}")
    assert evaluate.label(run) == "student-photos" and evaluate.label(tmp_path / "student-mnist.safetensors") == "student-mnist"
    assert evaluate.label(run / "best.safetensors") == "student-photos-best"
    assert evaluate.label(run / "checkpoints/step_00000100/ema.safetensors") == "student-photos-step_00000100-ema"
    assert evaluate.label(run / "checkpoints/step_00000100") == "student-photos-step_00000100"
    (tmp_path / "student-v1.5").mkdir()
    assert evaluate.label(tmp_path / "student-v1.5") == evaluate.label(tmp_path / "student-v1.5.safetensors") == "student-v1.5"
