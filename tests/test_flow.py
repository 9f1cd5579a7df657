"""Pairs of image and noise; the rest of the convention is held by the losses and samplers that use it."""

import torch

from utils.flow import nearest_noise


def test_each_image_gets_its_nearest_noise():
    draw = torch.Generator().manual_seed(0)
    x, noises = torch.rand(4000, 1, 2, 2, generator=draw) * 2 - 1, [torch.randn(4000, 1, 2, 2, generator=draw) for _ in range(4)]
    eps = nearest_noise(x, noises)
    distances = torch.stack([(noise - x).square().sum((1, 2, 3)) for noise in noises])
    torch.testing.assert_close((eps - x).square().sum((1, 2, 3)), distances.min(0).values)
    chosen = torch.stack([(eps == noise).flatten(1).all(1) for noise in noises])
    assert (chosen.sum(0) == 1).all()                       # whole noises, none mixed
    assert ((chosen.float().mean(1) - 1 / 4).abs() < 0.03).all()


def test_the_only_noise_is_the_nearest():
    x, eps = torch.zeros(3, 1, 2, 2), torch.randn(3, 1, 2, 2)
    assert nearest_noise(x, [eps]) is eps
