"""What an anchored student would learn if it learnt perfectly: how much of the data's spread one step keeps, by lam and leg.

    python -m benchmarks.splitting_bias

With a step of the teacher's flow as first leg and a constant lam, Eq. 11 unrolls to a solver of the teacher's flow whose every step
takes the share lam of what remains of the interval. On Gaussian data N(0, sd^2) the flow is linear in z, z_t having the standard
deviation sqrt((1 - t)^2 sd^2 + t^2), so that solver's end point is a product of numbers. No training, no randomness.
"""

import torch
from torch import Tensor

from utils.flow import step
from utils.guidance import Velocity
from utils.losses import midpoint_leg

LAMS, SPREADS = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02), (1.0, 0.5, 0.2, 0.05)


def velocity(z: Tensor, t: Tensor, sd: float) -> Tensor:
    """Marginal velocity of N(0, sd^2) at z and t: z std'(t) / std(t)."""
    left = 1 - t
    return z * (t - left * sd**2) / (left**2 * sd**2 + t**2)


def solve(v: Velocity, z: Tensor, y: Tensor, lam: float, midpoint: bool, last: float = 1e-9) -> Tensor:
    """From noise z (B, ...) to data along v, each step taking the share lam of the time that remains; below `last` all of it."""
    now = 1.0
    while now > 0:
        then = (1 - lam) * now if now > last else 0.0
        t, s = (torch.full((len(z),), time, dtype=z.dtype, device=z.device) for time in (now, then))
        leg = v(z, t, y)
        if midpoint:
            leg = midpoint_leg(v, z, leg, s, t, y)
        z, now = step(z, s, t, leg), then
    return z


def kept(lam: float, sd: float, midpoint: bool) -> float:
    """Standard deviation of one-step samples over that of the data; 1 is right."""
    one = torch.ones(1, dtype=torch.float64)
    return solve(lambda z, t, y: velocity(z, t, sd), one, one.long(), lam, midpoint).item() / sd


def main() -> None:
    print("| sd of the data | leg | " + " | ".join(f"lam {lam}" for lam in LAMS) + " |\n" + "|---" * (2 + len(LAMS)) + "|")
    for sd in SPREADS:
        for midpoint in (False, True):
            row = " | ".join(f"{kept(lam, sd, midpoint):.4f}" for lam in LAMS)
            print(f"| {sd} | {'midpoint' if midpoint else 'Euler'} | {row} |")


if __name__ == "__main__":
    main()
