import pytest
import torch
from oracle import ORACLE

from utils.flow import interpolate, step
from utils.sampling import sample_average_velocity, sample_velocity, time_grid

Z = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.zeros(8, dtype=torch.long)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, (1, 0.9, 0.2, 0)])
def test_average_velocity_steps_are_exact(num_steps):
    """One step or eight, on any grid: x = sd eps."""
    assert (sample_average_velocity(ORACLE.u, Z, Y, num_steps) - ORACLE.sd * Z).abs().max() < 1e-10


def test_plus_sign_sampler_is_seen():
    wrong = step(Z, torch.zeros(8), torch.ones(8), -ORACLE.u(Z, torch.zeros(8).double(), torch.ones(8).double(), Y))
    assert abs(wrong.std() - ORACLE.sd) > 0.5


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_converge_at_their_order(method, order):
    errors = [(sample_velocity(ORACLE.v, Z, Y, n, method) - ORACLE.sd * Z).abs().max() for n in (32, 64)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.2)


@pytest.mark.parametrize("num_steps", [1, 5])
def test_no_noise_is_left_where_the_data_are_thin(num_steps):
    """All images alike: v = eps - x wherever there is noise, and -x, the mean over all noise, where there is none."""
    x = torch.full_like(Z, 0.3)

    def v(z, t, y):
        t = t.view(-1, 1, 1, 1)
        return torch.where(t > 0, (z - x) / t.clamp(min=1e-9), -x)

    torch.testing.assert_close(sample_velocity(v, Z, Y, num_steps, "heun"), x)


def test_trajectory():
    states = sample_average_velocity(ORACLE.u, Z, Y, 4, trajectory=True)
    assert states.shape == (5, *Z.shape) and torch.equal(states[0], Z)
    for state, t in zip(states, (1, 0.75, 0.5, 0.25, 0)):
        torch.testing.assert_close(state, ORACLE.flow(Z, torch.full((8,), t).double(), torch.ones(8).double()))
    states = sample_velocity(ORACLE.v, Z, Y, 3, trajectory=True)
    assert torch.equal(states[-1], sample_velocity(ORACLE.v, Z, Y, 3, "euler"))
    states = sample_velocity(ORACLE.v, Z, Y, 3, "heun", trajectory=True)
    assert len(states) == 4 and torch.equal(states[0], Z) and torch.equal(states[-1], sample_velocity(ORACLE.v, Z, Y, 3, "heun"))


def test_renoising_keeps_the_distribution():
    """Each jump lands on the data exactly, and fresh noise is added: the result is distributed as the data, but is another image."""
    z = torch.randn(4000, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.zeros(4000, dtype=torch.long)
    x = sample_average_velocity(ORACLE.u, z, y, 4, renoise=torch.Generator().manual_seed(2))
    assert x.std().item() == pytest.approx(ORACLE.sd, rel=0.01)
    assert abs((x * z).mean()) < 0.45 * ORACLE.sd
    assert torch.equal(x, sample_average_velocity(ORACLE.u, z, y, 4, renoise=torch.Generator().manual_seed(2)))
    assert torch.equal(sample_average_velocity(ORACLE.u, z, y, 1, renoise=torch.Generator()), sample_average_velocity(ORACLE.u, z, y, 1))


def test_samples_carry_no_gradient():
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    assert not sample_velocity(lambda *args: factor * ORACLE.v(*args), Z, Y, 2, "heun").requires_grad
    assert not sample_average_velocity(lambda *args: factor * ORACLE.u(*args), Z, Y, 2, renoise=torch.Generator()).requires_grad


@pytest.mark.parametrize("bad", [0, -1, (1, 0.5), (0, 1), (1, 0.5, 0.5, 0), (1,), ()])
def test_bad_grids(bad):
    with pytest.raises(ValueError, match="step|grid"):
        time_grid(bad)


def test_unknown_method():
    with pytest.raises(ValueError, match="rk45.*euler, heun"):
        sample_velocity(ORACLE.v, Z, Y, 2, "rk45")


def test_flow_ends_and_direction():
    x, eps = Z, Z.flip(0)
    assert torch.equal(interpolate(x, eps, torch.zeros(8).double()), x)
    assert torch.equal(interpolate(x, eps, torch.ones(8).double()), eps)
    t, r = torch.full((8,), 0.7).double(), torch.full((8,), 0.2).double()
    torch.testing.assert_close(step(interpolate(x, eps, t), r, t, eps - x), interpolate(x, eps, r))
