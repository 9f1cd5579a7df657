"""Pairs of image and noise; the rest of the convention is held by the losses and samplers that use it."""

import torch

from benchmarks.ablations.noise_patches import nearest_noise
from utils.flow import choose_noise


def drawn(num):
    draw = torch.Generator().manual_seed(0)
    return torch.rand(num, 1, 2, 2, generator=draw) * 2 - 1, [torch.randn(num, 1, 2, 2, generator=draw) for _ in range(4)]


def check_whole(eps, noises):
    """None are mixed, and each draw serves as often as the others."""
    chosen = torch.stack([(eps == noise).flatten(1).all(1) for noise in noises])
    assert (chosen.sum(0) == 1).all()
    assert ((chosen.float().mean(1) - 1 / 4).abs() < 0.03).all()


def test_each_image_gets_the_noise_that_points_most_towards_it_from_its_class():
    x, noises = drawn(4000)
    y = torch.arange(len(x)) % 3 * 5                        # labels need not be the numbers 0, 1, ...
    x = x + y[:, None, None, None]
    eps = choose_noise(x, y, noises)
    check_whole(eps, noises)
    for label in (0, 5, 10):
        own = x[y == label] - x[y == label].mean(0)
        cosines = torch.stack([torch.cosine_similarity(noise.flatten(1), own.flatten(1)) for noise in (eps[y == label],
                                                                                                     *(n[y == label] for n in noises))])
        torch.testing.assert_close(cosines[0], cosines[1:].max(0).values)


def test_the_patch_gives_each_image_its_nearest_noise():
    x, noises = drawn(4000)
    eps = nearest_noise(x, torch.zeros(len(x)), noises)
    distances = torch.stack([(noise - x).square().sum((1, 2, 3)) for noise in noises])
    torch.testing.assert_close((eps - x).square().sum((1, 2, 3)), distances.min(0).values)
    check_whole(eps, noises)
