"""Patch of which noise an image gets, among those that --noise-candidates draws."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.ablations.changes import STUDENTS, TEACHERS, change


def by_direction(x: Tensor, noises: Sequence[Tensor]) -> Tensor:
    """For each image the noise that points most towards it, seen from the batch's mean image; all (B, ...).

    Unlike the nearest noise, the chosen ones are as large as all are, and lean to no side together: what samples start from.
    """
    if len(noises) == 1:
        return noises[0]
    towards = (x - x.mean(0)).flatten(1)
    cosines = torch.stack([(eps.flatten(1) * towards).sum(1) / eps.flatten(1).norm(dim=1) for eps in noises])     # times |towards|
    return torch.stack(list(noises))[cosines.argmax(dim=0), torch.arange(len(x), device=x.device)]


def noise_direction() -> None:
    change([*TEACHERS, *STUDENTS], "nearest_noise", by_direction)
