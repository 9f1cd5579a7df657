"""From images to latents and back, through a frozen autoencoder of diffusers.

Code that draws samples always calls `decode`, whether the network makes pixels (`NoAutoencoder`) or latents (`Autoencoder`).
"""

from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor

from utils.checkpoints import fingerprint

CHUNK_PIXELS = 2**19            # decoded at a time: 8 images of 256 x 256, some 3 GB with the sizes of Stable Diffusion


class NoAutoencoder:
    """For networks of pixels: everything stays as it is."""

    @staticmethod
    def encode(x: Tensor) -> Tensor:
        return x

    @staticmethod
    def decode(z: Tensor) -> Tensor:
        return z

    def to(self, device: torch.device | str) -> Self:
        return self

    @staticmethod
    def image_shape(shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return shape


class Autoencoder:
    """A diffusers AutoencoderKL of RGB images, frozen, in float32 (TF32 on CUDA: as `utils.distributed.start` sets it).

    Args:
        source: a hub id such as stabilityai/sd-vae-ft-mse, or a folder with config.json and its weights.

    Attributes:
        weights: hash of its weights. factor: pixels to a latent's side. num_channels: of a latent.
        scaling, shift: of its config; latents here are (z - shift) * scaling, about unit scale.

    Raises:
        ValueError: diffusers is not installed, or the autoencoder cannot be loaded whole, or is not of RGB images.
    """

    def __init__(self, source: str, device: torch.device):
        try:
            from diffusers import AutoencoderKL  # optional, and slow to import
        except ImportError as error:
            raise ValueError(f"latents need the package diffusers ({error}); install it with `uv sync --group latents` or "
                             "`pip install diffusers`") from error
        try:
            network, info = AutoencoderKL.from_pretrained(source, torch_dtype=torch.float32, low_cpu_mem_usage=False,
                                                          output_loading_info=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"cannot load the autoencoder {source}: {error}\nIt must be a hub id, or a folder with config.json and "
                             "diffusion_pytorch_model.safetensors. Where there is no network, copy that folder here and name it with "
                             "--autoencoder PATH") from error
        if info["missing_keys"] or info["unexpected_keys"]:
            raise ValueError(f"the autoencoder {source} does not fit its own config: missing {info['missing_keys'][:3]}, "
                             f"unexpected {info['unexpected_keys'][:3]}")
        config = network.config
        if (config.in_channels, config.out_channels) != (3, 3):
            raise ValueError(f"the autoencoder {source} has {config.in_channels} and {config.out_channels} image channels; it must have 3")
        self.source, self.device = source, device
        self.weights = fingerprint(*network.state_dict().values())
        self.scaling, self.shift = float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0)
        self.factor, self.num_channels = 2 ** (len(config.block_out_channels) - 1), config.latent_channels
        self.network = network.to(device).eval().requires_grad_(False)

    def to(self, device: torch.device | str) -> Self:
        self.device = torch.device(device)
        self.network.to(device)
        return self

    @property
    def entry(self) -> dict[str, Any]:
        """What rebuilds it: for latents.json and for checkpoints."""
        return {"source": self.source, "weights": self.weights, "scaling": self.scaling, "shift": self.shift}

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Of the images that latents of this shape (C, h, h) decode to."""
        return (3, shape[1] * self.factor, shape[2] * self.factor)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, H) in [-1, 1] to latents (B, C, H / factor, H / factor), the posterior's mean, about unit scale.

        The mean, not a draw: stored once, a draw would be the same in every epoch, noise and no variety.
        """
        with torch.autocast(self.device.type, enabled=False):
            return (self.network.encode(x.float()).latent_dist.mean - self.shift) * self.scaling

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents (..., C, h, h) to images (..., 3, H, H) near [-1, 1], a few at a time, so that memory stays bounded."""
        flat = z.flatten(0, -4).float() / self.scaling + self.shift
        few = max(1, CHUNK_PIXELS // (flat.shape[-1] * self.factor) ** 2)
        with torch.autocast(self.device.type, enabled=False):                   # callers draw samples under autocast
            images = torch.cat([self.network.decode(part).sample for part in flat.split(few)])
        return images.unflatten(0, z.shape[:-3])


def without_source(entry: dict[str, Any] | None) -> dict[str, Any] | None:
    """An entry but for where the autoencoder was read from; None means pixels."""
    return {**entry, "source": None} if entry else None


def same_autoencoder(entry: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """Whether two entries mean the same latents, wherever the autoencoder was read from; None means pixels."""
    return without_source(entry) == without_source(other)


def load_autoencoder(entry: dict[str, Any] | None, override: str | None, device: torch.device) -> Autoencoder | NoAutoencoder:
    """The autoencoder of latents or of a checkpoint.

    Args:
        entry: see `Autoencoder.entry`; None for pixels.
        override: where it is now (--autoencoder), if not at entry's source.

    Raises:
        ValueError: see `Autoencoder`; or it has other weights than entry says.
    """
    if entry is None:
        if override is not None:
            raise ValueError(f"--autoencoder {override}: here images are pixels, not latents; leave it out")
        return NoAutoencoder()
    autoencoder = Autoencoder(override or entry["source"], device)
    if autoencoder.weights != entry["weights"]:
        raise ValueError(f"wrong autoencoder: {autoencoder.source} has weights {autoencoder.weights}, and the latents were made with "
                         f"{entry['weights']} ({entry['source']}); name that one with --autoencoder PATH")
    autoencoder.scaling, autoencoder.shift = entry["scaling"], entry["shift"]   # as the latents were made
    return autoencoder
