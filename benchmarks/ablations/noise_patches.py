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
    """As `utils.flow.choose_noise`, but seen from the mean of the whole batch, so that the noise of a class leans towards the class."""
    return choose_noise(x, x.new_zeros(len(x), dtype=torch.long), noises, *([gather] if gather else []))


def choose(by: Callable[[Tensor, Sequence[Tensor], Callable[[Tensor], Tensor]], Tensor]) -> None:
    """Let teachers and students choose otherwise; where there is no choice, a run raises ValueError."""
    def choose_noise(x: Tensor, y: Tensor, noises: Sequence[Tensor], gather: Callable[[Tensor], Tensor]) -> Tensor:
        if len(noises) == 1:
            raise ValueError("the patch chooses among noises, but there is 1; --num-noises of the teacher must be at least 2")
        return by(x, noises, gather)

    change([*TEACHERS, *STUDENTS], "choose_noise", choose_noise)
