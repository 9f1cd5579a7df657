"""Translate the weights of other projects, in the layout of DiT's and SiT's published state dicts, to our names.

`read_shapes` finds the network that a state dict belongs to, and `translate` returns its weights. Both are strict: every
tensor of the state dict is used, or named in an error.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.sit import SIZES, SiT, parse_preset, preset_name

# Their name: ours. {n} is a block's number.
KEYS = {
    "x_embedder.proj.weight": "patch_embed.proj.weight",
    "x_embedder.proj.bias": "patch_embed.proj.bias",
    "pos_embed": "position",
    "t_embedder.mlp.0.weight": "time_embed.hidden.weight",
    "t_embedder.mlp.0.bias": "time_embed.hidden.bias",
    "t_embedder.mlp.2.weight": "time_embed.out.weight",
    "t_embedder.mlp.2.bias": "time_embed.out.bias",
    "y_embedder.embedding_table.weight": "label_embed.weight",
    "blocks.{n}.attn.qkv.weight": "blocks.{n}.attention.qkv.weight",
    "blocks.{n}.attn.qkv.bias": "blocks.{n}.attention.qkv.bias",
    "blocks.{n}.attn.proj.weight": "blocks.{n}.attention.out.weight",
    "blocks.{n}.attn.proj.bias": "blocks.{n}.attention.out.bias",
    "blocks.{n}.mlp.fc1.weight": "blocks.{n}.mlp.hidden.weight",
    "blocks.{n}.mlp.fc1.bias": "blocks.{n}.mlp.hidden.bias",
    "blocks.{n}.mlp.fc2.weight": "blocks.{n}.mlp.out.weight",
    "blocks.{n}.mlp.fc2.bias": "blocks.{n}.mlp.out.bias",
    "blocks.{n}.adaLN_modulation.1.weight": "blocks.{n}.modulation.weight",
    "blocks.{n}.adaLN_modulation.1.bias": "blocks.{n}.modulation.bias",
    "final_layer.adaLN_modulation.1.weight": "final.modulation.weight",
    "final_layer.adaLN_modulation.1.bias": "final.modulation.bias",
    "final_layer.linear.weight": "final.out.weight",
    "final_layer.linear.bias": "final.out.bias",
}
WRAPPERS = ("module.", "_orig_mod.")            # what DistributedDataParallel and torch.compile put before every name


@dataclass(frozen=True)
class Shapes:
    """What the shapes of a state dict tell about its network. The number of heads is not among it."""

    depth: int
    width: int
    patch_size: int
    image_size: int
    num_channels: int
    num_classes: int
    learn_sigma: bool           # twice the output channels; the first half is the velocity


def key_map(depth: int) -> dict[str, str]:
    """`KEYS` with the blocks' numbers filled in: their name to ours."""
    return {theirs.replace("{n}", str(n)): ours.replace("{n}", str(n))
            for theirs, ours in KEYS.items() for n in range(depth if "{n}" in theirs else 1)}


def unwrap(state: Mapping[str, Tensor], ignore: Sequence[str] = ()) -> dict[str, Tensor]:
    """Names without `WRAPPERS`, and without the tensors whose name then begins with one of `ignore`.

    Raises:
        ValueError: an entry of `ignore` that nothing begins with, or that would leave out a weight of the network; a name twice.
    """
    result = {}
    for name, tensor in state.items():
        while wrapper := next((w for w in WRAPPERS if name.startswith(w)), None):
            name = name.removeprefix(wrapper)
        if name in result:
            raise ValueError(f"the weights hold {name} twice, with and without a prefix of {', '.join(WRAPPERS)}")
        result[name] = tensor
    for start in ignore:
        chosen = [name for name in result if name.startswith(start)]
        needed = [name for name in chosen if re.sub(r"^blocks\.\d+\.", "blocks.{n}.", name) in KEYS]
        if not chosen:
            parts = sorted({name.partition(".")[0] for name in result})
            raise ValueError(f"--ignore {start}: no weight's name begins so; the parts are {some(parts)}")
        if needed:
            raise ValueError(f"--ignore {start}: {some(needed)} cannot be left out, the network needs it")
        result = {name: tensor for name, tensor in result.items() if name not in chosen}
    return result


def some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def read_shapes(state: Mapping[str, Tensor]) -> Shapes:
    """Which network an unwrapped state dict belongs to.

    Raises:
        ValueError: a name that `KEYS` does not have, a missing one, or shapes of no such network.
    """
    numbers = [int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))]
    depth = max(numbers, default=0) + 1
    known = key_map(depth)
    unknown, missing = [name for name in state if name not in known], [name for name in known if name not in state]
    if unknown or missing:
        raise ValueError("these are not the weights of a DiT or SiT" + (f"; unknown: {some(unknown)}" if unknown else "")
                         + (f"; missing: {some(missing)}" if missing else ""))
    patch, table, position = (state[name].shape for name in ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "pos_embed"))
    outputs = state["final_layer.linear.bias"].numel()
    if len(patch) != 4 or patch[2] != patch[3] or len(table) != 2 or len(position) != 3 or math.isqrt(position[1]) ** 2 != position[1]:
        raise ValueError(f"shapes of no DiT or SiT with square images: x_embedder.proj.weight {list(patch)}, pos_embed {list(position)}, "
                         f"y_embedder.embedding_table.weight {list(table)}")
    width, num_channels, patch_size = patch[:3]
    pixels = patch_size**2 * num_channels
    if outputs not in (pixels, 2 * pixels):
        raise ValueError(f"final_layer.linear has {outputs} outputs, but patches of {num_channels} x {patch_size} x {patch_size} need "
                         f"{pixels}, with learn_sigma twice that")
    return Shapes(depth, width, patch_size, math.isqrt(position[1]) * patch_size, num_channels, table[0] - 1,
                  learn_sigma=outputs == 2 * pixels)


def choose_preset(shapes: Shapes, preset: str | None = None, num_heads: int | None = None) -> str:
    """The preset of these shapes. The number of heads comes from `preset`, from `num_heads`, or from the known size they have.

    Raises:
        ValueError: the shapes are not the preset's, or nothing tells the number of heads.
    """
    if preset is not None:
        size, patch_size = parse_preset(preset)
        if (size.depth, size.width, patch_size) != (shapes.depth, shapes.width, shapes.patch_size):
            raise ValueError(f"--preset {preset} has depth {size.depth}, width {size.width}, patch size {patch_size}; the weights have "
                             f"depth {shapes.depth}, width {shapes.width}, patch size {shapes.patch_size}")
        if num_heads not in (None, size.num_heads):
            raise ValueError(f"--num-heads {num_heads}: --preset {preset} has {size.num_heads}; give one of the two")
        return preset_name(shapes.depth, shapes.width, size.num_heads, patch_size)
    if num_heads is None:
        known = [size.num_heads for size in SIZES.values() if (size.depth, size.width) == (shapes.depth, shapes.width)]
        if not known:
            raise ValueError(f"depth {shapes.depth} and width {shapes.width} are no known size, and the weights do not show the number of "
                             "heads: give --num-heads")
        num_heads = known[0]
    name = preset_name(shapes.depth, shapes.width, num_heads, shapes.patch_size)
    parse_preset(name)                                      # raises where the heads do not divide the width
    return name


def translate(state: Mapping[str, Tensor], shapes: Shapes, architecture: Mapping) -> dict[str, Tensor]:
    """The weights of `SiT(**architecture)` from an unwrapped state dict. With learn_sigma the outputs that are no velocity are dropped.

    Args:
        architecture: as `SiT.architecture`, of a teacher.

    Raises:
        ValueError: a tensor of another shape than that network's.
    """
    with torch.device("meta"):                              # shapes alone: an XL network takes no memory here
        expected = SiT(**{key: value for key, value in architecture.items() if key != "network"}).state_dict()
    weights = {ours: state[theirs] for theirs, ours in key_map(shapes.depth).items()}
    if shapes.learn_sigma:                                  # outputs lie in the order (row, column, channel) of the patch
        for name in ("final.out.weight", "final.out.bias"):
            outputs = weights[name].unflatten(0, (shapes.patch_size**2, 2 * shapes.num_channels))
            weights[name] = outputs[:, : shapes.num_channels].flatten(0, 1)
    wrong = [f"{theirs} {list(weights[ours].shape)} instead of {list(expected[ours].shape)}"
             for theirs, ours in key_map(shapes.depth).items() if weights[ours].shape != expected[ours].shape]
    if wrong or weights.keys() != expected.keys():
        raise ValueError(f"shapes of no {architecture['preset']}: {some(wrong)}")
    return weights
