"""Patches of which noise an image gets, among those that --num-noises draws."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.ablations.changes import STUDENTS, TEACHERS, change
from utils.flow import choose_noise, conditional_velocity


def nearest_noise(x: Tensor, noises: Sequence[Tensor]) -> Tensor:
    """For each image the nearest of its noises, all (B, ...): Li et al., arXiv 2505.18521."""
    distances = torch.stack([conditional_velocity(x, eps).flatten(1).norm(dim=1) for eps in noises])          # (number of noises, B)
    return torch.stack(list(noises))[distances.argmin(dim=0), torch.arange(len(x), device=x.device)]


def noise_towards(x: Tensor, noises: Sequence[Tensor], gather: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """As `utils.flow.choose_noise`, but seen from the mean of the whole batch: all noise together is plain, that of a class is not."""
    return choose_noise(x, x.new_zeros(len(x), dtype=torch.long), noises, *([gather] if gather else []))


def noise_nearest() -> None:
    change([*TEACHERS, *STUDENTS], "choose_noise", lambda x, y, noises, gather: nearest_noise(x, noises))


def noise_direction() -> None:
    change([*TEACHERS, *STUDENTS], "choose_noise", lambda x, y, noises, gather: noise_towards(x, noises, gather))
