"""Randomness as a function of (seed, step): a run that stops and resumes draws what it would have drawn without the stop.

Each process draws for the whole global batch and keeps its own rows (`utils.distributed.Ranks.rows`), so the numbers
depend neither on the number of processes nor on which one asks.
"""

import hashlib

import torch
from torch import Generator


def fold(seed: int, *parts: int | str) -> int:
    """Mix a seed and any labels into a new seed, 0 to 2^63 - 1; nearby inputs give unrelated seeds."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def generator(device: torch.device | str, seed: int, *parts: int | str) -> Generator:
    """A generator on the device, seeded by `fold(seed, *parts)`."""
    return Generator(device).manual_seed(fold(seed, *parts))
