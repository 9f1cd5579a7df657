"""The MLP of a block, relu(x W_in^T)^2 W_out^T, with the squared ReLU inside the matrix products.

With torch.compile the activation and its gradient are kernels of their own, which read and write the widest tensors of the network
once more. Here both are computed while a product's tile is still in registers. Needs Triton and GPUs that copy tiles by themselves
(Hopper and later); imported only there. `models.dit.two_products` is the same in plain operations, and tests hold the two equal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from models import dit

TILE = dict(ROWS=128, COLUMNS=256, DEPTH=64)                # of a product; the fastest of 14 on an H200


@triton.jit
def product_kernel(
    a, b, kept, out, num_rows, num_columns, INNER: tl.constexpr, GRADIENT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PROGRAMS: tl.constexpr,
):
    """out = relu(a b^T)^2; with GRADIENT its derivative by what is inside, times a b: 2 sqrt(kept) (a b). All are tensor descriptors."""
    HALF: tl.constexpr = COLUMNS // 2
    across = tl.cdiv(num_columns, COLUMNS)
    tiles = tl.cdiv(num_rows, ROWS) * across
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):      # neighbours share rows of a, which stay in the cache
        row, column = tile // across * ROWS, tile % across * COLUMNS
        result = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for k in range(0, INNER, DEPTH):
            if GRADIENT:
                result = tl.dot(a.load([row, k]), b.load([k, column]), result)
            else:
                result = tl.dot(a.load([row, k]), b.load([column, k]).T, result)
        halves = tl.split(tl.permute(tl.reshape(result, (ROWS, 2, HALF)), (0, 2, 1)))       # half the shared memory to write from
        for i in tl.static_range(2):
            part, at = halves[i], column + i * HALF
            if GRADIENT:
                part = 2 * part * tl.sqrt(kept.load([row, at]).to(tl.float32))
            else:
                part = tl.maximum(part, 0.0)
                part = part * part
            out.store([row, at], part.to(out.dtype))


def launch(a: Tensor, b: Tensor, kept: Tensor | None) -> Tensor:
    """a: (..., K); b: (N, K), or with `kept` (..., N) the other way round, (K, N). All of one type. Returns (..., N)."""
    a, b, gradient = a.contiguous(), b.contiguous(), kept is not None
    (num_columns, depth) = b.shape[::-1] if gradient else b.shape
    out = a.new_empty(*a.shape[:-1], num_columns)
    rows, columns, deep = TILE["ROWS"], TILE["COLUMNS"], TILE["DEPTH"]
    flat = out.flatten(0, -2)
    written = TensorDescriptor.from_tensor(flat, [rows, columns // 2])
    read = TensorDescriptor.from_tensor(kept.flatten(0, -2), [rows, columns // 2]) if gradient else written
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count
    product_kernel[(programs,)](
        TensorDescriptor.from_tensor(a.flatten(0, -2), [rows, deep]),
        TensorDescriptor.from_tensor(b, [deep, columns] if gradient else [columns, deep]),
        read, written, len(flat), num_columns, depth, gradient, **TILE, PROGRAMS=programs, num_warps=8, num_stages=3)
    return out


@torch.library.custom_op("splitmeanflow::hidden", mutates_args=())
def hidden(x: Tensor, w_in: Tensor) -> Tensor:
    """h = relu(x W_in^T)^2: x (..., D), w_in (H, D) to (..., H)."""
    return launch(x, w_in, None)


@torch.library.custom_op("splitmeanflow::hidden_gradient", mutates_args=())
def hidden_gradient(grad: Tensor, w_out: Tensor, h: Tensor) -> Tensor:
    """From the gradient at h W_out^T to that at x W_in^T: grad (..., D), w_out (D, H), h (..., H) to (..., H)."""
    return launch(grad, w_out, h.contiguous())


hidden.register_fake(lambda x, w_in: x.new_empty(*x.shape[:-1], len(w_in)))
hidden_gradient.register_fake(lambda grad, w_out, h: h.new_empty(h.shape))


class FusedMLP(torch.autograd.Function):
    """x (..., D), w_in (H, D), w_out (D, H), all bfloat16, to (..., D)."""

    @staticmethod
    def forward(ctx, x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        h = hidden(x, w_in)
        ctx.save_for_backward(x, h, w_in, w_out)
        return F.linear(h, w_out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, h, w_in, w_out = ctx.saved_tensors
        inner = hidden_gradient(grad, w_out, h)
        return inner @ w_in, inner.flatten(0, -2).mT @ x.flatten(0, -2), grad.flatten(0, -2).mT @ h.flatten(0, -2)


def two_products(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """`models.dit.two_products`, by kernels in bfloat16. The weights may be float32, as under autocast."""
    if x.dtype != torch.bfloat16:
        return dit.two_products(x, w_in, w_out)
    return FusedMLP.apply(x, w_in.to(x.dtype), w_out.to(x.dtype))
