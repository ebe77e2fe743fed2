"""Named random streams.

The library never touches global random state. Each stream (split, initialisation, augmentation, sampling, ...) draws
from a generator of its own, seeded by ``(seed, name)``: one more draw in one stream leaves the others alone.
"""

import hashlib

import numpy as np
import torch


def stream_seed(seed: int, *name: str | int) -> int:
    """A 63-bit seed for the stream ``name`` of the run ``seed``: the head of the SHA-256 of both."""
    digest = hashlib.sha256(repr((int(seed), *name)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *name: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on ``device`` for the stream ``name`` of the run ``seed``."""
    return torch.Generator(device=device).manual_seed(stream_seed(seed, *name))


def numpy_generator(seed: int, *name: str | int) -> np.random.Generator:
    """A NumPy generator for the stream ``name`` of the run ``seed``."""
    return np.random.default_rng(stream_seed(seed, *name))
