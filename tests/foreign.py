"""A transformer of DiT's and SiT's layout as another project would compute it: from its state dict, in its own convention.

Written with explicit loops and matrix products, without the project's network, to compare that with.
"""

import math

import torch
from torch import Tensor

CHANNELS, SIZE, CLASSES, DEPTH, WIDTH, HEADS, PATCH = 3, 8, 2, 2, 24, 3, 2
TOKENS = (SIZE // PATCH) ** 2
PRESET = f"SiT-{DEPTH}x{WIDTH}x{HEADS}/{PATCH}"


def random_state(seed: int = 0, learn_sigma: bool = False) -> dict[str, Tensor]:
    """Random weights, no two alike, with every name of the layout written out."""
    outputs = PATCH**2 * CHANNELS * (2 if learn_sigma else 1)
    shapes = {"x_embedder.proj.weight": (WIDTH, CHANNELS, PATCH, PATCH), "x_embedder.proj.bias": (WIDTH,), "pos_embed": (1, TOKENS, WIDTH),
              "t_embedder.mlp.0.weight": (WIDTH, 256), "t_embedder.mlp.0.bias": (WIDTH,),
              "t_embedder.mlp.2.weight": (WIDTH, WIDTH), "t_embedder.mlp.2.bias": (WIDTH,),
              "y_embedder.embedding_table.weight": (CLASSES + 1, WIDTH),
              "final_layer.linear.weight": (outputs, WIDTH), "final_layer.linear.bias": (outputs,),
              "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH), "final_layer.adaLN_modulation.1.bias": (2 * WIDTH,)}
    for n in range(DEPTH):
        for part, rows, columns in (("attn.qkv", 3 * WIDTH, WIDTH), ("attn.proj", WIDTH, WIDTH), ("mlp.fc1", 4 * WIDTH, WIDTH),
                                    ("mlp.fc2", WIDTH, 4 * WIDTH), ("adaLN_modulation.1", 6 * WIDTH, WIDTH)):
            shapes |= {f"blocks.{n}.{part}.weight": (rows, columns), f"blocks.{n}.{part}.bias": (rows,)}
    draw = torch.Generator().manual_seed(seed)
    return {name: 0.15 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def velocity(state: dict[str, Tensor], z: Tensor, time: Tensor, y: Tensor) -> Tensor:
    """The velocity as the weights mean it. z: (B, C, H, W); time: (B,), in their direction and scale; y: (B,)."""
    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def normalise(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def silu(x: Tensor) -> Tensor:
        return x / (1 + (-x).exp())

    grid, kernel = SIZE // PATCH, state["x_embedder.proj.weight"].flatten(1)
    patches = [z[:, :, i * PATCH : (i + 1) * PATCH, j * PATCH : (j + 1) * PATCH].flatten(1) for i in range(grid) for j in range(grid)]
    x = torch.stack(patches, 1) @ kernel.T + state["x_embedder.proj.bias"] + state["pos_embed"]

    # All in float32, as these networks are trained: at a time scale of 1000 its rounding shows in the fifth digit.
    frequencies = [(torch.tensor(-math.log(10_000)) * i / 128).exp() for i in range(128)]
    angles = torch.stack([time * frequency for frequency in frequencies], 1)
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = silu(c + state["y_embedder.embedding_table.weight"][y])

    for n in range(DEPTH):
        modulation = linear(f"blocks.{n}.adaLN_modulation.1", c)[:, None]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (modulation[..., i * WIDTH : (i + 1) * WIDTH] for i in range(6))
        qkv = linear(f"blocks.{n}.attn.qkv", normalise(x) * (1 + scale_a) + shift_a).view(len(z), TOKENS, 3, HEADS, WIDTH // HEADS)
        heads = []
        for h in range(HEADS):
            q, k, v = (qkv[:, :, part, h] for part in range(3))
            heads.append((q @ k.mT / math.sqrt(WIDTH // HEADS)).softmax(-1) @ v)
        x = x + gate_a * linear(f"blocks.{n}.attn.proj", torch.cat(heads, -1))
        hidden = linear(f"blocks.{n}.mlp.fc1", normalise(x) * (1 + scale_m) + shift_m)
        hidden = hidden / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + gate_m * linear(f"blocks.{n}.mlp.fc2", hidden)

    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].split(WIDTH, -1)
    x = linear("final_layer.linear", normalise(x) * (1 + scale) + shift)
    x = x.view(len(z), grid, grid, PATCH, PATCH, -1)                # output channels last: twice as many with learn_sigma
    v = torch.empty_like(z)
    for i in range(SIZE):
        for j in range(SIZE):
            v[:, :, i, j] = x[:, i // PATCH, j // PATCH, i % PATCH, j % PATCH, :CHANNELS]
    return v


def inputs(batch: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, r, t and y in our convention."""
    draw = torch.Generator().manual_seed(1)
    z = torch.randn(batch, CHANNELS, SIZE, SIZE, generator=draw)
    r, t = torch.rand(batch, 2, generator=draw).sort(1).values.T
    return z, r, t, torch.arange(batch) % (CLASSES + 1)
