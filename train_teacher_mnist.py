"""Stage 1 on MNIST: train a flow-matching teacher v(z, t, y). Some labels are dropped so that it can be guided.

    python train_teacher_mnist.py                       MNIST, one GPU
    python train_teacher_mnist.py --data digits         small digits inside scikit-learn: no download, a minute on a CPU
    torchrun --nproc-per-node=8 train_teacher_mnist.py  eight GPUs, the same global batch

Everything is written to results/<name>/. Repeat the command to continue a run that was stopped.
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

from models import PRESETS, Classifier, DiT
from utils import distributed, recipes
from utils.augmentation import AUGMENT_DIM, augment, check_augment, draw_augment_labels
from utils.autoencoder import load_autoencoder
from utils.checkpoints import start_from, step_folders
from utils.config import RunConfig, check_law, parse_config, require, to_dict
from utils.data import Batches, load_data
from utils.errors import run_script
from utils.evaluation import QuickEvaluation
from utils.flow import choose_noise
from utils.guidance import drop_labels, guided_velocity
from utils.interrupt import StopRequest
from utils.losses import flow_matching_loss
from utils.meter import Meter
from utils.optim import Optimizer
from utils.pictures import sample_labels
from utils.replay import Replay
from utils.run_log import Run
from utils.sampling import sample_velocity
from utils.schedules import learning_rate_factor
from utils.seeding import fold, generator
from utils.sharding import load_weights, shard, whole
from utils.times import LAWS, draw_times


@dataclass(frozen=True)
class Config(RunConfig):
    data: str = "mnist"                         # data set: mnist, cifar10, digits, or the path to images (folder or zip) or latents
    model: str = "DiT-Ti/4"                     # DiT-Nano, Ti, S, B, L or XL, with /2, /4 or /8 for the patch size, as in DiT-S/2
    steps: int = 8_000                          # updates in all
    optimizer: Literal["muon", "adamw"] = "muon"    # muon: Muon for the blocks' matrices, AdamW for the rest; adamw: AdamW alone
    lr: float = 1e-3                            # learning rate of AdamW
    muon_lr: float = 0.02                       # learning rate of Muon
    weight_decay: float = 0.0                   # decoupled weight decay
    warmup_steps: int = 100                     # updates of linear warm-up of the learning rates
    decay_share: float = 0.4                    # last share of the updates, in which the learning rates fall linearly to zero
    max_grad_norm: float = 1.0                  # gradients are clipped to this norm
    ema_decay: float = 0.9995                   # decay of the EMA of the weights, which is what is sampled and released
    t_law: str = "logit-normal(0, 1)"           # distribution of t: uniform, or logit-normal(loc, scale)
    label_dropout: float = 0.1                  # share of labels replaced by "no class", which makes guidance possible
    num_noises: int = 4                         # noises of which an image gets the one most towards it; 1: any. Its students draw as many
    augment: float = 0.0                        # chance of each: to scale, stretch, rotate, shift an image; the network is told how
    guidance_scale: tuple[float, ...] = (1.0, 2.5, 5.0)     # guidance scales of the sample grids; the GIF shows the middle one
    sample_steps: int = 25                      # Euler steps for the sample grids and --eval-every

    def __post_init__(self) -> None:
        super().__post_init__()
        check_law(self, "t_law", LAWS)
        require(self, "model", self.model in PRESETS, f"one of {', '.join(PRESETS)}")
        patch_size = PRESETS[self.model][1]
        require(self, "image_size", self.image_size is None or self.image_size % patch_size == 0,
                f"a multiple of {patch_size}, the patch size of --model {self.model}")
        for field in ("lr", "muon_lr", "max_grad_norm"):
            require(self, field, 0 < getattr(self, field) < math.inf, "above 0")
        for field in ("warmup_steps", "weight_decay"):
            require(self, field, 0 <= getattr(self, field) < math.inf, "at least 0")
        for field in ("label_dropout", "ema_decay", "decay_share", "augment"):
            require(self, field, 0 <= getattr(self, field) < 1, "in [0, 1)")
        require(self, "num_noises", self.num_noises >= 1, "at least 1")
        scales = self.guidance_scale
        require(self, "guidance_scale", len(scales) > 0 and all(map(math.isfinite, scales)), "one or more numbers")
        require(self, "sample_steps", self.sample_steps >= 1, "at least 1")


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__, recipes.TEACHER)
    ranks = distributed.start(cfg.device, cfg.shard)
    device = ranks.device

    # Data and network.
    run = Run(cfg, "teacher", ranks)                        # refuses what it can before images are read
    images = load_data(cfg.data, cfg.data_root, cfg.image_size, cfg.num_workers, cfg.guidance_scale)
    check_augment(images, cfg.augment)
    decode = load_autoencoder(images.autoencoder, cfg.autoencoder, device).decode        # from latents to images; pixels stay
    batches = Batches(images, cfg.global_batch_size, cfg.seed, ranks, cfg.flip)
    evaluate = cfg.eval_every and QuickEvaluation(cfg.classifier, Classifier, images, ranks, cfg.results_dir)
    run.learn_from(images, evaluate and evaluate.judge.name)
    torch.manual_seed(fold(cfg.seed, "weights"))            # alike on every rank
    augment_dim = AUGMENT_DIM if cfg.augment else 0
    network = DiT(cfg.model, images.shape[1], images.shape[0], len(images.classes), augment_dim=augment_dim).to(device)
    if cfg.start_from and not step_folders(run.checkpoints):
        start_from(network, cfg.start_from)
    ema = ModelEmaV3(network, decay=cfg.ema_decay, use_warmup=True, warmup_gamma=9, warmup_power=1, exclude_buffers=True)
    if cfg.shard:
        shard(ranks, network, ema.module)
    optimizer = Optimizer(network, cfg.optimizer, cfg.lr, cfg.muon_lr, cfg.weight_decay)

    # Go on where an earlier start of the same run stopped.
    networks = {"ema": ema.module, "raw": network}
    done, seconds = 0, 0.0
    if latest := run.latest(tuple(networks)):
        weights, training = latest
        for name in networks:
            load_weights(networks[name], weights[name])
        optimizer.load_state_dict(training["optimizer"])
        done, seconds = training["step"], training["seconds"]
    metadata = dict(kind="teacher", architecture=network.architecture, classes=images.classes, autoencoder=images.autoencoder,
                    config=to_dict(cfg))
    if cfg.compile and device.type == "cuda":
        network.compile_blocks()

    def forward_backward(x: Tensor, eps: Tensor, t: Tensor, y: Tensor, augment_labels: Tensor | None = None) -> tuple[Tensor]:
        """Loss of this rank's rows; leaves its gradients in the network."""
        with ranks.autocast():
            loss = flow_matching_loss(partial(network.velocity, augment_labels=augment_labels), x, eps, t, y).mean()
        loss.backward()
        return (loss,)

    if cfg.cuda_graph and device.type == "cuda" and not cfg.shard:
        forward_backward = Replay(forward_backward, network)

    guided = {scale: guided_velocity(ema.module.velocity, network.null_class, scale) for scale in cfg.guidance_scale}
    # Samples are always drawn from the same noise, so that progress can be watched.
    sample_y = sample_labels(len(images.classes)).to(device)
    sample_z = torch.randn(len(sample_y), *images.shape, generator=generator(device, cfg.seed, "samples"), device=device)
    meter = Meter(["loss", "grad_norm"], ranks)
    run.start(done, seconds)

    with StopRequest() as stop, run:
        for step in range(done + 1, cfg.steps + 1):         # `step` counts completed updates
            draw = generator(device, cfg.seed, "step", step)
            x, y = batches(step)                            # (B, C, H, W) in [-1, 1] and (B,), this rank's rows
            noises = [ranks.rows(torch.randn(cfg.global_batch_size, *images.shape, generator=draw, device=device))
                      for _ in range(cfg.num_noises)]
            t = ranks.rows(draw_times(cfg.global_batch_size, cfg.t_law, draw))
            coin = ranks.rows(torch.rand(cfg.global_batch_size, generator=draw, device=device))
            augment_labels = [ranks.rows(draw_augment_labels(cfg.global_batch_size, cfg.augment, draw))] if cfg.augment else []
            x = augment(x, *augment_labels) if cfg.augment else x
            eps = choose_noise(x, y, noises, ranks.gather)
            y = drop_labels(y, network.null_class, cfg.label_dropout, coin)

            (loss,) = forward_backward(x, eps, t, y, *augment_labels)
            ranks.average_gradients(network)
            grad_norm = whole(clip_grad_norm_(network.parameters(), cfg.max_grad_norm))
            lr_factor = learning_rate_factor(step, cfg.steps, cfg.warmup_steps, cfg.decay_share)
            optimizer.step(lr_factor, skip=meter.record(step, loss=loss, grad_norm=grad_norm))
            optimizer.zero_grad()
            ema.update(network, step)
            run.advance()

            last = step == cfg.steps
            stopping = run.asked_to_stop(step, stop)
            sampling = last or step % cfg.sample_every == 0
            saving = last or stopping or step % cfg.save_every == 0
            if sampling or saving or step % cfg.log_every == 0:
                run.scalars(step, **meter.read(), learning_rate=cfg.lr * lr_factor)     # raises if anything is not finite
            if sampling:
                with run.paused(), ranks.autocast():
                    for scale, v in guided.items():
                        trajectory = sample_velocity(v, sample_z, sample_y, cfg.sample_steps, trajectory=True)
                        run.images(step, f"cfg{scale}", decode(trajectory[-1]))
                        if scale == sorted(cfg.guidance_scale)[len(cfg.guidance_scale) // 2]:
                            run.gif(step, f"trajectory_cfg{scale}", decode(trajectory))
            if evaluate and (last or step % cfg.eval_every == 0):
                with run.paused():
                    rows = {f"cfg{w}": partial(sample_velocity, v, num_steps=cfg.sample_steps) for w, v in guided.items()}
                    run.evaluation(step, evaluate(rows), ema.module, metadata)
            if saving:
                with run.paused():
                    run.save(step, networks, dict(optimizer=optimizer.state_dict(), seconds=run.seconds), metadata)
            if stopping:
                break
    run.leave(step, stop)


if __name__ == "__main__":
    run_script(main)
