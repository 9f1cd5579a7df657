"""Which noise an image gets: what the chosen noise is, together and within a class."""

from functools import partial

import pytest
import torch

from benchmarks import noise
from benchmarks.ablations.noise_patches import nearest_noise, noise_towards, trade_noise
from utils.config import parse_config
from utils.data import load_images, to_range
from utils.flow import choose_noise


def test_noise_chosen_by_its_direction_is_together_what_all_noise_is():
    """The nearest noise is smaller, and leans towards the mean image."""
    draw = torch.Generator().manual_seed(0)
    x = 0.3 * torch.randn(20_000, 1, 4, 4, generator=draw) - 0.7
    noises = [torch.randn(x.shape, generator=draw) for _ in range(4)]
    found = []
    for choose in (nearest_noise, noise_towards):
        parts = zip(x.split(1000), zip(*(each.split(1000) for each in noises)))
        eps = torch.cat([choose(images, torch.zeros(1000), own) for images, own in parts])
        found.append((eps.square().mean().sqrt(), eps.mean(), ((x - x.mean(0)) * eps).mean()))
    (small, lean, near), (size, mean, towards) = found
    assert small < 0.95 and lean < -0.1 and near > 0.01
    assert size == pytest.approx(1, abs=0.005) and mean == pytest.approx(0, abs=0.005)
    assert towards > 2 * near


def test_what_each_choice_is():
    """Images of two classes, one lighter and one darker than the mean image, which is dark."""
    draw = torch.Generator().manual_seed(0)
    y = torch.tensor([3, 7]).repeat(10_000)                                     # labels need not count from 0
    x = 0.3 * torch.randn(len(y), 1, 4, 4, generator=draw) + torch.where(y == 7, -0.4, -1.0)[:, None, None, None]
    rows = noise.measure(x, y, 4, 250, seed=1)
    best_of_4 = 1.03                                                            # mean of the largest of 4 normal numbers
    assert rows["any"] == pytest.approx([1, 0, 0, 1, 0], abs=0.02)
    size, lean, of_class, _, pull = rows["nearest"]
    assert size < 0.97 and lean > 0.2 and of_class > 0.1 and pull > 0.2
    size, lean, of_class, _, pull = rows["by direction, from the mean image"]
    assert [size, lean] == pytest.approx([1, 0], abs=0.02) and of_class > 0.4
    plain = rows["by direction, from its class's mean image"]
    assert plain == pytest.approx([1, 0, 0, 1, best_of_4], abs=0.03)         # what a class has of every direction alike
    traded = rows["any, then 64 rounds of trades in its class"]
    assert traded[:4] == pytest.approx([1, 0, 0, 1], abs=0.02) and traded[-1] > 1.5
    assert pull < plain[-1]
    x[:, 0, 0, 0] *= 10                                                         # but not of one
    spread = noise.measure(x, y, 4, 250, seed=1)["by direction, from its class's mean image"][3]
    assert spread > 1.1


def test_the_main_direction_of_a_class():
    images = load_images("digits")
    for label in range(10):
        own = to_range(images.pixels[images.labels == label]).flatten(1)
        direction = torch.linalg.svd(own - own.mean(0), full_matrices=False)[2][0]
        assert abs(noise.main_direction(own) @ direction) > 0.999
    assert noise.main_direction(own[:1]).shape == own[0].shape                  # a class of one image


def test_the_only_noise_is_taken_and_an_image_alone_in_its_class_gets_any():
    x, y = torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 1])
    one, other = torch.randn(2, *x.shape)
    assert choose_noise(x, y, [one]) is one
    assert choose_noise(x, y, [one, other])[0].equal(one[0])
    grey = torch.full((25, 3, 32, 32), 2 * 250 / 255 - 1)   # copies of one image differ from their mean by rounding alone
    one, other = torch.randn(2, *grey.shape)
    assert choose_noise(grey, y.new_zeros(25), [one, other]).equal(one)


def test_a_class_is_seen_from_the_mean_of_all_processes_images():
    """Two processes have every other row; what either chooses is what one process chooses for these."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 1, 4, 4, generator=draw) + 2, torch.arange(64) % 6 // 2
    noises = [torch.randn(x.shape, generator=draw) for _ in range(4)]
    whole, alone = choose_noise(x, y, noises), []

    def gather(part, labels=y):
        every = x if part.dim() > 1 else labels
        return torch.stack([every[::2], every[1::2]])

    for rank in (0, 1):
        mine = slice(rank, None, 2)
        part = x[mine], y[mine], [eps[mine] for eps in noises]
        assert choose_noise(*part, gather).equal(whole[mine])
        assert noise_towards(*part, partial(gather, labels=torch.zeros_like(y))).equal(noise_towards(x, y, noises)[mine])
        alone.append(choose_noise(*part).equal(whole[mine]))
    assert not all(alone)


@pytest.mark.parametrize("size", [7, 8])
def test_images_of_a_class_trade_noises_until_no_two_gain(size):
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(3 * size + 1) % 3 * 5
    y[-1] = 1                                               # alone in its class
    x, eps = torch.randn(2, len(y), 1, 3, 3, generator=draw)
    every = trade_noise(x, y, eps, 20 * size)
    assert trade_noise(x, y, eps, 0).equal(eps) and every[-1].equal(eps[-1])
    for label in (0, 5, 10):
        own, before, after = (each[y == label].flatten(1) for each in (x, eps, every))
        assert sorted(before.tolist()) == sorted(after.tolist())                # none is lost or given twice
        gain = own @ after.T
        assert (gain.diag()[:, None] + gain.diag() >= gain + gain.T - 1e-5).all()
        assert (own * after).sum() > (own * before).sum() + size


def test_the_table(capsys):
    noise.main(["--data", "digits", "--num-images", "300", "--batch-size", "100", "--num-noises", "2"])
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "digits, 300 images, 2 noises each" and len(table) == 4 + len(noise.CHOICES)
    assert all(0.8 < float(row.split("|")[2]) < 1.2 for row in table[4:])
    with pytest.raises(ValueError, match="--batch-size 2000: must be at most the number of images, 1797"):
        noise.main(["--data", "digits", "--num-images", "2000", "--batch-size", "2000"])
    with pytest.raises(SystemExit):
        parse_config(noise.Config, ["--num-images", "3"], None)
