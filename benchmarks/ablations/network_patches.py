"""Variants of the network, of a teacher's training, and of what both stages share, that the scripts have no flag for; see `patches`."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ablations.changes import TEACHERS, change
from models import dit


def activation(function: Callable[[Tensor], Tensor]) -> None:
    """Another activation in place of the squared ReLU."""
    change([dit.MLP], "forward", lambda self, x: self.out(function(self.hidden(x))))


def dropout(rate: float) -> None:
    """Dropout of the MLP's hidden values while training; the EMA, which is sampled, has none."""
    def forward(self: dit.MLP, x: Tensor) -> Tensor:
        return self.out(F.dropout(dit.squared_relu(self.hidden(x)), rate, self.training))

    change([dit.MLP], "forward", forward)


def shifted(x: Tensor) -> Tensor:
    """An eighth of the channels moved by one patch up, one down, left and right; zeros come in. x: (B, T, D), T a square."""
    side, part = math.isqrt(x.shape[1]), x.shape[2] // 8
    up, down, left, right, rest = x.unflatten(1, (side, side)).split([part] * 4 + [x.shape[2] - 4 * part], dim=-1)
    moved = [F.pad(up[:, 1:], (0, 0, 0, 0, 0, 1)), F.pad(down[:, :-1], (0, 0, 0, 0, 1, 0)),
             F.pad(left[:, :, 1:], (0, 0, 0, 1)), F.pad(right[:, :, :-1], (0, 0, 1, 0))]
    return torch.cat([*moved, rest], dim=-1).flatten(1, 2)


def shift() -> None:
    """Each MLP sees some channels of the four patches around it (S2-MLP, arXiv 2106.07477)."""
    forward = dit.MLP.forward
    change([dit.MLP], "forward", lambda self, x: forward(self, shifted(x)))


def presets(new: Callable[[dit.Preset], dit.Preset]) -> None:
    """Each size of network as `new` makes it from what it was."""
    change([dit], "PRESETS", {name: (new(preset), patch_size) for name, (preset, patch_size) in dit.PRESETS.items()})


def head_size(size: int) -> None:
    """Fewer, larger attention heads, where the width allows."""
    presets(lambda preset: replace(preset, num_heads=preset.width // size) if preset.width % size == 0 else preset)


def depth(factor: float) -> None:
    """So many times as many blocks."""
    presets(lambda preset: replace(preset, depth=round(factor * preset.depth)))


class ParallelBlock(nn.Module):
    """Attention and MLP side by side, behind one norm: two large products where there were four (ViT-22B, arXiv 2302.05442)."""

    def __init__(self, width: int, num_heads: int, modulation_rank: int):
        super().__init__()
        self.num_heads = num_heads
        self.attention = nn.ModuleDict({"into": nn.Linear(width, 7 * width, bias=False), "out": nn.Linear(5 * width, width, bias=False)})
        self.modulation = dit.Modulation(width, 3, modulation_rank)

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(c)
        width = x.shape[-1]
        q, k, v, hidden = self.attention["into"](dit.modulate(dit.rms_norm(x), shift, scale)).split([width] * 3 + [4 * width], dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in (q, k, v))
        q, k = dit.rotate(dit.rms_norm(q), cos, sin), dit.rotate(dit.rms_norm(k), cos, sin)
        seen = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2).flatten(2)
        return x + gate[:, None] * self.attention["out"](torch.cat([seen, dit.squared_relu(hidden)], dim=-1))


def compile_blocks() -> None:
    """Each block is a graph of its own."""
    compile_several = dit.DiT.compile_blocks
    change([dit.DiT], "compile_blocks", lambda self: compile_several(self, at_once=1))


class Keep(nn.Module):
    """A block of the first half, whose output a block of the second half will see."""

    def __init__(self, block: nn.Module, kept: list[Tensor]):
        super().__init__()
        self.block, self.kept = block, kept

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        x = self.block(x, *rest)
        self.kept.append(x)
        return x

    def compile(self, **options: Any) -> None:
        self.block.compile(**options)


class Join(nn.Module):
    """A block of the second half, and the linear layer that brings the kept output in. It starts by ignoring it."""

    def __init__(self, block: nn.Module, width: int, kept: list[Tensor]):
        super().__init__()
        self.block, self.kept = block, kept
        self.join = nn.Linear(2 * width, width)
        with torch.no_grad():
            self.join.weight.copy_(torch.cat([torch.eye(width), torch.zeros(width, width)], dim=1))
            self.join.bias.zero_()

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return self.block(self.join(torch.cat([x, self.kept.pop()], dim=-1)), *rest)

    def compile(self, **options: Any) -> None:
        self.block.compile(**options)


def long_skips() -> None:
    """The last block sees the first one's output, the one before it the second's, and so on (U-ViT, arXiv 2209.12152)."""
    make = dit.DiT.__init__

    @wraps(make)
    def with_skips(self: dit.DiT, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        kept: list[Tensor] = []
        half, width = len(self.blocks) // 2, self.position.shape[-1]
        self.blocks = nn.ModuleList([Keep(block, kept) if i < half else Join(block, width, kept)
                                     for i, block in enumerate(self.blocks)][: 2 * half])

    change([dit.DiT], "__init__", with_skips)
    compile_blocks()                                        # what Keep keeps would be lost inside a graph of several


def ema_ramp(gamma: float) -> None:
    """A teacher's average reaches back over about 1 / (gamma + 1) of the updates so far; the scripts' gamma is 9.

    Up to --ema-decay, which it reaches after 2,000 gamma updates.
    """
    change(TEACHERS, "ModelEmaV3", lambda *args, **options: ModelEmaV3(*args, **{**options, "warmup_gamma": gamma}))
