"""Which noise an image gets: what the chosen noises are, together and within a class."""

import pytest
import torch

from benchmarks.ablations.noise_patches import by_direction
from utils.flow import nearest_noise


def test_noise_chosen_by_its_direction_is_together_what_all_noise_is():
    """The nearest noise is smaller, and leans towards the mean image."""
    draw = torch.Generator().manual_seed(0)
    x = 0.3 * torch.randn(20_000, 1, 4, 4, generator=draw) - 0.7
    noises = [torch.randn(x.shape, generator=draw) for _ in range(4)]
    found = []
    for choose in (nearest_noise, by_direction):
        eps = choose(x, noises)
        found.append((eps.square().mean().sqrt(), eps.mean(), ((x - x.mean(0)) * eps).mean()))
    (small, lean, near), (size, mean, towards) = found
    assert small < 0.95 and lean < -0.1 and near > 0.01
    assert size == pytest.approx(1, abs=0.005) and mean == pytest.approx(0, abs=0.005)
    assert towards > 2 * near
    assert by_direction(x, noises[:1]) is noises[0]


def test_noise_chosen_by_its_direction_from_the_class_s_mean_is_plain_within_each_class():
    """Seen from the mean of all, the noise of a class leans towards what the class has more of than others."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(2).repeat(2_000)
    side = torch.tensor([-1.0, 1.0])[y]
    x = 0.3 * torch.randn(len(y), 1, 4, 4, generator=draw) + 0.3 * side[:, None, None, None]
    noises = [torch.randn(x.shape, generator=draw) for _ in range(4)]
    leans = [(by_direction(x, noises, *labels).mean((1, 2, 3)) * side).mean() for labels in ([], [y])]
    assert leans[0] > 0.15 and leans[1] == pytest.approx(0, abs=0.015)
    eps = by_direction(x, noises, y)
    inside = x - 0.3 * side[:, None, None, None]
    assert (inside * eps).mean() > 0.05 and eps.square().mean() == pytest.approx(1, abs=0.02)
    assert by_direction(x[:1], [noises[0][:1], noises[1][:1]], y[:1]).equal(noises[0][:1])  # alone in its class: any
