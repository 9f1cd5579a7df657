"""What an anchored student would learn if it learnt perfectly: how much of the data's spread one step keeps, by lam and leg.

    python -m benchmarks.splitting_bias

With the teacher's velocity as first leg and a constant lam, Eq. 11 unrolls to a solver of the teacher's flow whose every step
takes the share lam of what remains of the interval. On Gaussian data N(0, sd^2) the flow is linear in z, z_t having the standard
deviation sqrt((1 - t)^2 sd^2 + t^2), so that solver's end point is a product of numbers. No training, no randomness.
"""

import torch
from torch import Tensor

from utils.flow import step

LAMS, SPREADS = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02), (1.0, 0.5, 0.2, 0.05)


def velocity(z: Tensor, t: Tensor, sd: float) -> Tensor:
    """Marginal velocity of N(0, sd^2) at z and t: z std'(t) / std(t)."""
    left = 1 - t
    return z * (t - left * sd**2) / (left**2 * sd**2 + t**2)


def kept(lam: float, sd: float, midpoint: bool) -> float:
    """Standard deviation of one-step samples over that of the data; 1 is right."""
    z, t = torch.ones(2, 1, dtype=torch.float64)
    while t > 1e-9:
        s = (1 - lam) * t                                   # towards r = 0
        leg = velocity(z, t, sd)
        if midpoint:
            leg = velocity(step(z, (s + t) / 2, t, leg), (s + t) / 2, sd)
        z, t = step(z, s, t, leg), s
    return z.item() / sd


def main() -> None:
    print("| sd of the data | leg | " + " | ".join(f"lam {lam}" for lam in LAMS) + " |\n" + "|---" * (2 + len(LAMS)) + "|")
    for sd in SPREADS:
        for midpoint in (False, True):
            row = " | ".join(f"{kept(lam, sd, midpoint):.4f}" for lam in LAMS)
            print(f"| {sd} | {'midpoint' if midpoint else 'velocity at z_t'} | {row} |")


if __name__ == "__main__":
    main()
