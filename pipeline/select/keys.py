"""Float32 scores as unsigned integers of the same order, so that an exact threshold is found digit by digit."""

from __future__ import annotations

import numpy as np

_SIGN = np.int32(-(2**31))


def order_keys(scores: np.ndarray) -> np.ndarray:
    """uint32 keys with key(a) < key(b) exactly where a < b; shape (n,), from float32 of shape (n,).

    Infinities are legal, -0.0 equals 0.0, and no score has the key 0 or 2**32 - 1. Raises ValueError for a NaN, which
    has no rank, and TypeError for any type but float32: a cast in one pass and not in the next would move rows.
    """
    if scores.dtype != np.float32:
        raise TypeError(f"a score is float32, not {scores.dtype}: cast it once, where its column is made")
    if np.isnan(scores).any():
        raise ValueError("a score is NaN and has no rank: its column must quarantine the row")
    bits = (scores + np.float32(0)).view(np.int32)  # -0.0 + 0.0 is 0.0
    return (bits ^ (bits >> 31 | _SIGN)).view(np.uint32)  # a negative flips every bit, a positive its sign
