"""Uniform random numbers that depend on a seed, a name and a row's index, and on nothing else."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor


class _Digest(ISeedSequence):
    """The 256 bits of a SHA-256, as the start of a generator."""

    def __init__(self, digest: bytes) -> None:
        self._digest = digest

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
        """Return the first words of the digest."""
        return np.frombuffer(self._digest, dtype=dtype)[:n_words]


def fill_uniform(out: Tensor, first: int, *, seed: int, name: str, purpose: str) -> Tensor:
    """Fill `out` [t, in] float32 with random numbers from 0 to 1, and return it.

    One stream of bits belongs to each (seed, name, purpose), whose SHA-256 seeds it. Every row of
    the weight has its own place in that stream, so a row's numbers do not depend on which rows are
    asked for together. The stream is that of PCG64, which numpy keeps the same in all its versions
    and on all machines, and which finds any place in it at once. While they are drawn, the numbers
    take the memory of `out` again.

    Parameters
    ----------
    first
        The index in the weight of the first row of `out`.
    """
    rows, columns = out.shape
    draws = -(-columns // 2)  # a draw has 64 bits, for two numbers
    digest = hashlib.sha256(f"{seed}\0{name}\0{purpose}".encode()).digest()
    start: Any = _Digest(digest)  # numpy's annotations know no such sequence but its own
    stream = np.random.PCG64(start)
    stream.advance(first * draws)
    bits = torch.from_numpy(stream.random_raw(rows * draws).view(np.int32))
    out.copy_(bits.view(rows, 2 * draws)[:, :columns])
    return out.mul_(2.0**-32).add_(0.5)


__all__ = ["fill_uniform"]
