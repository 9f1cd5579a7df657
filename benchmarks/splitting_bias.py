"""What an anchored student would learn if it learnt perfectly: how much of the data's spread one step keeps, by leg and its share.

    python -m benchmarks.splitting_bias

With a step of the teacher's flow as first leg, a constant share of the interval, Eq. 11 unrolls to a solver of the teacher's flow whose
every step takes that share of what remains; as last leg, to the same steps in reverse order. On Gaussian data N(0, sd^2) the flow
is linear in z, z_t having the standard deviation sqrt((1 - t)^2 sd^2 + t^2), so that solver's end point is a product of numbers. No
training, no randomness.
"""

import torch
from torch import Tensor

from utils.errors import run_script
from utils.flow import step
from utils.guidance import Velocity
from utils.losses import Leg, one_step
from utils.sampling import follow

SHARES, SPREADS = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02), (1.0, 0.5, 0.2, 0.05)
ANCHORED: list[tuple[Leg, Leg]] = [("euler", "self"), ("midpoint", "self"), ("self", "euler"), ("self", "midpoint")]


def velocity(z: Tensor, t: Tensor, sd: float) -> Tensor:
    """Marginal velocity of N(0, sd^2) at z and t: z std'(t) / std(t)."""
    left = 1 - t
    return z * (t - left * sd**2) / (left**2 * sd**2 + t**2)


def unrolled_times(share: float, last: bool, least: float) -> list[float]:
    """From 1 down to 0, each step the share of what remains, below `least` all of it; with `last` the same lengths from the other end."""
    times = [1.0]
    while times[-1] > 0:
        times.append((1 - share) * times[-1] if times[-1] > least else 0.0)
    return [1 - time for time in reversed(times)] if last else times


def solve(v: Velocity, z: Tensor, y: Tensor, share: float, first_leg: Leg, last_leg: Leg = "self", least: float = 1e-9) -> Tensor:
    """From noise z (B, ...) to data along v, in the steps that the unrolled student takes; one of the legs is "self"."""
    last = last_leg != "self"
    average = one_step(v, last_leg if last else first_leg)
    return follow(lambda z, r, t: step(z, r, t, average(z, r, t, y)), z, unrolled_times(share, last, least), trajectory=False)


def kept(share: float, sd: float, first_leg: Leg, last_leg: Leg = "self") -> float:
    """Standard deviation of one-step samples over that of the data; 1 is right."""
    one = torch.ones(1, dtype=torch.float64)
    return solve(lambda z, t, y: velocity(z, t, sd), one, one.long(), share, first_leg, last_leg).item() / sd


def main() -> None:
    print("| sd of the data | first leg | last leg | " + " | ".join(f"share {share}" for share in SHARES) + " |\n"
          + "|---" * (3 + len(SHARES)) + "|")
    for sd in SPREADS:
        for legs in ANCHORED:
            row = " | ".join(f"{kept(share, sd, *legs):.4f}" for share in SHARES)
            print(f"| {sd} | {' | '.join(legs)} | {row} |")


if __name__ == "__main__":
    run_script(main)
