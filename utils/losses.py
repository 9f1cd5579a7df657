"""The method: flow matching for the teacher; the boundary condition and Interval Splitting Consistency for the student
(SplitMeanFlow, arXiv 2507.16884).

    (t - r) u(z_t, r, t) = (s - r) u(z_s, r, s) + (t - s) u(z_t, s, t),   r <= s <= t                       (Eq. 10)

With lam = (t - s) / (t - r) that is u_rt = (1 - lam) u_rs + lam u_st (Eq. 11). The right-hand side is the target. It
carries no gradient: the backward pass goes through u(z_t, r, t) alone (Algorithm 1). The target has two legs, the first from t to s
and the last from s to r. In Algorithm 1 the student makes both. Here one of them may be a step of the teacher's ODE (`Leg`), which
anchors the student at its teacher; by default it is, see docs/method.md.

Losses are pure functions of states, times and the callables u(z, r, t, y) and v(z, t, y), and return one value per sample. The
caller weights and reduces them, and chooses the precision. Shapes: z_t (B, ...), r, t, lam (B,), y (B,) long; results (B,) float32.
Labels are passed on unchanged, so y may be `utils.guidance.GuidedLabels` where u and v take those.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from utils.flow import conditional_velocity, interpolate, pad_like, step
from utils.guidance import Velocity

AverageVelocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]        # u(z, r, t, y)
Leg = Literal["self", "euler", "midpoint"]      # the student's own, or one Euler or midpoint step of the teacher's ODE


def squared_error(prediction: Tensor, target: Tensor, edge_weight: float = 0.0) -> Tensor:
    """Squared difference of each sample, averaged over its values: (B, ...) to (B,).

    With an edge weight, for images (B, C, H, W), the error's differences between neighbouring pixels count too, by this factor. The
    best prediction stays the same, but fine detail, of which there is little, is no longer learned last (Sobolev norm H1, not L2).
    """
    error = prediction - target
    own = error.square().flatten(1).mean(1)
    if not edge_weight:
        return own
    return own + edge_weight * sum(error.diff(dim=dim).square().flatten(1).mean(1) for dim in (2, 3))


def adaptive_weight(loss: Tensor, power: float) -> Tensor:
    """loss / sg(loss + 0.001)^power, (B,) to (B,); sg stops the gradient. Power 0: plain loss (MeanFlow, arXiv 2505.13447, Sec. 4.3)."""
    return loss / (loss.detach() + 1e-3) ** power


def flow_matching_loss(v: Velocity, x: Tensor, eps: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Squared error of v(z_t, t, y) as a prediction of the conditional velocity eps - x (Lipman et al., arXiv 2210.02747)."""
    return squared_error(v(interpolate(x, eps, t), t, y), conditional_velocity(x, eps))


def boundary_loss(u: AverageVelocity, v: Velocity, z_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Boundary condition u(z_t, t, t) = v(z_t, t): the two velocities agree over an empty interval."""
    with torch.no_grad():
        v_t = v(z_t, t, y)
    return squared_error(u(z_t, t, t, y), v_t)


def split_time(r: Tensor, t: Tensor, lam: Tensor) -> Tensor:
    """The split point s in [r, t]: t for lam = 0, r for lam = 1."""
    return (1 - lam) * t + lam * r


def one_step(v: Velocity, leg: Leg) -> AverageVelocity:
    """Average velocity of one step of the ODE dz/dt = v from t to r: by Euler's rule, or to second order by the midpoint rule."""
    def euler(z_t: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return v(z_t, t, y)

    def midpoint(z_t: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
        middle = (r + t) / 2
        return v(step(z_t, middle, t, v(z_t, t, y)), middle, y)

    return {"euler": euler, "midpoint": midpoint}[leg]


def in_steps(average: AverageVelocity, shares: Sequence[float]) -> AverageVelocity:
    """Average velocity of several steps in a row, the i-th over shares[i] of the interval; shares sum to 1. (Eq. 10, repeatedly.)"""
    def several(z_t: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
        ends = [torch.lerp(t, r, share) for share in accumulate(shares, initial=0.0)]
        total = torch.zeros_like(z_t)
        for share, (start, end) in zip(shares, pairwise(ends), strict=True):
            velocity = average(z_t, end, start, y)
            total += share * velocity
            z_t = step(z_t, end, start, velocity)
        return total

    return several


@torch.no_grad()
def splitting_target(first: AverageVelocity, last: AverageVelocity, z_t: Tensor, r: Tensor, t: Tensor, lam: Tensor, y: Tensor) -> Tensor:
    """Right-hand side of Eq. 11, given what makes its first and its last leg. In Algorithm 1 the student makes both."""
    s = split_time(r, t, lam)
    u_st = first(z_t, s, t, y)
    u_rs = last(step(z_t, s, t, u_st), r, s, y)
    return torch.lerp(u_rs, u_st, pad_like(lam, z_t))


def interval_splitting_loss(u: AverageVelocity, z_t: Tensor, r: Tensor, t: Tensor, lam: Tensor, y: Tensor) -> Tensor:
    """Interval Splitting Consistency with both legs made by the student, as in Algorithm 1."""
    return squared_error(u(z_t, r, t, y), splitting_target(u, u, z_t, r, t, lam, y))


def anchored_splitting_loss(u: AverageVelocity, v: Velocity, z_t: Tensor, r: Tensor, t: Tensor, share: Tensor, y: Tensor,
                            first_leg: Leg, last_leg: Leg) -> Tensor:
    """Interval Splitting Consistency with one leg made by the teacher. The residual is divided by that leg's share of the interval.

    As the share goes to 0, the residual with the teacher's first leg tends to MeanFlow's, u + (t - r) du/dt - v(z_t, t). With the
    teacher's last leg it tends to u - (t - r) du/dr - v(z_r, r), where z_r is where the student itself arrives. The teacher's Euler
    step is right only in that limit; its midpoint step lets the share stay large. (first leg: cf. SoFlow, arXiv 2512.15657; last leg: cf.
    Lagrangian self-distillation, Boffi et al., arXiv 2505.18825)
    """
    target = splitting_target(*legs(u, v, first_leg, last_leg), z_t, r, t, first_share(share, last_leg), y)
    return squared_error(u(z_t, r, t, y), target) / share.square()


def legs(u: AverageVelocity, v: Velocity, first_leg: Leg, last_leg: Leg) -> tuple[AverageVelocity, AverageVelocity]:
    """What makes the first and the last leg of a target: u, or a step along v. Not v for both, which would leave the student out."""
    assert "self" in (first_leg, last_leg)
    first, last = (u if leg == "self" else one_step(v, leg) for leg in (first_leg, last_leg))
    return first, last


def first_share(share: Tensor, last_leg: Leg) -> Tensor:
    """lam of Eq. 11, the first leg's share of the interval, from the share of the teacher's leg. Both (B,)."""
    return share if last_leg == "self" else 1 - share


def mean_flow_loss(u: AverageVelocity, z_t: Tensor, v_t: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """MeanFlow's identity u = v - (t - r) du/dt, with the total derivative along v by forward-mode differentiation.

    SplitMeanFlow does without that; it is here for comparison (Geng et al., arXiv 2505.13447, Eq. 6 and 9).

    Args:
        v_t: velocity at z_t, (B, ...): eps - x of the sample (MeanFlow), or a teacher's v(z_t, t, y).

    Raises:
        NotImplementedError: u has a fused attention kernel, which has no forward-mode derivative; see `sdpa_kernel`.
    """
    tangents = (v_t, torch.zeros_like(r), torch.ones_like(t))
    u_rt, du_dt = torch.func.jvp(lambda z, r, t: u(z, r, t, y), (z_t, r, t), tangents)
    return squared_error(u_rt, v_t - pad_like(t - r, z_t) * du_dt.detach())


class StudentLoss(NamedTuple):
    """Per-sample losses of one student batch, unweighted."""

    boundary: Tensor            # (num_boundary,)
    splitting: Tensor           # (B - num_boundary,)


def student_loss(u: AverageVelocity, u_target: AverageVelocity, v: Velocity, z_t: Tensor, r: Tensor, t: Tensor, share: Tensor,
                 y: Tensor, num_boundary: int, first_leg: Leg = "self", last_leg: Leg = "self", edge_weight: float = 0.0,
                 num_whole: int = 0, one_step_from: int = 0) -> StudentLoss:
    """Both student losses over one batch, with a single forward pass that carries gradient.

    Equal to `boundary_loss` on the first `num_boundary` rows and to `anchored_splitting_loss` or `interval_splitting_loss`
    on the others (a test holds this), but faster. Counts are fixed so that shapes never change.

    A chain of targets is as good as its worst interval, and from (0, 1) it leads through intervals that are seldom drawn. Therefore the
    `num_whole` rows after the boundary rows may get their target from `one_step_from` equal steps of the student: Eq. 10 with more than
    two legs. There, too, an error of u is divided by the share, so that it weighs the same. Unlike the error of a target with a
    teacher's leg, it does not shrink with the share, so use this with a share that is not near zero, or with an adaptive weight.

    Args:
        u: the student.
        u_target: the network that makes the student's part of the targets: the student, an EMA of it, or what it started from.
        v: the teacher's guided velocity.
        share: share of the interval that the teacher's leg takes, or lam of Eq. 11 if there is no such leg. In (0, 1], (B,).
        num_boundary: rows for the boundary condition; their r and share are not used.
        first_leg, last_leg: what makes the two legs. "self" means `u_target`; one must be "self", and both are in Algorithm 1.
        edge_weight: see `squared_error`.
        num_whole, one_step_from: number of rows whose targets take one_step_from steps, see above; both 0 for none.
    """
    n, m = num_boundary, num_boundary + num_whole
    r = torch.cat([t[:n], r[n:]])
    with torch.no_grad():
        targets = [v(z_t[:n], t[:n], y[:n])]
        if num_whole:
            targets.append(in_steps(u_target, [1 / one_step_from] * one_step_from)(z_t[n:m], r[n:m], t[n:m], y[n:m]))
        lam = first_share(share[m:], last_leg)
        targets.append(splitting_target(*legs(u_target, v, first_leg, last_leg), z_t[m:], r[m:], t[m:], lam, y[m:]))
        target = torch.cat(targets)
    error = squared_error(u(z_t, r, t, y), target, edge_weight)
    anchored = (first_leg, last_leg) != ("self", "self")
    return StudentLoss(error[:n], error[n:] / share[n:].square() if anchored else error[n:])
