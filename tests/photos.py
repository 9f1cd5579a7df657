"""Photos, a tiny random autoencoder, and their latents: what the tests of latents begin with."""

from pathlib import Path

import torch
from runs import make_images

import prepare_latents

SCALING, SHIFT = 1.7, 0.3


def make_photo_latents(folder: Path) -> Path:
    """12 photos in two classes, an autoencoder, and the photos' latents in shards of 5, 5 and 2."""
    make_images(folder / "photos", ["cat", "dog"])
    save_autoencoder(folder / "autoencoder")
    prepare(folder, folder / "prepared")
    return folder


def save_autoencoder(folder: Path, seed: int = 0):
    """Two levels: 16 x 16 pixels become 8 x 8 x 4."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    network = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=SCALING, shift_factor=SHIFT)
    network.save_pretrained(folder)
    return network.eval()


def prepare(folder: Path, out: Path, *flags: str) -> None:
    prepare_latents.main([str(folder / "photos"), str(out), "--autoencoder", str(folder / "autoencoder"), "--image-size", "16",
                          "--shard-size", "5", "--batch-size", "3", "--device", "cpu", *flags])


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@torch.no_grad()
def encoded(folder: Path, x: torch.Tensor) -> torch.Tensor:
    """By diffusers alone."""
    from diffusers import AutoencoderKL

    return (AutoencoderKL.from_pretrained(folder / "autoencoder").encode(x).latent_dist.mean - SHIFT) * SCALING
