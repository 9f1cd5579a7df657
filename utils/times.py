"""Draws of t, of intervals (r, t) and of the split lam. Their laws (distributions) are texts such as "logit-normal(-0.6, 1.6)"."""

import math
import re
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

LAWS = {"uniform": 0, "logit-normal": 2}
LAM_LAWS = {"uniform": 0, "constant": 1, "anneal": 3}


def parse_law(text: str, known: dict[str, int] = LAWS) -> tuple[str, tuple[float, ...]]:
    """Split "name(a, b)" into its name and numbers.

    Raises:
        ValueError: the name is not in `known`, or does not take so many numbers, or a number is out of range.
    """
    match = re.fullmatch(r"\s*([\w-]+)\s*(?:\(([^()]*)\))?\s*", text)
    name = match and match[1]
    if name not in known:
        raise ValueError(f"unknown law {text!r}; known are {', '.join(f'{n} with {k} numbers' for n, k in known.items())}")
    try:
        numbers = tuple(float(number) for number in match[2].split(",")) if match[2] else ()
    except ValueError:
        raise ValueError(f"law {text!r}: what stands in brackets must be numbers") from None
    if len(numbers) != known[name]:
        raise ValueError(f"law {text!r}: {name} takes {known[name]} numbers, not {len(numbers)}")
    if known is LAM_LAWS and not all(0 < number <= 1 for number in numbers):
        raise ValueError(f"law {text!r}: every number must lie in (0, 1]")
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"law {text!r}: every number must be finite")
    if name == "logit-normal" and numbers[1] <= 0:
        raise ValueError(f"law {text!r}: the scale must be above 0")
    return name, numbers


def draw_times(num: int, law: str, generator: Generator) -> Tensor:
    """num independent times in [0, 1], float32 (num,): "uniform", or "logit-normal(loc, scale)" = sigmoid(N(loc, scale^2))."""
    name, numbers = parse_law(law)
    if name == "uniform":
        return torch.rand(num, generator=generator, device=generator.device)
    loc, scale = numbers
    return torch.sigmoid(loc + scale * torch.randn(num, generator=generator, device=generator.device))


def draw_between(num: int, low: float, high: float, generator: Generator) -> Tensor:
    """num independent values, uniform over [low, high], float32 (num,)."""
    return low + (high - low) * torch.rand(num, generator=generator, device=generator.device)


def sampling_intervals(step_counts: Sequence[int]) -> list[tuple[float, float]]:
    """The intervals (r, t) of sampling with each of these numbers of equal steps; those of a number given twice come twice."""
    return sorted((i / n, (i + 1) / n) for n in step_counts for i in range(n))


def count_whole(num: int, pinned_share: float, pinned_steps: Sequence[int]) -> int:
    """How many of num intervals `draw_intervals` pins at (0, 1) on average, rounded."""
    intervals = sampling_intervals(pinned_steps)
    return round(num * pinned_share * intervals.count((0, 1)) / len(intervals))


def draw_intervals(num: int, t_law: str, r_law: str, pinned_share: float, pinned_steps: Sequence[int],
                   generator: Generator, num_whole: int = 0) -> tuple[Tensor, Tensor]:
    """Intervals r <= t for the splitting loss.

    An interval is two independent draws, one of each law, sorted. A share of the rows, each by its own coin, is instead pinned at
    the intervals of sampling in `pinned_steps` equal steps: the laws almost never reach (0, 1), the one that matters most.

    Args:
        num: number of intervals.
        t_law, r_law: laws of the noise-side and the data-side draw; see `draw_times`.
        pinned_share: probability in [0, 1] that a row is pinned.
        pinned_steps: numbers of steps whose intervals are pinned, all intervals equally often. With (1, 1, 2) the interval of one step
            is pinned as often as the two intervals of two steps together.
        generator: source of randomness; its device is the result's.
        num_whole: number of rows, the first ones, that are (0, 1) for certain. The others are then pinned only at intervals of two and
            more steps, so often that `pinned_share` of all rows are pinned if num_whole is what `count_whole` says.

    Returns:
        r and t, each (num,), 0 <= r <= t <= 1.
    """
    device = generator.device
    if num_whole:
        others = [count for count in pinned_steps if count > 1]
        share = max(0, pinned_share * num - num_whole) / (num - num_whole) if others else 0
        r, t = draw_intervals(num - num_whole, t_law, r_law, share, others, generator)
        return torch.cat([torch.zeros(num_whole, device=device), r]), torch.cat([torch.ones(num_whole, device=device), t])
    a, b = draw_times(num, t_law, generator), draw_times(num, r_law, generator)
    r, t = torch.minimum(a, b), torch.maximum(a, b)
    coin = torch.rand(num, generator=generator, device=device)
    choice = torch.rand(num, generator=generator, device=device)
    if pinned_share > 0:
        intervals = torch.tensor(sampling_intervals(pinned_steps)).to(device, non_blocking=True)     # (K, 2)
        pinned = intervals[(choice * len(intervals)).long()]
        r = torch.where(coin < pinned_share, pinned[:, 0], r)
        t = torch.where(coin < pinned_share, pinned[:, 1], t)
    return r, t


def draw_lam(num: int, law: str, progress: float, generator: Generator) -> Tensor:
    """lam in (0, 1], float32 (num,), which splits an interval at s = (1 - lam) t + lam r; or the last leg's share if the teacher makes it.

    "uniform" is Algorithm 1's U(0, 1); "constant(c)" is c; "anneal(start, end, share)" falls geometrically from start to
    end over the first `share` of training and stays there.

    Args:
        progress: share of the training that is done, in [0, 1].
    """
    name, numbers = parse_law(law, LAM_LAWS)
    if name == "uniform":
        return 1 - torch.rand(num, generator=generator, device=generator.device)       # rand may be 0, and lam is divided by
    if name == "anneal":
        start, end, share = numbers
        value = start * (end / start) ** min(progress / share, 1.0)
    else:
        (value,) = numbers
    return torch.full((num,), value, device=generator.device)
