import re

import pytest
import torch

from utils.times import LAM_LAWS, count_whole, draw_intervals, draw_lam, draw_times, parse_law, sampling_intervals

NUM = 40_000
T_LAW, R_LAW = "logit-normal(-0.6, 1.6)", "logit-normal(-4, 1.6)"
PINNED = [(0.0, 0.5), (0.0, 1.0), (0.5, 1.0)]


def intervals(draw, pinned_share, num=NUM, t_law=T_LAW, r_law=R_LAW, pinned_steps=(1, 2)):
    return draw_intervals(num, t_law, r_law, pinned_share, pinned_steps, draw)


def pinned_counts(r, t):
    """How many rows lie at each of PINNED, exactly."""
    return torch.tensor([((r == low) & (t == high)).sum() for low, high in PINNED])


def test_uniform_times(draw):
    t = draw_times(NUM, "uniform", draw)
    assert t.min() >= 0 and t.max() <= 1
    assert t.mean().item() == pytest.approx(1 / 2, abs=0.01)
    assert t.var().item() == pytest.approx(1 / 12, rel=0.03)


@pytest.mark.parametrize(("loc", "scale"), [(0, 1), (-0.6, 1.6), (-4, 1.6), (2, 0.5)])
def test_logit_of_logit_normal_times_has_the_loc_and_scale(draw, loc, scale):
    logit = draw_times(NUM, f"logit-normal({loc}, {scale})", draw).double().logit()
    assert logit.mean().item() == pytest.approx(loc, abs=0.02 * scale)
    assert logit.std().item() == pytest.approx(scale, rel=0.02)
    assert ((logit - logit.mean()) ** 3).mean().item() / scale**3 == pytest.approx(0, abs=0.1)     # as symmetric as a normal


@pytest.mark.parametrize("pinned_share", [0, 0.3, 1])
@pytest.mark.parametrize("laws", [(T_LAW, R_LAW), (R_LAW, T_LAW), ("uniform", "uniform")])
def test_intervals_are_ordered(draw, laws, pinned_share):
    r, t = intervals(draw, pinned_share, t_law=laws[0], r_law=laws[1])
    assert bool(((0 <= r) & (r <= t) & (t <= 1)).all())


def test_unpinned_intervals_are_two_sorted_independent_draws(draw):
    """Of two uniform draws the smaller has mean 1/3, the larger 2/3, and their covariance is 1/36."""
    r, t = intervals(draw, 0, t_law="uniform", r_law="uniform")
    assert r.mean().item() == pytest.approx(1 / 3, abs=0.01)
    assert t.mean().item() == pytest.approx(2 / 3, abs=0.01)
    assert torch.stack([r, t]).cov()[0, 1].item() == pytest.approx(1 / 36, rel=0.1)


def test_each_of_the_two_draws_has_its_own_law(draw):
    r, t = intervals(draw, 0, t_law="logit-normal(2, 0.1)", r_law="logit-normal(-4, 0.1)")
    for times, loc in ((r, -4), (t, 2)):
        assert times.double().logit().mean().item() == pytest.approx(loc, abs=0.01)


@pytest.mark.parametrize(
    ("step_counts", "expected"),
    [
        ((1,), [(0, 1)]),
        ((1, 2), [(0, 0.5), (0, 1), (0.5, 1)]),
        ((2, 4), [(0, 0.25), (0, 0.5), (0.25, 0.5), (0.5, 0.75), (0.5, 1), (0.75, 1)]),
        ((1, 2, 1), [(0, 0.5), (0, 1), (0, 1), (0.5, 1)]),
    ],
)
def test_sampling_intervals(step_counts, expected):
    assert sampling_intervals(step_counts) == expected


def test_pinned_share(draw):
    """About that share of the rows is pinned, evenly over the three intervals of 1 and 2 steps."""
    share = pinned_counts(*intervals(draw, 0.3)) / NUM
    torch.testing.assert_close(share, torch.full((3,), 0.1), rtol=0, atol=0.007)


def test_everything_pinned(draw):
    counts = pinned_counts(*intervals(draw, 1))
    assert counts.sum() == NUM
    torch.testing.assert_close(counts / NUM, torch.full((3,), 1 / 3), rtol=0, atol=0.01)


def test_a_number_of_steps_named_twice_is_pinned_twice_as_often(draw):
    counts = pinned_counts(*intervals(draw, 1, pinned_steps=(1, 1, 2)))
    torch.testing.assert_close(counts / NUM, torch.tensor([0.25, 0.5, 0.25]), rtol=0, atol=0.01)


@pytest.mark.parametrize(("pinned_steps", "expected"), [((1, 2), 20), ((1, 1, 2), 30), ((2, 4), 0), ((1,), 60), ((1, 2, 4), 9)])
def test_how_many_are_whole(pinned_steps, expected):
    assert count_whole(100, 0.6, pinned_steps) == expected


@pytest.mark.parametrize("pinned_steps", [(1, 1, 2), (1, 2, 2)])
def test_whole_intervals_come_first_and_pins_stay_as_many(draw, pinned_steps):
    """A fixed count of (0, 1), at the head; of the others as many are pinned as without."""
    num_whole = count_whole(NUM, 0.6, pinned_steps)
    r, t = draw_intervals(NUM, T_LAW, R_LAW, 0.6, pinned_steps, draw, num_whole)
    assert (r[:num_whole] == 0).all() and (t[:num_whole] == 1).all() and len(r) == len(t) == NUM
    assert pinned_counts(r[num_whole:], t[num_whole:])[1] == 0
    plain = pinned_counts(*intervals(draw, 0.6, pinned_steps=pinned_steps)) / NUM
    torch.testing.assert_close(pinned_counts(r, t) / NUM, plain, rtol=0, atol=0.01)


def test_whole_intervals_alone(draw):
    r, t = draw_intervals(100, T_LAW, R_LAW, 0.6, (1,), draw, 60)
    assert pinned_counts(r, t)[1] == 60 and (r <= t).all()


def test_nothing_pinned(draw):
    assert pinned_counts(*intervals(draw, 0)).sum() == 0


def test_pins_leave_the_other_rows_as_they_were():
    plain, some = (torch.stack(intervals(torch.Generator().manual_seed(0), share)) for share in (0, 0.3))
    assert (plain == some).all(0).float().mean().item() == pytest.approx(0.7, abs=0.01)


def test_each_row_has_its_own_coin(draw):
    """Whether a row is pinned tells nothing about its neighbour, nor about its place in the batch."""
    r, t = intervals(draw, 0.5)
    pinned = sum((r == low) & (t == high) for low, high in PINNED).float()
    assert torch.stack([pinned[1:], pinned[:-1]]).corrcoef()[0, 1].abs() < 0.02
    assert pinned[: NUM // 2].mean().item() == pytest.approx(0.5, abs=0.02)


def test_uniform_lam(draw):
    lam = draw_lam(NUM, "uniform", 0.3, draw)
    assert lam.mean().item() == pytest.approx(1 / 2, abs=0.01)
    assert lam.var().item() == pytest.approx(1 / 12, rel=0.03)


def test_lam_is_never_zero_but_may_be_one(monkeypatch):
    """A loss is divided by it. `torch.rand` may give 0, and never gives 1."""
    monkeypatch.setattr(torch, "rand", lambda num, **_: torch.zeros(num))
    assert draw_lam(1, "uniform", 0, torch.Generator()) == 1
    assert parse_law("anneal(1, 0.1, 1)", LAM_LAWS) == ("anneal", (1.0, 0.1, 1.0))


@pytest.mark.parametrize("progress", [0, 0.5, 1])
def test_constant_lam(draw, progress):
    assert torch.equal(draw_lam(5, "constant(0.2)", progress, draw), torch.full((5,), 0.2))


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0, 0.4), (0.2, (0.4**3 * 0.1) ** 0.25), (0.4, (0.4 * 0.1) ** 0.5), (0.8, 0.1), (0.9, 0.1), (1, 0.1)],
)
def test_annealed_lam(draw, progress, expected):
    """Half way through the share it is the geometric mean of both ends, after it the end."""
    assert draw_lam(3, "anneal(0.4, 0.1, 0.8)", progress, draw).tolist() == pytest.approx([expected] * 3)


@pytest.mark.parametrize(
    "function",
    [
        lambda draw: draw_times(50, T_LAW, draw),
        lambda draw: torch.stack(intervals(draw, 0.3, num=50)),
        lambda draw: draw_lam(50, "uniform", 0, draw),
    ],
    ids=["times", "intervals", "lam"],
)
def test_draws_depend_on_the_generator_alone(function):
    def drawn(seed):
        torch.rand(1)                                       # the global generator moves on, and must not matter
        return function(torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


@pytest.mark.parametrize("text", ["logit-normal(-0.6, 1.6)", "logit-normal( -0.6 ,1.6 )", " logit-normal (-.6, 16e-1) "])
def test_spaces_do_not_matter(text):
    assert parse_law(text) == ("logit-normal", (-0.6, 1.6))


@pytest.mark.parametrize(
    ("text", "known", "reason"),
    [
        ("normal(0, 1)", None, "known are uniform with 0 numbers, logit-normal with 2 numbers"),
        ("", None, "known are uniform"),
        ("logit-normal(0, 1", None, "known are uniform"),
        ("anneal(0.3, 0.1, 0.8)", None, "known are uniform"),
        ("logit-normal", None, "takes 2 numbers, not 0"),
        ("logit-normal(1)", None, "takes 2 numbers, not 1"),
        ("uniform(0, 1)", None, "takes 0 numbers, not 2"),
        ("logit-normal(zero, one)", None, "must be numbers"),
        ("logit-normal(0, 0)", None, "scale must be above 0"),
        ("logit-normal(0, -1)", None, "scale must be above 0"),
        ("logit-normal(0, nan)", None, "finite"),
        ("logit-normal(nan, 1)", None, "number"),
        ("logit-normal(0, 1)", LAM_LAWS, "known are uniform with 0 numbers, constant with 1 numbers, anneal with 3 numbers"),
        ("constant", LAM_LAWS, "takes 1 numbers, not 0"),
        ("constant(0)", LAM_LAWS, "must lie in (0, 1]"),
        ("constant(1.1)", LAM_LAWS, "must lie in (0, 1]"),
        ("constant(nan)", LAM_LAWS, "must lie in (0, 1]"),
        ("anneal(0.3, 0, 0.8)", LAM_LAWS, "must lie in (0, 1]"),
        ("anneal(0.3, 0.1, 0)", LAM_LAWS, "must lie in (0, 1]"),
    ],
)
def test_bad_laws(text, known, reason):
    with pytest.raises(ValueError, match=f"{re.escape(repr(text))}.*{re.escape(reason)}"):
        parse_law(text, *([known] if known else []))
