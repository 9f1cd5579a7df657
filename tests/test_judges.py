"""The networks that images are judged by: the classifier, its training, and Inception."""

import pytest
import torch
from runs import make_images
from torch_fidelity import feature_extractor_inceptionv3

import evaluate
import train_classifier
from models import Classifier
from utils import distributed


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
