"""PyTorch's images for the page's noise: reads what test.mjs took from the page, prints the largest difference in grey levels.

    python -m demo.reference checkpoints/student-mnist.safetensors page.json
"""

import json
import sys
from pathlib import Path

import torch

from models import build_network
from utils.checkpoints import load_network
from utils.data import to_pixels
from utils.sampling import sample_average_velocity


def differences(checkpoint: str, page: dict) -> dict[str, int]:
    """Number of steps to the largest difference of any value, 0 to 255. page: label, noise (C * H * W numbers), guidance if one was chosen,
    and for each number of steps the RGBA bytes of a canvas."""
    network, _ = load_network(checkpoint, build_network)
    z, u = torch.tensor(page["noise"]).view(1, *network.shape), network.at_guidance(page.get("guidance"))
    result = {}
    for steps, rgba in page["images"].items():
        ours = to_pixels(sample_average_velocity(u, z, torch.tensor([page["label"]]), int(steps)))[0]
        theirs = torch.tensor(rgba).view(*network.shape[1:], 4)[..., :3].permute(2, 0, 1)                  # (3, H, W)
        result[steps] = int((ours.int() - theirs).abs().max())
    return result


if __name__ == "__main__":
    print(json.dumps(differences(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))))
