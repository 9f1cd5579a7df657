"""What evaluate.py and a training run measure: sets of samples against the training split, with real held-out images as the floor."""

import hashlib
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor, nn

from utils import metrics
from utils.autoencoder import NoAutoencoder
from utils.checkpoints import RELEASED, fingerprint, flush, load_network
from utils.config import check_writable, short_name
from utils.data import NAMES, Images, hash_order, to_pixels, to_range
from utils.distributed import Ranks
from utils.latents import Latents
from utils.losses import AverageVelocity, interval_splitting_loss
from utils.metrics import Features
from utils.seeding import generator

Sample = Callable[[Tensor, Tensor], Tensor]             # from noise z (B, C, H, W) and labels y (B,) to images
QUICK_IMAGES = 5_000        # samples of each row of a quick evaluation
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
BLAS_THREADS = 8            # of NumPy's products; all of a server's wait for each other: 64 took twice as long, and ten times the work


def even_labels(num_images: int, images: Images) -> Tensor:
    """Labels (num_images,) of the classes in equal shares; all 0 without classes."""
    return torch.arange(num_images) * max(1, len(images.classes)) // num_images


@dataclass(frozen=True)
class Judge:
    """A feature space.

    name: with a hash of its weights; part of every metric's name.
    see: uint8 images (B, C, H, H) to features (B, D) and logits (B, classes).
    knows_classes: whether its classes are the data set's.
    held_out: fingerprint of the images, in their hash's order, that its training did not see; None: not known.
    """

    name: str
    see: Callable[[Tensor], tuple[Tensor, Tensor]]
    knows_classes: bool
    batch_size: int = 500
    held_out: str | None = None

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Features:
        """Features of uint8 images (N, C, H, H), on the CPU."""
        parts = [[part.float().cpu() for part in self.see(batch)] for batch in pixels.split(self.batch_size)]
        return Features(*(torch.cat(column) for column in zip(*parts)))


def classifier_file(file: str | None, data: str) -> Path:
    """The classifier of a data set: the file that was named, or the one beside the released ones, which need not be there.

    Own images that are called like a named data set do not get its classifier, nor take its place.
    """
    name = short_name(data)
    own = "own-" if name in NAMES and data != name else ""
    return Path(file) if file else RELEASED / f"classifier-{own}{name}.safetensors"


def find_classifier(file: str | None, data: str, image_size: int | None, classes: list[str] | None = None) -> Path:
    """The file of `classifier_file`; FileNotFoundError, with advice, if it is not there.

    Args:
        image_size: that it must be of; None: the usual one of these data.
        classes: of the data; None: not known yet.
    """
    path = classifier_file(file, data)
    if not path.is_file():
        flags = (f" --image-size {image_size}" if image_size else "") + (f" --out {file}" if file else "")
        making = f"make it with python train_classifier.py --data {data}{flags}"
        without = "there can be none without classes: run evaluate.py with --features inception, and train without --eval-every"
        advice = f"{making} ({without})" if classes is None else making if len(classes) > 1 else without
        raise FileNotFoundError(f"no classifier {path}; {advice}")
    return path


def classifier_judge(file: str | None, network_class: Callable[..., nn.Module], images: Images, ranks: Ranks) -> Judge:
    """The frozen classifier of a data set.

    Args:
        file: what train_classifier.py wrote; None: see `classifier_file`.
        network_class: `models.classifier.Classifier`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of other images, or no classifier.
    """
    path = find_classifier(file, images.name, images.shape[-1], images.classes)
    network, metadata = load_network(path, network_class, ranks.device)
    if metadata["kind"] != "classifier":
        raise ValueError(f"--classifier {path} is a {metadata['kind']}; see train_classifier.py")
    trained = (metadata["architecture"]["num_channels"], metadata["image_size"], metadata["classes"])
    if trained != (images.shape[0], images.shape[1], images.classes):
        raise ValueError(f"{path} judges {trained[0]} channels, size {trained[1]}, classes {trained[2]}; the data have "
                         f"{images.shape[0]}, {images.shape[1]}, {images.classes}")

    def see(pixels: Tensor) -> tuple[Tensor, Tensor]:
        return network.see(to_range(pixels.to(ranks.device)))

    return Judge(f"{path.stem}-{fingerprint(*network.state_dict().values())}", see, knows_classes=True, batch_size=ranks.batch_size,
                 held_out=metadata.get("held_out"))


def check_inception(weights: str | None) -> None:
    """Raise ValueError if a file is named that is not there."""
    if weights is not None and not Path(weights).is_file():
        raise ValueError(f"--inception-weights {weights}: no such file")


def inception_judge(weights: str | None, ranks: Ranks) -> Judge:
    """Inception-v3 as in the field's FID: 2048 pooled features, through torch-fidelity's exact resizing.

    Raises:
        ValueError: the weights are not there and cannot be downloaded, or are not torch-fidelity's.
    """
    from torch_fidelity.utils import create_feature_extractor  # slow to import

    check_inception(weights)
    if weights is not None:                                 # it will be unpickled: only the one known file may be
        digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
        if digest != INCEPTION_SHA256:
            raise ValueError(f"--inception-weights {weights} has SHA-256 {digest}; {INCEPTION_FILE} has {INCEPTION_SHA256}")
    try:
        network = create_feature_extractor("inception-v3-compat", ["2048", "logits_unbiased"], cuda=ranks.device.type == "cuda",
                                           feature_extractor_weights_path=weights, verbose=False)
    except OSError as error:
        raise ValueError(f"--features inception: the weights could not be downloaded ({error}). Where there is a network, get "
                         f"{INCEPTION_FILE} from torch-fidelity's releases, and name it with --inception-weights") from error

    def see(pixels: Tensor) -> tuple[Tensor, Tensor]:
        return network(pixels.to(ranks.device).expand(-1, 3, -1, -1))

    return Judge(f"inception-{fingerprint(*network.state_dict().values())}", see, knows_classes=False, batch_size=100)


def check_counts(judge: Judge, num_images: int, real: Tensor, held_out: Tensor) -> int:
    """The least number of images that can be compared: one more than the judge has features.

    Raises:
        ValueError: fewer samples, training images or held-out images.
        ModuleNotFoundError: torch-fidelity is not installed.
    """
    import torch_fidelity.metric_prc  # noqa: F401 - slow to import, and first needed when all samples are drawn

    least = judge(real[:2]).features.shape[1] + 1
    if num_images < least:
        raise ValueError(f"--num-images {num_images}: must be at least {least}: one more than the judge has features")
    metrics.check_pixels(real, least, "training images")
    metrics.check_pixels(held_out[:num_images], least, "held-out images")
    return least


def compare(judge: Judge, samples: Features, labels: Tensor, reference: Features) -> dict[str, float]:
    """All metrics of one set of samples, of classes `labels` (N,).

    reference: the training split, of which precision and recall see as many images.
    """
    import torch_fidelity.metric_prc  # noqa: F401 - slow to import, and three threads that begin it at once fail

    same_number = reference.features[: len(samples.features)]
    fewer = min([BLAS_THREADS, *(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas")])
    with threadpool_limits(fewer, "blas"), ThreadPoolExecutor() as threads:     # on the CPU; the three take about as long
        frechet = threads.submit(metrics.frechet_distance, samples.features, reference.features)
        kernel = threads.submit(metrics.kernel_distance, samples.features, reference.features)
        precision, recall = metrics.precision_recall(samples.features, same_number)
        result = {"frechet_distance": frechet.result(), "kernel_distance": kernel.result(), "precision": precision, "recall": recall}
    if judge.knows_classes:
        result["class_accuracy"] = metrics.class_accuracy(samples.logits, labels)
    else:
        result["inception_score"] = metrics.inception_score(samples.logits)
    return result


@torch.no_grad()
def draw(sample: Sample, labels: Tensor, shape: tuple[int, ...], seed: int, ranks: Ranks, batch_size: int,
         decode: Callable[[Tensor], Tensor] = NoAutoencoder.decode, bfloat16: bool = False, noise_scale: float = 1.0) -> Tensor:
    """Samples of the given labels (N,) as they would be saved: uint8 (N, C, H, H), rounded and clipped.

    Args:
        shape: of the network's noise. decode: from what the network makes to images. bfloat16: compute in it, on CUDA.
        noise_scale: standard deviation of the noise.
    """
    noise = generator(ranks.device, seed, "noise")
    pixels = []
    for y in labels.split(batch_size):
        z = noise_scale * torch.randn(len(y), *shape, generator=noise, device=ranks.device)
        with ranks.autocast(bfloat16):
            pixels.append(to_pixels(decode(sample(z, y.to(ranks.device)))).cpu())
    return torch.cat(pixels)


def shuffled(images: Images) -> tuple[Tensor, Tensor]:
    """Pixels and labels in the order of a hash of the pixels: the first few are a fair sample, whatever the order of the files."""
    order = hash_order(images)
    return images.pixels[order], images.labels[order]


def reference_features(judge: Judge, pixels: Tensor, folder: Path) -> Features:
    """Features of the training split, kept in `folder` under the names of judge and images, so that they are made once.

    Runs that begin at once may each make them, and the last one's stay. ValueError if they are to be made and may not be written.
    """
    file = folder / f"{judge.name}-{fingerprint(pixels)}.pt"
    if file.is_file():
        with suppress(RuntimeError, EOFError, UnpicklingError):             # of a torn file, in whose place a good one comes
            return Features(**torch.load(file, weights_only=True))
    check_writable(file)
    features = judge(pixels)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.writing")
    torch.save(features._asdict(), temporary)
    flush(temporary)
    temporary.replace(file)
    return features


class TeacherDistance:
    """How far a student's samples are from where its teacher's own flow takes the same noise.

    Args:
        ideal: the teacher's sampler, many fine steps of it.
        labels: of the samples, (N,); some dozens will do.
        noise_scale: standard deviation of the noise.
    """

    def __init__(self, ideal: Sample, labels: Tensor, shape: tuple[int, ...], ranks: Ranks, noise_scale: float = 1.0):
        self.ideal, self.labels, self.shape, self.ranks, self.noise_scale = ideal, labels.to(ranks.device), shape, ranks, noise_scale
        self.goals: dict[int, tuple[Tensor, Tensor]] = {}   # noise and the teacher's images, by seed

    @torch.no_grad()
    def __call__(self, sample: Sample, seed: int) -> float:
        """Mean squared difference, images in [-1, 1], or latents."""
        if seed not in self.goals:
            device = self.ranks.device
            noise = generator(device, seed, "teacher")
            z = self.noise_scale * torch.randn(len(self.labels), *self.shape, generator=noise, device=device)
            self.goals[seed] = z, self.ideal(z, self.labels)
        z, goal = self.goals[seed]
        return (sample(z, self.labels) - goal).square().mean().item()


@torch.no_grad()
def residual_map(u: AverageVelocity, z_at: Callable[[Tensor], Tensor], y: Tensor, points: int = 8) -> Tensor:
    """How much the student contradicts itself: the interval splitting loss at lam = 1/2 on a grid of intervals.

    Args:
        z_at: states (B, ...) at times (B,).

    Returns:
        (points, points): row t = (i + 1) / points, column r = j / points; not a number where r >= t.
    """
    result = torch.full((points, points), float("nan"))
    for i in range(points):
        t = torch.full((len(y),), (i + 1) / points, device=y.device)
        z_t = z_at(t)
        for j in range(i + 1):
            result[i, j] = interval_splitting_loss(u, z_t, torch.full_like(t, j / points), t, torch.full_like(t, 0.5), y).mean()
    return result


def quick_judge(classifier: str | None, network_class: Callable[..., nn.Module], images: Images | Latents, ranks: Ranks) -> Judge:
    """The judge of quick evaluations: see `classifier_judge`, also for the errors; ValueError if the images are latents."""
    if images.autoencoder is not None:
        raise ValueError(f"--eval-every: --data {images.name} holds latents, without the pixels that samples are compared with; "
                         "leave it out, and run evaluate.py on the checkpoints")
    return classifier_judge(classifier, network_class, images, ranks)


class QuickEvaluation:
    """What a training run looks at on its way: Frechet distance and class accuracy of few samples.

    Args:
        classifier, network_class: see `quick_judge`, also for the errors.
        images: the training split.
        results_dir: its features are kept in here, in features/.

    Raises:
        ValueError: the training split has too few images.
        ModuleNotFoundError: torch-fidelity is not installed.
    """

    def __init__(self, classifier: str | None, network_class: Callable[..., nn.Module], images: Images | Latents, ranks: Ranks,
                 results_dir: str):
        import torch_fidelity.metric_fid  # noqa: F401 - slow to import, and first needed in the midst of a training

        self.judge, self.ranks, self.shape = quick_judge(classifier, network_class, images, ranks), ranks, images.shape
        self.labels = even_labels(QUICK_IMAGES, images)
        self.reference = reference_features(self.judge, shuffled(images)[0], Path(results_dir, "features")) if ranks.is_main else None
        if self.reference and len(images) <= (width := self.reference.features.shape[1]):
            raise ValueError(f"--eval-every: {len(images)} images are too few for a distance of {width} features, which needs more; leave "
                             "it out")

    def __call__(self, samplers: dict[str, Sample]) -> dict[str, float]:
        """From named samplers to "fd_<name>" and "accuracy_<name>"; always from the same noise.

        All ranks draw, rank 0 measures; the others return nothing.
        """
        result = {}
        for name, sample in samplers.items():
            # By all ranks: the network may be split among them.
            pixels = draw(sample, self.labels, self.shape, 0, self.ranks, self.ranks.batch_size)
            if not self.ranks.is_main:
                continue
            seen = self.judge(pixels)
            result[f"fd_{name}"] = metrics.frechet_distance(seen.features, self.reference.features)
            result[f"accuracy_{name}"] = metrics.class_accuracy(seen.logits, self.labels)
        return result


def summary(seeds: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and standard deviation (of the seeds, n - 1) of each metric."""
    values = {key: torch.tensor([row[key] for row in seeds], dtype=torch.float64) for key in seeds[0]}
    return {key: {"mean": value.mean().item(), "std": value.std().item() if len(value) > 1 else None} for key, value in values.items()}
