"""An evaluation as a table and as pictures."""

from pathlib import Path
from typing import Any

from torch import Tensor

from utils.pictures import log_scale, pyplot

# Key, heading, factor, decimals. "/ floor" is written beside the first two, where smaller is better and 1 is the best.
COLUMNS = [
    ("frechet_distance", "FD", 1, 3), ("kernel_distance", "KD x 1000", 1000, 3), ("precision", "precision", 1, 3),
    ("recall", "recall", 1, 3),
    ("class_accuracy", "class accuracy", 1, 4), ("inception_score", "IS", 1, 2), ("neighbour_ratio", "neighbour ratio", 1, 3),
    ("near_copies", "near copies", 1, 4), ("teacher_distance", "from teacher", 1, 4),
]


def weights_name(identity: str, metadata: dict[str, Any]) -> str:
    """What an evaluation calls weights: "EMA 01234567", or "raw 01234567" of a raw.safetensors. identity: of `checkpoints.weights_id`."""
    kind = metadata.get("weights", "ema")
    return f"{'EMA' if kind == 'ema' else kind} {identity}"


def full_names(numbers: dict[str, Any], protocol: dict[str, Any]) -> dict[str, Any]:
    """Metrics under names that say how they were measured, so that no two protocols are mixed up by accident."""
    known = {key for key, *_ in COLUMNS}
    suffix = f" [{protocol['features']}, n={protocol['num_images']}]"
    return {key + suffix if key in known else key: value for key, value in numbers.items()}


def cell(key: str, value: Any, factor: float, decimals: int, floor: dict[str, float]) -> str:
    """A number, or mean ± standard deviation over the seeds, and for distances its multiple of the floor."""
    mean, std = (value["mean"], value["std"]) if isinstance(value, dict) else (value, None)
    text = f"{factor * mean:.{decimals}f}" + (f" ± {factor * std:.{decimals}f}" if std is not None else "")
    if isinstance(value, dict) and key in ("frechet_distance", "kernel_distance") and floor.get(key, 0) > 0:
        text += f" ({mean / floor[key]:.1f} x floor)"
    return text


def line(row: dict[str, Any], floor: dict[str, float]) -> str:
    """One row as plain text."""
    return row["name"] + ": " + ", ".join(f"{heading} {cell(key, row[key], factor, decimals, floor)}"
                                          for key, heading, factor, decimals in COLUMNS if key in row)


def table(rows: list[dict[str, Any]], floor: dict[str, float], protocol: dict[str, Any], floor_row: bool = True) -> str:
    """Markdown: the floor first, then the rows; the protocol under it."""
    shown = [column for column in COLUMNS if any(column[0] in row for row in rows)]
    lines = ["| | evaluations | " + " | ".join(heading for _, heading, _, _ in shown) + " |", "|" + "---|" * (len(shown) + 2)]
    first = [{"name": "real held-out images: the floor", "evaluations": "", **floor}] if floor_row else []
    for row in [*first, *rows]:
        cells = [cell(key, row[key], factor, decimals, floor) if key in row else "" for key, _, factor, decimals in shown]
        lines.append(f"| {row['name']} | {row['evaluations']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + "; ".join(f"{key} {value}" for key, value in protocol.items()) + "\n"


def save_plot(path: Path, rows: list[dict[str, Any]], floor: dict[str, float]) -> None:
    """Frechet distance against network evaluations, a line for each guidance, with the floor."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    lines: dict[float | None, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(row.get("guidance_scale"), []).append(row)
    for scale, alike in lines.items():
        means = [row["frechet_distance"]["mean"] for row in alike]
        spreads = [row["frechet_distance"]["std"] or 0 for row in alike]
        axis.errorbar([row["evaluations"] for row in alike], means, spreads, marker="o", capsize=3, linestyle="-" if len(alike) > 1 else "",
                      label=f"guidance {scale:g}" if len(lines) > 1 else None)
    axis.axhline(floor["frechet_distance"], color="gray", linestyle="--", label="real held-out images")
    axis.set(xscale="log", xlabel="network evaluations", ylabel="Frechet distance")
    axis.set_xticks([row["evaluations"] for row in rows], [str(row["evaluations"]) for row in rows], minor=False)
    log_scale(axis)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_residual(path: Path, residual: Tensor) -> None:
    """A heat map of `utils.evaluation.residual_map`, logarithmic."""
    from matplotlib.colors import LogNorm  # slow to import

    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
    n = len(residual)
    positive = residual.clamp(min=1e-12).numpy()
    picture = axis.imshow(positive, origin="lower", norm=LogNorm(), cmap="viridis")
    axis.set_xticks(range(n), [f"{j / n:.2f}" for j in range(n)], fontsize=7)
    axis.set_yticks(range(n), [f"{(i + 1) / n:.2f}" for i in range(n)], fontsize=7)
    axis.set(xlabel="r", ylabel="t", title="interval splitting residual, lam = 1/2")
    figure.colorbar(picture)
    figure.savefig(path, dpi=110)
    plt.close(figure)
