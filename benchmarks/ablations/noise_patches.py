"""Patches of which noise an image gets, among those that --num-noises draws."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.ablations.changes import STUDENTS, TEACHERS, change
from utils.flow import choose_noise, conditional_velocity

Gather = Callable[[Tensor], Tensor]


def nearest_noise(x: Tensor, y: Tensor, noises: Sequence[Tensor], *gather: Gather) -> Tensor:
    """Called as `utils.flow.choose_noise`: for each image the nearest of its noises (Li et al., arXiv 2505.18521)."""
    distances = torch.stack([conditional_velocity(x, eps).flatten(1).norm(dim=1) for eps in noises])          # (number of noises, B)
    return torch.stack(list(noises))[distances.argmin(dim=0), torch.arange(len(x), device=x.device)]


def noise_towards(x: Tensor, y: Tensor, noises: Sequence[Tensor], *gather: Gather) -> Tensor:
    """As `utils.flow.choose_noise`, but seen from the mean of the whole batch, so that the noise of a class leans towards the class."""
    return choose_noise(x, torch.zeros_like(y), noises, *gather)


def choose(by: Callable[..., Tensor]) -> None:
    """Let teachers and students choose by another function that is called as `choose_noise`; one noise then raises ValueError."""
    def among_several(x: Tensor, y: Tensor, noises: Sequence[Tensor], gather: Gather) -> Tensor:
        if len(noises) == 1:
            raise ValueError("the patch chooses among noises, but there is 1; --num-noises of the teacher must be at least 2")
        return by(x, y, noises, gather)

    change([*TEACHERS, *STUDENTS], "choose_noise", among_several)


def trade_noise(x: Tensor, y: Tensor, eps: Tensor, rounds: int) -> Tensor:
    """Give the noises of a class to its images anew, so that paths cross less: x and eps (B, ...), classes y (B,).

    In each round the images of a class meet in pairs, and a pair trades noises if these then point more towards their images. In as many
    rounds as a class has images, each two meet once. None is left out, so the noise of a class stays what it was, in every respect.
    Minibatch optimal transport (Pooladian et al., arXiv 2304.14772) within a class (why: Cheng and Schwing, 2503.10636), by trades.
    """
    order = y.argsort(stable=True)
    y = y[order]
    here, first, end = torch.arange(len(y), device=y.device), torch.searchsorted(y, y), torch.searchsorted(y, y, right=True)
    towards = x[order].flatten(1) @ eps.flatten(1).T        # (B images, B noises)
    mine, have = order, towards[here, order]                # each image's noise, and how far it points towards the image
    turns = torch.arange(rounds, device=y.device)[:, None]
    for other in first + (turns - (here - first)) % (end - first):
        theirs = mine[other]
        get = towards[here, theirs]
        trade = (get - have) + (get - have)[other] > 0
        mine, have = torch.where(trade, theirs, mine), torch.where(trade, get, have)
    return torch.empty_like(eps).index_copy(0, order, eps[mine])


def noise_trade(rounds: int) -> None:
    """The first of the noises, traded. Each process trades among its own rows."""
    change([*TEACHERS, *STUDENTS], "choose_noise", lambda x, y, noises, gather: trade_noise(x, y, noises[0], rounds))
