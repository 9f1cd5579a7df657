import math
from copy import deepcopy

import pytest
import torch

from models import PRESETS, DiT, student_from_teacher
from models.dit import Block, SquaredReLU, squared_relu
from models.embeddings import rotary_table, rotate, sinusoid
from models.transformer import Stack
from utils.distributed import Ranks


def randomised(network: DiT, seed: int = 0) -> DiT:
    """Noise on every weight, so that nothing is hidden behind a zero."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draw))
    return network


def inputs(batch: int = 6, channels: int = 1, size: int = 8, classes: int = 3):
    draw = torch.Generator().manual_seed(1)
    z = torch.randn(batch, channels, size, size, generator=draw)
    r, t = torch.rand(batch, 2, generator=draw).sort(1).values.T
    return z, r, t, torch.randint(0, classes + 1, (batch,), generator=draw)


@pytest.mark.parametrize(("size", "shape"), {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}.items())
def test_published_sizes(size, shape):
    for patch_size in (2, 4, 8):
        preset, found = PRESETS[f"DiT-{size}/{patch_size}"]
        assert (preset.depth, preset.width, preset.num_heads) == shape and found == patch_size


def test_starts_at_zero_with_identity_blocks():
    network = DiT("DiT-Nano/4", 8, 1, 3)
    z, r, t, y = inputs()
    assert network(z, r, t, y).abs().max() == 0
    x, c = torch.randn(2, 4, 128), torch.randn(2, 128)
    assert torch.equal(network.blocks[0](x, c, network.rotary_cos, network.rotary_sin), x)


def test_initial_weights():
    """DiT's: linear layers uniform within sqrt(6 / (inputs + outputs)), embeddings of positions and classes small, no biases."""
    network = DiT("DiT-Nano/2", 8, 1, 10)
    for name in ("patch_embed", "time_embed.hidden", "blocks.0.attention.qkv", "blocks.3.mlp.out", "blocks.1.modulation.down"):
        weight = network.get_submodule(name).weight
        assert 0.98 < weight.abs().max() / math.sqrt(6 / sum(weight.shape)) <= 1
    for weight in (network.position, network.label_embed.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not any(p.any() for name, p in network.named_parameters() if name.endswith("bias"))


def test_student_is_its_teacher_until_it_learns():
    teacher = randomised(DiT("DiT-Nano/4", 8, 1, 3))
    student = student_from_teacher(teacher)
    z, r, t, y = inputs()
    v = teacher.velocity(z, t, y)
    assert v.abs().max() > 0.1
    assert torch.equal(student(z, r, t, y), v) and torch.equal(student(z, t, t, y), v)
    new = set(student.state_dict()) - set(teacher.state_dict())
    assert new == {f"interval_embed.{layer}.{part}" for layer in ("hidden", "out") for part in ("weight", "bias")}
    torch.nn.init.normal_(student.interval_embed.out.weight)
    assert not torch.allclose(student(z, r, t, y), student(z, r / 2, t, y), atol=1e-3)
    assert torch.equal(student.velocity(z, t, y), student(z, t, t, y))          # over an empty interval, then too


def test_bad_teachers(monkeypatch):
    teacher = DiT("DiT-Nano/4", 8, 1, 3)
    with pytest.raises(ValueError, match="it is a student"):
        student_from_teacher(student_from_teacher(teacher))
    weights = teacher.state_dict()
    weights["final.weights"] = weights.pop("final.out.weight")
    monkeypatch.setattr(teacher, "state_dict", lambda: weights)
    with pytest.raises(RuntimeError, match=r"missing .*'final.out.weight'.*unexpected \['final.weights'\].*only \['interval_embed"):
        student_from_teacher(teacher)


@pytest.mark.parametrize("name", ["z", "r", "t", "y"])
def test_output_depends_on_every_input(name):
    network = randomised(DiT("DiT-Nano/4", 8, 1, 3, interval=True))
    given = dict(zip("zrty", inputs()))
    other = {**given, name: (given[name] + 1) % 4 if name == "y" else given[name] * 0.5}
    change = (network(**given) - network(**other)).abs().flatten(1).max(1).values
    assert change.min() > 1e-3


def test_position_is_seen():
    """Mirroring the image is not mirroring the output."""
    network = randomised(DiT("DiT-Nano/2", 8, 1, 3))
    z, r, t, y = inputs()
    z = z.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :8, :8]         # constant patches: mirroring moves them whole
    swapped = network(z.roll(4, dims=3), r, t, y).roll(-4, dims=3)
    assert (swapped - network(z, r, t, y)).abs().max() > 1e-2


def test_patches_come_out_where_they_went_in():
    """With identity blocks, pixel gradients stay within their own patch, in both directions of the image."""
    network = DiT("DiT-Nano/2", 8, 3, 3)
    torch.nn.init.normal_(network.final.out.weight)
    z, r, t, y = inputs(1, channels=3)
    z.requires_grad_()
    network(z, r, t, y)[0, :, 2:4, 6:8].sum().backward()
    seen = z.grad[0].abs().sum(0) > 0
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:4, 6:8] = True
    assert torch.equal(seen, expected)


@pytest.mark.parametrize(("channels", "size", "classes", "patch"), [(1, 8, 0, 2), (3, 12, 10, 4), (4, 16, 1, 8)])
def test_any_channels_size_and_classes(channels, size, classes, patch):
    network = randomised(DiT(f"DiT-Nano/{patch}", size, channels, classes))
    z, r, t, _ = inputs(2, channels, size)
    y = torch.full((2,), network.null_class)
    assert network(z, r, t, y).shape == z.shape == (2, *network.shape) and network.null_class == classes
    with pytest.raises(IndexError):
        network(z, r, t, y + 1)


@pytest.mark.parametrize(("arguments", "message"), [
    (("DiT-Q/2", 8, 1, 3), "unknown model 'DiT-Q/2'; known are .*DiT-XL/8"),
    (("DiT-Nano/8", 12, 1, 3), "image size 12 is not divisible by the patch size 8"),
    (("DiT-Nano/8", 0, 1, 3), "image size 0"),
    (("DiT-Nano/2", 8, 0, 3), "num_channels .* 0 and 3"),
    (("DiT-Nano/2", 8, 1, -1), "num_classes .* 1 and -1"),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiT(*arguments)


def test_architecture_rebuilds_the_network():
    network = randomised(DiT("DiT-Nano/4", 8, 2, 5, interval=True, modulation_rank=7))
    again = DiT(**network.architecture)
    again.load_state_dict(network.state_dict())
    z, r, t, y = inputs(channels=2)
    assert torch.equal(network(z, r, t, y), again(z, r, t, y))


def test_every_weight_gets_a_gradient():
    network = randomised(DiT("DiT-Nano/4", 8, 1, 3, interval=True))
    z, r, t, _ = inputs(8)
    network(z, r, t, torch.arange(8) % 4).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


def test_precision_under_autocast():
    network = randomised(DiT("DiT-Nano/4", 8, 1, 3))
    given = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = network(*given)
    exact = network(*given)
    assert out.dtype == torch.float32 and not torch.equal(out, exact)
    torch.testing.assert_close(out, exact, rtol=0.1, atol=0.1 * exact.abs().max().item())


def test_autocast_keeps_no_weights():
    """Those of a target's pass, without gradient, cut off the next pass in the older PyTorch that may be installed."""
    with Ranks(0, 1, torch.device("cpu")).autocast():
        assert not torch.is_autocast_cache_enabled()


def test_time_features_are_computed_in_float32():
    """Of times in bfloat16, too: 128 rad times one of them would be off by half a radian."""
    t = torch.rand(16).bfloat16()
    assert torch.equal(sinusoid(t, 64), sinusoid(t.float(), 64)) and sinusoid(t, 64).dtype == torch.float32


def test_rotary_sees_relative_positions_only():
    cos, sin = rotary_table(6, 16)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).expand(2, 1, 36, 1, 16)
    q, k = rotate(q, cos, sin)[0, :, 0], rotate(k, cos, sin)[0, :, 0]                       # (36, 16)
    torch.testing.assert_close(q.norm(dim=1), q.norm(dim=1)[:1].expand(36))
    scores = (q @ k.T).view(6, 6, 6, 6)                                                     # row, column of q; of k
    torch.testing.assert_close(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1])
    flat = {round(scores[0, 0, i, j].item(), 4) for i in range(6) for j in range(6)}
    assert len(flat) == 36                                                                  # and every offset has its own


def test_modulation_is_small():
    network = DiT("DiT-S/2", 32, 3, 10)
    modulation = sum(p.numel() for name, p in network.named_parameters() if "modulation" in name)
    assert modulation / sum(p.numel() for p in network.parameters()) < 0.08


def test_compiled_in_stacks_it_is_the_same_network(monkeypatch):
    network = randomised(DiT("DiT-Nano/4", 8, 1, 3, interval=True))
    names, given = set(network.state_dict()), inputs()
    expected = network(*given)
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(type(self).__name__))
    for at_once, parts in ((1, ["Stack"] * 4), (3, ["Stack"] * 2), (4, ["Stack"])):
        compiled.clear()
        network.compile_blocks(at_once)
        assert compiled == [*parts, "Final"] and [len(stack.blocks) for stack in network.stacks] == {1: [1] * 4, 3: [3, 1], 4: [4]}[at_once]
        ran = []
        for stack in network.stacks:
            stack.register_forward_hook(lambda stack, *_, ran=ran: ran.append(stack))
        assert set(network.state_dict()) == names and torch.equal(network(*given), expected) and ran == network.stacks
    monkeypatch.setattr("torch.distributed.fsdp.FSDPModule", Block)            # as if they were split among processes
    network.compile_blocks()
    assert [len(stack.blocks) for stack in network.stacks] == [1] * 4
    again = deepcopy(network)
    torch.nn.init.zeros_(again.blocks[0].mlp.out.weight)                        # a copy's stacks are its own blocks
    assert not torch.equal(again(*given), expected) and torch.equal(network(*given), expected)


def test_a_stack_is_one_graph():
    network = randomised(DiT("DiT-Nano/4", 8, 1, 3))
    stack, x, c = Stack(network.blocks), torch.randn(2, 4, 128), torch.randn(2, 128)
    plain = stack(x, c, network.rotary_cos, network.rotary_sin)
    stack.compile(backend="aot_eager", fullgraph=True)                          # an error, were it several
    torch.testing.assert_close(stack(x, c, network.rotary_cos, network.rotary_sin), plain)


def test_squared_relu():
    x = torch.tensor([-2.0, 0.0, 0.5, 3.0], requires_grad=True)
    for activation in (squared_relu, SquaredReLU.apply, torch.compile(squared_relu, backend="aot_eager", fullgraph=True)):
        kept: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            kept.append(tensor.clone())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = activation(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        assert y.tolist() == [0, 0, 0.25, 9] and slope.tolist() == [0, 0, 1, 6]
        if activation is not squared_relu:
            assert [tensor.tolist() for tensor in kept] == [[0, 0, 0.25, 9]]    # the result, which the next layer keeps anyway
    assert torch.func.jvp(squared_relu, (x.detach(),), (torch.ones(4),))[1].tolist() == [0, 0, 1, 6]
