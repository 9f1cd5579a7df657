"""Images from any checkpoint, teacher or student.

    python sample.py checkpoints/student-mnist.safetensors                              a grid at 1, 2 and 4 steps
    python sample.py results/teacher-mnist --guidance-scale 2.5 --formats grid gif      the newest checkpoint of a run
    python sample.py checkpoints/student-mnist.safetensors --num-steps 1 --num-images 50000 --formats npz --bfloat16 True
"""

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from models import build_network
from utils import distributed
from utils.autoencoder import load_autoencoder
from utils.checkpoints import load_network
from utils.config import check_folder, check_interval, check_writable, first_free, is_vacant, parse_config, require, written
from utils.data import check_guidance, to_pixels, to_range
from utils.errors import run_script
from utils.guidance import guided_velocity
from utils.pictures import save_gif, save_grid, save_image
from utils.sampling import sample_average_velocity, sample_velocity
from utils.seeding import generator

ENDINGS = {"grid": ".png", "png": "", "npz": ".npz", "gif": ".gif"}     # of what each format writes, after "4step"


@dataclass(frozen=True)
class Config:
    checkpoint: Annotated[str, tyro.conf.Positional]    # safetensors file, checkpoint folder, or run folder (its newest checkpoint)
    num_steps: tuple[int, ...] = ()         # numbers of sampling steps, a set of images each; empty: 1 2 4 for a student, 25 for a teacher
    classes: tuple[str, ...] = ()           # names or numbers of the classes to draw; empty: all
    guidance_scale: float | None = None     # None: 1 for a teacher, the default of a student (others only if it learned a range)
    guidance_interval: tuple[float, float] = (0.0, 1.0)     # teacher only: times between which it is guided (0: data, 1: noise)
    method: Literal["euler", "heun"] = "euler"  # teacher only: ODE solver; heun takes 2n - 1 evaluations for n steps
    renoise: bool = False                   # student only: jump to the data and add fresh noise, instead of following the flow
    noise_scale: float = 1.0                # size of the noise to start from, 1 in training; a little above it, images vary more
    num_images: int = 100                   # images in each set, spread evenly over the classes
    seed: int = 0                           # seed of the noise, which is the same for every number of steps
    formats: tuple[Literal["grid", "png", "npz", "gif"], ...] = ("grid",)   # grid in a PNG, single PNGs, uint8 arrays, trajectory as GIF
    out: str | None = None                  # output folder; None: samples, or the first of samples-2, ... without such files
    batch_size: int | None = None           # images at a time; None: 500 on a GPU, 50 on a CPU
    bfloat16: bool = False                  # compute in bfloat16 (on CUDA only): twice as fast, with a light grain in one step
    compile: bool = False                   # torch.compile the network (on CUDA only): 15 to 21 s, pays off from 200,000 evaluations
    device: str = "auto"                    # auto, cuda, cuda:1, ..., or cpu
    autoencoder: str | None = None          # latents only: Hub id or folder of their autoencoder; None: where it was in training

    def __post_init__(self) -> None:
        require(self, "num_images", self.num_images >= 1, "at least 1")
        require(self, "batch_size", self.batch_size is None or self.batch_size >= 1, "at least 1, or None")
        require(self, "num_steps", all(n >= 1 for n in self.num_steps), "counts of at least 1")
        require(self, "guidance_scale", self.guidance_scale is None or math.isfinite(self.guidance_scale), "a number")
        check_interval(self, "guidance_interval")
        require(self, "noise_scale", 0 < self.noise_scale < math.inf, "above 0")
        require(self, "formats", len(self.formats) > 0, "one or more of grid, png, npz, gif")
        check_folder(self, "out")


def in_the_way(folder: Path, counts: Sequence[int], formats: Sequence[str]) -> Path | None:
    """What is in a folder already of what would be written there; single PNGs are a folder, which may be there if it is empty."""
    paths = (folder / f"{n}step{ENDINGS[name]}" for n in counts for name in formats)
    return next((path for path in paths if not is_vacant(path)), None)


def chosen_classes(asked: Sequence[str], classes: list[str]) -> list[int]:
    """Class indices from names or numbers; without classes, the null class.

    Raises:
        ValueError: an unknown class, or any class for an unconditional network.
    """
    if not asked:
        return list(range(len(classes))) or [0]
    known = {**{str(i): i for i in range(len(classes))}, **{name: i for i, name in enumerate(classes)}}
    unknown = [name for name in asked if name not in known]
    if unknown:
        allowed = f"known are {', '.join(classes)}, or 0 to {len(classes) - 1}" if classes else "this network has no classes"
        raise ValueError(f"--classes {unknown[0]}: {allowed}")
    return [known[name] for name in asked]


def for_file_names(classes: list[str]) -> list[str]:
    """What the names of single PNGs call each class: its number or, where names are other numbers (folders 1, 2, ...), its name."""
    numbers = [str(i) for i in range(max(1, len(classes)))]                 # without classes there is the null class, 0
    by_name = any(name.isdecimal() and name != number for name, number in zip(classes, numbers))
    return [re.sub(r"[^\w.-]", "_", name) for name in classes] if by_name else numbers


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__)
    wanted = Path(cfg.out or "samples")
    check_writable(wanted)
    ranks = distributed.start(cfg.device)
    network, metadata = load_network(cfg.checkpoint, build_network, ranks.device)
    student = metadata["kind"] == "student"
    u = network.at_guidance(cfg.guidance_scale) if student else None
    if student and (cfg.method, cfg.guidance_interval) != ("euler", (0.0, 1.0)):
        raise ValueError("--method and --guidance-interval are a teacher's: a student has its guidance inside, and jumps")
    check_guidance((1.0 if cfg.guidance_scale is None else cfg.guidance_scale,), metadata["classes"], cfg.guidance_interval)
    if not student and cfg.renoise:
        raise ValueError("--renoise True: only a student can jump to the data")
    chosen, in_names = torch.tensor(chosen_classes(cfg.classes, metadata["classes"])), for_file_names(metadata["classes"])
    y = chosen[torch.arange(cfg.num_images) * len(chosen) // cfg.num_images]
    shape = network.shape
    autoencoder = load_autoencoder(metadata.get("autoencoder"), cfg.autoencoder, ranks.device)
    if (channels := autoencoder.image_shape(shape)[0]) not in (1, 3) and set(cfg.formats) != {"npz"}:
        raise ValueError(f"--formats {' '.join(cfg.formats)}: must be npz alone: {cfg.checkpoint} makes {channels} channels and has no "
                         "autoencoder; if they are latents, import_teacher.py --data LATENTS tells it")
    v = guided_velocity(network.velocity, network.null_class, 1.0 if student or cfg.guidance_scale is None else cfg.guidance_scale,
                        cfg.guidance_interval)
    counts = cfg.num_steps or ((1, 2, 4) if student else (25,))
    out = wanted if cfg.out else first_free(wanted, lambda folder: in_the_way(folder, counts, cfg.formats) is None)
    if (file := in_the_way(out, counts, cfg.formats)) is not None:
        raise ValueError(f"{file} is there already, and is not overwritten; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    batch_size = cfg.batch_size or ranks.batch_size
    if cfg.compile and ranks.device.type == "cuda":
        start = time.monotonic()
        network.compile_blocks()
        filled = -(-len(y) // batch_size) * batch_size                  # one shape: the last batch is filled up
        y = torch.cat([y, y[-1:].expand(filled - len(y))])
        with ranks.autocast(cfg.bfloat16):
            warm = torch.zeros(min(batch_size, len(y)), *shape, device=ranks.device)
            v(warm, warm[:, 0, 0, 0], y[: len(warm)].to(ranks.device))
        torch.cuda.synchronize()
        tqdm.write(f"compiled in {time.monotonic() - start:.1f} s")

    shown_at_most = min(100, cfg.num_images)
    few, gif = torch.arange(shown_at_most) * cfg.num_images // shown_at_most, "gif" in cfg.formats      # of all classes
    for num_steps in counts:
        noise = generator(ranks.device, cfg.seed, "noise")
        renoise = generator(ranks.device, cfg.seed, "renoise") if cfg.renoise else None
        pixels, shown, start = [], [], time.monotonic()
        for labels, places in zip(tqdm(y.split(batch_size), f"{num_steps} steps", disable=None), torch.arange(len(y)).split(batch_size)):
            z = cfg.noise_scale * torch.randn(len(labels), *shape, generator=noise, device=ranks.device)
            with ranks.autocast(cfg.bfloat16):
                if student:
                    states = sample_average_velocity(u, z, labels.to(ranks.device), num_steps, renoise, trajectory=gif)
                else:
                    states = sample_velocity(v, z, labels.to(ranks.device), num_steps, cfg.method, trajectory=gif)
            if gif:
                shown.append(states[:, torch.isin(places, few).to(ranks.device)])
                states = states[-1]
            pixels.append(to_pixels(autoencoder.decode(states)).to("cpu", non_blocking=True))       # the next batch need not wait for it
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        pixels, seconds = torch.cat(pixels)[: cfg.num_images], time.monotonic() - start
        name = f"{num_steps}step"
        if "grid" in cfg.formats:
            save_grid(out / f"{name}.png", to_range(pixels[few]))
        if gif:
            save_gif(out / f"{name}.gif", autoencoder.decode(torch.cat(shown, dim=1)))
        if "npz" in cfg.formats:
            with written(out / f"{name}.npz") as file:
                np.savez(file, arr_0=pixels.permute(0, 2, 3, 1).numpy(), labels=y[: cfg.num_images].numpy())
        if "png" in cfg.formats:
            (out / name).mkdir(exist_ok=True)
            for i, image in enumerate(pixels):
                save_image(out / name / f"{i:06d}_class{in_names[y[i]]}.png", image.permute(1, 2, 0).squeeze(-1))
        tqdm.write(f"{len(pixels)} images in {num_steps} step{'s' * (num_steps > 1)}, {seconds:.1f} s: {out}/{name}.*")


if __name__ == "__main__":
    run_script(main)
