"""Variants of a student's training that train_student.py has no flag for; see `patches`."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import train_student
from benchmarks import perfect_student, splitting_bias
from benchmarks.ablations.changes import STUDENTS, change
from models import DiT, build_network, dit, student_from_teacher
from utils import losses
from utils.flow import interpolate, pad_like, step
from utils.guidance import GuidedLabels, Velocity
from utils.losses import AverageVelocity, Leg, StudentLoss, in_steps, squared_error, student_loss
from utils.times import draw_intervals, sampling_intervals


def without_graph() -> None:
    """Nothing is recorded: for a patch that decides something anew in each update."""
    change(STUDENTS, "Replay", lambda function, network: function)


def mixed_leg() -> None:
    """A leg is the teacher's in every other update, both are the student's own in the rest."""
    without_graph()
    turn = itertools.cycle([False, True])
    change(STUDENTS, "student_loss", lambda *args: student_loss(
        *args[:9], *(("self", "self") if next(turn) else args[9:11]), *args[11:]))


def several_steps(count: int, ratio: float = 1) -> None:
    """The teacher's leg is several steps of its flow in a row, which lets its share be larger: fewer hops to a long interval.

    Steps each 1 - lam times as long as the one before, over the share 1 - (1 - lam)^count, are what a target of share lam is when the
    student's leg is unrolled: the flow stays the same.
    """
    one_step, sizes = losses.one_step, [ratio**i for i in range(count)]
    shares = [size / sum(sizes) for size in sizes]
    change([losses], "one_step", lambda v, leg: in_steps(one_step(v, leg), shares))


def own_leg_in_steps(count: int) -> None:
    """The student makes its leg of a target in several steps, which know the way better than one does."""
    legs = losses.legs

    def longer(u: AverageVelocity, v: Velocity, *kinds: Leg) -> tuple[AverageVelocity, ...]:
        return tuple(in_steps(leg, [1 / count] * count) if kind == "self" else leg for leg, kind in zip(legs(u, v, *kinds), kinds))

    change([losses], "legs", longer)


def are_pinned(r: Tensor, t: Tensor, pinned_steps: Sequence[int]) -> Tensor:
    """Which intervals are those of sampling in `pinned_steps` equal steps, (B,) bool."""
    return torch.stack([(r == low) & (t == high) for low, high in sampling_intervals(pinned_steps)]).any(0)


def move_pinned(moved: Callable[[Tensor, Tensor, torch.Generator], Tensor]) -> None:
    """Pinned intervals keep their r; their t is what `moved` makes of r, t and the source of randomness. All (B,)."""
    def intervals(num: int, t_law: str, r_law: str, pinned_share: float, pinned_steps: Sequence[int],
                  generator: torch.Generator, num_whole: int = 0) -> tuple[Tensor, Tensor]:
        if num_whole:
            raise ValueError(f"moved pins: {num_whole} rows must stay at (0, 1), with --one-step-from")
        r, t = draw_intervals(num, t_law, r_law, pinned_share, pinned_steps, generator)
        return r, torch.where(are_pinned(r, t, pinned_steps), moved(r, t, generator), t)

    change(STUDENTS, "draw_intervals", intervals)


def pin_data_end() -> None:
    """Of the pinned intervals r alone is pinned, t uniform above it: with a first leg of the teacher a chain of targets has one r."""
    move_pinned(lambda r, t, generator: torch.lerp(r, torch.ones_like(r), torch.rand(len(r), generator=generator, device=r.device)))


def pin_chain(share: float) -> None:
    """Half of the pinned intervals are what the others' targets ask for: the first leg, a share of each, is taken off once, twice, ..."""
    def shorter(r: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
        coin = torch.rand(len(r), generator=generator, device=r.device).clamp(min=1e-6)
        hops = (-coin.log2()).floor()                       # k with chance 2^-(k + 1)
        return torch.lerp(r, t, (1 - share) ** hops)

    move_pinned(shorter)


def whole_below(length: float) -> None:
    """Of intervals shorter than `length` the teacher's leg takes all: a chain of targets ends there, and not in the boundary condition."""
    def loss(u: AverageVelocity, u_target: AverageVelocity, v: Velocity, z_t: Tensor, r: Tensor, t: Tensor, share: Tensor,
             *rest: Any) -> StudentLoss:
        return student_loss(u, u_target, v, z_t, r, t, torch.where(t - r < length, 1, share), *rest)

    change(STUDENTS, "student_loss", loss)


def more_to_data(share: float, earliest: float = 0.4) -> None:
    """A share of all intervals, taken from those that are not pinned, is (0, t), t uniform between `earliest` and 1."""
    def intervals(num: int, t_law: str, r_law: str, pinned_share: float, pinned_steps: Sequence[int],
                  generator: torch.Generator, num_whole: int = 0) -> tuple[Tensor, Tensor]:
        if share > 1 - pinned_share:
            raise ValueError(f"more to data: a share of {share} does not fit beside --pinned-share {pinned_share}")
        r, t = draw_intervals(num, t_law, r_law, pinned_share, pinned_steps, generator, num_whole)
        coin, late = torch.rand(2, num, generator=generator, device=r.device)
        chosen = ~are_pinned(r, t, pinned_steps) & (coin < share / (1 - pinned_share))
        return torch.where(chosen, 0, r), torch.where(chosen, earliest + (1 - earliest) * late, t)

    change(STUDENTS, "draw_intervals", intervals)


def mix(v: Velocity, null_class: int, guidance_scale: float, share: Tensor, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """v guided by a scale that is 1 where share is 0 and guidance_scale where it is 1; share: (B,)."""
    return torch.lerp(v(z, t, torch.full_like(y, null_class)), v(z, t, y), pad_like(1 + (guidance_scale - 1) * share, z))


def soft_guidance(width: float) -> None:
    """Guidance rises and falls over `width` around the ends of its interval: a leg sees it at its middle alone, so edges make jumps."""
    def soft(v: Velocity, null_class: int, guidance_scale: float, interval: tuple[float, float]) -> Velocity:
        low, high = interval

        def guided(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
            share = ((t - low) / width + 0.5).clamp(0, 1) * ((high - t) / width + 0.5).clamp(0, 1)
            return mix(v, null_class, guidance_scale, share, z, t, y)

        return guided

    change([*STUDENTS, perfect_student], "guided_velocity", soft)


def mean_guidance() -> None:
    """A leg of the teacher's is guided as much as its interval is on average, not as its middle happens to be."""
    def guided_velocity(v: Velocity, null_class: int, guidance_scale: float, interval: tuple[float, float]) -> Callable[..., Tensor]:
        low, high = interval

        def guided(z: Tensor, t: Tensor, y: Tensor, leg: tuple[Tensor, Tensor] | None = None) -> Tensor:
            start, end = leg or (t, t)
            inside = (end.clamp(low, high) - start.clamp(low, high)) / (end - start).clamp(min=1e-6)
            inside = torch.where(end > start, inside, ((t >= low) & (t <= high)).to(t.dtype))
            return mix(v, null_class, guidance_scale, inside, z, t, y)

        return guided

    plain = losses.one_step

    def one_step(v: Callable[..., Tensor], leg: Leg) -> AverageVelocity:
        return lambda z_t, r, t, y: plain(lambda z, time, label: v(z, time, label, (r, t)), leg)(z_t, r, t, y)

    change([*STUDENTS, perfect_student], "guided_velocity", guided_velocity)
    change([losses, splitting_bias], "one_step", one_step)


def wider_modulation(factor: int) -> None:
    """adaLN of more channels than the teacher's, which at first have no effect: more room for what differs from interval to interval."""
    def wider(teacher: DiT, **more: Any) -> DiT:
        narrow = student_from_teacher(teacher, **more)
        rank = factor * teacher.architecture["modulation_rank"]
        student = build_network(**{**narrow.architecture, "modulation_rank": rank}).to(teacher.position.device)
        given = student.state_dict()
        for name, weight in narrow.state_dict().items():
            given[name][tuple(map(slice, weight.shape))] = weight       # the first channels; up.weight is zero for the rest
        return student

    change(STUDENTS, "student_from_teacher", wider)


def shared_states() -> None:
    """Boundary and splitting at the same states: one evaluation of the teacher, v(z_t, t), serves both. Half of the images is used."""
    def loss(u: AverageVelocity, u_target: AverageVelocity, v: Velocity, z_t: Tensor, r: Tensor, t: Tensor, share: Tensor,
             y: Tensor, num_boundary: int, first_leg: Leg, last_leg: Leg, edge_weight: float = 0.0, *whole: int) -> StudentLoss:
        n = len(y) - num_boundary
        if n != num_boundary or (first_leg, last_leg) != ("midpoint", "self") or any(whole):
            raise ValueError(f"shared states: {num_boundary} of {len(y)} rows are boundary, legs {first_leg} and {last_leg}; "
                             "half of them and midpoint and self are needed, without --one-step-from")
        z, y, r, t, share = z_t[n:], y[n:], r[n:], t[n:], share[n:]
        with torch.no_grad():
            v_t = v(z, t, y)
        first = losses.one_step(lambda state, *rest: v_t if state is z else v(state, *rest), first_leg)
        target = losses.splitting_target(first, u_target, z, r, t, share, y)
        error = squared_error(u(z.repeat(2, 1, 1, 1), torch.cat([t, r]), t.repeat(2), y.repeat(2)), torch.cat([v_t, target]), edge_weight)
        return StudentLoss(error[:n], error[n:] / share.square())

    change(STUDENTS, "student_loss", loss)


def as_seen(teacher: DiT, z: Tensor, t: Tensor, y: Tensor, share: float) -> Tensor:
    """What the first `share` of the teacher's blocks makes of z: (B, T, D), each token of mean square one."""
    x, c, parts = teacher.tokens(z), teacher.condition(t, t, y), list(teacher.stacks or teacher.blocks)
    for part in parts[: round(share * len(parts))]:
        x = part(x, c, teacher.rotary_cos, teacher.rotary_sin)
    return dit.rms_norm(x).float()


class Kept(dict[str, Any]):
    """What a function returned last, by a name, for a loss that needs it too."""

    def keep(self, name: str, value: Any) -> Any:
        self[name] = value
        return value

    def keep_teacher(self, guiding: str) -> None:
        """The teacher, from what the scripts call by the name `guiding`. Gradients go through it to the student, not to its weights."""
        guide = getattr(train_student, guiding)

        def guided(v: Velocity, *args: Any) -> Velocity:
            self.keep("teacher", v.__self__).requires_grad_(False)
            return guide(v, *args)

        change(STUDENTS, guiding, guided)


def teacher_features(weight: float, depth: float = 2 / 3, shortest: float = 0.3) -> None:
    """Where the student arrives and where it should are compared as the teacher sees them, too (cf. Lin & Yang, arXiv 2401.00110).

    Distances of features are divided by the interval, as those of velocities are of images'; `shortest` bounds what that does to rounding.
    """
    kept, splitting_target = Kept(), losses.splitting_target

    def loss(u: AverageVelocity, u_target: AverageVelocity, v: Velocity, z_t: Tensor, r: Tensor, t: Tensor, share: Tensor,
             y: Tensor, num_boundary: int, *rest: Any) -> StudentLoss:
        if any(rest[3:]):                                   # num_whole and one_step_from
            raise ValueError("teacher features: all splitting rows need targets from legs, without --one-step-from")
        plain = student_loss(lambda *inputs: kept.keep("made", u(*inputs)), u_target, v, z_t, r, t, share, y, num_boundary, *rest)
        z, r, t, y, made, share = (rows[num_boundary:] for rows in (z_t, r, t, y, kept["made"], share))
        seen = as_seen(kept["teacher"], step(z, r, t, made), r, y, depth)
        with torch.no_grad():
            wanted = as_seen(kept["teacher"], step(z, r, t, kept["target"]), r, y, depth)
        further = squared_error(seen, wanted) / (t - r).clamp(min=shortest).square()
        return StudentLoss(plain.boundary, plain.splitting + weight * further / share.square())

    kept.keep_teacher("guided_velocity")
    change([losses], "splitting_target", lambda *args: kept.keep("target", splitting_target(*args)))
    change(STUDENTS, "student_loss", loss)


def whole_features(weight: float, depth: float = 2 / 3, noisiest: float = 0.4) -> None:
    """Where one step arrives and where `--one-step-from` says that it should are compared as the teacher sees them, too.

    For students that are told their guidance. Both images get the same noise first, of a time uniform in [0, noisiest]; it is drawn from
    the device's own generator: alike on all processes, and anew when a run goes on. (A diffusion model's own features as a measure of
    its images: Lin & Yang, arXiv 2401.00110.)
    """
    kept = Kept()

    def several(*args: Any) -> AverageVelocity:
        average = in_steps(*args)
        return lambda *inputs: kept.keep("wanted", average(*inputs))

    def loss(u: AverageVelocity, u_target: AverageVelocity, v: Velocity, z_t: Tensor, r: Tensor, t: Tensor, share: Tensor,
             y: GuidedLabels, num_boundary: int, first_leg: Leg, last_leg: Leg, edge_weight: float, num_whole: int,
             one_step_from: int) -> StudentLoss:
        plain = student_loss(lambda *inputs: kept.keep("made", u(*inputs)), u_target, v, z_t, r, t, share, y, num_boundary, first_leg,
                             last_leg, edge_weight, num_whole, one_step_from)
        rows = slice(num_boundary, num_boundary + num_whole)
        z, y, r, t = z_t[rows], y.y[rows], r[rows], t[rows]
        eps, noise = torch.randn_like(z), noisiest * torch.rand_like(t)

        def see(velocity: Tensor) -> Tensor:
            return as_seen(kept["teacher"], interpolate(step(z, r, t, velocity), eps, noise), noise, y, depth)

        with torch.no_grad():
            wanted = see(kept["wanted"])
        further = weight * squared_error(see(kept["made"][rows]), wanted) / share[rows].square()
        return StudentLoss(plain.boundary, torch.cat([plain.splitting[:num_whole] + further, plain.splitting[num_whole:]]))

    kept.keep_teacher("guided_as_told")
    change([losses], "in_steps", several)
    change(STUDENTS, "student_loss", loss)


def warm_start(updates: int, substeps: int = 4) -> None:
    """At first the target is the mean velocity of the teacher's own trajectory from t to r, solved in `substeps` Euler steps."""
    without_graph()
    count = itertools.count()

    def loss(u: AverageVelocity, u_target: AverageVelocity, v: Velocity, z_t: Tensor, r: Tensor, t: Tensor, share: Tensor,
             y: Tensor, num_boundary: int, first_leg: Leg, last_leg: Leg, edge_weight: float = 0.0, *whole: int) -> StudentLoss:
        n = num_boundary
        if next(count) >= updates:
            return student_loss(u, u_target, v, z_t, r, t, share, y, n, first_leg, last_leg, edge_weight, *whole)
        r = torch.cat([t[:n], r[n:]])
        with torch.no_grad():
            trajectory = in_steps(losses.one_step(v, "euler"), [1 / substeps] * substeps)
            target = torch.cat([v(z_t[:n], t[:n], y[:n]), trajectory(z_t[n:], r[n:], t[n:], y[n:])])
        error = squared_error(u(z_t, r, t, y), target, edge_weight)
        return StudentLoss(error[:n], error[n:])

    change(STUDENTS, "student_loss", loss)
