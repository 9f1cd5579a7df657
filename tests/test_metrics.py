"""Metrics against closed forms, a second implementation, and sets that are made to have a known answer."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from utils.metrics import (
    check_pixels,
    class_accuracy,
    frechet_distance,
    inception_score,
    kernel_distance,
    memorisation,
    nearest,
    precision_recall,
)


def normal(num: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(mean: Tensor, std: Tensor, num: int = 400, seed: int = 0) -> Tensor:
    """A set whose sample mean and covariance are exactly `mean` and diag(std^2)."""
    x = normal(num, len(mean), seed)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return x * std + mean


def test_frechet_distance_of_gaussians():
    """Diagonal covariances: |difference of means|^2 + sum of (difference of standard deviations)^2."""
    mean, std = torch.tensor([[0.0, 1.0, -2.0], [0.5, 1.0, 1.0]]).double(), torch.tensor([[1.0, 2.0, 0.5], [3.0, 2.0, 1.5]]).double()
    expected = (mean[0] - mean[1]).square().sum() + (std[0] - std[1]).square().sum()
    found = frechet_distance(exactly(mean[0], std[0]), exactly(mean[1], std[1], 500, seed=1))
    assert found == pytest.approx(expected.item(), rel=1e-6)


def test_identical_sets_have_no_distance():
    x = normal(300, 16)
    assert abs(frechet_distance(x, x)) < 1e-6
    assert precision_recall(x, x) == (1.0, 1.0)


def test_distances_grow_with_noise():
    x = normal(600, 16)
    noisy = [x + scale * normal(600, 16, seed=1) for scale in (0.3, 0.6, 1.2)]
    for distance in (frechet_distance, kernel_distance):
        values = [distance(y, x) for y in noisy]
        assert values[0] < values[1] < values[2]


def correlated(num: int, width: int, seed: int) -> Tensor:
    return normal(num, width, seed) @ (normal(width, width, seed=9) + seed * torch.eye(width)) + 0.1 * seed


def test_frechet_distance_agrees_with_scipy():
    a, b = correlated(700, 24, 1), correlated(900, 24, 2)
    covariances = [np.cov(x.numpy(), rowvar=False) for x in (a, b)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((a.mean(0) - b.mean(0)).square().sum().item() + np.trace(covariances[0] + covariances[1] - 2 * root))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)


class Pooled(nn.Module):
    """Features of an image that are easy to make: 4 x 4 block means of its channels."""

    num_features = 48

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.double(), 4).flatten(1)


def test_frechet_distance_agrees_with_torchmetrics():
    draw = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (400, 3, 16, 16), generator=draw, dtype=torch.uint8)
    fake = (real.float() * 0.8 + 30 * torch.rand(real.shape, generator=draw)).to(torch.uint8)
    pooled = Pooled()
    theirs = FrechetInceptionDistance(feature=pooled, input_img_size=(3, 16, 16)).set_dtype(torch.float64)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    assert frechet_distance(pooled(fake), pooled(real)) == pytest.approx(theirs.compute().item(), rel=1e-4)


def test_kernel_distance_is_unbiased():
    """Over many pairs of sets from one distribution the mean is 0, within 4 standard errors; the biased one is not."""
    values = torch.tensor([kernel_distance(normal(60, 8, 2 * i), normal(60, 8, 2 * i + 1)) for i in range(60)])
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean()) < 4 * error
    assert kernel_distance(normal(60, 8) + 1, normal(60, 8, 1)) > 20 * error


def test_kernel_distance_of_all_there_are():
    """Of sets below 1,000 each subset is the whole set: the mean over all pairs of different images of (x.y / D + 1)^3."""
    a, b = normal(200, 8).float(), normal(200, 8, 1).float() + 0.5

    def mean(x: Tensor, y: Tensor, same: bool) -> Tensor:
        kernel = (x @ y.T / 8 + 1) ** 3
        return (kernel.sum() - kernel.trace()) / (200 * 199) if same else kernel.mean()

    expected = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    assert kernel_distance(a, b) == pytest.approx(expected.item(), rel=1e-3)
    assert 0 < kernel_distance(a, b[:150])                          # the smaller set decides the size of the subsets


def test_precision_and_recall_on_made_sets():
    left, right = normal(200, 8), normal(200, 8, 1) + 100
    both = torch.cat([left, right])
    assert precision_recall(left, both) == (1.0, 0.5)               # half of the real modes are missing
    assert precision_recall(both, left) == (0.5, 1.0)               # half of the samples are no real images
    assert precision_recall(left, right) == (0.0, 0.0)


def test_inception_score_and_class_accuracy():
    certain = 100 * torch.eye(10).repeat(500, 1)
    assert inception_score(certain) == pytest.approx(10, rel=0.02) and inception_score(torch.zeros(200, 10)) == pytest.approx(1)
    assert class_accuracy(certain, torch.arange(10).repeat(500)) == 1
    assert class_accuracy(certain, torch.arange(10).roll(1).repeat(500)) == 0


def test_nearest_finds_neighbours_in_order():
    real = torch.tensor([[0.0, 0], [10, 0], [0, 3], [50, 50]])
    distances, indices = nearest(torch.tensor([[0.0, 1], [9, 0]]), real, 2)
    assert indices.tolist() == [[0, 2], [1, 0]]
    assert torch.allclose(distances, torch.tensor([[1.0, 2], [1, 9]]))
    pixels = torch.randint(0, 256, (600, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert nearest(pixels, pixels)[1].flatten().tolist() == list(range(600))                # in several parts


def test_memorisation_sees_copies():
    real, held_out = normal(2000, 8).float(), normal(500, 8, 1).float()
    fresh, copied = normal(500, 8, 2).float(), torch.cat([real[:100] + 1e-3, normal(400, 8, 3).float()])
    near = {name: nearest(x, real)[0][:, 0] for name, x in {"held out": held_out, "fresh": fresh, "copied": copied}.items()}
    honest, cheat = (memorisation(near[name], near["held out"]) for name in ("fresh", "copied"))
    assert honest.ratio == pytest.approx(1, abs=0.05) and honest.copies < 0.03
    assert cheat.copies > 0.2
    assert memorisation(nearest(real[:500], real)[0][:, 0], near["held out"]).ratio < 1e-3


def test_memorisation_in_numbers():
    """Medians, which one far image does not move; and all but 1 % of the held-out distances 0, 1, ..., 999 are above 9.99."""
    found = memorisation(torch.tensor([5.0, 9.9, 10.0, 1e6]), torch.arange(1000.0))
    assert found.ratio == pytest.approx(9.9 / 499) and found.copies == 0.5


def test_just_enough_images_that_are_just_not_binary():
    check_pixels(torch.full((30, 1, 8, 8), 2, dtype=torch.uint8), 30, "samples")


@pytest.mark.parametrize(("pixels", "message"), [
    (torch.rand(50, 1, 8, 8), "must be uint8, 0 to 255, not torch.float32"),
    (torch.randint(0, 2, (50, 1, 8, 8), dtype=torch.uint8), "floats in \\[0, 1\\]"),
    (torch.full((50, 8, 8, 1), 9, dtype=torch.uint8), "must be \\(N, 1 or 3, side, side\\)"),
    (torch.full((50, 3, 8, 9), 9, dtype=torch.uint8), "must be \\(N, 1 or 3, side, side\\)"),
    (torch.full((20, 1, 8, 8), 9, dtype=torch.uint8), "20 images are too few; these metrics need at least 30"),
])
def test_bad_images_are_refused(pixels, message):
    with pytest.raises(ValueError, match=message):
        check_pixels(pixels, 30, "samples")


def test_bad_features_are_refused():
    x = normal(50, 8)
    for bad, message in ((normal(8, 8), "8 images are too few for 8 features"), (normal(50, 7), "one D"), (x / 0, "not all finite")):
        for distance in (frechet_distance, kernel_distance, precision_recall):
            for pair in ((bad, x), (x, bad)):
                with pytest.raises(ValueError, match=message):
                    distance(*pair)
