"""Our own kernels against the plain operations: on a CPU by Triton's interpreter, on Hopper as they are."""

import subprocess
import sys

import pytest
import torch

from models import DiT, dit
from models.embeddings import rotary_table
from models.transformer import FUSED_ON, Stack

pytest.importorskip("triton")
HOPPER = pytest.mark.skipif(not (torch.cuda.is_available() and torch.cuda.get_device_capability() in FUSED_ON), reason="needs Hopper")

INTERPRETED = """
import builtins

import torch
from triton.runtime import interpreter


class Integer(type):
    # The interpreter makes integers of arrays with one value, which NumPy 2.4 refuses.
    __instancecheck__ = lambda self, x: isinstance(x, builtins.int)
    __call__ = lambda self, x: builtins.int(getattr(x, "item", lambda: x)())


interpreter.int = Integer("int", (), {})

from models import dit, fused_attention, fused_mlp
from models.embeddings import rotary_table

torch.manual_seed(0)
for patches, heads, size in [(16, 2, 32), (49, 1, 32), (64, 2, 64), (100, 1, 64)]:
    cos, sin = rotary_table(int(patches**0.5), size)
    qkv = torch.randn(2, patches, 3 * heads * size, requires_grad=True)
    out, grad = dit.attend(qkv, cos, sin, heads), torch.randn(2, patches, heads * size)
    out.backward(grad)
    q, k, _ = dit.normalised_heads(qkv, cos, sin, heads)
    log_sum = (q @ k.mT / size**0.5).logsumexp(-1).detach()
    ours = fused_attention.attention_gradient(grad, qkv.detach(), cos, sin, out.detach(), log_sum, heads)
    torch.testing.assert_close(ours, qkv.grad, rtol=0, atol=2e-5)

fused_mlp.TILE.update(ROWS=32, COLUMNS=64, DEPTH=32)
torch.cuda.get_device_properties = lambda device: type("Properties", (), {"multi_processor_count": 3})
for tokens, width in [(96, 64), (50, 48)]:                  # whole tiles, and parts of them
    x, grad = (torch.randn(2, tokens, width) for _ in range(2))
    w_in, w_out = torch.randn(4 * width, width) / 8, torch.randn(width, 4 * width) / 8
    h = (x @ w_in.mT).relu().square()
    torch.testing.assert_close(fused_mlp.hidden(x, w_in), h, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused_mlp.hidden_gradient(grad, w_out, h), 2 * (grad @ w_out) * h.sqrt(), rtol=1e-5, atol=1e-5)
"""


def test_kernels_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")             # is read when Triton is imported, hence the process
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def error(ours, truth):
    return ((ours.double() - truth).norm() / truth.norm()).item()


@HOPPER
@pytest.mark.parametrize(("patches", "heads", "size"), [(256, 6, 64), (64, 3, 64), (49, 4, 32), (196, 3, 64), (16, 4, 32)])
def test_attention_on_hopper(patches, heads, size):
    """As near to float64 as PyTorch's kernels are."""
    from models import fused_attention

    torch.manual_seed(0)
    cos, sin = (part.cuda() for part in rotary_table(int(patches**0.5), size))
    qkv, grad = (torch.randn(8, patches, n * heads * size, device="cuda", dtype=torch.bfloat16) for n in (3, 1))
    results = []
    for attend, x in ((dit.attend, qkv.double()), (dit.attend, qkv), (fused_attention.attend, qkv)):
        x = x.clone().requires_grad_()
        out = attend(x, cos.to(torch.promote_types(x.dtype, torch.float32)), sin.to(torch.promote_types(x.dtype, torch.float32)), heads)
        out.backward(grad.to(out.dtype))
        results.append((out.detach(), x.grad))
    (truth, truth_grad), (plain, plain_grad), (ours, ours_grad) = results
    assert error(ours, truth) < 1.2 * error(plain, truth) and error(ours_grad, truth_grad) < 1.2 * error(plain_grad, truth_grad) < 0.02


@HOPPER
@pytest.mark.parametrize(("shape", "width"), [((512, 256), 384), ((3, 49), 192), ((7,), 128)])
def test_mlp_on_hopper(shape, width):
    from models import fused_mlp

    torch.manual_seed(0)
    x, grad = (torch.randn(*shape, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    w_in, w_out = (torch.randn(n, m, device="cuda") * 0.05 for n, m in ((4 * width, width), (width, 4 * width)))
    results = []
    plain, ours = dit.two_products, fused_mlp.two_products
    for two_products, dtype in ((plain, torch.float64), (plain, torch.bfloat16), (ours, torch.bfloat16)):
        leaves = [part.to(dtype).clone().requires_grad_() for part in (x, w_in, w_out)]
        out = two_products(*leaves)
        out.backward(grad.to(dtype))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for truth, by_plain, by_ours in zip(*results):
        assert error(by_ours, truth) < 1.2 * error(by_plain, truth) < 0.02


@HOPPER
def test_a_compiled_network_on_hopper():
    """One graph for all blocks of a stack, and the same gradients as without kernels."""
    from models.fused import fuse

    torch.manual_seed(0)
    plain, ours = (DiT("DiT-Ti/4", 32, 3, 10).cuda() for _ in range(2))
    for p in plain.parameters():
        torch.nn.init.normal_(p, std=0.05)
    ours.load_state_dict(plain.state_dict())
    ours.compile_blocks()
    z, t, y = torch.randn(64, 3, 32, 32, device="cuda"), torch.rand(64, device="cuda"), torch.arange(64, device="cuda") % 10
    for network in (plain, ours):
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            network.velocity(z, t, y).square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), ours.parameters()):
        if p.grad is not None:
            assert error(q.grad, p.grad.double()) < 0.05, name
    torch._dynamo.reset()
    fuse(plain)                                             # one that is not compiled yet
    stack = Stack(plain.blocks)
    x, c = torch.randn(8, 64, 192, device="cuda", dtype=torch.bfloat16), torch.randn(8, 192, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        explained = torch._dynamo.explain(stack)(x, c, plain.rotary_cos, plain.rotary_sin)
    assert explained.graph_count == 1 and explained.graph_break_count == 0
