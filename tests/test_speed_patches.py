"""The variants that are timed: each computes what the plain script does, another way, or says when it does not."""

import pytest
import torch

import train_student_mnist
import train_teacher_mnist
from benchmarks.ablations import patches
from models import DiT, dit


def test_guidance_at_once(undo):
    """The same velocity, of one call."""
    plain, calls = train_student_mnist.guided_velocity, []

    def v(z, t, y):
        calls.append(len(z))
        return z * y[:, None] + t[:, None]

    inputs = torch.randn(5, 3), torch.linspace(0, 1, 5), torch.arange(5)
    patches.PATCHES["guidance-at-once"]()
    at_once = train_student_mnist.guided_velocity(v, 7, 2.5, (0.2, 0.8))(*inputs)
    assert calls == [10]
    torch.testing.assert_close(at_once, plain(v, 7, 2.5, (0.2, 0.8))(*inputs))


@pytest.mark.parametrize("name", ["attention-flash", "attention-plain"])         # cuDNN has none on a CPU
def test_attention_is_the_same_by_another_backend(name, undo, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    torch.manual_seed(0)
    network = DiT("DiT-Nano/4", 8, 1, 10)
    plain = network.blocks[0].attention.attend
    patches.PATCHES[name]()
    network.compile_blocks()
    other = network.blocks[0].attention.attend
    assert plain is dit.attend and other is not plain
    inputs = torch.randn(3, 4, 3 * 128), network.rotary_cos, network.rotary_sin, 4
    torch.testing.assert_close(torch.compile(other, backend="eager", fullgraph=True)(*inputs), plain(*inputs))


def test_rare_average(undo):
    """After eight updates of the same weights it is where the other one is; before, it has not moved."""
    plain = train_teacher_mnist.ModelEmaV3
    patches.PATCHES["ema-every-8"]()
    network = torch.nn.Linear(2, 2)
    averages = [kind(network, decay=0.9) for kind in (plain, train_teacher_mnist.ModelEmaV3)]
    start = network.weight.detach().clone()
    with torch.no_grad():
        network.weight.add_(1)
    for update in range(2, 9):                              # at the first one a plain average is the weights themselves
        assert torch.equal(averages[1].module.weight, start)
        for average in averages:
            average.update(network, update)
    averages[0].update(network, 9)
    torch.testing.assert_close(averages[1].module.weight, averages[0].module.weight)
