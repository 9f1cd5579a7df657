"""A replayed update is the update: on a CPU with a graph of recorded operations in place of CUDA's, on CUDA with the scripts."""

import contextlib
import json

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import train_student_mnist
import train_teacher_mnist
from models import DiT, student_from_teacher
from utils.guidance import GuidedLabels, guided_as_told, guided_velocity, told
from utils.losses import student_loss
from utils.replay import EAGER_CALLS, Replay


class Tape(TorchDispatchMode):
    """Records operations as a CUDA graph does, from fixed memory to fixed memory; what Python decides is not asked again."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for operation, args, kwargs, result in self.operations:
            for kept, new in zip(tree_flatten(result)[0], tree_flatten(operation(*args, **kwargs))[0]):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


class FakeStream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def tapes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", lambda tape, **options: tape)


@pytest.mark.parametrize("guidance_range", [None, (1.0, 3.0)])
def test_replayed_gradients_are_the_gradients(guidance_range, tapes):
    """Other inputs and other weights at every call; gradients clipped in place and dropped in between, as the loops do."""
    teacher = DiT("DiT-Nano/4", 8, 1, 3)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.02 * torch.randn_like(p))
    student = u = student_from_teacher(teacher, guidance_range=guidance_range, guidance_scale=2.0)
    v = guided_velocity(teacher.velocity, teacher.null_class, 2.0, (0.2, 0.8))
    if guidance_range:
        u, v = told(student), guided_as_told(teacher.velocity, teacher.null_class, (0.2, 0.8))

    def forward_backward(z, r, t, share, y, *scale):
        parts = student_loss(u, u, v, z, r, t, share, GuidedLabels(y, *scale) if scale else y, 4, "midpoint", "self")
        loss = torch.cat(parts).mean()
        loss.backward()
        return loss, parts.splitting.mean()

    replay, seen, given = Replay(forward_backward, student), [], []
    for call in range(1, EAGER_CALLS + 4):
        r, t = torch.rand(2, 8).sort(dim=0).values
        inputs = torch.randn(8, 1, 8, 8), r, t, torch.full((8,), 0.3), torch.randint(0, 3, (8,))
        inputs += (1 + 2 * torch.rand(8),) if guidance_range else ()
        expected = forward_backward(*inputs)
        wanted = [p.grad for p in student.parameters()]
        student.zero_grad(set_to_none=True)
        given.append((inputs, [each.clone() for each in inputs]))
        found = replay(*inputs)
        assert (replay.graph is not None) == (call > EAGER_CALLS) and not any(value.requires_grad for value in found)
        torch.testing.assert_close(found, tuple(value.detach() for value in expected), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close([p.grad for p in student.parameters()], wanted, rtol=1e-4, atol=1e-6)
        seen.append(found[0])
        nn.utils.clip_grad_norm_(student.parameters(), 1e-3)
        with torch.no_grad():
            for p in student.parameters():
                p.sub_(p.grad)
        student.zero_grad(set_to_none=True)
    assert len({value.item() for value in seen}) == len(seen)                   # earlier results stay, and so does what was given
    assert all(torch.equal(now, then) for inputs, copies in given for now, then in zip(inputs, copies))
    with pytest.raises(AssertionError):                                         # one row would be spread over all
        replay(*[each[:1] for each in inputs])
    replay(*inputs)
    with pytest.raises(AssertionError):                                         # gradients were not dropped
        replay(*inputs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("compiled", ["False", "True"])
def test_replayed_runs_learn_as_others_do(compiled, tmp_path, monkeypatch):
    """Losses of a teacher and a student, with the graph and without: the same kernels on the same numbers."""
    recorded, record = [], Replay.record
    monkeypatch.setattr(Replay, "record", lambda self, inputs: (recorded.append(self), record(self, inputs)))
    rows = {}
    for graph in ("True", "False"):
        common = ["--data", "digits", "--steps", "20", "--log-every", "1", "--comet", "off", "--results-dir", str(tmp_path),
                  "--cuda-graph", graph, "--compile", compiled]
        train_teacher_mnist.main([*common, "--name", f"teacher-{graph}"])
        train_student_mnist.main([*common, "--name", f"student-{graph}", "--teacher", str(tmp_path / "teacher-True")])
        assert len(recorded) == 2                           # by the first two runs alone
        for stage in ("teacher", "student"):
            lines = (tmp_path / f"{stage}-{graph}" / "metrics.jsonl").read_text().splitlines()
            rows[stage, graph] = torch.tensor([[json.loads(line)[key] for key in ("loss", "grad_norm")] for line in lines])
    for stage in ("teacher", "student"):
        assert len(rows[stage, "True"]) == 20
        torch.testing.assert_close(rows[stage, "True"], rows[stage, "False"], rtol=1e-4, atol=0)
