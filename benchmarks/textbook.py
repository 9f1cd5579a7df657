"""The loop that tutorials teach, to measure against: the same network, AdamW, nothing compiled, no care for the GPU's queue.

Images are decoded by Pillow in worker processes at every epoch, the loss is read at every step, the EMA is updated parameter
by parameter. Started by `benchmarks.throughput`; leaves metrics.jsonl as the training scripts do.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.metrics import Metrics, RivalConfig
from models import DiT
from utils import distributed
from utils.config import parse_config
from utils.errors import run_script
from utils.flow import conditional_velocity, interpolate


@dataclass(frozen=True)
class Config(RivalConfig):
    precision: Literal["fp32", "bf16"] = "fp32"     # fp32 with TF32 matrix products, or bf16 autocast
    num_workers: int = 8                        # worker processes


def endless(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__)
    device = distributed.start(cfg.device).device
    torch.manual_seed(0)
    transform = transforms.Compose([
        transforms.Resize(cfg.image_size), transforms.CenterCrop(cfg.image_size), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3),
    ])
    data = ImageFolder(cfg.data, transform)
    loader = DataLoader(data, cfg.batch_size, shuffle=True, drop_last=True, num_workers=cfg.num_workers, pin_memory=device.type == "cuda",
                        persistent_workers=cfg.num_workers > 0)
    if not len(loader):
        raise ValueError(f"--batch-size {cfg.batch_size}: {cfg.data} has only {len(data)} images")
    network = DiT(cfg.model, cfg.image_size, 3, len(data.classes)).to(device)
    ema = deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    metrics = Metrics(cfg.results_dir, cfg.name, cfg.batch_size, device)

    for step, (x, y) in zip(range(1, cfg.steps + 1), endless(loader)):
        x, y = x.to(device), y.to(device)
        eps, t = torch.randn_like(x), torch.rand(len(x), device=device)
        y = torch.where(torch.rand(len(x), device=device) < 0.1, network.null_class, y)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            loss = F.mse_loss(network.velocity(interpolate(x, eps, t), t, y), conditional_velocity(x, eps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for average, p in zip(ema.parameters(), network.parameters()):
                average.mul_(0.9995).add_(p, alpha=1 - 0.9995)
        value = loss.item()
        if step % cfg.log_every == 0:
            metrics.line(step, loss=value)


if __name__ == "__main__":
    run_script(main)
