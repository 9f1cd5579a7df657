"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598). A teacher is trained with labels dropped. Its guided velocity
is the student's target, so the student needs no guidance when it samples: it learns one scale, or takes the scale as an input."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from utils.flow import pad_like

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]       # v(z, t, y)


def guidance_in_words(config: Mapping[str, Any]) -> str:
    """The guidance that a student learned, from its config: "1.3", "2 at times 0.2 to 0.8", or "2 (or any from 1.5 to 3)"."""
    (low, high), scales = config["guidance_interval"], config.get("guidance_range")
    return (f"{config['guidance_scale']:g}" + (" (or any from {:g} to {:g})".format(*scales) if scales else "")
            + (f" at times {low:g} to {high:g}" if (low, high) != (0, 1) else ""))


def drop_labels(y: Tensor, null_class: int, rate: float, coin: Tensor) -> Tensor:
    """Replace each label by `null_class` where its own coin, uniform in [0, 1), falls below `rate`. All (B,); y long."""
    return torch.where(coin < rate, null_class, y)


def guided_velocity(v: Velocity, null_class: int, guidance_scale: float | Tensor,
                    interval: tuple[float, float] = (0.0, 1.0)) -> Velocity:
    """Wrap a velocity v(z, t, y) into v_null + w (v_y - v_null).

    Args:
        v: conditional velocity; the label `null_class` asks for the unconditional one.
        guidance_scale: w; 1 means no guidance and costs one evaluation instead of two. A tensor (B,) has one for each row.
        interval: times [low, high] at which guidance acts (Kynkaanniemi et al., arXiv 2404.07724); elsewhere w = 1.

    Returns:
        A velocity of the same signature: z (B, ...), t (B,), y (B,) to (B, ...).
    """
    if not isinstance(guidance_scale, Tensor) and guidance_scale == 1:
        return v
    low, high = interval

    def guided(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        v_y, v_null = v(z, t, y), v(z, t, torch.full_like(y, null_class))
        w = 1 + (guidance_scale - 1) * ((t >= low) & (t <= high)).to(z.dtype)
        return torch.lerp(v_null, v_y, pad_like(w, z))

    return guided


@dataclass(frozen=True)
class GuidedLabels:
    """Labels y, (B,) long, with the guidance scale of each row, (B,). A loss may be given these in place of labels."""

    y: Tensor
    guidance_scale: Tensor

    def __getitem__(self, rows: slice) -> Self:
        return type(self)(self.y[rows], self.guidance_scale[rows])


def told(u: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor, GuidedLabels], Tensor]:
    """A student u(z, r, t, y, guidance_scale=...) as a function of guided labels."""
    return lambda z, r, t, labels: u(z, r, t, labels.y, guidance_scale=labels.guidance_scale)


def guided_as_told(v: Velocity, null_class: int, interval: tuple[float, float]) -> Callable[[Tensor, Tensor, GuidedLabels], Tensor]:
    """`guided_velocity` at the scale that comes with each row's label."""
    return lambda z, t, labels: guided_velocity(v, null_class, labels.guidance_scale, interval)(z, t, labels.y)
