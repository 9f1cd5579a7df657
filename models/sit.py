"""The network of other projects' flow-matching teachers: the plain transformer of DiT (Peebles & Xie, arXiv 2212.09748) and
SiT (Ma et al., arXiv 2401.08740), whose weights `models.foreign` translates to our names.

Unlike `models.dit` it has LayerNorm, biases everywhere, a fixed sin-cos position table without rotation, and a full matrix for
each adaLN. It was written from the papers and from the shapes and order of published weights.

Such networks have their own convention of time. Everything outside this file uses ours (t = 0 is data, dz/dt points to the noise).
Only `SiT.forward` translates, by two values that are part of the architecture:

    time_direction   "data-at-one"     their time is 1 - t, their velocity is data - noise: ours negated   (SiT)
                     "noise-at-one"    their time is t, their velocity is noise - data: ours               (REPA, Stable Diffusion 3)
    time_scale       their time is multiplied by this before its sinusoid: 1 (SiT, REPA) or 1000 (Stable Diffusion 3)
"""

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.dit import Preset, modulate
from models.embeddings import NUM_FEATURES, TimeEmbedding
from models.transformer import Transformer

SIZES = {
    "S": Preset(depth=12, width=384, num_heads=6),
    "B": Preset(depth=12, width=768, num_heads=12),
    "L": Preset(depth=24, width=1024, num_heads=16),
    "XL": Preset(depth=28, width=1152, num_heads=16),
}
TIME_DIRECTIONS = ("data-at-one", "noise-at-one")
MAX_PERIOD = 10_000


def parse_preset(preset: str) -> tuple[Preset, int]:
    """Size and patch size of a name: "SiT-XL/2", or depth x width x heads as in "SiT-6x256x4/2".

    Raises:
        ValueError: no such name, or a width that the heads or the position table cannot share out.
    """
    match = re.fullmatch(r"SiT-(?:([A-Z]+)|([1-9]\d*)x([1-9]\d*)x([1-9]\d*))/([1-9]\d*)", preset)
    if match is None or (match[1] and match[1] not in SIZES):
        raise ValueError(f"unknown model {preset!r}; known are SiT-{', '.join(SIZES)} or depth x width x heads as in SiT-6x256x4, "
                         "followed by / and the patch size")
    size = SIZES[match[1]] if match[1] else Preset(*(int(match[i]) for i in (2, 3, 4)))
    if size.width % size.num_heads or size.width % 4:
        raise ValueError(f"model {preset!r}: the width must be divisible by 4 and by the number of heads")
    return size, int(match[5])


def preset_name(depth: int, width: int, num_heads: int, patch_size: int) -> str:
    """The name that `parse_preset` reads."""
    size = Preset(depth, width, num_heads)
    known = next((name for name, other in SIZES.items() if other == size), f"{depth}x{width}x{num_heads}")
    return f"SiT-{known}/{patch_size}"


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension, without gain: adaLN supplies it. Autocast computes it in float32; same dtype out."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6).to(x.dtype)


def position_table(grid_size: int, width: int) -> Tensor:
    """The fixed table of these networks, (1, grid_size ** 2, width): sines, then cosines, of the column in the first half of
    the channels and of the row in the second, with periods from 2 pi to 2 pi x 10000 patches."""
    frequency = MAX_PERIOD ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequency               # (G, D/4)
    features = torch.cat([angle.sin(), angle.cos()], dim=1)                                 # (G, D/2)
    columns = features[None].expand(grid_size, -1, -1)
    rows = features[:, None].expand(-1, grid_size, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)[None].float()


class ForeignTimeEmbedding(nn.Module):
    """Sinusoid of their time, with periods from 2 pi to 2 pi x 10000, followed by a two-layer MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.hidden = nn.Linear(NUM_FEATURES, width)
        self.out = nn.Linear(width, width)

    def forward(self, time: Tensor) -> Tensor:
        """time: (B,), in their direction and scale. Returns (B, width)."""
        half = NUM_FEATURES // 2
        index = torch.arange(half, device=time.device, dtype=torch.float32)
        frequency = torch.exp(index * -math.log(MAX_PERIOD) / half)
        angle = time.float()[:, None] * frequency                                           # (B, F/2), float32
        features = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.hidden.weight.dtype)
        return self.out(F.silu(self.hidden(features)))


class Attention(nn.Module):
    """Multi-head self-attention over all patches."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, D). Returns (B, T, D)."""
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.hidden = nn.Linear(width, 4 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.hidden(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each with adaLN-Zero from the condition's full matrix."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.attention = Attention(width, num_heads)
        self.mlp = MLP(width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x: (B, T, D); c: condition (B, D). Returns (B, T, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attention(modulate(layer_norm(x), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(layer_norm(x), shift_m, scale_m))


class Final(nn.Module):
    """Last adaLN, and from each patch's channels to its pixels."""

    def __init__(self, width: int, num_outputs: int):
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, num_outputs)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x: (B, T, D); c: condition (B, D). Returns (B, T, num_outputs)."""
        return self.out(modulate(layer_norm(x), *self.modulation(c).chunk(2, dim=1)))


class SiT(Transformer):
    """Average velocity u(z, r, t, y) of a student, or velocity v(z, t, y) of a teacher, in our convention; see `models.dit.DiT`.

    Args:
        preset: name such as "SiT-XL/2", or "SiT-6x256x4/2" (depth x width x heads) for other sizes. Then the patch size.
        image_size: side of the square images or latents, divisible by the patch size.
        num_channels: their channels.
        num_classes: number of classes; 0 for an unconditional network. Label `num_classes` (`null_class`) means "no class".
        interval: a student's network, which sees the interval t - r. A teacher's (False) has no such input and is only
            ever called at r = t.
        time_direction, time_scale: how the weights count time; see the top of this file.
        extra_blocks, input_skip, guidance_range, guidance_scale: as of `models.dit.DiT`.

    Raises:
        ValueError: an unknown preset or direction, a size that the patch does not divide, or a count or scale out of range.
    """

    def __init__(self, preset: str, image_size: int, num_channels: int, num_classes: int, interval: bool = False,
                 time_direction: str = "data-at-one", time_scale: float = 1.0, extra_blocks: int = 0, input_skip: bool = False,
                 guidance_range: Sequence[float] | None = None, guidance_scale: float = 1.0):
        super().__init__()
        size, patch_size = parse_preset(preset)
        if image_size <= 0 or image_size % patch_size:
            raise ValueError(f"image size {image_size} is not divisible by the patch size {patch_size} of {preset}")
        if num_channels < 1 or num_classes < 0:
            raise ValueError(f"num_channels must be at least 1 and num_classes at least 0, not {num_channels} and {num_classes}")
        if time_direction not in TIME_DIRECTIONS:
            raise ValueError(f"unknown time direction {time_direction!r}; known are {', '.join(TIME_DIRECTIONS)}")
        if not 0 < time_scale < math.inf:
            raise ValueError(f"the time scale must be above 0, not {time_scale}")
        self.architecture = dict(network="SiT", preset=preset, image_size=image_size, num_channels=num_channels,
                                 num_classes=num_classes, interval=interval, time_direction=time_direction, time_scale=time_scale)
        self.patch_size, self.grid_size = patch_size, image_size // patch_size
        self.null_class = num_classes
        self.data_at_one, self.time_scale = time_direction == "data-at-one", time_scale

        from timm.layers import PatchEmbed  # slow to import

        self.patch_embed = PatchEmbed(image_size, patch_size, num_channels, size.width)
        self.register_buffer("position", position_table(self.grid_size, size.width))        # saved with the weights, never trained
        self.time_embed = ForeignTimeEmbedding(size.width)
        self.interval_embed = TimeEmbedding(size.width) if interval else None
        self.label_embed = nn.Embedding(num_classes + 1, size.width)
        self.add_student_parts(extra_blocks, input_skip, size.width, num_channels)
        self.hear_guidance(guidance_range, guidance_scale, size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.num_heads) for _ in range(size.depth + extra_blocks))
        self.final = Final(size.width, patch_size**2 * num_channels)
        self.init_weights()

    def init_weights(self) -> None:
        """All initial weights, in one place; they matter for what a student adds, the rest is loaded."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.normal_(self.label_embed.weight, std=0.02)
        for layer in (*(block.modulation for block in self.blocks), self.final.modulation, self.final.out):
            nn.init.zeros_(layer.weight)
        # Interval and guidance start unseen, so that a student made from a teacher is the teacher: u(z, r, t, y) = v(z, t, y).
        for embed in (self.interval_embed, self.guidance_embed):
            if embed is not None:
                nn.init.zeros_(embed.out.weight)
        if self.input_skip is not None:
            nn.init.zeros_(self.input_skip.share.weight)

    def forward(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor, guidance_scale: Tensor | None = None) -> Tensor:
        """Average velocity over [r, t] of the trajectory that is at z at time t; z_r = z - (t - r) u.

        Arguments and result as in `models.dit.DiT.forward`: our times and our velocity, whatever the weights were trained with.
        """
        time = 1 - t if self.data_at_one else t
        c = self.condition(self.time_scale * time, t - r, y, self.told_guidance(guidance_scale, t))
        theirs = self.foreign_velocity(z, c)
        u = -theirs if self.data_at_one else theirs
        return u if self.input_skip is None else u + self.input_skip(z, c)

    def condition(self, time: Tensor, interval: Tensor, y: Tensor, guidance: Tensor | None = None) -> Tensor:
        """What each block is told besides, (B, D). `time` (B,) is theirs; ours are `interval`, t - r (B,), and `guidance`, embedded (B, D),
        if there is any."""
        c = self.time_embed(time) + self.label_embed(y)
        if self.interval_embed is not None:
            c = c + self.interval_embed(interval)
        if guidance is not None:
            c = c + guidance
        return F.silu(c)

    def foreign_velocity(self, z: Tensor, c: Tensor) -> Tensor:
        """What the weights themselves compute, by their convention: z (B, C, H, W) and the condition c (B, D) to (B, C, H, W)."""
        x = self.patch_embed(z).contiguous()                # channels last: the whole residual stream inherits this layout
        x = x + self.position.to(x.dtype)                                           # (B, T, D)
        x = self.through_blocks(x, c)
        x = self.final(x, c)                                                        # (B, T, p * p * C)
        x = x.unflatten(2, (self.patch_size, self.patch_size, -1)).unflatten(1, (self.grid_size, self.grid_size))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3).float()      # (B, G, G, p, p, C) to (B, C, H, W)
