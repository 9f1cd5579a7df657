"""Patches of which noise an image gets, among those that --noise-candidates draws."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.ablations.changes import STUDENTS, TEACHERS, change
from utils.data import Batches


def by_direction(x: Tensor, noises: Sequence[Tensor], y: Tensor | None = None) -> Tensor:
    """For each image the noise that points most towards it, seen from the batch's mean image; all (B, ...).

    Unlike the nearest noise, the chosen ones are as large as all are, and lean to no side together: what samples start from.
    With labels y (B,), seen from the mean image of its class: then neither do those of a class.
    """
    if len(noises) == 1:
        return noises[0]
    images = x.flatten(1)
    if y is None:
        towards = images - images.mean(0)
    else:
        alike = (y[:, None] == y).to(x.dtype)
        towards = images - alike / alike.sum(1, keepdim=True) @ images
    cosines = torch.stack([(eps.flatten(1) * towards).sum(1) / eps.flatten(1).norm(dim=1) for eps in noises])     # times |towards|
    return torch.stack(list(noises))[cosines.argmax(dim=0), torch.arange(len(x), device=x.device)]


def noise_direction() -> None:
    change([*TEACHERS, *STUDENTS], "nearest_noise", by_direction)


def noise_class_direction() -> None:
    labels: list[Tensor] = []                               # of the batch of this update, before label dropout

    class Labelled(Batches):
        def __call__(self, step: int) -> tuple[Tensor, Tensor]:
            x, y = super().__call__(step)
            labels[:] = [y]
            return x, y

    change([*TEACHERS, *STUDENTS], "Batches", Labelled)
    change([*TEACHERS, *STUDENTS], "nearest_noise", lambda x, noises: by_direction(x, noises, *labels))
