"""Grids, GIFs and curves."""

from pathlib import Path
from types import ModuleType
from typing import Any

import imageio.v3 as imageio
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from utils.config import written
from utils.data import to_pixels
from utils.json_lines import read_lines


def sample_labels(num_classes: int, rows: int = 10, columns: int = 10) -> Tensor:
    """Labels (rows * columns,) of a grid: one class a row, the first `rows` classes; all "no class" without classes."""
    if num_classes == 0:
        return torch.zeros(rows * columns, dtype=torch.long)
    return torch.arange(min(num_classes, rows)).repeat_interleave(columns)


def grid(x: Tensor, columns: int = 10, tile: int = 48, largest: int | None = None) -> Tensor:
    """Images (B, C, H, W) near [-1, 1] as one picture, uint8 (H', W', 3); those below `tile` pixels are enlarged pixel by pixel,
    those above `largest` reduced to it."""
    if largest is not None and x.shape[-1] > largest:
        x = F.interpolate(x.float(), largest, mode="area")
    columns, factor = min(columns, len(x)), max(1, -(-tile // x.shape[-1]))
    gap = max(1, x.shape[-1] // 16) if len(x) > 1 else 0
    tiles = F.pad(to_pixels(x).cpu(), (gap, 0, gap, 0), value=255)           # the gap above and to the left of each image
    blank = tiles.new_full((-len(x) % columns, *tiles.shape[1:]), 255)
    pixels = rearrange(torch.cat([tiles, blank]), "(row column) c h w -> (row h) (column w) c", column=columns)
    pixels = F.pad(pixels, (0, 0, 0, gap, 0, gap), value=255).expand(-1, -1, 3)
    return pixels.repeat_interleave(factor, 0).repeat_interleave(factor, 1)


def save_image(path: Path, pixels: Tensor) -> None:
    """Write uint8 pixels (H, W, 3) or (H, W) as PNG."""
    with written(path) as file:
        imageio.imwrite(file, pixels.numpy())


def save_grid(path: Path, x: Tensor, columns: int = 10) -> None:
    """Write a grid of images (B, C, H, W) near [-1, 1] as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(path, grid(x, columns))


def save_gif(path: Path, trajectory: Tensor, columns: int = 10, seconds: float = 2.5) -> None:
    """Write states (num_steps + 1, B, C, H, W), noise first, as a looping GIF that rests on the last frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [grid(x, columns, tile=24, largest=64).numpy() for x in trajectory]      # small: noise does not compress
    durations = [1000 * seconds / len(frames)] * (len(frames) - 1) + [1500]
    with written(path) as file:
        imageio.imwrite(file, frames, duration=durations, loop=0)


def pyplot() -> ModuleType:
    """matplotlib.pyplot without a display. Slow to import: only when there is something to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def log_scale(axis: Any) -> None:
    """Makes the vertical axis of a drawn matplotlib plot logarithmic, with plain numbers, whether it spans decades or less than one."""
    from matplotlib.ticker import AutoLocator, LogLocator

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    subs = (1, 1.5, 2, 3, 4, 5, 7) if high < 10 * low else (1, 2, 5) if high < 1000 * low else (1,)
    axis.yaxis.set_major_locator(AutoLocator() if high < 3 * low else LogLocator(subs=subs))
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:,.10g}")


def save_curves(path: Path, folder: Path) -> None:
    """Plot a run folder's metrics.jsonl: losses, gradient norm (both logarithmic), learning rate, images/s against the step;
    and evaluations.jsonl, if there were any: Frechet distances and accuracies."""
    rows, evaluations = read_lines(folder / "metrics.jsonl"), read_lines(folder / "evaluations.jsonl")
    if not rows:
        return
    others = ("grad_norm", "learning_rate", "images_per_second")
    losses = [key for key in rows[0] if key not in (*others, "step", "seconds", "memory_gib")]
    panels = [(rows, losses), *((rows, [key]) for key in others)]
    for prefix in ("fd", "accuracy"):
        panels += [(evaluations, keys)] if evaluations and (keys := [key for key in evaluations[0] if key.startswith(prefix)]) else []
    plt = pyplot()
    num_rows = -(-len(panels) // 2)
    height = 3.25 * num_rows                    # inches, as the margins; a layout that matplotlib looks for takes three times as long
    margins = dict(left=0.07, right=0.985, bottom=0.5 / height, top=1 - 0.35 / height, wspace=0.17, hspace=0.35)
    figure, axes = plt.subplots(num_rows, 2, figsize=(10, height), gridspec_kw=margins)
    for axis, (lines, keys) in zip(axes.flat, panels):
        for key in keys:
            axis.plot([line["step"] for line in lines], [line[key] for line in lines], label=key, linewidth=1)
        axis.set(xlabel="step", title=", ".join(keys))
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            axis.legend()
    for axis in axes.flat[:2]:
        log_scale(axis)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    with written(path) as file:
        figure.savefig(file, dpi=110)
    plt.close(figure)
