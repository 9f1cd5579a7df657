"""The method against the Gaussian oracle, with the field's classic mistakes as negative controls."""

import pytest
import torch
from oracle import ORACLE, batch
from torch import Tensor

from utils.flow import pad_like, step
from utils.losses import (
    adaptive_weight,
    anchored_splitting_loss,
    boundary_loss,
    flow_matching_loss,
    in_steps,
    interval_splitting_loss,
    mean_flow_loss,
    one_step,
    splitting_target,
    squared_error,
    student_loss,
)


def test_splitting_and_boundary_vanish_at_the_oracle():
    z_t, r, t, lam, y = batch()
    assert interval_splitting_loss(ORACLE.u, z_t, r, t, lam, y).max() < 1e-20
    assert boundary_loss(ORACLE.u, ORACLE.v, z_t, t, y).max() < 1e-20


ANCHORED = [("euler", "self"), ("midpoint", "self"), ("self", "euler"), ("self", "midpoint")]


@pytest.mark.parametrize("legs", ANCHORED)
def test_the_teachers_leg_is_exact_as_it_shortens(legs):
    """At the exact average velocity what is left is the leg's error. Its square falls with the share to the power 2 by Euler's
    rule; by the midpoint rule it would with 4, but on a Gaussian flow, whose std has y y'' + y'^2 constant, the leading term cancels: 6."""
    z_t, r, t, share, y = batch(64)
    coarse, fine = (anchored_splitting_loss(ORACLE.u, ORACLE.v, z_t, r, t, scale * share, y, *legs).mean() for scale in (0.2, 0.05))
    assert fine < 2e-3
    low, high = (14, 20) if "euler" in legs else (3000, 6000)                                       # 4^2 and 4^6
    assert low < coarse / fine < high


def test_mean_flow_vanishes_at_the_oracle_only():
    z_t, r, t, _, y = batch()
    v_t = ORACLE.v(z_t, t, y)
    assert mean_flow_loss(ORACLE.u, z_t, v_t, r, t, y).max() < 1e-20
    for wrong in (length_for_r, exchanged_times, lambda z, r, t, y: -ORACLE.u(z, r, t, y)):
        assert mean_flow_loss(wrong, z_t, v_t, r, t, y).mean() > 1e-3
    assert mean_flow_loss(ORACLE.u, z_t, -v_t, r, t, y).mean() > 1e-3


def some_velocity(z, r, t, y):
    """No average velocity of any flow."""
    return torch.sin(z) * pad_like(t - r**2, z)


@pytest.mark.parametrize("leg", ["euler", "midpoint"])
def test_mean_flow_is_the_limit_of_an_anchored_first_leg(leg):
    """Away from the solution too: the anchored residual over its share tends to MeanFlow's own."""
    z_t, r, t, _, y = batch()
    limit = mean_flow_loss(some_velocity, z_t, ORACLE.v(z_t, t, y), r, t, y)
    near = anchored_splitting_loss(some_velocity, ORACLE.v, z_t, r, t, torch.full_like(t, 1e-5), y, leg, "self")
    assert torch.allclose(near, limit, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("leg", ["euler", "midpoint"])
def test_the_limit_of_an_anchored_last_leg(leg):
    """It tends to the Lagrangian residual: how the student's end point moves with r, against the velocity there."""
    z_t, r, t, _, y = batch()
    u, du_dr = torch.func.jvp(lambda r: some_velocity(z_t, r, t, y), (r,), (torch.ones_like(r),))
    z_r = step(z_t, r, t, u)
    limit = squared_error(u - pad_like(t - r, u) * du_dr, ORACLE.v(z_r, r, y))
    near = anchored_splitting_loss(some_velocity, ORACLE.v, z_t, r, t, torch.full_like(t, 1e-5), y, "self", leg)
    assert torch.allclose(near, limit, rtol=1e-3, atol=1e-6)


def test_mean_flow_has_no_gradient_through_its_target():
    z_t, r, t, _, y = batch(4)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    v_t = ORACLE.v(z_t, t, y)
    loss = mean_flow_loss(lambda z, r, t, y: scale * ORACLE.u(z, r, t, y), z_t, v_t, r, t, y).sum()
    loss.backward()
    u = ORACLE.u(z_t, r, t, y)
    du_dt = (v_t - u) / pad_like(t - r, u)                                      # the identity, at the exact u
    residual = 1.3 * u - v_t + pad_like(t - r, u) * 1.3 * du_dt
    assert torch.allclose(scale.grad, (2 * residual * u).flatten(1).mean(1).sum())


def length_for_r(z, r, t, y):
    return ORACLE.u(z, t - r, t, y)


def exchanged_times(z, r, t, y):
    return ORACLE.u(z, t, r, y)


def splitting_with(first_step_sign: float = -1, swap_lam: bool = False):
    """Interval splitting written out, to plant a mistake in it."""
    def loss(u, z_t: Tensor, r: Tensor, t: Tensor, lam: Tensor, y: Tensor) -> Tensor:
        s = (1 - lam) * t + lam * r
        u_st = u(z_t, s, t, y)
        u_rs = u(z_t + first_step_sign * pad_like(t - s, z_t) * u_st, r, s, y)
        weight = pad_like(1 - lam if swap_lam else lam, z_t)
        return squared_error(u(z_t, r, t, y), (1 - weight) * u_rs + weight * u_st)

    return loss


def test_written_out_splitting_is_the_same():
    z_t, r, t, lam, y = batch()
    assert splitting_with()(ORACLE.u, z_t, r, t, lam, y).max() < 1e-20


@pytest.mark.parametrize(
    ("u", "loss"),
    [
        pytest.param(length_for_r, interval_splitting_loss, id="t - r passed for r"),
        pytest.param(exchanged_times, interval_splitting_loss, id="r and t exchanged"),
        pytest.param(lambda z, r, t, y: -ORACLE.u(z, r, t, y), interval_splitting_loss, id="wrong sign of u"),
        pytest.param(ORACLE.u, splitting_with(first_step_sign=+1), id="first leg steps towards noise"),
        pytest.param(ORACLE.u, splitting_with(swap_lam=True), id="lam exchanged with 1 - lam"),
    ],
)
def test_classic_mistakes_are_seen(u, loss):
    z_t, r, t, lam, y = batch()
    assert loss(u, z_t, r, t, lam, y).mean() > 1e-3


def test_classic_mistakes_are_seen_by_the_boundary():
    z_t, _, t, _, y = batch()
    for u in (lambda z, r, t, y: -ORACLE.u(z, r, t, y), lambda z, r, t, y: ORACLE.u(z, 0 * r, t, y)):
        assert boundary_loss(u, ORACLE.v, z_t, t, y).mean() > 1e-3


def test_flow_matching_loss_is_least_at_the_oracle():
    draw = torch.Generator().manual_seed(2)
    x = ORACLE.sd * torch.randn(20_000, 1, 2, 2, generator=draw, dtype=torch.float64)
    eps = torch.randn(x.shape, generator=draw, dtype=torch.float64)
    t, y = torch.rand(len(x), generator=draw, dtype=torch.float64), torch.zeros(len(x), dtype=torch.long)
    best = flow_matching_loss(ORACLE.v, x, eps, t, y).mean()
    for factor in (0.9, 1.1, -1.0):
        assert flow_matching_loss(lambda z, t, y, f=factor: f * ORACLE.v(z, t, y), x, eps, t, y).mean() > best
    assert flow_matching_loss(lambda z, t, y: ORACLE.v(z, 1 - t, y), x, eps, t, y).mean() > best + 0.1       # time reversed


class Linear(torch.nn.Module):
    """A trainable u, to see where gradients go."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64))

    def forward(self, z, r, t, y):
        return z * (self.w[0] + self.w[1] * pad_like(r, z) + self.w[2] * pad_like(t, z))


ALL_LEGS = [("self", "self"), *ANCHORED]


@pytest.mark.parametrize("legs", ALL_LEGS)
def test_student_loss_is_the_two_losses(legs):
    """In value and in gradient, of which the teacher gets none."""
    z_t, r, t, share, y = batch()
    u, teacher, n = Linear(), Linear(), 24
    v = lambda z, t, y: 2 * teacher(z, t, t, y)                                              # noqa: E731
    parts = student_loss(u, u, v, z_t, r, t, share, y, n, *legs)
    rest = (z_t[n:], r[n:], t[n:], share[n:], y[n:])
    splitting = interval_splitting_loss(u, *rest) if legs == ("self", "self") else anchored_splitting_loss(u, v, *rest, *legs)
    for found, wanted in zip(parts, (boundary_loss(u, v, z_t[:n], t[:n], y[:n]), splitting), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
        gradients = [torch.autograd.grad(loss.mean(), u.w, retain_graph=True)[0] for loss in (found, wanted)]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)
        wanted.mean().backward(retain_graph=True)
    assert teacher.w.grad is None


@pytest.mark.parametrize("shares", [[1.0], [0.5, 0.5], [0.7, 0.2, 0.1]])
def test_average_velocity_of_steps_in_a_row(shares):
    """At the oracle that of one step; elsewhere it leads where the steps lead."""
    z_t, r, t, _, y = batch()
    torch.testing.assert_close(in_steps(ORACLE.u, shares)(z_t, r, t, y), ORACLE.u(z_t, r, t, y), rtol=0, atol=1e-12)
    z, start = z_t, t
    for share in shares:
        end = start - share * (t - r)
        z, start = z - pad_like(start - end, z) * some_velocity(z, end, start, y), end
    torch.testing.assert_close(step(z_t, r, t, in_steps(some_velocity, shares)(z_t, r, t, y)), z, rtol=0, atol=1e-12)


@pytest.mark.parametrize("legs", ALL_LEGS)
@pytest.mark.parametrize("count", [2, 4])
def test_one_step_learns_from_several(legs, count):
    """The rows after the boundary's do, and no others; they weigh what they would by legs."""
    z_t, r, t, share, y = batch()
    u, target_network, n, m = Linear(), Linear(), 24, 40
    with torch.no_grad():
        target_network.w.mul_(2)
    args = u, target_network, ORACLE.v, z_t, r, t, share, y, n, *legs
    parts, plain = student_loss(*args, num_whole=m - n, one_step_from=count), student_loss(*args)
    wanted = in_steps(target_network, [1 / count] * count)(z_t, r, t, y)
    scale = 1 if legs == ("self", "self") else share[n:m] ** 2
    torch.testing.assert_close(parts.splitting[: m - n], squared_error(u(z_t, r, t, y), wanted)[n:m] / scale, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.splitting[m - n :], plain.splitting[m - n :], rtol=1e-12, atol=0)
    assert torch.equal(parts.boundary, plain.boundary) and not torch.isclose(parts.splitting[: m - n], plain.splitting[: m - n]).any()
    torch.cat(parts).mean().backward()
    assert u.w.grad is not None and target_network.w.grad is None
    right, wrong = (student_loss(ORACLE.u, target, *args[2:], num_whole=m - n, one_step_from=count).splitting[: m - n]
                    for target in (ORACLE.u, exchanged_times))
    assert right.max() < 1e-20 and wrong.mean() > 1e-3


@pytest.mark.parametrize("legs", ALL_LEGS)
def test_gradient_reaches_only_the_prediction(legs):
    """The gradient equals that of the squared error to a constant; teacher and target network get none."""
    z_t, r, t, share, y = batch()
    u, target_network, teacher = Linear(), Linear(), Linear()
    with torch.no_grad():
        target_network.w.mul_(2)                            # no two are alike
        teacher.w.mul_(3)
    v = lambda z, t, y: teacher(z, t, t, y)                                                  # noqa: E731
    parts = student_loss(u, target_network, v, z_t, r, t, share, y, 24, *legs)
    torch.cat(parts).mean().backward()
    assert teacher.w.grad is None and target_network.w.grad is None

    def leg(kind, z, end, start):
        """One leg of the target, written out."""
        v_start = v(z, start, y)
        middle = (start + end) / 2
        return {"self": target_network(z, end, start, y), "euler": v_start,
                "midpoint": v(z - pad_like(start - middle, z) * v_start, middle, y)}[kind]

    s = r + share * (t - r) if legs[1] != "self" else t - share * (t - r)
    u_st = leg(legs[0], z_t, s, t)
    z_s = z_t - pad_like(t - s, z_t) * u_st
    whole = (pad_like(s - r, z_t) * leg(legs[1], z_s, r, s) + pad_like(t - s, z_t) * u_st) / pad_like(t - r, z_t)      # Eq. 10
    constant = torch.cat([v(z_t, t, y)[:24], whole[24:]]).detach()
    scale = torch.cat([torch.ones(24), torch.ones(40) if legs == ("self", "self") else share[24:]]).double()
    again = Linear()
    (squared_error(again(z_t, torch.cat([t[:24], r[24:]]), t, y), constant) / scale**2).mean().backward()
    torch.testing.assert_close(u.w.grad, again.w.grad, rtol=1e-9, atol=0)


def test_edges():
    """An error of one pixel counts itself and its four differences; one that is alike everywhere counts itself only."""
    one, flat = torch.zeros(2, 3, 5, 5), torch.full((2, 3, 5, 5), 0.5)
    one[:, :, 2, 2] = 1
    torch.testing.assert_close(squared_error(one, torch.zeros_like(one), 3), torch.full((2,), 1 / 25 + 3 * (2 / 20 + 2 / 20)))
    torch.testing.assert_close(squared_error(flat, torch.zeros_like(flat), 3), torch.full((2,), 0.25))
    torch.testing.assert_close(squared_error(one, flat), (one - flat).square().mean((1, 2, 3)))


def test_edges_in_both_losses():
    """Boundary and splitting rows alike; the residual is divided by the teacher's share as before."""
    z_t, y = torch.randn(8, 1, 4, 4), torch.zeros(8).long()
    t, share = torch.rand(8) / 2 + 0.5, torch.full((8,), 0.3)
    r = t / 2
    u, v = (lambda z, r, t, y: z.cos()), (lambda z, t, y: z.sin())
    plain, edged = (student_loss(u, u, v, z_t, r, t, share, y, 3, "midpoint", "self", weight) for weight in (0.0, 2.0))
    target = splitting_target(one_step(v, "midpoint"), u, z_t[3:], r[3:], t[3:], share[3:], y[3:])
    errors = z_t[:3].cos() - z_t[:3].sin(), z_t[3:].cos() - target
    edges = [sum(error.diff(dim=dim).square().mean((1, 2, 3)) for dim in (2, 3)) for error in errors]
    torch.testing.assert_close(edged.boundary, plain.boundary + 2 * edges[0])
    torch.testing.assert_close(edged.splitting, plain.splitting + 2 * edges[1] / 0.09)


def test_adaptive_weight():
    loss = torch.tensor([0.0, 0.5, 4.0], dtype=torch.float64, requires_grad=True)
    assert torch.equal(adaptive_weight(loss, 0), loss)
    weighted = adaptive_weight(loss, 0.75)
    weighted.sum().backward()
    torch.testing.assert_close(loss.grad, (loss.detach() + 1e-3) ** -0.75)      # the weight itself carries no gradient
