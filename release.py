"""Make the file that is released from a run: its EMA weights in bfloat16, with the run's metadata.

    python release.py results/student-mnist checkpoints/student-mnist.safetensors
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from utils.checkpoints import read_weights, resolve_weights, write_weights
from utils.config import FREE_FIELDS, parse_config


@dataclass(frozen=True)
class Config:
    source: Annotated[str, tyro.conf.Positional]            # run folder (its newest checkpoint), checkpoint folder, or file
    target: Annotated[str, tyro.conf.Positional]            # the file to write
    replace: bool = False                                   # overwrite a file that is there


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__)
    target = Path(cfg.target)
    if target.exists() and not cfg.replace:
        raise ValueError(f"{target} exists; use --replace True to overwrite it")
    weights, metadata = read_weights(resolve_weights(cfg.source))
    metadata["config"] = {key: value for key, value in metadata["config"].items() if key not in FREE_FIELDS}    # folders and the like
    target.parent.mkdir(parents=True, exist_ok=True)
    write_weights(target, {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}, metadata)
    print(f"{target}: {metadata['kind']}, step {metadata['step']}, {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
