"""The loops against the same updates written out: what is drawn, what is learned from it, and how far the weights move."""

import copy
import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from runs import COMMON, STEPS, TEACHER, everything
from test_dit import randomised

import train_student_mnist
import train_teacher_mnist
from models import DiT, build_network, student_from_teacher
from utils.augmentation import AUGMENT_DIM, augment, draw_augment_labels
from utils.checkpoints import load_network, start_from, write_weights
from utils.data import Batches, load_images
from utils.distributed import Ranks
from utils.flow import interpolate
from utils.guidance import GuidedLabels, drop_labels, guided_as_told, guided_velocity, told
from utils.json_lines import read_lines
from utils.losses import adaptive_weight, flow_matching_loss, student_loss
from utils.optim import Optimizer
from utils.pictures import sample_labels
from utils.run_log import Run
from utils.sampling import sample_average_velocity, sample_velocity
from utils.seeding import fold, generator
from utils.times import draw_between, draw_intervals, draw_lam, draw_times

CPU, IMAGES = torch.device("cpu"), load_images("digits")
UPDATES = ["--weight-decay", "0.1", "--max-grad-norm", "0.05", "--ema-decay", "0.3", "--decay-share", "0.6", "--seed", "3",
           "--log-every", "1"]


def drawn(cfg, step, num_noises):
    """The generator, images, labels and noises of one update."""
    draw = generator(CPU, cfg.seed, "step", step)
    x, y = Batches(IMAGES, 16, cfg.seed, Ranks(0, 1, CPU))(step)
    return draw, x, y, [torch.randn(x.shape, generator=draw) for _ in range(num_noises)]


def chosen(x, y, noises):
    """For each image the noise most towards it, as its class sees it."""
    means = {label: torch.stack([image for image, its in zip(x, y) if its == label]).mean(0) for label in y.unique().tolist()}
    return torch.stack([max(own, key=lambda eps: ((image - means[label]) * eps).sum() / eps.norm())
                        for image, label, *own in zip(x, y.tolist(), *noises)])


def check_run(folder, cfg, networks, losses_of_step, num_noises):
    """Make the updates of a run, and compare weights, losses and learning rates.

    networks: "raw" as it starts, and others, whose weights follow it; losses_of_step: a function of (draw, x, y, noises, step)
    to "loss" and what else is logged.
    """
    network, rows = networks["raw"], read_lines(folder / "metrics.jsonl")
    optimizer = Optimizer(network, cfg.optimizer, cfg.lr, cfg.muon_lr, cfg.weight_decay)
    for step, row in enumerate(rows, 1):
        losses = losses_of_step(*drawn(cfg, step, num_noises), step)
        losses["loss"].backward()
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
        logged = {**{name: value.item() for name, value in losses.items()}, "grad_norm": norm, "learning_rate": cfg.lr * factor}
        assert row["step"] == step and {name: row[name] for name in logged} == pytest.approx(logged, rel=1e-3)
    saved = everything(folder, tuple(networks))
    for name, each in networks.items():
        for key, weight in each.state_dict().items():
            torch.testing.assert_close(saved[f"{name}.{key}"], weight, rtol=1e-4, atol=1e-6)


@pytest.fixture
def shown(monkeypatch):
    """The sample images of the last update, by name."""
    images = {}
    monkeypatch.setattr(Run, "images", lambda self, step, name, x: images.update({name: x}))
    return images


def check_shown(shown, expected, apart):
    """expected: name to a function of noise and labels, which samples by the EMA; no two alike, by `apart`."""
    y = sample_labels(10)
    z = torch.randn(len(y), 1, 8, 8, generator=generator(CPU, 3, "samples"))
    assert shown.keys() == expected.keys()
    samples = {name: sample(z, y) for name, sample in expected.items()}
    for name, x in samples.items():
        torch.testing.assert_close(shown[name], x, rtol=0, atol=1e-4)
    one, *others = samples.values()
    assert all((one - other).abs().max() > apart for other in others)


def config(folder):
    return SimpleNamespace(**json.loads((folder / "config.json").read_text()))


@pytest.fixture
def taught(request, tmp_path):
    """A teacher with something to say, and its file, which says how many noises it drew for each image."""
    torch.manual_seed(0)
    network, file = randomised(DiT("DiT-Test/4", 8, 1, 10)), tmp_path / "taught.safetensors"
    write_weights(file, network.state_dict(), dict(kind="teacher", architecture=network.architecture, autoencoder=None,
                                                   config={"num_noises": getattr(request, "param", 1)},
                                                   classes=[str(i) for i in range(10)]))
    return network.requires_grad_(False), file


@pytest.mark.parametrize(("rate", "num_noises"), [(0, 1), (0.5, 3)])
def test_a_teachers_updates(rate, num_noises, taught, shown, tmp_path):
    """From fresh weights, and from another's with augmentation and a choice of noises."""
    flags = ["--start-from", str(taught[1]), "--augment", str(rate)] if rate else []
    train_teacher_mnist.main([*TEACHER, *UPDATES, "--label-dropout", "0.5", "--t-law", "logit-normal(-1, 0.5)", *flags,
                              "--num-noises", str(num_noises), "--results-dir", str(tmp_path)])
    cfg = config(tmp_path / "teacher-digits")
    torch.manual_seed(fold(3, "weights"))
    network = DiT("DiT-Test/4", 8, 1, 10, augment_dim=AUGMENT_DIM if rate else 0)
    if rate:
        start_from(network, taught[1])
    ema = copy.deepcopy(network)

    def losses(draw, x, y, noises, step):
        t, coin = draw_times(16, cfg.t_law, draw), torch.rand(16, generator=draw)
        moves = draw_augment_labels(16, rate, draw) if rate else None
        x = augment(x, moves) if rate else x
        v = partial(network.velocity, augment_labels=moves)
        return {"loss": flow_matching_loss(v, x, chosen(x, y, noises), t, drop_labels(y, 10, 0.5, coin)).mean()}

    check_run(tmp_path / "teacher-digits", cfg, {"raw": network, "ema": ema}, losses, num_noises)
    check_shown(shown, {f"cfg{w}": partial(sample_velocity, guided_velocity(ema.velocity, 10, w), num_steps=2) for w in (1.0, 2.5, 5.0)},
                apart=1e-2 if rate else 0)


TARGETS = ["--target", "ema", "--target-decay", "0.5", "--first-leg", "midpoint", "--guidance-scale", "3",
           "--guidance-interval", "0.2", "0.7"]
TOLD = [*TARGETS[:4], "--guidance-range", "1", "4", "--guidance-interval", "0.2", "0.7", "--first-leg", "self", "--last-leg", "euler"]
WHOLE = ["--one-step-from", "3", "--edge-weight", "0.5", "--pinned-share", "0.6", "--pinned-steps", "1", "2", "--guidance-scale", "1"]


@pytest.mark.parametrize(("taught", "flags"), [(1, TARGETS), (1, TOLD), (4, WHOLE)], indirect=["taught"])
def test_a_students_updates(flags, taught, shown, tmp_path):
    """With the noises of its teacher."""
    teacher, file = taught
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

    def losses(draw, x, y, noises, step):
        t_boundary = draw_times(4, cfg.t_law, draw)
        r, t = draw_intervals(12, cfg.t_law, cfg.r_law, cfg.pinned_share, cfg.pinned_steps, draw, num_whole)
        share = draw_lam(16, cfg.lam_law, (step - 1) / STEPS, draw)
        labels = GuidedLabels(y, draw_between(16, *cfg.guidance_range, draw)) if cfg.guidance_range else y
        r, t = torch.cat([torch.zeros(4), r]), torch.cat([t_boundary, t])
        parts = student_loss(u, u_target, v, interpolate(x, chosen(x, y, noises), t), r, t, share, labels, 4, cfg.first_leg, cfg.last_leg,
                             cfg.edge_weight, num_whole, cfg.one_step_from)
        return {"loss": adaptive_weight(torch.cat(parts), 0.5).mean(), "boundary": parts[0].mean(), "splitting": parts[1].mean()}

    num_noises = load_network(file, build_network)[1]["config"]["num_noises"]
    check_run(tmp_path / "student-digits", cfg, networks, losses, num_noises)
    assert load_network(tmp_path / "student-digits", build_network)[1]["config"]["num_noises"] == num_noises
    check_shown(shown, {f"{n}step": partial(sample_average_velocity, networks["ema"], num_steps=n) for n in (1, 2, 4)}, apart=1e-2)
