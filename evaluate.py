"""Measure any checkpoint: how far its images are from the data, beside the same numbers for real held-out images.

    python evaluate.py checkpoints/student-mnist.safetensors                        1, 2, 4 and 8 steps, 3 seeds
    python evaluate.py results/teacher-cifar10 --num-steps 25 --guidance-scale 1 1.5 2
    python evaluate.py results/student-photos --data photos --held-out photos-test --features inception

Protocol: samples of the EMA weights, rounded to 8 bits, with classes in equal shares, are compared with the whole training split.
For your own images without --held-out that is nine tenths, and the floor is the rest, which was trained on. Precision and recall
use as many training images as samples. Every number's name says its feature space: a classifier of the data set, with the hash of
its weights, or the standard Inception network. Writes metrics.json, table.md, plot.png, neighbours.png and, for a student,
residual.png into --out.
"""

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tqdm import tqdm

from models import Classifier, DiT, SiT, build_network
from utils import distributed, metrics, report
from utils.autoencoder import load_autoencoder
from utils.checkpoints import fingerprint, load_network, resolve_weights, weights_id
from utils.config import check_folder, check_interval, check_writable, first_free, is_vacant, parse_config, require, to_dict, write_json
from utils.data import WITH_TEST_SPLIT, Images, check_guidance, check_source, load_held_out, load_images, to_range
from utils.distributed import Ranks
from utils.errors import run_script
from utils.evaluation import (
    Judge,
    Sample,
    TeacherDistance,
    check_counts,
    check_inception,
    classifier_judge,
    compare,
    draw,
    even_labels,
    find_classifier,
    inception_judge,
    reference_features,
    residual_map,
    shuffled,
    summary,
)
from utils.flow import choose_noise, interpolate
from utils.guidance import guided_velocity
from utils.latents import originals
from utils.pictures import save_grid
from utils.sampling import sample_average_velocity, sample_velocity
from utils.seeding import generator
from utils.teachers import same_classes


@dataclass(frozen=True)
class Config:
    checkpoint: Annotated[str, tyro.conf.Positional]    # safetensors file, checkpoint folder, or run folder (its newest checkpoint)
    data: str | None = None                 # training images; None: those of the checkpoint, or those from which its latents were made
    held_out: str | None = None             # path to held-out images of your own; None: the test split, else a tenth chosen by a hash
    data_root: str = "data"                 # folder of mnist and cifar10; a missing one is downloaded into it
    features: Literal["classifier", "inception"] = "classifier"     # feature space: of a classifier of the data set, or of Inception
    classifier: str | None = None           # file of train_classifier.py; None: checkpoints/classifier-<data>.safetensors
    inception_weights: str | None = None    # file of torch-fidelity's Inception weights; None: download them
    num_steps: tuple[int, ...] = ()         # numbers of sampling steps, a row each; empty: 1 2 4 8 for a student, 25 for a teacher
    guidance_scale: tuple[float, ...] = ()  # a row each; empty: 1 for a teacher, the default of a student (others if it learned a range)
    guidance_interval: tuple[float, float] = (0.0, 1.0)     # teacher only: times between which it is guided (0: data, 1: noise)
    method: Literal["euler", "heun"] = "euler"  # teacher only: ODE solver; heun takes 2n - 1 evaluations for n steps
    noise_scale: float = 1.0                # size of the noise that samples start from, 1 in training; a little above it, they vary more
    num_images: int = 10_000                # samples for each row and seed; 50000 for the record
    seeds: int = 3                          # sets of samples for each row, each from other noise
    teacher: str | None = None              # student only: teacher whose distance is measured; None: its own, if beside the checkpoint
    batch_size: int | None = None           # images at a time; None: 500 on a GPU, 50 on a CPU
    bfloat16: bool = False                  # compute in bfloat16 (on CUDA only): twice as fast, with a light grain in one step
    compile: bool = False                   # torch.compile the network (on CUDA only): 15 to 21 s, pays off from 200,000 evaluations
    device: str = "auto"                    # auto, cuda, cuda:1, ..., or cpu
    num_workers: int = 4                    # threads that decode image files
    autoencoder: str | None = None          # latents only: Hub id or folder of their autoencoder; None: where it was in training
    out: str | None = None                  # output folder; None: results/evaluation-<checkpoint>, with -2, ... if other results are there
    cache: str = "results/features"         # folder that keeps the features of the training split

    def __post_init__(self) -> None:
        for field in ("num_images", "seeds", "num_workers"):
            require(self, field, getattr(self, field) >= 1, "at least 1")
        require(self, "batch_size", self.batch_size is None or self.batch_size >= 1, "at least 1, or None")
        require(self, "num_steps", all(n >= 1 for n in self.num_steps), "counts of at least 1")
        require(self, "classifier", self.classifier is None or self.features == "classifier", "left out with --features inception")
        require(self, "inception_weights", self.inception_weights is None or self.features == "inception",
                "left out without --features inception")
        require(self, "guidance_scale", all(map(math.isfinite, self.guidance_scale)), "a number")
        check_interval(self, "guidance_interval")
        require(self, "noise_scale", 0 < self.noise_scale < math.inf, "above 0")
        for field in ("out", "cache"):
            check_folder(self, field)


def judge_of(cfg: Config, images: Images, ranks: Ranks) -> Judge:
    """The feature space that the flags ask for; errors as of `inception_judge` and `classifier_judge`."""
    if cfg.features == "inception":
        return inception_judge(cfg.inception_weights, ranks)
    return classifier_judge(cfg.classifier, Classifier, images, ranks)


def rows_of(network: DiT | SiT, student: bool, cfg: Config) -> list[tuple[str, int, float | None, Sample]]:
    """Name, network evaluations, guidance scale (None: the student's own) and sampler of each row."""
    if student:
        return [(f"{n} step" + "s" * (n > 1) + ("" if w is None else f", guidance {w:g}"), n, w,
                 partial(sample_average_velocity, network.at_guidance(w), num_steps=n))
                for n in cfg.num_steps or (1, 2, 4, 8) for w in cfg.guidance_scale or (None,)]
    interval = cfg.guidance_interval
    where = "" if interval == (0, 1) else " at {:g} to {:g}".format(*interval)
    evaluations = {"euler": lambda n: n, "heun": lambda n: 2 * n - 1}[cfg.method]
    return [(f"{n} {cfg.method.title()} step{'s' * (n > 1)}, guidance {w}{where if w != 1 else ''}", evaluations(n) * (1 if w == 1 else 2),
             w, partial(sample_velocity, guided_velocity(network.velocity, network.null_class, w, interval), num_steps=n,
                        method=cfg.method))
            for n in cfg.num_steps or (25,) for w in cfg.guidance_scale or (1.0,)]


Rows = Callable[[DiT | SiT, bool, Config], list[tuple[str, int, float | None, Sample]]]


def find_own_teacher(checkpoint: str, teacher: str | None) -> Path | None:
    """The teacher a student was made from: as given, in its run folder, or beside its released file; None if it is in none."""
    if teacher is not None:
        return resolve_weights(teacher)
    file = resolve_weights(checkpoint)
    places = [folder / "teacher.safetensors" for folder in file.parents[:3]]
    if "student" in file.name:
        places.append(file.with_name(file.name.replace("student", "teacher")))
    return next((place for place in places if place.is_file()), None)


def load_own_teacher(path: Path, metadata: dict[str, Any], ranks: Ranks, given: bool) -> DiT | SiT | None:
    """The network at `path`, if it is a teacher's for a student of this metadata.

    One that was found, not given, is left out, with a note, if it is none, of another size, or not the one that the student learnt from.

    Raises:
        ValueError: it was given, and is no teacher, or of another size. Of another teacher that was given a note tells.
    """
    teacher, theirs = load_network(path, build_network, ranks.device)
    architecture = metadata["architecture"]
    wrong = [] if theirs["kind"] == "teacher" else [f"is a {theirs['kind']}; the distance is that from a teacher"]
    wrong += [f"has {key} {theirs['architecture'].get(key)}, the student {architecture[key]}"
              for key in ("num_channels", "image_size", "num_classes") if theirs["architecture"].get(key) != architecture[key]]
    if wrong and given:
        raise ValueError(f"--teacher {path} {wrong[0]}")
    identity = weights_id(teacher)
    if not wrong and metadata.get("teacher", identity) != identity:
        wrong = [f"is teacher {identity}; the student learnt from {metadata['teacher']}"]
    if wrong:
        print(f"note: {path} {wrong[0]}" + ("" if given else ": no distance from a teacher is told"))
    return None if wrong and not given else teacher


def label(checkpoint: Path) -> str:
    """Name for a checkpoint's results: its own, after the run it lies in, since all runs have files of the same names."""
    for run in checkpoint.parents:
        if (run / "config.json").is_file():
            inside = checkpoint.relative_to(run).with_suffix("").parts
            return "-".join([run.name, *(part for part in inside if part != "checkpoints")])
    return checkpoint.name if checkpoint.is_dir() else checkpoint.stem


def arithmetic(bfloat16: bool) -> str:
    """In what the networks compute, as the protocol says it."""
    if bfloat16:
        return "bfloat16"
    return "float32" if torch.get_float32_matmul_precision() == "highest" else "float32, products in TF32"      # which GPUs alone have


def free_folder(folder: Path, config: dict[str, Any], weights: str) -> Path:
    """The folder itself, or the first of folder-2, folder-3, ... that holds no evaluation by other flags or of other weights."""
    def is_free(numbered: Path) -> bool:
        file = numbered / "metrics.json"
        found = json.loads(file.read_text()) if file.is_file() else None
        return found is None or (found.get("config"), found.get("protocol", {}).get("weights")) == (config, weights)

    return first_free(folder, is_free)


@torch.no_grad()
def main(argv: Sequence[str] | None = None, config: type[Config] = Config, rows_of: Rows = rows_of, text: str | None = __doc__,
         program: str = "evaluation") -> None:
    """config, rows_of, text, program: flags, rows, help and results' name of what measures other samplers by this protocol."""
    cfg = parse_config(config, argv, text)
    wanted = Path(cfg.out or f"results/{program}-{label(Path(cfg.checkpoint))}")
    check_writable(wanted)
    if is_vacant(Path(cfg.cache)):                          # one that may only be read may hold what is needed
        check_writable(Path(cfg.cache))
    ranks = distributed.start(cfg.device)
    network, metadata = load_network(cfg.checkpoint, build_network, ranks.device)
    student = metadata["kind"] == "student"
    samplers = rows_of(network, student, cfg)
    if student and cfg.guidance_interval != (0, 1):
        raise ValueError("--guidance-interval {} {}: a student has its guidance inside".format(*cfg.guidance_interval))
    if student and cfg.method != "euler":
        raise ValueError(f"--method {cfg.method}: only a teacher's flow is solved; a student jumps")
    weights = report.weights_name(weights_id(network), metadata)
    out = free_folder(wanted, to_dict(cfg), weights)
    if cfg.out and out != wanted:
        raise ValueError(f"--out {cfg.out} holds an evaluation by other flags or of other weights, which stays; choose another one")
    if not student and cfg.teacher is not None:
        raise ValueError(f"--teacher {cfg.teacher}: only a student has one, and {cfg.checkpoint} is a teacher")
    check_guidance(cfg.guidance_scale, metadata["classes"], cfg.guidance_interval)
    own = find_own_teacher(cfg.checkpoint, cfg.teacher) if student else None
    teacher = load_own_teacher(own, metadata, ranks, given=cfg.teacher is not None) if own else None
    data = cfg.data or metadata["config"]["data"]
    if data is None:
        raise ValueError(f"{cfg.checkpoint} does not say what it was trained on; name the images with --data")
    autoencoder = load_autoencoder(metadata.get("autoencoder"), cfg.autoencoder, ranks.device)
    image_shape = autoencoder.image_shape(network.shape)
    data = originals(data)
    if cfg.held_out:
        check_source(cfg.held_out, "--held-out")
    check_inception(cfg.inception_weights)

    def check(classes: list[str]) -> None:
        if not same_classes(metadata, classes):
            raise ValueError(f"--data {data} has classes {classes}; {cfg.checkpoint} was trained on {metadata['classes']}")
        if cfg.features == "classifier":
            find_classifier(cfg.classifier, data, image_shape[-1], classes)

    images = load_images(data, cfg.data_root, image_shape[-1], cfg.num_workers, image_shape[0], check)
    if images.shape != image_shape:
        raise ValueError(f"--data {data} has shape {images.shape}; {cfg.checkpoint} was trained on {image_shape[0]} channels")
    images, held_out = load_held_out(images, cfg.held_out, cfg.data_root, cfg.num_workers)
    judge = judge_of(cfg, images, ranks)

    # The training split and the floor.
    real, real_labels = shuffled(images)
    floor_pixels, floor_labels = shuffled(held_out)
    least = check_counts(judge, cfg.num_images, real, floor_pixels)
    reference = reference_features(judge, real, Path(cfg.cache))
    if judge.knows_classes and images.name not in WITH_TEST_SPLIT and judge.held_out != fingerprint(floor_pixels):
        print(f"note: {judge.name} was trained with other images held out, or before that was noted: it may know some of these, which are "
              "the floor; train_classifier.py makes it anew")
    floor_features = judge(floor_pixels[: cfg.num_images])
    background = ThreadPoolExecutor(1)                      # compares while the next samples are drawn
    comparing = comparing_floor = background.submit(compare, judge, floor_features, floor_labels[: cfg.num_images], reference)
    num_floor = len(floor_features.features)
    in_bfloat16 = cfg.bfloat16 and ranks.device.type == "cuda"
    protocol = {"checkpoint": cfg.checkpoint, **({} if program == "evaluation" else {"samples": program}),
                "data": images.name, "features": judge.name, "num_images": cfg.num_images,
                "reference": f"{len(real)} training images", "floor": f"{num_floor} held-out images", "seeds": cfg.seeds,
                "weights": weights, "arithmetic": arithmetic(in_bfloat16), "images": "8 bits",
                **({} if cfg.noise_scale == 1 else {"noise_scale": cfg.noise_scale})}
    print("  ".join(f"{key}: {value}" for key, value in protocol.items()), flush=True)
    if num_floor < cfg.num_images:
        print(f"note: the floor has fewer images than the rows ({num_floor} < {cfg.num_images}), which alone makes its distances larger")

    # Each row: samples of every seed.
    if cfg.compile and ranks.device.type == "cuda":
        network.compile_blocks()
    y = even_labels(cfg.num_images, images)
    held_nearest, _ = metrics.nearest(floor_features.features[:2000], reference.features)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    if teacher:
        @cache
        def from_teacher(guidance_scale: float) -> TeacherDistance:
            v = guided_velocity(teacher.velocity, teacher.null_class, guidance_scale, tuple(metadata["config"]["guidance_interval"]))
            ideal = partial(sample_velocity, v, num_steps=16, method="heun")
            return TeacherDistance(ideal, even_labels(32, images), network.shape, ranks, cfg.noise_scale)

    for name, evaluations, scale, sample in samplers:
        scale = metadata["config"]["guidance_scale"] if scale is None else scale
        seeds, compared = [], []
        for seed in tqdm(range(cfg.seeds), name, disable=None):
            pixels = draw(sample, y, network.shape, seed, ranks, cfg.batch_size or ranks.batch_size, autoencoder.decode, cfg.bfloat16,
                          cfg.noise_scale)
            metrics.check_pixels(pixels, least, "samples")
            seen = judge(pixels)
            comparing.result()                              # one waits at most, and an error shows before more is drawn
            comparing = background.submit(compare, judge, seen, y, reference)
            compared.append(comparing)
            few = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))[:2000]
            distances, indices = metrics.nearest(seen.features[few], reference.features, 4)
            ratio, copies = metrics.memorisation(distances[:, 0], held_nearest[:, 0])
            numbers = {"neighbour_ratio": ratio, "near_copies": copies}
            if teacher:
                numbers["teacher_distance"] = from_teacher(scale)(sample, seed)
            seeds.append(numbers)
            if not rows and seed == 0:                      # the samples that are nearest to some training image, with those
                suspects = distances[:, 0].topk(10, largest=False).indices
                _, by_pixels = metrics.nearest(pixels[few[suspects]], real, 4)
                shown = [torch.cat([pixels[few[i]][None], real[indices[i]], real[near]]) for i, near in zip(suspects, by_pixels)]
                save_grid(out / "neighbours.png", to_range(torch.cat(shown)), columns=9)
        floor = comparing_floor.result()
        seeds = [future.result() | numbers for future, numbers in zip(compared, seeds)]
        rows.append({"name": name, "evaluations": evaluations, "guidance_scale": scale, **summary(seeds)})
        print(report.line(rows[-1], floor), flush=True)

    if student:
        x = autoencoder.encode(to_range(real[:32].to(ranks.device)))
        noise = generator(ranks.device, 0, "map")           # paired with images as in training
        y = real_labels[:32].to(ranks.device)
        eps = choose_noise(x, y, [torch.randn(x.shape, generator=noise, device=ranks.device)
                                  for _ in range(metadata["config"].get("num_noises", 1))])
        u = network.at_guidance(next(iter(cfg.guidance_scale), None))
        residual = residual_map(u, lambda t: interpolate(x, eps, t), y)
        report.save_residual(out / "residual.png", residual)
    result = {"protocol": protocol, "config": to_dict(cfg), "floor": report.full_names(floor, protocol),
              "rows": [report.full_names(row, protocol) for row in rows]}
    write_json(out / "metrics.json", result)
    table = report.table(rows, floor, protocol)
    (out / "table.md").write_text(table)
    report.save_plot(out / "plot.png", rows, floor)
    print(f"\n{table}\n{out}")


if __name__ == "__main__":
    run_script(main)
