"""What the networks here have in common: like blocks in a row, and a velocity that is the average over an empty interval."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from models.hub import HubModel

FUSED_ON = [(9, 0)]                                         # compute capabilities that our own kernels were made for: Hopper


class Stack(nn.Module):
    """Some blocks in a row, which torch.compile sees as one graph."""

    def __init__(self, blocks: Sequence[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, *condition)
        return x


class Transformer(nn.Module, HubModel):
    """A network u(z, r, t, y) whose work is done by `blocks`, alike, and a `final` layer."""

    blocks: nn.ModuleList
    final: nn.Module
    stacks: Sequence[nn.Module] = ()                        # the same blocks, once they are compiled

    def through_blocks(self, x: Tensor, *condition: Tensor) -> Tensor:
        """x: (B, T, D); condition: what each block is given besides. Returns (B, T, D)."""
        for part in self.stacks or self.blocks:
            x = part(x, *condition)
        return x

    @property
    def layers(self) -> list[nn.Module]:
        """Nearly all of the work, in pieces that are split among processes one by one."""
        return [*self.blocks, self.final]

    def compile_blocks(self, at_once: int = 4) -> None:
        """torch.compile the layers, `at_once` blocks as one graph, which the others share: twelve compile as fast as four.

        One by one they start sooner; together the end of a block and the start of the next become one kernel. Blocks that
        are split among processes are compiled one by one, because the gathering of each one's weights ends a graph.
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

    def velocity(self, z: Tensor, t: Tensor, y: Tensor, **told: Tensor) -> Tensor:
        """Instantaneous velocity v(z, t, y), which is u(z, t, t, y) by definition. Shapes, and what else may be told, as in `forward`."""
        return self(z, t, t, y, **told)
