"""The convention of this project, in code. No other file writes (1 - t) x + t eps.

t = 0 is data, t = 1 is noise. Sampling runs from t = 1 down to 0. Intervals are r <= s <= t, u takes the state at the
interval's noise end t, and z_r = z_t - (t - r) u(z_t, r, t, y). Times are float tensors (B,).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_like(t: Tensor, z: Tensor) -> Tensor:
    """View times (B,) as (B, 1, ..., 1), so that they multiply a batch shaped like z."""
    return t.view(-1, *[1] * (z.dim() - 1))


def interpolate(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 - t) x + t eps: the straight path from data x to noise eps, both (B, ...), at times t (B,)."""
    return torch.lerp(x, eps, pad_like(t, x))


def nearest_noise(x: Tensor, noises: Sequence[Tensor]) -> Tensor:
    """For each image the nearest of its noises, all (B, ...), so that paths from data to noise cross less (Li et al., arXiv 2505.18521)."""
    if len(noises) == 1:
        return noises[0]
    distances = torch.stack([(eps - x).flatten(1).norm(dim=1) for eps in noises])                     # (number of noises, B)
    return torch.stack(list(noises))[distances.argmin(dim=0), torch.arange(len(x), device=x.device)]


def conditional_velocity(x: Tensor, eps: Tensor) -> Tensor:
    """dz_t/dt = eps - x along the straight path; its mean given z_t is the velocity v(z_t, t)."""
    return eps - x


def step(z_t: Tensor, r: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """Go from time t to r <= t with average velocity u over [r, t]: z_r = z_t - (t - r) u. Shapes (B, ...) and (B,)."""
    return z_t - pad_like(t - r, z_t) * u
