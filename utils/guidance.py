"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598). A teacher learns with labels dropped; its guided velocity
is the student's target, and the student itself samples without guidance."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from utils.flow import pad_like

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]       # v(z, t, y)


def guidance_in_words(config: Mapping[str, Any]) -> str:
    """The guidance that a student learned, from its config: "1.3", or "2 at times 0.2 to 0.8"."""
    low, high = config["guidance_interval"]
    return f"{config['guidance_scale']:g}" + (f" at times {low:g} to {high:g}" if (low, high) != (0, 1) else "")


def drop_labels(y: Tensor, null_class: int, rate: float, coin: Tensor) -> Tensor:
    """Replace each label by `null_class` where its own coin, uniform in [0, 1), falls below `rate`. All (B,); y long."""
    return torch.where(coin < rate, null_class, y)


def guided_velocity(v: Velocity, null_class: int, guidance_scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> Velocity:
    """Wrap a velocity v(z, t, y) into v_null + w (v_y - v_null).

    Args:
        v: conditional velocity; the label `null_class` asks for the unconditional one.
        guidance_scale: w; 1 is no guidance and costs one evaluation instead of two.
        interval: times [low, high] at which guidance acts (Kynkaanniemi et al., arXiv 2404.07724); elsewhere w = 1.

    Returns:
        A velocity of the same signature: z (B, ...), t (B,), y (B,) to (B, ...).
    """
    if guidance_scale == 1:
        return v
    low, high = interval

    def guided(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        v_y, v_null = v(z, t, y), v(z, t, torch.full_like(y, null_class))
        w = 1 + (guidance_scale - 1) * ((t >= low) & (t <= high)).to(z.dtype)
        return torch.lerp(v_null, v_y, pad_like(w, z))

    return guided
