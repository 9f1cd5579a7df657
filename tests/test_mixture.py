"""The whole method on a problem whose answer is known: two classes with two modes each, in two dimensions.

Teacher and student are trained with the project's own losses; one step must put samples on the modes of the class asked for.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

from utils.flow import interpolate
from utils.guidance import drop_labels, guided_velocity
from utils.losses import flow_matching_loss, student_loss
from utils.sampling import sample_average_velocity, sample_velocity
from utils.schedules import learning_rate_factor
from utils.times import draw_intervals, draw_lam, draw_times

MODES = torch.tensor([[[1.0, 1.0], [-1.0, 1.0]], [[1.0, -1.0], [-1.0, -1.0]]])         # (class, mode, 2)
SD, NULL, BATCH = 0.1, 2, 256


class Net(nn.Module):
    """u(z, r, t, y) for points shaped (B, 2, 1, 1)."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7 + 10, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                    nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
        waves = torch.stack([f(k * torch.pi * t) for k in (1, 2, 3, 4, 5) for f in (torch.sin, torch.cos)], 1)
        inputs = [z.flatten(1), t[:, None], (t - r)[:, None], nn.functional.one_hot(y, 3), waves]
        return self.layers(torch.cat(inputs, 1)).view_as(z)

    def velocity(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self(z, t, t, y)


def data(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    y, mode = torch.randint(0, 2, (2, BATCH), generator=draw)
    x = MODES[y, mode] + SD * torch.randn(BATCH, 2, generator=draw)
    return x[:, :, None, None], y


def train(network: Net, loss_of_batch, num_steps: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0)
    draw = torch.Generator().manual_seed(0)
    for step in range(1, num_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * learning_rate_factor(step, num_steps, 50, 0.5)
        loss = loss_of_batch(*data(draw), draw, step / num_steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()


@pytest.fixture(scope="module")
def networks() -> tuple[Net, Net]:
    torch.manual_seed(0)
    teacher = Net()

    def teacher_loss(x, y, draw, progress):
        eps = torch.randn(x.shape, generator=draw)
        y = drop_labels(y, NULL, 0.1, torch.rand(BATCH, generator=draw))
        return flow_matching_loss(teacher.velocity, x, eps, draw_times(BATCH, "uniform", draw), y).mean()

    train(teacher, teacher_loss, 1000)
    student, n = copy.deepcopy(teacher), BATCH // 2
    v = guided_velocity(teacher.velocity, NULL, 1.5)

    def loss(x, y, draw, progress):
        eps, t = torch.randn(x.shape, generator=draw), draw_times(n, "logit-normal(-0.6, 1.6)", draw)
        r, later = draw_intervals(BATCH - n, "logit-normal(-0.6, 1.6)", "logit-normal(-4, 1.6)", 0.4, (1, 2), draw)
        r, t = torch.cat([t, r]), torch.cat([t, later])
        lam = draw_lam(BATCH, "constant(0.3)", progress, draw)
        parts = student_loss(student, student, v, interpolate(x, eps, t), r, t, lam, y, n, first_leg="midpoint")
        return torch.cat(parts).mean()

    train(student, loss, 1500)
    return teacher, student


def hits(points: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """Share of points within 5 standard deviations of a mode of their class, and how those divide among its two modes."""
    distance = (points.flatten(1)[:, None] - MODES[y]).norm(dim=2)              # (B, mode)
    hit = distance.min(1).values < 5 * SD
    shares = torch.stack([nn.functional.one_hot(distance.argmin(1)[hit & (y == k)], 2).double().mean(0) for k in (0, 1)])
    return hit.double().mean().item(), shares


Y = torch.arange(4000) % 2
Z = torch.randn(4000, 2, 1, 1, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_student_lands_on_the_modes(networks, num_steps):
    share, modes = hits(sample_average_velocity(networks[1], Z, Y, num_steps), Y)
    assert share >= 0.95
    assert 0.3 < modes.min() and modes.max() < 0.7


def test_the_teacher_needs_its_many_steps(networks):
    """So that the student's success is its own: its teacher lands there in 50 steps, and not in one."""
    teacher, _ = networks
    assert hits(sample_velocity(teacher.velocity, Z, Y, 50), Y)[0] >= 0.95
    assert hits(sample_velocity(teacher.velocity, Z, Y, 1), Y)[0] < 0.5


def test_wrong_sign_and_wrong_class_miss(networks):
    _, student = networks
    assert hits(sample_average_velocity(lambda *a: -student(*a), Z, Y, 1), Y)[0] < 0.5
    assert hits(sample_average_velocity(student, Z, 1 - Y, 1), Y)[0] < 0.05
