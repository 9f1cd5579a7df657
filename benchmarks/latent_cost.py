"""What training on latents of 256 x 256 images should cost: an ESTIMATE, scaled by operations from DiT-S/2's measured speed.

    python -m benchmarks.latent_cost

Larger matrices keep a GPU busier, so larger networks may do better than this; several GPUs have to average gradients, which
is not counted. `benchmarks.throughput` measures.
"""

from typing import Any

import torch

from benchmarks.throughput import forward_flops
from models import DiT
from utils.errors import run_script

# Images/s of DiT-S/2 at 32 x 32 x 3 (256 tokens, as on latents), batch 512, one H100: benchmarks/README.md.
MEASURED = {"teacher": 8_502, "student": 4_065}
SIZE, CHANNELS, CLASSES = 32, 4, 1000                       # 256 x 256 pixels by an autoencoder of factor 8


def rows(models: list[str]) -> list[dict[str, Any]]:
    """Parameters, operations of one forward pass, and images/s of each network; the first one is the measured one."""
    flops = [forward_flops(model, SIZE, CHANNELS) for model in models]
    with torch.device("meta"):                              # sizes only
        networks = [DiT(model, SIZE, CHANNELS, CLASSES) for model in models]
    return [{"model": model, "parameters": sum(p.numel() for p in network.parameters()), "flops": each,
             "times": each / flops[0], **{stage: speed * flops[0] / each for stage, speed in MEASURED.items()}}
            for model, network, each in zip(models, networks, flops)]


def main() -> None:
    print("| network | parameters | GFLOP forward | times DiT-S/2 | teacher, images/s | student, images/s | "
          "GPU hours for 100,000 updates of 1,024: teacher | student |\n" + "|---" * 8 + "|")
    for row in rows(["DiT-S/2", "DiT-B/2", "DiT-L/2", "DiT-XL/2"]):
        hours = [1e5 * 1024 / row[stage] / 3600 for stage in MEASURED]
        print(f"| {row['model']} | {row['parameters'] / 1e6:.0f} M | {row['flops'] / 1e9:.1f} | {row['times']:.2f} | "
              f"{row['teacher']:,.0f} | {row['student']:,.0f} | {hours[0]:.0f} | {hours[1]:.0f} |")


if __name__ == "__main__":
    run_script(main)
