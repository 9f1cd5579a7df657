"""A flow whose every quantity is known: data x ~ N(0, sd^2) per pixel.

z_t = (1 - t) x + t eps has std(t)^2 = (1 - t)^2 sd^2 + t^2, and the probability-flow ODE carries z_t to
z_r = z_t std(r) / std(t). Everything else follows. Derived here from scratch, not with the project's formulas.
"""

import torch
from torch import Tensor

from utils.flow import interpolate


class GaussianFlow:
    def __init__(self, sd: float = 0.5):
        self.sd = sd

    def std(self, t: Tensor) -> Tensor:
        return ((1 - t) ** 2 * self.sd**2 + t**2).sqrt().view(-1, 1, 1, 1)

    def flow(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """Where the trajectory through z at time t is at time r."""
        return z * self.std(r) / self.std(t)

    def v(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """dz/dt along the trajectory: z std'(t) / std(t)."""
        derivative = (t - (1 - t) * self.sd**2).view(-1, 1, 1, 1) / self.std(t)
        return z * derivative / self.std(t)

    def u(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """(z_t - z_r) / (t - r), and its limit v for r = t."""
        length = (t - r).view(-1, 1, 1, 1)
        safe = torch.where(length == 0, 1.0, length)
        return torch.where(length == 0, self.v(z, t, y), (z - self.flow(z, r, t)) / safe)


ORACLE = GaussianFlow()


def batch(num: int = 64):
    """States on the oracle's path at t, with 0 < r < t < 1 and lam in (0.1, 0.9), float64."""
    draw = torch.Generator().manual_seed(1)
    times = torch.rand(num, 2, generator=draw, dtype=torch.float64).sort(dim=1).values
    r, t = 0.02 + 0.9 * times[:, 0], 0.08 + 0.9 * times[:, 1]
    lam = 0.1 + 0.8 * torch.rand(num, generator=draw, dtype=torch.float64)
    x = ORACLE.sd * torch.randn(num, 1, 4, 4, generator=draw, dtype=torch.float64)
    eps = torch.randn(x.shape, generator=draw, dtype=torch.float64)
    return interpolate(x, eps, t), r, t, lam, torch.zeros(num, dtype=torch.long)
