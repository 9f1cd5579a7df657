"""A MeanFlow training step by forward-mode differentiation (arXiv 2505.13447), to measure against.

Everything but the loss is ours, to compare the two losses and nothing else: data on the device, fixed shapes, Muon, fused
EMA, the loss compiled as one function. A quarter of the samples has r < t, as in MeanFlow's best runs, and the JVP is taken
of the whole batch, as its authors' code does. Attention is not fused: fused kernels have no forward-mode derivative.
Started by `benchmarks.throughput`; leaves metrics.jsonl as the training scripts do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_

from benchmarks.metrics import Metrics, RivalConfig
from models import DiT
from utils import distributed
from utils.config import parse_config
from utils.data import Batches, load_images
from utils.errors import run_script
from utils.flow import conditional_velocity, interpolate
from utils.losses import adaptive_weight, mean_flow_loss
from utils.meter import Meter
from utils.optim import Optimizer
from utils.seeding import generator
from utils.times import draw_times


@dataclass(frozen=True)
class Config(RivalConfig):
    share: float = 0.25                         # of the batch: r < t
    compile: bool = True                        # torch.compile the loss


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__)
    ranks = distributed.start(cfg.device)
    images = load_images(cfg.data, image_size=cfg.image_size)
    batches = Batches(images, cfg.batch_size, 0, ranks)
    network = DiT(cfg.model, cfg.image_size, 3, len(images.classes), interval=True).to(ranks.device)
    ema = ModelEmaV3(network, decay=0.9995, use_warmup=True, warmup_gamma=9, warmup_power=1, exclude_buffers=True)
    optimizer = Optimizer(network, "muon", 1e-3, 0.02)
    meter = Meter(["loss"], ranks)
    metrics = Metrics(cfg.results_dir, cfg.name, cfg.batch_size, ranks.device)

    def loss_of(x: Tensor, eps: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
        per_sample = mean_flow_loss(network, interpolate(x, eps, t), conditional_velocity(x, eps), r, t, y)
        return adaptive_weight(per_sample, 0.75).mean()

    if cfg.compile and ranks.device.type == "cuda":
        loss_of = torch.compile(loss_of, dynamic=False)
    with sdpa_kernel(SDPBackend.MATH):
        for step in range(1, cfg.steps + 1):
            draw = generator(ranks.device, 0, "step", step)
            x, y = batches(step)
            eps = torch.randn(x.shape, generator=draw, device=ranks.device)
            a, b = (draw_times(cfg.batch_size, "logit-normal(-0.4, 1)", draw) for _ in range(2))
            t = torch.maximum(a, b)
            r = torch.where(torch.arange(cfg.batch_size, device=t.device) < cfg.share * cfg.batch_size, torch.minimum(a, b), t)
            with ranks.autocast():
                loss = loss_of(x, eps, r, t, y)
            loss.backward()
            clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step(1.0, skip=meter.record(step, loss=loss))
            optimizer.zero_grad()
            ema.update(network, step)
            if step % cfg.log_every == 0:
                metrics.line(step, **meter.read())


if __name__ == "__main__":
    run_script(main)
