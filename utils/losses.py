"""The method: flow matching for the teacher; boundary condition and Interval Splitting Consistency for the student
(SplitMeanFlow, arXiv 2507.16884).

    (t - r) u(z_t, r, t) = (s - r) u(z_s, r, s) + (t - s) u(z_t, s, t),   r <= s <= t                       (Eq. 10)

With lam = (t - s) / (t - r) that is u_rt = (1 - lam) u_rs + lam u_st (Eq. 11). The right-hand side is the target and
carries no gradient: the backward pass goes through u(z_t, r, t) alone (Algorithm 1). In place of the student's own u_st one step of
the teacher's ODE may stand (`Leg`): the default, see docs/method.md.

Losses are pure: callables u(z, r, t, y) and v(z, t, y), states and times in; one value per sample out. Weighting,
reduction and precision are the caller's. Shapes: z_t (B, ...), r, t, lam (B,), y (B,) long; results (B,) float32.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from utils.flow import conditional_velocity, interpolate, pad_like, step
from utils.guidance import Velocity

AverageVelocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]        # u(z, r, t, y)
Leg = Literal["midpoint", "euler", "self"]      # first leg u_st: one midpoint or Euler step of the teacher's ODE, or the student's own


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared difference of each sample, averaged over its values: (B, ...) to (B,)."""
    return (prediction - target).square().flatten(1).mean(1)


def adaptive_weight(loss: Tensor, power: float, floor: float = 1e-3) -> Tensor:
    """loss / sg(loss + floor)^power: (B,) to (B,). Power 0 is the plain loss (MeanFlow, arXiv 2505.13447, Sec. 4.3)."""
    return loss / (loss.detach() + floor) ** power


def flow_matching_loss(v: Velocity, x: Tensor, eps: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Distance of v(z_t, t, y) from the conditional velocity eps - x (Lipman et al., arXiv 2210.02747)."""
    return squared_error(v(interpolate(x, eps, t), t, y), conditional_velocity(x, eps))


def boundary_loss(u: AverageVelocity, v: Velocity, z_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Boundary condition u(z_t, t, t) = v(z_t, t): over an empty interval the two velocities agree."""
    with torch.no_grad():
        v_t = v(z_t, t, y)
    return squared_error(u(z_t, t, t, y), v_t)


def split_time(r: Tensor, t: Tensor, lam: Tensor) -> Tensor:
    """s in [r, t]; lam = 0 splits at t, lam = 1 at r."""
    return (1 - lam) * t + lam * r


@torch.no_grad()
def splitting_target(u: AverageVelocity, z_t: Tensor, r: Tensor, t: Tensor, lam: Tensor, y: Tensor,
                     u_st: Tensor | None = None) -> Tensor:
    """Right-hand side of Eq. 11. `u_st` is the first leg; None asks u itself for it, as Algorithm 1 does."""
    s = split_time(r, t, lam)
    if u_st is None:
        u_st = u(z_t, s, t, y)                              # first leg, from t down to s
    u_rs = u(step(z_t, s, t, u_st), r, s, y)                # second leg, from z_s down to r
    return torch.lerp(u_rs, u_st, pad_like(lam, z_t))


def interval_splitting_loss(u: AverageVelocity, z_t: Tensor, r: Tensor, t: Tensor, lam: Tensor, y: Tensor) -> Tensor:
    """Interval Splitting Consistency with both legs the student's own, as in Algorithm 1."""
    return squared_error(u(z_t, r, t, y), splitting_target(u, z_t, r, t, lam, y))


@torch.no_grad()
def midpoint_leg(v: Velocity, z_t: Tensor, v_t: Tensor, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Mean velocity of the teacher's ODE from t down to s by the midpoint rule, to second order in t - s; v_t is v(z_t, t, y)."""
    middle = (s + t) / 2
    return v(step(z_t, middle, t, v_t), middle, y)


def anchored_splitting_loss(u: AverageVelocity, v: Velocity, z_t: Tensor, r: Tensor, t: Tensor, lam: Tensor, y: Tensor,
                            midpoint: bool) -> Tensor:
    """Interval Splitting Consistency whose first leg is anchored at the teacher: one step of its ODE, midpoint or Euler.

    Either keeps the student from teaching itself nonsense. The residual is divided by lam; as lam -> 0 it tends to MeanFlow's
    u + (t - r) du/dt - v. The Euler step, u_st := v(z_t, t, y), is right only there, to first order in lam (t - r); the midpoint
    step, to second order, lets lam stay large. (velocity in the first leg: cf. SoFlow, arXiv 2512.15657)
    """
    with torch.no_grad():
        u_st = v(z_t, t, y)
        if midpoint:
            u_st = midpoint_leg(v, z_t, u_st, split_time(r, t, lam), t, y)
    target = splitting_target(u, z_t, r, t, lam, y, u_st)
    return squared_error(u(z_t, r, t, y), target) / lam.square()


def mean_flow_loss(u: AverageVelocity, z_t: Tensor, v_t: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """MeanFlow's identity u = v - (t - r) du/dt, the total derivative along v by forward-mode differentiation.

    The rival that SplitMeanFlow does without; here to be compared with (Geng et al., arXiv 2505.13447, Eq. 6 and 9).

    Args:
        v_t: velocity at z_t: eps - x of the sample (MeanFlow), or a teacher's v(z_t, t, y), (B, ...).

    Raises:
        NotImplementedError: u attends by a fused kernel, which cannot be differentiated forwards; see `sdpa_kernel`.
    """
    tangents = (v_t, torch.zeros_like(r), torch.ones_like(t))
    u_rt, du_dt = torch.func.jvp(lambda z, r, t: u(z, r, t, y), (z_t, r, t), tangents)
    return squared_error(u_rt, v_t - pad_like(t - r, z_t) * du_dt.detach())


class StudentLoss(NamedTuple):
    """Per-sample losses of one student batch, unweighted."""

    boundary: Tensor            # (num_boundary,)
    splitting: Tensor           # (B - num_boundary,)


def student_loss(u: AverageVelocity, u_target: AverageVelocity, v: Velocity, z_t: Tensor, r: Tensor, t: Tensor, lam: Tensor,
                 y: Tensor, num_boundary: int, leg: Leg) -> StudentLoss:
    """Both student losses over one batch, with a single forward pass that carries gradient.

    Equal to `boundary_loss` on the first `num_boundary` rows and to `anchored_splitting_loss` or `interval_splitting_loss`
    on the others (a test holds this), but faster. The count is fixed so that shapes never change.

    Args:
        u: the student.
        u_target: the network that the splitting targets come from: the student, or an EMA of it.
        v: the teacher's guided velocity.
        num_boundary: rows for the boundary condition; their r and lam are not used.
        leg: where the first leg comes from; "self" is `u_target`.
    """
    n = num_boundary
    r = torch.cat([t[:n], r[n:]])
    with torch.no_grad():
        v_t = v(z_t[:n], t[:n], y[:n]) if leg == "self" else v(z_t, t, y)
        u_st = None if leg == "self" else v_t[n:]
        if leg == "midpoint":
            u_st = midpoint_leg(v, z_t[n:], v_t[n:], split_time(r[n:], t[n:], lam[n:]), t[n:], y[n:])
        target = torch.cat([v_t[:n], splitting_target(u_target, z_t[n:], r[n:], t[n:], lam[n:], y[n:], u_st)])
    error = squared_error(u(z_t, r, t, y), target)
    return StudentLoss(error[:n], error[n:] if leg == "self" else error[n:] / lam[n:].square())
