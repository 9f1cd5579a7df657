"""The network: one diffusion transformer for teacher and student.

The layout follows DiT (Peebles & Xie, arXiv 2212.09748: adaLN-Zero blocks), with RMSNorm, normalised queries and keys,
axial rotary embedding beside a learned position table, and a low-rank adaLN (see `Modulation`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from models.embeddings import TimeEmbedding, rotary_table, rotate
from models.transformer import Transformer


@dataclass(frozen=True)
class Preset:
    depth: int
    width: int
    num_heads: int


# S to XL are DiT's sizes; Ti and Nano are ours, for MNIST and for a CPU.
PRESETS = {
    f"DiT-{size}/{patch_size}": (preset, patch_size)
    for size, preset in {
        "Nano": Preset(depth=4, width=128, num_heads=4),
        "Ti": Preset(depth=8, width=192, num_heads=3),
        "S": Preset(depth=12, width=384, num_heads=6),
        "B": Preset(depth=12, width=768, num_heads=12),
        "L": Preset(depth=24, width=1024, num_heads=16),
        "XL": Preset(depth=28, width=1152, num_heads=16),
    }.items()
    for patch_size in (2, 4, 8)
}


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without gain: adaLN supplies the scale. Autocast computes it in float32; returns x's dtype."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift x (B, T, D); shift and scale: (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Modulation(nn.Module):
    """adaLN: shifts, scales and gates from the condition, through a bottleneck of `rank` channels.

    DiT's full matrix (width x 6 width in each block) holds a third of all parameters. With rank = width / 8 the bottleneck
    holds a fourteenth.
    """

    def __init__(self, width: int, num_outputs: int, rank: int):
        super().__init__()
        self.num_outputs = num_outputs
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, num_outputs * width)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        """c: (B, D). Returns num_outputs tensors (B, D)."""
        return self.up(self.down(c)).chunk(self.num_outputs, dim=1)


def normalised_heads(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, RMS-normalised and then rotated, and values of each head, (B, heads, T, hd), from qkv (B, T, 3 D)."""
    q, k, v = (rearrange(part, "b t (h d) -> b t h d", h=num_heads) for part in qkv.chunk(3, dim=-1))
    q, k = rotate(rms_norm(q), cos, sin), rotate(rms_norm(k), cos, sin)             # (B, T, heads, hd)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def attend(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Attention of all heads. qkv: (B, T, 3 D); cos, sin: (T, hd/2). Returns (B, T, D)."""
    return rearrange(F.scaled_dot_product_attention(*normalised_heads(qkv, cos, sin, num_heads)), "b h t d -> b t (h d)")


class Attention(nn.Module):
    """Multi-head self-attention over all patches."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.attend = attend                                # or the same by a kernel of ours, see `models.fused`

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (B, T, D); cos, sin: (T, hd/2). Returns (B, T, D)."""
        return self.out(self.attend(self.qkv(x), cos, sin, self.num_heads))


class SquaredReLU(torch.autograd.Function):
    """relu(x)^2, any shape, whose derivative 2 relu(x) is computed from the result instead of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = F.relu(x)
        x = x * x                                           # autocast would compute `square`, and keep it, in float32
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0].sqrt()


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2, any shape (So et al., arXiv 2109.08668).

    The linear layer after it keeps the result for its own backward pass. When compiled, the input, a fifth of a block's activations,
    need not be kept too. Without compilation the plain product also has the forward derivatives of a JVP.
    """
    if torch.compiler.is_dynamo_compiling():
        return SquaredReLU.apply(x)
    x = F.relu(x)
    return x * x


def two_products(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """relu(x W_in^T)^2 W_out^T: x (..., D), w_in (H, D), w_out (D, H) to (..., D)."""
    return F.linear(squared_relu(F.linear(x, w_in)), w_out)


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.hidden = nn.Linear(width, 4 * width, bias=False)
        self.out = nn.Linear(4 * width, width, bias=False)
        self.two_products = two_products                    # or the same by kernels of ours, see `models.fused`

    def forward(self, x: Tensor) -> Tensor:
        return self.two_products(x, self.hidden.weight, self.out.weight)


class Block(nn.Module):
    """Attention and MLP, each with adaLN-Zero: the gates are closed at first, so the block starts as the identity."""

    def __init__(self, width: int, num_heads: int, modulation_rank: int):
        super().__init__()
        self.attention = Attention(width, num_heads)
        self.mlp = MLP(width)
        self.modulation = Modulation(width, 6, modulation_rank)

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (B, T, D); c: condition (B, D). Returns (B, T, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c)
        x = x + gate_a[:, None] * self.attention(modulate(rms_norm(x), shift_a, scale_a), cos, sin)
        return x + gate_m[:, None] * self.mlp(modulate(rms_norm(x), shift_m, scale_m))


class Final(nn.Module):
    """The last adaLN, and a linear layer from each patch's channels to its pixels."""

    def __init__(self, width: int, num_outputs: int, modulation_rank: int):
        super().__init__()
        self.modulation = Modulation(width, 2, modulation_rank)
        self.out = nn.Linear(width, num_outputs)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x: (B, T, D); c: condition (B, D). Returns (B, T, num_outputs)."""
        return self.out(modulate(rms_norm(x), *self.modulation(c)))


class DiT(Transformer):
    """Average velocity u(z, r, t, y) of a student, or velocity v(z, t, y) of a teacher.

    Args:
        preset: name such as "DiT-S/2"; see `PRESETS`. The number after the slash is the patch size.
        image_size: side of the square images, divisible by the patch size.
        num_channels: channels of the images.
        num_classes: number of classes; 0 for an unconditional network. Label `num_classes` (`null_class`) means "no class".
        interval: True for a student, which has the interval t - r as an input. A teacher (False) has no such input
            and is only called at r = t.
        modulation_rank: rank of adaLN; None for width / 8.
        augment_dim: of a teacher, how many numbers say what was done to a training image; see `utils.augmentation`. 0 for none.
        extra_blocks: blocks that a student has beyond its teacher's preset; see `models.student_from_teacher`.
        input_skip: whether a share of a student's input is added to its output; see `models.transformer.InputSkip`.
        guidance_range: lowest and highest guidance scale of a student that takes it as an input; None for a single scale.
        guidance_scale: default scale of such a student.

    Raises:
        ValueError: an unknown preset, a size that the patch does not divide, a negative count, or a guidance scale out of its range.
    """

    def __init__(self, preset: str, image_size: int, num_channels: int, num_classes: int, interval: bool = False,
                 modulation_rank: int | None = None, augment_dim: int = 0, extra_blocks: int = 0, input_skip: bool = False,
                 guidance_range: Sequence[float] | None = None, guidance_scale: float = 1.0):
        super().__init__()
        if preset not in PRESETS:
            raise ValueError(f"unknown model {preset!r}; known are {', '.join(PRESETS)}")
        size, patch_size = PRESETS[preset]
        if image_size <= 0 or image_size % patch_size:
            raise ValueError(f"image size {image_size} is not divisible by the patch size {patch_size} of {preset}")
        if num_channels < 1 or num_classes < 0:
            raise ValueError(f"num_channels must be at least 1 and num_classes at least 0, not {num_channels} and {num_classes}")
        rank = size.width // 8 if modulation_rank is None else modulation_rank
        self.architecture = dict(preset=preset, image_size=image_size, num_channels=num_channels, num_classes=num_classes,
                                 interval=interval, modulation_rank=rank, **({"augment_dim": augment_dim} if augment_dim else {}))
        self.patch_size, self.grid_size = patch_size, image_size // patch_size
        self.null_class = num_classes

        self.patch_embed = nn.Linear(patch_size**2 * num_channels, size.width, bias=False)
        self.position = nn.Parameter(torch.empty(1, self.grid_size**2, size.width))
        self.time_embed = TimeEmbedding(size.width)
        self.interval_embed = TimeEmbedding(size.width) if interval else None
        self.label_embed = nn.Embedding(num_classes + 1, size.width)
        self.augment_embed = nn.Linear(augment_dim, size.width, bias=False) if augment_dim else None
        self.add_student_parts(extra_blocks, input_skip, size.width, num_channels)
        self.hear_guidance(guidance_range, guidance_scale, size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.num_heads, rank) for _ in range(size.depth + extra_blocks))
        self.final = Final(size.width, patch_size**2 * num_channels, rank)
        cos, sin = rotary_table(self.grid_size, size.width // size.num_heads)
        self.register_buffer("rotary_cos", cos, persistent=False)
        self.register_buffer("rotary_sin", sin, persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """All initial weights, in one place."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for weight in (self.position, self.label_embed.weight):
            nn.init.normal_(weight, std=0.02)
        # adaLN-Zero: every block starts as the identity, and the network's output at zero.
        for modulation in [block.modulation for block in self.blocks] + [self.final.modulation]:
            nn.init.zeros_(modulation.up.weight)
        nn.init.zeros_(self.final.out.weight)
        # Interval and guidance start unseen, so that a student made from a teacher is the teacher: u(z, r, t, y) = v(z, t, y).
        for embed in (self.interval_embed, self.guidance_embed):
            if embed is not None:
                nn.init.zeros_(embed.out.weight)
        if self.augment_embed is not None:
            nn.init.zeros_(self.augment_embed.weight)
        if self.input_skip is not None:
            nn.init.zeros_(self.input_skip.share.weight)

    def forward(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor, augment_labels: Tensor | None = None,
                guidance_scale: Tensor | None = None) -> Tensor:
        """Average velocity over [r, t] of the trajectory that passes z at time t; z_r = z - (t - r) u.

        Args:
            z: images at time t, (B, C, H, W).
            r, t: ends of the interval, (B,), 0 <= r <= t <= 1; 0 is data, 1 is noise.
            y: class labels, (B,) long, 0 to num_classes; num_classes means "no class".
            augment_labels: what was done to the images of a training batch, (B, augment_dim); None for nothing.
            guidance_scale: of a student that takes it, (B,), within its range; None for its default.

        Returns:
            (B, C, H, W), float32.
        """
        p = self.patch_size
        c = self.condition(r, t, y, augment_labels, guidance_scale)
        x = self.through_blocks(self.tokens(z), c, self.rotary_cos, self.rotary_sin)
        x = self.final(x, c)                                                        # (B, T, p * p * C)
        u = rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=self.grid_size, p=p, q=p).float()
        return u if self.input_skip is None else u + self.input_skip(z, c)

    def tokens(self, z: Tensor) -> Tensor:
        """The patches of z, embedded with their positions: (B, C, H, W) to (B, T, D)."""
        x = self.patch_embed(rearrange(z, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch_size, q=self.patch_size))
        return x + self.position.to(x.dtype)

    def condition(self, r: Tensor, t: Tensor, y: Tensor, augment_labels: Tensor | None = None,
                  guidance_scale: Tensor | None = None) -> Tensor:
        """The condition of each block, (B, D); arguments as in `forward`."""
        c = self.time_embed(t) + self.label_embed(y)
        if self.interval_embed is not None:
            c = c + self.interval_embed(t - r)
        if augment_labels is not None:
            c = c + self.augment_embed(augment_labels)
        if (guidance := self.told_guidance(guidance_scale, t)) is not None:
            c = c + guidance
        return F.silu(c)
