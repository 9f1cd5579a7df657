"""Stage 2 on MNIST: train a few-step student u(z, r, t, y) by SplitMeanFlow (arXiv 2507.16884).

    python train_student_mnist.py                       from the newest MNIST teacher in results/, else the released one
    python train_student_mnist.py --data digits         the same on the small digits inside scikit-learn

The student learns its teacher's guidance, so it samples in 1, 2 or 4 evaluations whatever the scale.
docs/method.md explains targets, their legs and lam.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from models import Classifier, build_network, student_from_teacher
from utils import distributed, recipes
from utils.autoencoder import load_autoencoder
from utils.checkpoints import load_network, start_from, step_folders, weights_id
from utils.config import RunConfig, check_interval, check_law, parse_config, require, to_dict
from utils.data import Batches, load_data
from utils.errors import run_script
from utils.evaluation import QuickEvaluation
from utils.flow import choose_noise, interpolate
from utils.guidance import GuidedLabels, guided_as_told, guided_velocity, told
from utils.interrupt import StopRequest
from utils.losses import Leg, adaptive_weight, student_loss
from utils.meter import Meter
from utils.optim import Optimizer
from utils.pictures import sample_labels
from utils.replay import Replay
from utils.run_log import Run
from utils.sampling import sample_average_velocity
from utils.schedules import learning_rate_factor
from utils.seeding import fold, generator
from utils.sharding import load_weights, shard, whole
from utils.teachers import check_teacher, find_teacher, note_other_teacher, num_noises_of
from utils.times import LAM_LAWS, LAWS, count_whole, draw_between, draw_intervals, draw_lam, draw_times


@dataclass(frozen=True)
class Config(RunConfig):
    data: str = "mnist"                         # data set: mnist, cifar10, digits, or the path to images (folder or zip) or latents
    teacher: str | None = None                  # teacher's file, checkpoint or run folder; None: newest matching run, else the released one
    model: str | None = None                    # not needed: the student has its teacher's size; if given, it must be that
    extra_blocks: int = 0                       # blocks added between the teacher's; they do nothing at first. Multiples of 4 are fastest
    input_skip: bool = False                    # add a learned share of the input to the output; the share is zero at first
    steps: int = 4_500                          # updates in all
    optimizer: Literal["muon", "adamw"] = "muon"    # muon: Muon for the blocks' matrices, AdamW for the rest; adamw: AdamW alone
    lr: float = 7e-4                            # learning rate of AdamW
    muon_lr: float = 0.014                      # learning rate of Muon
    weight_decay: float = 0.0                   # decoupled weight decay
    warmup_steps: int = 100                     # updates of linear warm-up of the learning rates
    decay_share: float = 0.8                    # last share of the updates, in which the learning rates fall linearly to zero
    max_grad_norm: float = 1.0                  # gradients are clipped to this norm
    ema_decay: float = 0.9995                   # decay of the EMA of the weights, which is what is sampled and released
    guidance_scale: float = 1.15                # teacher's guidance scale (1: none); with --guidance-range, the student's default
    guidance_interval: tuple[float, float] = (0.0, 1.0)     # times between which the teacher is guided (0: data, 1: noise)
    guidance_range: tuple[float, float] | None = None   # lowest and highest scale, if the student takes it as an input; None: one scale
    boundary_share: float = 0.25                # share of each batch for the boundary condition; the rest is for interval splitting
    first_leg: Leg = "midpoint"                 # first leg of a target, from t to s: by the student (self), or a step of the teacher's ODE
    last_leg: Leg = "self"                      # last leg of a target, from s to r: as --first-leg; one of the two must be self
    lam_law: str = "constant(0.2)"              # share of the teacher's leg, or lam if none: uniform, constant(c), anneal(start, end, over)
    t_law: str = "logit-normal(-0.6, 1.6)"      # distribution of t: uniform, or logit-normal(loc, scale)
    r_law: str = "logit-normal(-4, 1.6)"        # distribution of r: as --t-law
    pinned_share: float = 0.6                   # share of the intervals that are pinned at those used in sampling, rather than drawn
    pinned_steps: tuple[int, ...] = (1, 2)      # numbers of sampling steps whose intervals are pinned; one named twice counts twice
    one_step_from: int = 0                      # for intervals pinned at (0, 1): a target of this many student steps; 0: two legs as usual
    edge_weight: float = 4.0                    # weight, in the losses, of error differences between neighbouring pixels; 0: none
    adaptive_power: float = 0.75                # power p of the adaptive weight 1 / (loss + 0.001)^p; 0: the plain loss
    target: Literal["online", "ema", "start"] = "online"    # what makes the student's part of targets: itself, its EMA, or its --start-from
    target_decay: float = 0.95                  # decay of the EMA of --target ema
    num_steps: tuple[int, ...] = (1, 2, 4)      # sampling steps of the sample grids and --eval-every; the GIF shows the most

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, laws in (("t_law", LAWS), ("r_law", LAWS), ("lam_law", LAM_LAWS)):
            check_law(self, field, laws)
        for field in ("lr", "muon_lr", "max_grad_norm"):
            require(self, field, 0 < getattr(self, field) < math.inf, "above 0")
        for field in ("extra_blocks", "warmup_steps", "weight_decay", "edge_weight", "adaptive_power"):
            require(self, field, 0 <= getattr(self, field) < math.inf, "at least 0")
        require(self, "guidance_scale", math.isfinite(self.guidance_scale), "a number")
        for field in ("ema_decay", "target_decay", "decay_share"):
            require(self, field, 0 <= getattr(self, field) < 1, "in [0, 1)")
        require(self, "pinned_share", 0 <= self.pinned_share <= 1, "in [0, 1]")
        require(self, "boundary_share", 0 < self.num_boundary < self.global_batch_size,
                f"such that of {self.global_batch_size} samples at least one is boundary and one is not")
        check_interval(self, "guidance_interval")
        low, high = self.guidance_range or (1, math.inf)
        require(self, "guidance_range", self.guidance_range is None or 1 <= low < high < math.inf, "two numbers, 1 <= low < high, or None")
        require(self, "guidance_scale", self.guidance_range is None or low <= self.guidance_scale <= high,
                f"in --guidance-range {low:g} {high:g}: it is what the student is told where nothing is said")
        require(self, "last_leg", "self" in (self.first_leg, self.last_leg), f"self where --first-leg is {self.first_leg}")
        require(self, "target", self.target != "start" or self.start_from is not None, "online or ema without --start-from")
        for field in ("num_steps", "pinned_steps"):
            require(self, field, len(getattr(self, field)) > 0 and min(getattr(self, field)) >= 1, "one or more counts, each at least 1")
        require(self, "one_step_from", self.one_step_from == 0 or (self.one_step_from >= 2 and 0 < self.num_whole < self.num_splitting),
                f"0, or at least 2 where --pinned-share and --pinned-steps pin one step in some but not all of the {self.num_splitting} "
                f"splitting rows, here {self.num_whole}")

    # Rows of each batch: fixed counts, so that shapes never change. Boundary first, then those that one_step_from is for, then the rest.
    @property
    def num_boundary(self) -> int:
        return round(self.boundary_share * self.global_batch_size)

    @property
    def num_splitting(self) -> int:
        return self.global_batch_size - self.num_boundary

    @property
    def num_whole(self) -> int:
        return count_whole(self.num_splitting, self.pinned_share, self.pinned_steps) if self.one_step_from else 0


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__, recipes.STUDENT)
    ranks = distributed.start(cfg.device, cfg.shard)
    device = ranks.device
    if cfg.num_boundary % ranks.world_size:
        raise ValueError(f"{cfg.num_boundary} boundary samples (--boundary-share x --global-batch-size) do not divide among "
                         f"{ranks.world_size} processes")
    if cfg.one_step_from and min(cfg.num_whole, cfg.num_splitting - cfg.num_whole) < ranks.world_size:
        raise ValueError(f"--one-step-from {cfg.one_step_from}: of {cfg.num_splitting} splitting rows {cfg.num_whole} are pinned at (0, 1) "
                         "by --global-batch-size, --pinned-share and --pinned-steps; there must be at least one of these, and one of "
                         f"the others, for each of {ranks.world_size} processes")

    # Data, teacher and student.
    run = Run(cfg, "student", ranks)                        # refuses what it can before images are read
    images = load_data(cfg.data, cfg.data_root, cfg.image_size, cfg.num_workers, (cfg.guidance_scale, *(cfg.guidance_range or ())))
    decode = load_autoencoder(images.autoencoder, cfg.autoencoder, device).decode        # from latents to images; pixels stay
    evaluate = cfg.eval_every and QuickEvaluation(cfg.classifier, Classifier, images, ranks, cfg.results_dir)
    run.learn_from(images, evaluate and evaluate.judge.name)
    kept = run.folder / "teacher.safetensors"
    goes_on = kept.exists() and bool(step_folders(run.checkpoints))
    path = kept if goes_on else find_teacher(cfg.teacher, cfg.results_dir, cfg.data, images.shape[-1], kept)
    teacher, teacher_metadata = load_network(path, build_network, device)
    check_teacher(path, teacher_metadata, images, cfg.model)
    theirs = teacher_metadata["config"]                     # its flow has mirror images or not, and pairs each image with noise in its way
    flip = theirs.get("flip") if cfg.flip is None else cfg.flip
    num_noises = num_noises_of(path, theirs, run.note)
    batches = Batches(images, cfg.global_batch_size, cfg.seed, ranks, flip)
    torch.manual_seed(fold(cfg.seed, "weights"))            # alike on every rank
    student = student_from_teacher(teacher, extra_blocks=cfg.extra_blocks, input_skip=cfg.input_skip, guidance_range=cfg.guidance_range,
                                   guidance_scale=cfg.guidance_scale)
    teacher_id = weights_id(teacher)
    if cfg.start_from and not step_folders(run.checkpoints):
        note_other_teacher(cfg.start_from, start_from(student, cfg.start_from), teacher_id, run.note)
    ema = ModelEmaV3(student, decay=cfg.ema_decay, use_warmup=True, warmup_gamma=9, warmup_power=1, exclude_buffers=True)
    targets = ModelEmaV3(student, decay=cfg.target_decay, exclude_buffers=True) if cfg.target != "online" else None
    if cfg.shard:
        shard(ranks, teacher, student, ema.module, *([targets.module] if targets else []))
    optimizer = Optimizer(student, cfg.optimizer, cfg.lr, cfg.muon_lr, cfg.weight_decay)

    # Go on where an earlier start of the same run stopped.
    networks = {"ema": ema.module, "raw": student, **({"target": targets.module} if targets else {})}
    done, seconds = 0, 0.0
    if latest := run.latest(tuple(networks), teacher_id):
        weights, training = latest
        for name, network in networks.items():
            load_weights(network, weights[name])
        optimizer.load_state_dict(training["optimizer"])
        done, seconds = training["step"], training["seconds"]
    metadata = dict(kind="student", architecture=student.architecture, classes=images.classes, autoencoder=images.autoencoder,
                    teacher=teacher_id, config=to_dict(cfg) | {"flip": flip, "num_noises": num_noises})
    if cfg.compile and device.type == "cuda":
        for network in (teacher, student, *([targets.module] if targets else [])):
            network.compile_blocks()
    u, u_target = student, targets.module if targets else student
    if cfg.guidance_range:
        u, u_target = told(u), told(u_target)
        v = guided_as_told(teacher.velocity, teacher.null_class, cfg.guidance_interval)
    else:
        v = guided_velocity(teacher.velocity, teacher.null_class, cfg.guidance_scale, cfg.guidance_interval)

    def forward_backward(z_t: Tensor, r: Tensor, t: Tensor, share: Tensor, y: Tensor, *scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of this rank's rows; leaves their gradients in the student. scale: of their guidance, if the student is told it."""
        labels = GuidedLabels(y, *scale) if scale else y
        with ranks.autocast():
            parts = student_loss(u, u_target, v, z_t, r, t, share, labels, ranks.count(cfg.num_boundary), cfg.first_leg,
                                 cfg.last_leg, cfg.edge_weight, ranks.count(cfg.num_whole), cfg.one_step_from)
            loss = adaptive_weight(torch.cat(parts), cfg.adaptive_power).mean()
        loss.backward()
        return loss, parts.boundary.mean(), parts.splitting.mean()

    if cfg.cuda_graph and device.type == "cuda" and not cfg.shard:
        forward_backward = Replay(forward_backward, student)

    # Samples are always drawn from the same noise, so that progress can be watched.
    sample_y = sample_labels(len(images.classes)).to(device)
    sample_z = torch.randn(len(sample_y), *images.shape, generator=generator(device, cfg.seed, "samples"), device=device)
    meter = Meter(["loss", "boundary", "splitting", "grad_norm"], ranks)
    run.start(done, seconds)
    run.keep_teacher(path, teacher_metadata)

    with StopRequest() as stop, run:
        for step in range(done + 1, cfg.steps + 1):         # `step` counts completed updates
            draw = generator(device, cfg.seed, "step", step)
            x, y = batches(step)                            # (B, C, H, W) in [-1, 1] and (B,), this rank's rows
            noises = [ranks.rows(torch.randn(cfg.global_batch_size, *images.shape, generator=draw, device=device))
                      for _ in range(num_noises)]
            t_boundary = draw_times(cfg.num_boundary, cfg.t_law, draw)
            r, t = draw_intervals(cfg.num_splitting, cfg.t_law, cfg.r_law, cfg.pinned_share, cfg.pinned_steps, draw,
                                  cfg.num_whole)
            share = draw_lam(cfg.global_batch_size, cfg.lam_law, (step - 1) / cfg.steps, draw)
            r, t, share = (ranks.rows(times) for times in (torch.cat([t_boundary, r]), torch.cat([t_boundary, t]), share))
            scale = [ranks.rows(draw_between(cfg.global_batch_size, *cfg.guidance_range, draw))] if cfg.guidance_range else []

            z_t = interpolate(x, choose_noise(x, y, noises, ranks.gather), t)

            loss, boundary, splitting = forward_backward(z_t, r, t, share, y, *scale)
            ranks.average_gradients(student)
            grad_norm = whole(clip_grad_norm_(student.parameters(), cfg.max_grad_norm))
            lr_factor = learning_rate_factor(step, cfg.steps, cfg.warmup_steps, cfg.decay_share)
            optimizer.step(lr_factor, skip=meter.record(step, loss=loss, boundary=boundary, splitting=splitting, grad_norm=grad_norm))
            optimizer.zero_grad()
            ema.update(student, step)
            if cfg.target == "ema":
                targets.update(student)
            run.advance()

            last = step == cfg.steps
            stopping = run.asked_to_stop(step, stop)
            sampling = last or step % cfg.sample_every == 0
            saving = last or stopping or step % cfg.save_every == 0
            if sampling or saving or step % cfg.log_every == 0:
                run.scalars(step, **meter.read(), learning_rate=cfg.lr * lr_factor)     # raises if anything is not finite
            if sampling:
                with run.paused(), ranks.autocast():
                    for num_steps in cfg.num_steps:
                        trajectory = sample_average_velocity(ema.module, sample_z, sample_y, num_steps, trajectory=True)
                        run.images(step, f"{num_steps}step", decode(trajectory[-1]))
                        if num_steps == max(cfg.num_steps):
                            run.gif(step, f"trajectory_{num_steps}step", decode(trajectory))
            if evaluate and (last or step % cfg.eval_every == 0):
                with run.paused():
                    rows = {f"{n}step": partial(sample_average_velocity, ema.module, num_steps=n) for n in cfg.num_steps}
                    run.evaluation(step, evaluate(rows), ema.module, metadata)
            if saving:
                with run.paused():
                    run.save(step, networks, dict(optimizer=optimizer.state_dict(), seconds=run.seconds), metadata)
            if stopping:
                break
    run.leave(step, stop)


if __name__ == "__main__":
    run_script(main)
