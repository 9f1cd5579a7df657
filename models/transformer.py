"""What the networks here share: a row of blocks of one kind, a velocity that is the average over an empty interval, and a guidance scale
that a student may take as an input."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from models.embeddings import OF_GUIDANCE, TimeEmbedding
from models.hub import HubModel

FUSED_ON = [(9, 0)]                                         # compute capabilities that our own kernels were made for: Hopper


class Stack(nn.Module):
    """Several blocks in a row, which torch.compile sees as one graph."""

    def __init__(self, blocks: Sequence[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, *condition)
        return x


class InputSkip(nn.Module):
    """What is added to a student's output: a share of each channel of its input. The condition chooses the shares, which are 0 at first.

    One step subtracts nearly all of its input, white noise, and a hundredth of it left over shows. Without this path the blocks must
    carry every value. (c_skip of Karras et al., arXiv 2206.00364, learned.)
    """

    def __init__(self, width: int, num_channels: int):
        super().__init__()
        self.share = nn.Linear(width, num_channels)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """z: input (B, C, H, W); c: condition (B, D). Returns (B, C, H, W), computed outside autocast."""
        with torch.autocast(z.device.type, enabled=False):
            return self.share(c.to(self.share.weight.dtype))[:, :, None, None] * z


class Transformer(nn.Module, HubModel):
    """A network u(z, r, t, y) whose work is done by `blocks`, all of one kind, and a `final` layer."""

    architecture: dict[str, Any]                            # what a checkpoint's metadata says of it: the constructor's arguments
    blocks: nn.ModuleList
    final: nn.Module
    stacks: Sequence[nn.Module] = ()                        # the same blocks, once they are compiled
    guidance_range: tuple[float, float] | None = None       # of a student that is told its guidance; None for others

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of its images, or latents: (C, H, H)."""
        return self.architecture["num_channels"], *[self.architecture["image_size"]] * 2

    def through_blocks(self, x: Tensor, *condition: Tensor) -> Tensor:
        """x: (B, T, D); condition: the other arguments of each block. Returns (B, T, D)."""
        for part in self.stacks or self.blocks:
            x = part(x, *condition)
        return x

    @property
    def layers(self) -> list[nn.Module]:
        """The layers that do nearly all of the work; each is split among processes by itself."""
        return [*self.blocks, self.final]

    def compile_blocks(self, at_once: int = 4) -> None:
        """torch.compile the layers, `at_once` blocks as one graph that the other blocks share: twelve compile as fast as four.

        Blocks compiled one by one start sooner; together, the end of one and the start of the next become one kernel. Blocks that
        are split among processes are compiled one by one, because gathering their weights ends a graph.
        """
        from torch.distributed.fsdp import FSDPModule  # slow to import, and sampling needs none

        if isinstance(self.blocks[0], FSDPModule):
            at_once = 1
        if torch.cuda.is_available() and torch.cuda.get_device_capability() in FUSED_ON:
            from models.fused import fuse  # needs Triton

            fuse(self)
        # The gradients of our functions are traced with the rest of a graph, so that the next start may find both in the cache.
        functorch_config.autograd_cache_allow_custom_autograd_functions = True
        self.stacks = [Stack(self.blocks[i : i + at_once]) for i in range(0, len(self.blocks), at_once)]
        for part in (*self.stacks, self.final):
            part.compile(dynamic=False)

    def add_student_parts(self, extra_blocks: int, input_skip: bool, width: int, num_channels: int) -> None:
        """Make a student's `InputSkip`, if it has one, and check its extra blocks; both are added to the architecture. For constructors,
        which make the blocks.

        Raises:
            ValueError: a negative number of blocks, or a teacher's network.
        """
        if extra_blocks < 0:
            raise ValueError(f"extra_blocks must be at least 0, not {extra_blocks}")
        if (extra_blocks or input_skip) and self.interval_embed is None:
            raise ValueError(f"extra_blocks {extra_blocks}, input_skip {input_skip}: only a student's network (interval=True) has them")
        self.input_skip = InputSkip(width, num_channels) if input_skip else None
        self.architecture |= {**({"extra_blocks": extra_blocks} if extra_blocks else {}), **({"input_skip": True} if input_skip else {})}

    def spread_blocks(self, weights: Mapping[str, Tensor], depth: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Spread the weights of a network of `depth` such blocks, no more than here, over this one: evenly, in their order.

        Returns:
            The weights by their names here, and the prefixes of the names of the blocks in between, which get none.
        """
        places = [-(-(i + 1) * len(self.blocks) // depth) - 1 for i in range(depth)]        # of 3 for 2: the second and third
        renamed = {}
        for name, weight in weights.items():
            if name.startswith("blocks."):
                _, index, rest = name.split(".", 2)
                name = f"blocks.{places[int(index)]}.{rest}"
            renamed[name] = weight
        return renamed, tuple(f"blocks.{i}." for i in range(len(self.blocks)) if i not in places)

    def hear_guidance(self, guidance_range: Sequence[float] | None, guidance_scale: float, width: int) -> None:
        """Give a student an input for its guidance scale, if there is a range to choose from; both are added to the architecture. For
        constructors.

        Args:
            guidance_range: lowest and highest scale, at least 1. guidance_scale: the default.

        Raises:
            ValueError: an invalid range, or a scale outside it.
        """
        self.guidance_embed = None
        if guidance_range is None:
            return
        low, high = guidance_range
        if not 1 <= low <= guidance_scale <= high < math.inf or low == high:
            raise ValueError(f"guidance range {low} to {high} with scale {guidance_scale}: needs 1 <= low <= scale <= high, and low < high")
        self.guidance_range, self.guidance_scale = (low, high), guidance_scale
        self.guidance_embed = TimeEmbedding(width, highest_frequency=OF_GUIDANCE)
        self.architecture |= {"guidance_range": [low, high], "guidance_scale": guidance_scale}

    def told_guidance(self, guidance_scale: Tensor | None, t: Tensor) -> Tensor | None:
        """What to add to a condition, (B, D), if anything. guidance_scale: of each row, (B,), or None for the default; t: (B,).

        What is embedded is 1 / w, which lies in (0, 1] as times do.

        Raises:
            ValueError: a scale is given to a network that takes none.
        """
        if self.guidance_embed is None:
            if guidance_scale is not None:
                raise ValueError("this network is not told a guidance scale: a student's is inside, a teacher is guided from outside")
            return None
        return self.guidance_embed(1 / (torch.full_like(t, self.guidance_scale) if guidance_scale is None else guidance_scale))

    def at_guidance(self, guidance_scale: float | None) -> nn.Module:
        """A student's u(z, r, t, y) at one guidance scale; None: at its own.

        Raises:
            ValueError: the student has not learned this scale.
        """
        if guidance_scale is None:
            return self
        if self.guidance_range is None:
            raise ValueError(f"guidance scale {guidance_scale}: this student has its guidance inside, of one scale; none can be chosen")
        low, high = self.guidance_range
        if not low <= guidance_scale <= high:
            raise ValueError(f"guidance scale {guidance_scale}: this student learned {low:g} to {high:g}")
        return AtGuidance(self, guidance_scale)

    def velocity(self, z: Tensor, t: Tensor, y: Tensor, **told: Tensor) -> Tensor:
        """Instantaneous velocity v(z, t, y), which is u(z, t, t, y) by definition. Shapes and further arguments as in `forward`."""
        return self(z, t, t, y, **told)


class AtGuidance(nn.Module):
    """A student's u(z, r, t, y) at one of the guidance scales that it learned."""

    def __init__(self, network: Transformer, guidance_scale: float):
        super().__init__()
        self.network, self.guidance_scale = network, guidance_scale

    def forward(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.network(z, r, t, y, guidance_scale=torch.full_like(t, self.guidance_scale))
