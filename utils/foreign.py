"""Read the weight files of other projects. Nothing in them is executed."""

import argparse
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# Where training scripts put a state dict. The averaged weights first: they are the better teacher.
ENTRIES = ("ema", "model", "state_dict")


def read_state(path: Path | str) -> tuple[dict[str, Tensor], str]:
    """The state dict of a .safetensors, .pt or .pth file.

    A .pt file holds the state dict itself, or a dict with one under "ema", "model" or "state_dict", the first of these that is
    there. Besides tensors and plain values only an argparse.Namespace is accepted in it, which DiT's script saves.

    Returns:
        Tensors by name, on the CPU, and where in the file they were: an entry's name or "all of it".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another ending, a torn file, one that would execute code, or one without tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise ValueError(f"{path}: must be a .safetensors, .pt or .pth file")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):        # mmap: optimizer states are never read
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is torn, or holds more than weights: {error}") from error
    entry = next((name for name in ENTRIES if isinstance(content, dict) and isinstance(content.get(name), dict)), None)
    state = content if entry is None else content[entry]
    others = [name for name, value in state.items() if not isinstance(value, Tensor)] if isinstance(state, dict) else []
    if not isinstance(state, dict) or not state or others:
        raise ValueError(f"{path} holds no state dict: neither it nor its {', '.join(ENTRIES)} is a dict of tensors alone"
                         + (f" ({others[0]} is none)" if others else ""))
    return state, entry or "all of it"
