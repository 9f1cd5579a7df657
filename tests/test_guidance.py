import pytest
import torch

from utils.guidance import drop_labels, guidance_in_words, guided_velocity

NULL = 3
Y = torch.arange(3).repeat(10_000)


def test_guidance_in_words():
    assert guidance_in_words({"guidance_scale": 1.3, "guidance_interval": [0.0, 1.0]}) == "1.3"
    assert guidance_in_words({"guidance_scale": 2.0, "guidance_interval": (0.2, 0.8)}) == "2 at times 0.2 to 0.8"
    assert guidance_in_words({"guidance_scale": 2.0, "guidance_interval": (0.0, 0.8)}) == "2 at times 0 to 0.8"
    told = {"guidance_scale": 2.0, "guidance_interval": (0.2, 0.8), "guidance_range": [1.5, 3.0]}
    assert guidance_in_words(told) == "2 (or any from 1.5 to 3) at times 0.2 to 0.8"
    assert guidance_in_words({**told, "guidance_range": None}) == "2 at times 0.2 to 0.8"


@pytest.mark.parametrize("rate", [0, 0.1, 0.5, 1])
def test_share_of_dropped_labels(draw, rate):
    """The share is the rate, in every class alike."""
    dropped = drop_labels(Y, NULL, rate, torch.rand(len(Y), generator=draw)) == NULL
    for label in range(3):
        assert dropped[Y == label].float().mean().item() == pytest.approx(rate, abs=0.02 if 0 < rate < 1 else 0)


def test_a_label_is_kept_or_dropped_but_never_another(draw):
    y = drop_labels(Y, NULL, 0.5, torch.rand(len(Y), generator=draw))
    assert bool(((y == Y) | (y == NULL)).all())


def test_each_label_has_its_own_coin():
    y = drop_labels(torch.tensor([0, 1, 2, 0]), NULL, 0.1, torch.tensor([0.05, 0.5, 0.0999, 0.1]))
    assert y.tolist() == [NULL, 1, NULL, 0]


def velocity(z, t, y):
    """A velocity that differs by label: (label + 1) z + t."""
    return (y + 1).to(z).view(-1, 1, 1, 1) * z + t.view(-1, 1, 1, 1)


def states(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(6, 2, 3, 3, generator=draw, dtype=dtype)
    return z, torch.tensor([0.0, 0.1, 0.3, 0.5, 0.8, 1.0], dtype=dtype), torch.tensor([0, 1, 2, 0, 1, 2])


def expected(z, t, y, w):
    """v_null + w (v_y - v_null), with v = (label + 1) z + t: the label's factor is NULL + 1 + w (y - NULL)."""
    factor = (NULL + 1 + torch.as_tensor(w, dtype=z.dtype) * (y - NULL)).to(z.dtype)
    return factor.view(-1, 1, 1, 1) * z + t.view(-1, 1, 1, 1)


def test_scale_one_is_the_velocity_itself():
    """Not merely equal: no second evaluation."""
    assert guided_velocity(velocity, NULL, 1.0, (0.2, 0.6)) is velocity


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 7.5, -1.0, torch.tensor([1.0, 2.0, 3.0, 1.0, 0.0, 5.0])])
def test_formula(scale):
    z, t, y = states()
    torch.testing.assert_close(guided_velocity(velocity, NULL, scale)(z, t, y), expected(z, t, y, scale), rtol=1e-5, atol=1e-5)


def test_formula_in_double_precision():
    """The oracle and other checks of the method run in float64."""
    z, t, y = states(torch.float64)
    torch.testing.assert_close(guided_velocity(velocity, NULL, 2.5)(z, t, y), expected(z, t, y, 2.5), rtol=1e-12, atol=1e-12)


def test_interval_is_per_sample():
    """Inside [0.1, 0.5], ends included, w is the scale; outside it is 1."""
    z, t, y = states()
    inside = torch.tensor([1.0, 3.0, 3.0, 3.0, 1.0, 1.0])
    found = guided_velocity(velocity, NULL, 3.0, (0.1, 0.5))(z, t, y)
    torch.testing.assert_close(found, expected(z, t, y, inside), rtol=1e-5, atol=1e-5)
    assert torch.equal(found[inside == 1], velocity(z, t, y)[inside == 1])


def test_the_null_label_is_asked_for_everywhere():
    asked = []

    def spy(z, t, y):
        asked.append(y.tolist())
        return velocity(z, t, y)

    guided_velocity(spy, NULL, 2.0)(*states())
    assert sorted(asked) == sorted([[0, 1, 2, 0, 1, 2], [NULL] * 6])
