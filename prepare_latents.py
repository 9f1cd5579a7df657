"""Encode your own images as latents, so that a network can learn large images: 256 x 256 pixels become 32 x 32 x 4 values.

    python prepare_latents.py photos latents/photos                         256 pixels, with a Stable Diffusion autoencoder
    python train_teacher.py --data latents/photos --model DiT-B/2           trains on them; samples are decoded
    torchrun --nproc-per-node=8 prepare_latents.py imagenet/train latents/imagenet          eight GPUs, every eighth shard each

Needs the package diffusers: uv sync --group latents, or pip install diffusers. Repeat the command to continue after a stop: whole
shards are kept, missing and torn ones are written. An image that cannot be read stops the program: repair or replace it under
the same name, and repeat the command.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tqdm import tqdm

from utils import distributed, latents
from utils.autoencoder import Autoencoder
from utils.checkpoints import fingerprint
from utils.config import check_folder, check_writable, parse_config, require, write_json
from utils.data import to_range
from utils.errors import run_script
from utils.folders import ImageFolder, chunked, open_folder


@dataclass(frozen=True)
class Config:
    source: Annotated[str, tyro.conf.Positional]    # folder or zip of images, in class folders or not
    out: Annotated[str, tyro.conf.Positional]   # folder to write to: --data of the training scripts
    image_size: int = 256                       # side in pixels to which images are centre-cropped and resized
    autoencoder: str = "stabilityai/sd-vae-ft-mse"  # AutoencoderKL of diffusers: Hub id or folder
    flip: bool = True                           # encode mirror images too, so that training can use them
    shard_size: int = 4096                      # images per file
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"    # number format of the latents in the files
    batch_size: int = 32                        # images encoded at a time
    num_workers: int = 8                        # threads that decode image files
    device: str = "auto"                        # auto, cuda, cuda:1, ..., or cpu

    def __post_init__(self) -> None:
        for field in ("image_size", "shard_size", "batch_size", "num_workers"):
            require(self, field, getattr(self, field) >= 1, "at least 1")
        check_folder(self, "out")


def describe(cfg: Config, folder: ImageFolder, autoencoder: Autoencoder) -> dict[str, Any]:
    """What latents.json says.

    Raises:
        ValueError: a size that the autoencoder cannot halve so often.
    """
    if cfg.image_size % autoencoder.factor:
        raise ValueError(f"--image-size {cfg.image_size}: must be divisible by {autoencoder.factor}, the factor of {cfg.autoencoder}")
    side = cfg.image_size // autoencoder.factor
    return {
        "format": latents.FORMAT, "source": cfg.source, "num_images": len(folder.names),
        "listing": fingerprint("\n".join(folder.names).encode(errors="surrogateescape")),        # names need not be UTF-8
        "classes": folder.classes, "image_size": cfg.image_size, "shape": [autoencoder.num_channels, side, side], "flip": cfg.flip,
        "dtype": cfg.dtype, "shard_size": cfg.shard_size, "posterior": "mean", "autoencoder": autoencoder.entry,
    }


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__)
    check_writable(Path(cfg.out))
    ranks = distributed.start(cfg.device)
    folder = open_folder(Path(cfg.source), "SOURCE")
    autoencoder = Autoencoder(cfg.autoencoder, ranks.device)
    description, out = describe(cfg, folder, autoencoder), Path(cfg.out)
    latents.begin(out, description)
    if ranks.is_main and folder.left_out:
        print(f"note: SOURCE {cfg.source}: files that Pillow does not read as images were left out: {folder.left_out}")
    ranks.wait()                                            # every rank has checked before the main one writes
    if ranks.is_main and not latents.is_latents(out):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / latents.UNFINISHED, description)

    # The shards that are not there, shared out; a shard's batches do not depend on where a run began.
    shards = latents.shard_rows(description)
    missing = [number for number in range(len(shards)) if not latents.is_whole(out, description, number)]
    ranks.wait()                                            # every rank has looked before any writes
    mine = missing[ranks.rank :: ranks.world_size]
    batches = {number: chunked(shards[number], cfg.batch_size) for number in mine}
    stream = folder.stream([batch for number in mine for batch in batches[number]], cfg.image_size, cfg.num_workers)
    labels, dtype = torch.tensor(folder.labels), latents.DTYPES[cfg.dtype]
    with tqdm(total=sum(len(shards[number]) for number in mine), unit="image", disable=None if ranks.is_main else True) as bar:
        for number in mine:
            parts = []
            for _ in batches[number]:
                pixels, _ = next(stream)
                x = to_range(torch.from_numpy(pixels).to(ranks.device).permute(0, 3, 1, 2))
                views = [x, x.flip(-1)] if cfg.flip else [x]
                parts.append(torch.stack([autoencoder.encode(view) for view in views], 1).to(dtype).cpu())     # (B, V, C, h, h)
                bar.update(len(pixels))
            values = torch.cat(parts)
            if not values.isfinite().all():
                raise ValueError(f"shard {number} holds values that are not finite in {cfg.dtype}; try --dtype float32 and another OUT")
            latents.write_shard(out, description, number, values, labels[shards[number].start : shards[number].stop])
    ranks.wait()

    if ranks.is_main:
        latents.finish(out, description)
        values = latents.read_shard(out, description, 0)[0].float()
        print(f"{out}: {len(folder.names)} images, {len(missing)} of {len(shards)} shards written; latents of shape "
              f"{tuple(description['shape'])}, in the first shard of mean {values.mean():.3f} and standard deviation {values.std():.3f}")
    distributed.finish()


if __name__ == "__main__":
    run_script(main)
