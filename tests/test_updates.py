"""The loops against the same updates written out: what is drawn, what is learned from it, and how far the weights move."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from runs import COMMON, STEPS, TEACHER, everything
from test_dit import randomised

import train_student_mnist
import train_teacher_mnist
from models import DiT, student_from_teacher
from utils.checkpoints import write_weights
from utils.data import Batches, load_images
from utils.distributed import Ranks
from utils.flow import interpolate
from utils.guidance import GuidedLabels, drop_labels, guided_as_told, guided_velocity, told
from utils.losses import adaptive_weight, flow_matching_loss, student_loss
from utils.optim import Optimizer
from utils.seeding import fold, generator
from utils.times import draw_between, draw_intervals, draw_lam, draw_times

CPU, IMAGES = torch.device("cpu"), load_images("digits")
UPDATES = ["--weight-decay", "0.1", "--max-grad-norm", "0.05", "--ema-decay", "0.3", "--decay-share", "0.6", "--seed", "3",
           "--log-every", "1"]


def drawn(cfg, step):
    """The generator, images, labels and noise of one update."""
    draw = generator(CPU, cfg.seed, "step", step)
    x, y = Batches(IMAGES, 16, cfg.seed, Ranks(0, 1, CPU))(step)
    return draw, x, y, torch.randn(x.shape, generator=draw)


def check_run(folder, cfg, networks, loss_of_step):
    """Make the updates of a run, and compare weights, losses and learning rates.

    networks: "raw" as it starts, and others, whose weights follow it; loss_of_step: a function of (draw, x, y, eps, step).
    """
    network, rows = networks["raw"], [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    optimizer = Optimizer(network, cfg.optimizer, cfg.lr, cfg.muon_lr, cfg.weight_decay)
    for step, row in enumerate(rows, 1):
        loss = loss_of_step(*drawn(cfg, step), step)
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in network.parameters()))
        assert norm > cfg.max_grad_norm                     # so that clipping is seen
        for p in network.parameters():
            p.grad *= cfg.max_grad_norm / norm
        factor = min(1, step / cfg.warmup_steps, (STEPS + 1 - step) / (cfg.decay_share * STEPS))
        optimizer.step(factor, skip=torch.tensor(False))
        optimizer.zero_grad()
        decays = {"ema": min(cfg.ema_decay, (step - 1) / (step + 8)), "target": getattr(cfg, "target_decay", None)}
        for name in networks.keys() - {"raw"}:
            for p, q in zip(networks[name].parameters(), network.parameters()):
                p.detach().lerp_(q.detach(), 1 - decays[name])
        assert (row["step"], row["loss"], row["grad_norm"]) == (step, pytest.approx(loss.item(), rel=1e-4), pytest.approx(norm, rel=1e-3))
        assert row["learning_rate"] == pytest.approx(cfg.lr * factor)
    saved = everything(folder, tuple(networks))
    for name, each in networks.items():
        for key, weight in each.state_dict().items():
            torch.testing.assert_close(saved[f"{name}.{key}"], weight, rtol=1e-4, atol=1e-6)


def config(folder):
    return SimpleNamespace(**json.loads((folder / "config.json").read_text()))


def test_a_teachers_updates(tmp_path):
    train_teacher_mnist.main([*TEACHER, *UPDATES, "--label-dropout", "0.5", "--t-law", "logit-normal(-1, 0.5)",
                              "--results-dir", str(tmp_path)])
    cfg = config(tmp_path / "teacher-digits")
    torch.manual_seed(fold(3, "weights"))
    network = DiT("DiT-Test/4", 8, 1, 10)

    def loss(draw, x, y, eps, step):
        t = draw_times(16, cfg.t_law, draw)
        return flow_matching_loss(network.velocity, x, eps, t, drop_labels(y, 10, 0.5, torch.rand(16, generator=draw))).mean()

    check_run(tmp_path / "teacher-digits", cfg, {"raw": network, "ema": copy.deepcopy(network)}, loss)


TARGETS = ["--target", "ema", "--target-decay", "0.5", "--first-leg", "midpoint", "--guidance-scale", "3",
           "--guidance-interval", "0.2", "0.7"]
TOLD = ["--guidance-range", "1", "4", "--guidance-interval", "0.2", "0.7", "--first-leg", "self", "--last-leg", "euler"]
WHOLE = ["--one-step-from", "3", "--edge-weight", "0.5", "--pinned-share", "0.6", "--pinned-steps", "1", "2", "--guidance-scale", "1"]


@pytest.mark.parametrize("flags", [TARGETS, TOLD, WHOLE])
def test_a_students_updates(flags, tmp_path):
    torch.manual_seed(0)
    teacher, file = randomised(DiT("DiT-Test/4", 8, 1, 10)), tmp_path / "teacher.safetensors"
    write_weights(file, teacher.state_dict(), dict(kind="teacher", architecture=teacher.architecture, config={}, autoencoder=None,
                                                   classes=[str(i) for i in range(10)]))
    teacher.requires_grad_(False)
    train_student_mnist.main([*COMMON, *UPDATES, "--boundary-share", "0.25", "--adaptive-power", "0.5", *flags,
                              "--teacher", str(file), "--results-dir", str(tmp_path)])
    cfg = config(tmp_path / "student-digits")
    torch.manual_seed(fold(3, "weights"))
    student = student_from_teacher(teacher, guidance_range=cfg.guidance_range, guidance_scale=cfg.guidance_scale)
    networks = {"raw": student, "ema": copy.deepcopy(student), **({"target": copy.deepcopy(student)} if cfg.target == "ema" else {})}
    u, u_target = student, networks.get("target", student)
    v = guided_velocity(teacher.velocity, 10, cfg.guidance_scale, cfg.guidance_interval)
    if cfg.guidance_range:
        u, u_target, v = told(u), told(u_target), guided_as_told(teacher.velocity, 10, cfg.guidance_interval)
    num_whole = round(12 * cfg.pinned_share / 3) if cfg.one_step_from else 0            # a third of the pins of one and two steps

    def loss(draw, x, y, eps, step):
        t_boundary = draw_times(4, cfg.t_law, draw)
        r, t = draw_intervals(12, cfg.t_law, cfg.r_law, cfg.pinned_share, cfg.pinned_steps, draw, num_whole)
        share = draw_lam(16, cfg.lam_law, (step - 1) / STEPS, draw)
        labels = GuidedLabels(y, draw_between(16, *cfg.guidance_range, draw)) if cfg.guidance_range else y
        r, t = torch.cat([torch.zeros(4), r]), torch.cat([t_boundary, t])
        parts = student_loss(u, u_target, v, interpolate(x, eps, t), r, t, share, labels, 4, cfg.first_leg, cfg.last_leg, cfg.edge_weight,
                             num_whole, cfg.one_step_from)
        return adaptive_weight(torch.cat(parts), 0.5).mean()

    check_run(tmp_path / "student-digits", cfg, networks, loss)
