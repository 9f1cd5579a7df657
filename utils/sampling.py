"""From noise at t = 1 to images at t = 0.

Every sampler starts from z (B, C, H, W), standard Gaussian noise, and follows a falling grid of times; y is (B,) long. The
result is (B, C, H, W), or with `trajectory=True` all states from noise to image, (num_steps + 1, B, C, H, W). Values lie
near [-1, 1] and are not clipped.
"""

from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from torch import Generator, Tensor

from utils.flow import interpolate, step
from utils.guidance import Velocity
from utils.losses import AverageVelocity


def time_grid(num_steps: int | Sequence[float]) -> list[float]:
    """Times from 1 down to 0: that many equal steps for a number, or the given times, checked.

    Raises:
        ValueError: fewer than one step, or times that do not fall strictly from 1 to 0.
    """
    if isinstance(num_steps, Integral):
        if num_steps < 1:
            raise ValueError(f"the number of steps must be at least 1, not {num_steps}")
        return [1 - i / num_steps for i in range(num_steps)] + [0.0]
    times = [float(t) for t in num_steps]
    if len(times) < 2 or times[0] != 1 or times[-1] != 0 or any(a <= b for a, b in zip(times, times[1:])):
        raise ValueError(f"a time grid must fall strictly from 1 to 0, not {times}")
    return times


@torch.no_grad()
def follow(advance: Callable[[Tensor, Tensor, Tensor], Tensor], z: Tensor, times: Sequence[float], trajectory: bool) -> Tensor:
    """Apply z_r = advance(z_t, r, t) along the grid."""
    states = [z]
    for t, r in zip(times, times[1:]):
        z = advance(z, torch.full(z.shape[:1], r, dtype=z.dtype, device=z.device),
                    torch.full(z.shape[:1], t, dtype=z.dtype, device=z.device))
        if trajectory:
            states.append(z)
    return torch.stack(states) if trajectory else z


def sample_velocity(v: Velocity, z: Tensor, y: Tensor, num_steps: int | Sequence[float], method: str = "euler",
                    trajectory: bool = False) -> Tensor:
    """Solve the teacher's ODE dz/dt = v(z, t, y).

    Args:
        method: "euler", first order, n evaluations for n steps; or "heun", second order, 2n - 1 evaluations. Heun's last step is
            Euler's, because images at t = 0 have no noise left that tells v, and half of the last step's noise would stay
            (Karras et al., arXiv 2206.00364, Algorithm 1).

    Raises:
        ValueError: an unknown method or time grid.
    """
    def euler(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return step(z, r, t, v(z, t, y))

    def heun(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        v_t = v(z, t, y)
        v_r = v(step(z, r, t, v_t), r, y)
        return step(z, r, t, (v_t + v_r) / 2)

    methods = {"euler": euler, "heun": heun}
    if method not in methods:
        raise ValueError(f"unknown method {method!r}; known are {', '.join(methods)}")
    times = time_grid(num_steps)
    start = follow(methods[method], z, times[:-1], trajectory)
    end = follow(euler, start[-1] if trajectory else start, times[-2:], trajectory=False)
    return torch.cat([start, end[None]]) if trajectory else end


def sample_average_velocity(u: AverageVelocity, z: Tensor, y: Tensor, num_steps: int | Sequence[float],
                            renoise: Generator | None = None, trajectory: bool = False) -> Tensor:
    """Take the student's steps z_r = z_t - (t - r) u(z_t, r, t, y): one network evaluation each.

    Args:
        renoise: None follows the flow from t to r. With a generator each step jumps from t to 0 and adds fresh noise up to r, as
            consistency models sample (arXiv 2303.01469, Algorithm 1).
    """
    def along_flow(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return step(z, r, t, u(z, r, t, y))

    def through_data(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        x = step(z, torch.zeros_like(t), t, u(z, torch.zeros_like(t), t, y))
        eps = torch.randn(x.shape, generator=renoise, device=x.device, dtype=x.dtype)
        return interpolate(x, eps, r)

    return follow(along_flow if renoise is None else through_data, z, time_grid(num_steps), trajectory)
