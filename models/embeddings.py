"""What a DiT is given besides the image: time, interval length, guidance scale, class, and the position of each patch."""

import math

import torch
from torch import Tensor, nn

# Angular frequencies of the time features. Times lie in [0, 1], so the slowest feature turns by 1 rad over a trajectory
# and the fastest completes about 20 turns. Far higher frequencies (the 1000 t of DDPM) make u(z, r, t) rough in t, and
# interval splitting compares u at neighbouring times (cf. Lu & Song, arXiv 2410.11081, on consistency models).
# Samples change slowly with the guidance scale; told by such fast features, a briefly trained student was uneven in it.
LOWEST_FREQUENCY, HIGHEST_FREQUENCY, OF_GUIDANCE = 1.0, 128.0, 8.0
NUM_FEATURES = 256


def sinusoid(t: Tensor, num_features: int, highest_frequency: float = HIGHEST_FREQUENCY) -> Tensor:
    """Cosine and sine features of a time, in float32 whatever the autocast.

    Args:
        t: times, interval lengths or inverse guidance scales in [0, 1], (B,).
        num_features: size of the result, even.
        highest_frequency: angular frequency of the fastest feature, in rad; the slowest has `LOWEST_FREQUENCY`.

    Returns:
        (B, num_features), values in [-1, 1].
    """
    exponent = torch.linspace(0, 1, num_features // 2, device=t.device, dtype=torch.float32)
    frequency = LOWEST_FREQUENCY * (highest_frequency / LOWEST_FREQUENCY) ** exponent
    angle = t.float()[:, None] * frequency                              # (B, F/2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)                 # (B, F)


class TimeEmbedding(nn.Module):
    """A sinusoid and a two-layer MLP, for the time t and, in a student, for the interval t - r and 1 / guidance scale."""

    def __init__(self, width: int, highest_frequency: float = HIGHEST_FREQUENCY):
        super().__init__()
        self.highest_frequency = highest_frequency
        self.hidden = nn.Linear(NUM_FEATURES, width)
        self.out = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """t: (B,) in [0, 1]. Returns (B, width)."""
        features = sinusoid(t, NUM_FEATURES, self.highest_frequency).to(self.hidden.weight.dtype)
        return self.out(nn.functional.silu(self.hidden(features)))


def rotary_table(grid_size: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the axial 2-D rotary embedding (Su et al., arXiv 2104.09864), half of the pairs for each axis.

    Args:
        grid_size: patches along one side of the square image.
        head_dim: channels of one attention head, divisible by 4.

    Returns:
        cos and sin, each (grid_size ** 2, head_dim / 2): row angles first, then column angles.
    """
    frequency = math.pi ** torch.linspace(0, 2, head_dim // 4) / grid_size          # about 1/G to pi^2/G rad per patch
    position = torch.arange(grid_size, dtype=torch.float32)
    angle = position[:, None] * frequency                                           # (G, hd/4)
    rows = angle[:, None].expand(grid_size, grid_size, -1)
    columns = angle[None].expand(grid_size, grid_size, -1)
    angle = torch.cat([rows, columns], dim=-1).flatten(0, 1)                        # (T, hd/2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + hd/2]) by its patch's angle. x: (B, T, heads, hd); cos, sin: (T, hd/2)."""
    cos, sin = cos[:, None, None].to(x.dtype), sin[:, None].to(x.dtype)         # (T, 1, 1, hd/2), (T, 1, hd/2)
    x = x.unflatten(-1, (2, -1))
    # (a cos - b sin, b cos + a sin) by a flip rather than a cat, so that RMSNorm and rotation compile to one kernel.
    return (x * cos + x.flip(-2) * torch.stack([-sin, sin], dim=-2)).flatten(-2)
