import pytest
import torch

from utils.schedules import learning_rate_factor
from utils.seeding import fold, generator


def factors(num_steps, warmup_steps, decay_share):
    return [learning_rate_factor(step, num_steps, warmup_steps, decay_share) for step in range(1, num_steps + 1)]


def test_warmup_then_constant_then_decay():
    expected = [0.25, 0.5, 0.75, 1, *[1] * 11, *[1, 0.8, 0.6, 0.4, 0.2]]
    assert factors(20, 4, 0.25) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("num_steps", "warmup_steps", "decay_share"),
    [(100, 7, 0.4), (1000, 100, 0.9), (33, 0, 0.5), (10, 10, 0.99)],
)
def test_factor_stays_above_zero_and_at_most_one(num_steps, warmup_steps, decay_share):
    assert all(0 < factor <= 1 for factor in factors(num_steps, warmup_steps, decay_share))


def test_first_and_last_update():
    first, *_, last = factors(1000, 50, 0.4)
    assert first == pytest.approx(1 / 50)
    assert last == pytest.approx(1 / 400)


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_without_warmup_the_first_update_is_whole(warmup_steps):
    assert factors(10, warmup_steps, 0) == [1] * 10


def test_without_decay_the_last_update_is_whole():
    assert factors(10, 5, 0)[4:] == [1] * 6


def test_overlapping_warmup_and_decay_take_the_smaller():
    assert factors(4, 4, 0.99) == pytest.approx([min(step / 4, (5 - step) / 3.96) for step in range(1, 5)])


def test_one_step():
    assert factors(1, 0, 0.4) == [1]


def test_fold_is_the_same_everywhere_and_always():
    """Pinned: another value would make every earlier run unrepeatable, and resuming inexact."""
    assert fold(0, "step", 1) == 2752179012869973653
    assert fold(0) != fold(0, "step", 1)


def test_fold_separates_neighbours():
    """10,000 seeds, steps and labels, all different; and half of the bits change from one to the next."""
    seeds = [fold(seed, label, step) for seed in range(10) for label in ("step", "flip") for step in range(500)]
    assert len(set(seeds)) == 10_000
    changed = [(a ^ b).bit_count() for a, b in zip(seeds, seeds[1:])]
    assert sum(changed) / len(changed) == pytest.approx(63 / 2, abs=0.3)


def test_fold_keeps_its_parts_apart():
    assert len({fold(1, 23), fold(12, 3), fold(123), fold(1, 2, 3)}) == 4


def test_fold_fits_a_generator():
    assert all(0 <= fold(seed) < 2**63 for seed in (-1, 0, 1, 2**31, 2**64))


def test_generator_is_a_function_of_its_parts():
    def drawn(*parts):
        return torch.randn(8, generator=generator("cpu", *parts))

    assert torch.equal(drawn(0, "step", 1), drawn(0, "step", 1))
    for other in ((1, "step", 1), (0, "step", 2), (0, "flip", 1), (0, "step")):
        assert not torch.equal(drawn(0, "step", 1), drawn(*other))
