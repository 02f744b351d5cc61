"""Bytes that a pruned matrix takes, by how its zeros are stored. Zeros save bytes, not operations: dense kernels
multiply by them."""

from __future__ import annotations

import math

import numpy as np

from pipeline.compress.sparse.base import Pattern


def bitmask_bytes(count: int, kept: int, itemsize: int) -> int:
    """A bit for every weight and the values that stay."""
    return -(-count // 8) + kept * itemsize


def csr_bytes(shape: tuple[int, int], kept: int, itemsize: int) -> int:
    """Values, their columns (2 bytes up to 65,536 of them, else 4) and where rows begin (4 bytes)."""
    return kept * (itemsize + (2 if shape[1] <= 1 << 16 else 4)) + 4 * (shape[0] + 1)


def pattern_bytes(count: int, pattern: Pattern, itemsize: int) -> int:
    """Values that stay and, for each, its place in the group: for 2:4 of bfloat16 56.25 % of dense."""
    kept = count // pattern.of * pattern.keep
    return kept * itemsize + math.ceil(kept * int(np.ceil(np.log2(pattern.of))) / 8)
