"""The convention of this project, in code. No other file writes (1 - t) x + t eps.

t = 0 is data, t = 1 is noise. Sampling runs from t = 1 down to 0. Intervals are r <= s <= t, u takes the state at the
interval's noise end t, and z_r = z_t - (t - r) u(z_t, r, t, y). Times are float tensors (B,).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def pad_like(t: Tensor, z: Tensor) -> Tensor:
    """View times (B,) as (B, 1, ..., 1), so that they multiply a batch shaped like z."""
    return t.view(-1, *[1] * (z.dim() - 1))


def interpolate(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 - t) x + t eps: the straight path from data x to noise eps, both (B, ...), at times t (B,)."""
    return torch.lerp(x, eps, pad_like(t, x))


def choose_noise(x: Tensor, y: Tensor, noises: Sequence[Tensor], gather: Callable[[Tensor], Tensor] = lambda part: part[None]) -> Tensor:
    """For each image the noise that points most towards it, seen from the mean image of its class in the batch; all (B, ...).

    Paths from data to noise then cross less, as they do with the nearest noise (Li et al., arXiv 2505.18521). But the nearest is smaller
    than others and leans towards the mean image and its class; these have, together and within each class, the size and mean of the noise
    that samples start from (docs/noise.md).

    Args:
        y: class of each image (B,), none dropped.
        noises: to choose from. An only one is taken; an image that is alone in its class gets any.
        gather: stacks a tensor of every process, (processes, B, ...), if each has rows of the batch.
    """
    if len(noises) == 1:
        return noises[0]
    images, labels = gather(x).flatten(0, 1).flatten(1), gather(y).flatten()
    alike = (y[:, None] == labels).to(x.dtype)
    towards = x.flatten(1) - alike / alike.sum(1, keepdim=True) @ images
    towards *= towards.norm(dim=1, keepdim=True) > 2e-3 * x.flatten(1).norm(dim=1, keepdim=True)     # less is rounding, as of TF32
    chosen, most = noises[0], torch.full_like(towards[:, 0], -torch.inf)
    for eps in noises:
        cosine = (eps.flatten(1) * towards).sum(1) / eps.flatten(1).norm(dim=1)                     # times |towards|
        chosen = torch.where(pad_like(cosine > most, eps), eps, chosen)
        most = most.maximum(cosine)
    return chosen


def conditional_velocity(x: Tensor, eps: Tensor) -> Tensor:
    """dz_t/dt = eps - x along the straight path; its mean given z_t is the velocity v(z_t, t)."""
    return eps - x


def step(z_t: Tensor, r: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """Go from time t to r <= t with average velocity u over [r, t]: z_r = z_t - (t - r) u. Shapes (B, ...) and (B,)."""
    return z_t - pad_like(t - r, z_t) * u
