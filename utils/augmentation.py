"""Augmentation that does not leak into samples: training images are moved, and the network is told how
(Karras et al., arXiv 2206.00364, Sec. 5).

Told that nothing was done, it makes images like the data. So a teacher can train on few images for much longer before it memorises them.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.data import Images
from utils.flow import pad_like
from utils.latents import Latents

# What a network is told: log2 of the scale; log2 of the stretch times cos and sin of its direction; 1 - cos and sin of the
# rotation; shift along x and y. In units of what is usual, and all zero where nothing is done.
AUGMENT_DIM = 7
SCALE, STRETCH, SHIFT = 0.2, 0.2, 0.125         # standard deviations: of two log2, and as a share of the side


def check_augment(images: Images | Latents, rate: float) -> None:
    """Raise ValueError if what an autoencoder made of images is to be moved as if it were an image."""
    if rate and images.autoencoder:
        raise ValueError(f"--augment {rate:g}: {images.name} holds latents, and images alone can be augmented; use --augment 0")


def draw_augment_labels(num: int, rate: float, generator: torch.Generator) -> Tensor:
    """How `num` images are to be moved: each is scaled, stretched, rotated and shifted with chance `rate` each. (num, 7), see above."""
    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=generator.device)

    scale, stretch, *shift = torch.randn(4, num, generator=generator, device=generator.device)
    direction, angle = 2 * math.pi * uniform(2, num)
    labels = torch.stack([scale, stretch * direction.cos(), stretch * direction.sin(), 1 - angle.cos(), angle.sin(), *shift], dim=1)
    chosen = uniform(num, 4) < rate
    return torch.where(chosen[:, [0, 1, 1, 2, 2, 3, 3]], labels, 0)


def augment(x: Tensor, labels: Tensor) -> Tensor:
    """Images moved as the labels say, by bicubic interpolation, reflected at the border; those with labels of zero stay as they are.

    x: (B, C, H, H) in [-1, 1]; labels: (B, 7) of `draw_augment_labels`. Returns (B, C, H, H) in [-1, 1].
    """
    scale, cos2, sin2, less, sin, *shift = labels.unbind(1)
    cos, stretch = 1 - less, math.log(2) * STRETCH * torch.hypot(cos2, sin2)
    direction = torch.atan2(sin2, cos2)
    even, odd = stretch.cosh(), stretch.sinh()
    # From where each pixel is taken: longer along one direction and shorter across it, then turned, scaled and shifted.
    longer = square(even + odd * direction.cos(), odd * direction.sin(), odd * direction.sin(), even - odd * direction.cos())
    linear = square(cos, -sin, sin, cos) @ longer * torch.exp2(SCALE * scale)[:, None, None]
    matrix = torch.cat([linear, 2 * SHIFT * torch.stack(shift, dim=1)[:, :, None]], dim=2)                      # (B, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(-1, 1)
    return torch.where(pad_like((labels != 0).any(1), x), moved, x)


def square(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """[[a, b], [c, d]] of numbers (B,): (B, 2, 2)."""
    return torch.stack([a, b, c, d], dim=1).unflatten(1, (2, 2))
