"""The throughput benchmark's table and plot."""

from pathlib import Path
from typing import Any

from utils.pictures import pyplot


def markdown(rows: list[Any], ceiling: float | None) -> str:
    """One line a row; `ceiling` is the TFLOP/s of a bf16 matrix product, or None."""
    lines = ["| row | network | batch | GPUs | images/s (least to greatest) | ms an update | peak GiB | TFLOP/s | of matmul "
             "| first update cold, s | warm, s |", "|" + "---|" * 11]
    for row in rows:
        low, high = min(row.images_per_second), max(row.images_per_second)
        spread = f"{row.median:,.0f} ({low:,.0f} to {high:,.0f})"
        milliseconds = 1000 * row.batch_size * row.num_gpus / row.median
        share = f"{row.tflops / row.num_gpus / ceiling:.0%}" if ceiling else ""
        memory = f"{row.memory_gib:.1f}" if row.memory_gib is not None else ""
        cold, warm = (f"{seconds:.0f}" if seconds is not None else "" for seconds in (row.first_update_cold, row.first_update_warm))
        lines.append(f"| {row.name} | {row.model} | {row.batch_size} | {row.num_gpus} | {spread} | {milliseconds:.1f} | {memory} | "
                     f"{row.tflops:.3g} | {share} | {cold} | {warm} |")
    return "\n".join(lines) + "\n"


def varying(rows: list[Any]) -> str:
    """The field that the rows of one name differ in: batch_size, num_gpus or model; "" if there is but one row of each."""
    for field in ("batch_size", "num_gpus", "model"):
        if len({getattr(row, field) for row in rows}) > 1:
            return field
    return ""


def plot(rows: list[Any], path: Path, device: str) -> None:
    """Bars, or curves against what varies: images/s, with the least and the greatest window."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    names = list(dict.fromkeys(row.name for row in rows))
    field = varying(rows)
    for name in names:
        mine = [row for row in rows if row.name == name]
        medians = [row.median for row in mine]
        spread = [[m - min(row.images_per_second) for m, row in zip(medians, mine)],
                  [max(row.images_per_second) - m for m, row in zip(medians, mine)]]
        if field:
            axis.errorbar([str(getattr(row, field)) for row in mine], medians, spread, label=name, marker="o", capsize=3)
        else:
            axis.bar([name], medians, yerr=spread, capsize=3)
            axis.annotate(f"{medians[0]:,.0f}", (name, medians[0]), ha="center", va="bottom")
    axis.set(ylabel="images/s", title=device, xlabel={"batch_size": "batch on each GPU", "num_gpus": "GPUs"}.get(field, ""))
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3, axis="y")
    if field:
        figure.legend(loc="outside right upper")
    else:
        axis.tick_params(axis="x", labelrotation=15)
    figure.savefig(path, dpi=110)
    plt.close(figure)
