"""How far one set of images is from another, measured on features. All metrics here are functions of features alone.

The distances are torch-fidelity's (Obukhov et al. 2020), so they are the field's own, to the last constant. Added here is
what it lacks: nearest neighbours in the training set, and checks of the inputs. Features are (N, D) float32 on the CPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Features(NamedTuple):
    """What a judge sees in N images."""

    features: Tensor            # (N, D) float32
    logits: Tensor              # (N, classes) float32


def check_pixels(pixels: Tensor, least: int, name: str) -> None:
    """Raise ValueError unless these are enough 8-bit images: uint8 (N, C, H, H), N >= least, not all within 0..1."""
    if pixels.dtype != torch.uint8:
        raise ValueError(f"{name}: images must be uint8, 0 to 255, not {pixels.dtype}")
    if pixels.dim() != 4 or pixels.shape[1] not in (1, 3) or pixels.shape[2] != pixels.shape[3]:
        raise ValueError(f"{name}: images must be (N, 1 or 3, side, side), not {tuple(pixels.shape)}")
    if len(pixels) < least:
        raise ValueError(f"{name}: {len(pixels)} images are too few; these metrics need at least {least}")
    if int(pixels.max()) <= 1:
        raise ValueError(f"{name}: all values are 0 or 1; images must be 0 to 255, so these were probably floats in [0, 1]")


def check_features(a: Tensor, b: Tensor) -> None:
    """Raise ValueError unless two sets of features are finite, of one width, and larger than that width."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be (N, D) with one D, not {tuple(a.shape)} and {tuple(b.shape)}")
    for features in (a, b):
        if len(features) <= features.shape[1]:
            raise ValueError(f"{len(features)} images are too few for {features.shape[1]} features: a covariance needs more images "
                             "than features")
        if not features.isfinite().all():
            raise ValueError("features are not all finite")


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two sets: |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) (arXiv 1706.08500)."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    check_features(a, b)
    statistics = [{"mu": x.mean(0).cpu().numpy(), "sigma": x.T.cov().cpu().numpy()} for x in (a.double(), b.double())]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD, kernel (x.y / D + 1)^3, mean of 100 subsets of 1,000 or all there are (arXiv 1801.01401)."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    check_features(a, b)
    size = min(1000, len(a), len(b))
    return kid_features_to_metric(a.float(), b.float(), kid_subset_size=size, verbose=False)[KEY_METRIC_KID_MEAN]


def precision_recall(samples: Tensor, real: Tensor) -> tuple[float, float]:
    """Share of samples among the real images (their 3rd neighbour's distance) and the reverse (arXiv 1904.06991).

    Both depend on how many images there are: compare sets of one size only.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    check_features(samples, real)
    # In parts: whole, 50,000 images would need matrices of 10 GB.
    result = prc_features_to_metric(samples, real, verbose=False, save_cpu_ram=True)
    return result[KEY_METRIC_PRECISION], result[KEY_METRIC_RECALL]


def inception_score(logits: Tensor) -> float:
    """exp of the mean divergence of an image's class distribution from that of all; 10 splits (arXiv 1606.03498)."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    return isc_features_to_metric(logits)[KEY_METRIC_ISC_MEAN]


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """How often the judge sees the class that was asked for."""
    return (logits.argmax(1) == labels).double().mean().item()


@torch.no_grad()
def nearest(queries: Tensor, real: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Euclidean distances and indices of the nearest rows of `real`, nearest first.

    Args:
        queries: (N, D), or anything that flattens to it; real: (M, D) likewise. uint8 is taken as it is.

    Returns:
        Distances (N, count) float32 and indices (N, count) long.
    """
    real = real.flatten(1).float()
    squares = real.square().sum(1)
    found = []
    for part in queries.split(500):
        part = part.flatten(1).float()
        found.append((squares - 2 * part @ real.T).topk(count, largest=False).indices)
    indices = torch.cat(found)
    distances = torch.stack([(query.flatten().float() - real[i]).norm(dim=1) for query, i in zip(queries, indices)])
    return distances, indices


class Memorisation(NamedTuple):
    """How near samples are to the training set, beside held-out images. (Those of a named set and
    of --held-out cannot have been memorised; a tenth of the training images can, so there copies pass for chance.)

    ratio: median distance to the nearest training image, over that of held-out images; well below 1 is suspicious.
    copies: share of samples nearer than all but 1 % of the held-out images are; 0.01 is what chance gives.
    """

    ratio: float
    copies: float


def memorisation(samples: Tensor, held_out: Tensor) -> Memorisation:
    """From distances to the nearest training image: samples' (N,) and held-out images' (M,)."""
    return Memorisation((samples.median() / held_out.median()).item(),
                        (samples < held_out.quantile(0.01)).double().mean().item())
