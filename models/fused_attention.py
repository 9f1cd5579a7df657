"""The backward pass of self-attention over the patches of an image, from the heads' results to the projection's output, in one kernel.

PyTorch's backward pass takes three kernels, and two more for the rotation and RMSNorm of queries and keys, each with a pass over
memory. An image has few patches (256 at most here), so one program holds all queries of a head, and nothing is summed across
programs. The forward pass is PyTorch's. Needs Triton, so it is imported only where there is a GPU. `models.dit.attend` is the same
in plain operations, and tests hold the two equal.

(probabilities recomputed from each softmax's sum, tile by tile: FlashAttention, Dao et al., arXiv 2205.14135)
"""

from typing import Any

import torch
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor

from models import dit

TINY, LOG2_E = tl.constexpr(1e-6), tl.constexpr(1.4426950408889634)
MOST_PATCHES, KEYS = 256, 64                                # keys at a time


@triton.jit
def rotated(pointer, stride, rows, there, cos_pointer, sin_pointer, SIZE: tl.constexpr):
    """Rows (N,) of one head, normalised and rotated, float32 (N, SIZE), and the factor (N,) that normalised each."""
    HALF: tl.constexpr = SIZE // 2
    i = tl.arange(0, SIZE)
    x = tl.load(pointer + rows[:, None] * stride + i[None, :], there, 0.0).to(tl.float32)
    partner = tl.load(pointer + rows[:, None] * stride + ((i + HALF) % SIZE)[None, :], there, 0.0).to(tl.float32)
    cos = tl.load(cos_pointer + rows[:, None] * HALF + (i % HALF)[None, :], there, 0.0)
    sin = tl.load(sin_pointer + rows[:, None] * HALF + (i % HALF)[None, :], there, 0.0)
    factor = tl.rsqrt(tl.sum(x * x, 1) / SIZE + TINY)
    return (x * cos + partner * tl.where((i < HALF)[None, :], -sin, sin)) * factor[:, None], factor


@triton.jit
def store_unrotated(pointer, stride, rows, there, grad, y, factor, cos_pointer, sin_pointer, SIZE: tl.constexpr):
    """Write the gradient at what `rotated` read, from the gradient at y, what it returned. A rotation keeps scalar products."""
    HALF: tl.constexpr = SIZE // 2
    i = tl.arange(0, HALF)
    grad = (grad - y * (tl.sum(grad * y, 1) / SIZE)[:, None]) * factor[:, None]
    first, second = tl.split(tl.permute(tl.reshape(grad, (grad.shape[0], 2, HALF)), (0, 2, 1)))
    cos = tl.load(cos_pointer + rows[:, None] * HALF + i[None, :], there, 0.0)
    sin = tl.load(sin_pointer + rows[:, None] * HALF + i[None, :], there, 0.0)
    place = pointer + rows[:, None] * stride + i[None, :]
    tl.store(place, (first * cos + second * sin).to(pointer.dtype.element_ty), there)
    tl.store(place + HALF, (second * cos - first * sin).to(pointer.dtype.element_ty), there)


@triton.jit
def backward_kernel(qkv, cos, sin, out, log_sum, grad_out, grad_qkv, patches, heads, scale, SIZE: tl.constexpr, PADDED: tl.constexpr,
                    KEYS: tl.constexpr, WHOLE: tl.constexpr):
    """All gradients of one head, some keys at a time. PADDED: patches to a power of two; WHOLE: nothing was padded."""
    head = tl.program_id(0)
    image, width = (head // heads).to(tl.int64), heads * SIZE
    offset = image * patches * 3 * width + head % heads * SIZE
    start, grad_start = qkv + offset, grad_qkv + offset
    i, rows = tl.arange(0, SIZE), tl.arange(0, PADDED)
    rows_there = (rows < patches)[:, None] | WHOLE
    place = (image * patches + rows)[:, None] * width + (head % heads * SIZE + i)[None, :]
    do = tl.load(grad_out + place, rows_there, 0.0)
    delta = tl.sum(do.to(tl.float32) * tl.load(out + place, rows_there, 0.0).to(tl.float32), 1)
    sums = tl.load(log_sum + head.to(tl.int64) * patches + rows, (rows < patches) | WHOLE, float("inf")) * LOG2_E
    q, q_factor = rotated(start, 3 * width, rows, rows_there, cos, sin, SIZE)
    q = (q * (scale * LOG2_E)).to(qkv.dtype.element_ty)
    dq = tl.zeros((PADDED, SIZE), tl.float32)
    for first in range(0, PADDED, KEYS):
        columns = first + tl.arange(0, KEYS)
        there = (columns < patches)[:, None] | WHOLE
        k, k_factor = rotated(start + width, 3 * width, columns, there, cos, sin, SIZE)
        k = k.to(q.dtype)
        at = columns[:, None] * (3 * width) + i[None, :]
        v = tl.load(start + 2 * width + at, there, 0.0)
        p = tl.exp2(tl.dot(q, tl.trans(k)) - sums[:, None])
        if not WHOLE:
            p = tl.where((columns < patches)[None, :], p, 0.0)
        dv = tl.dot(tl.trans(p.to(q.dtype)), do)
        tl.store(grad_start + 2 * width + at, dv.to(grad_qkv.dtype.element_ty), there)
        ds = (p * (tl.dot(do, tl.trans(v)) - delta[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q) / LOG2_E
        store_unrotated(grad_start + width, 3 * width, columns, there, dk, k.to(tl.float32), k_factor, cos, sin, SIZE)
        dq = tl.dot(ds, k, dq)
    store_unrotated(grad_start, 3 * width, rows, rows_there, dq * scale, q.to(tl.float32) / (scale * LOG2_E), q_factor, cos, sin, SIZE)


@torch.library.custom_op("splitmeanflow::attention_gradient", mutates_args=())
def attention_gradient(grad: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, out: Tensor, log_sum: Tensor, heads: int) -> Tensor:
    """Gradient at qkv (B, T, 3 D) from that at the results (B, T, D); log_sum (B, heads, T): logarithm of each softmax's sum."""
    images, patches, width = out.shape
    size, padded = width // heads, max(16, triton.next_power_of_2(patches))
    qkv, out, grad = qkv.contiguous(), out.contiguous(), grad.contiguous()
    grad_qkv = torch.empty_like(qkv)
    backward_kernel[(images * heads,)](
        qkv, cos, sin, out, log_sum, grad, grad_qkv, patches, heads, size**-0.5, size, padded, min(padded, KEYS),
        padded == patches, num_warps=8 if padded > 64 else 4, num_stages=1)
    return grad_qkv


@attention_gradient.register_fake
def _(grad: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, out: Tensor, log_sum: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


class Attend(torch.autograd.Function):
    """As `models.dit.attend`, all bfloat16."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        q, k, v = dit.normalised_heads(qkv, cos, sin, heads)
        # What F.scaled_dot_product_attention calls on Hopper, which does not return the sums.
        out, log_sum, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        out = rearrange(out, "b h t d -> b t (h d)")
        ctx.save_for_backward(qkv, cos, sin, out, log_sum)
        ctx.heads = heads
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return attention_gradient(grad, *ctx.saved_tensors, ctx.heads), None, None, None


def attend(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """`models.dit.attend`, whose gradient is one kernel in bfloat16, for the sizes that the kernel was made for."""
    if qkv.dtype == torch.bfloat16 and qkv.shape[1] <= MOST_PATCHES and qkv.shape[2] // 3 // heads in (32, 64):
        return Attend.apply(qkv, cos, sin, heads)
    return dit.attend(qkv, cos, sin, heads)
