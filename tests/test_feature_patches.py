"""The patches that compare a student with its targets as the teacher sees them."""

import pytest
import torch
from runs import COMMON, losses

import train_student_mnist
from benchmarks.ablations import patches, student_patches
from models import DiT
from utils.guidance import GuidedLabels


def some_pair() -> tuple[DiT, DiT]:
    """A teacher and a student of which nothing is closed, as after some training."""
    torch.manual_seed(0)
    teacher, student = (DiT("DiT-Nano/4", 8, 1, 3, interval=interval) for interval in (False, True))
    for weights in (*teacher.parameters(), *student.parameters()):
        torch.nn.init.normal_(weights, std=0.1)
    return teacher, student


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_teacher_features_add_to_the_loss_of_a_wrong_student(weight, undo):
    teacher, student = some_pair()
    student_patches.teacher_features(weight)
    v = train_student_mnist.guided_velocity(teacher.velocity, 3, 1.5, (0.0, 1.0))
    z_t, r, t, y = torch.randn(6, 1, 8, 8), torch.full([6], 0.2), torch.full([6], 0.9), torch.arange(6) % 3
    args = student, student, v, z_t, r, t, torch.full([6], 0.3), y, 2, "midpoint", "self", 4.0
    changed, plain = train_student_mnist.student_loss(*args), student_patches.student_loss(*args)
    torch.testing.assert_close(changed.boundary, plain.boundary)
    if weight == 0:
        torch.testing.assert_close(changed.splitting, plain.splitting)
    else:
        further = changed.splitting - plain.splitting
        assert further.min() > 1e-3 * plain.splitting.max()
        further.sum().backward()
        assert all(p.grad is None for p in teacher.parameters()) and student.final.out.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_whole_features_add_to_the_loss_of_a_wrong_one_step(weight, undo):
    teacher, student = some_pair()
    student_patches.whole_features(weight)
    v = train_student_mnist.guided_as_told(teacher.velocity, 3, (0.0, 1.0))
    labels = GuidedLabels(torch.arange(6) % 3, torch.full([6], 1.5))

    def u(z, r, t, guided):
        return student(z, r, t, guided.y)

    z_t, r, t = torch.randn(6, 1, 8, 8), torch.tensor([0.2, 0.2, 0, 0, 0.2, 0.2]), torch.tensor([0.9, 0.9, 1, 1, 0.9, 0.9])
    args = u, u, v, z_t, r, t, torch.full([6], 0.3), labels, 2, "midpoint", "self", 4.0, 2, 4
    changed, plain = train_student_mnist.student_loss(*args), student_patches.student_loss(*args)
    torch.testing.assert_close(changed.boundary, plain.boundary)
    torch.testing.assert_close(changed.splitting[2:], plain.splitting[2:])
    further = changed.splitting[:2] - plain.splitting[:2]
    if weight == 0:
        torch.testing.assert_close(further, torch.zeros(2))
    else:
        assert further.min() > 1e-3 * plain.splitting[:2].max()
        further.sum().backward()
        assert all(p.grad is None for p in teacher.parameters()) and student.final.out.weight.grad.abs().sum() > 0

    torch.nn.init.zeros_(student.final.out.weight)          # u = 0: one step and four arrive at the same image
    torch.nn.init.zeros_(student.final.out.bias)
    torch.testing.assert_close(train_student_mnist.student_loss(*args), student_patches.student_loss(*args))


def test_whole_features_in_a_script(results, undo, tmp_path):
    flags = ["--teacher", str(results / "teacher-digits"), "--guidance-range", "1", "4", "--one-step-from", "2", "--pinned-share", "0.6"]
    train_student_mnist.main([*COMMON, *flags, "--results-dir", str(tmp_path), "--name", "unchanged"])
    patches.main(["whole-features-1", "train_student_mnist.py", *COMMON, *flags, "--results-dir", str(tmp_path), "--name", "changed"])
    changed, unchanged = losses(tmp_path / "changed"), losses(tmp_path / "unchanged")
    assert len(changed) == len(unchanged) and all(torch.tensor(changed).isfinite())
    assert changed != unchanged
