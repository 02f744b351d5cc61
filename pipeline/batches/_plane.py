"""The error-uncertainty plane of Q-Tuning (arXiv 2509.23873, section 3): perplexity against entropy, in NumPy.

| quadrant | perplexity | entropy | what it is | what becomes of it |
| --- | --- | --- | --- | --- |
| 1 | high | high | noise | dropped |
| 2 | high | low | a confident mistake | kept, its worst tokens masked |
| 3 | low | low | known already | dropped |
| 4 | low | high | right, but unsure | kept whole |
| 0 | between | | | dropped |

One threshold `alpha` in [0, 0.49] says how much of either axis is low (the lowest alpha of it) and high (the highest).
The larger it is, the more rows the quadrants hold, so it is bisected until quadrants 2 and 4 hold the share of rows
that is asked for. That number is a step function of alpha: the last alpha tried that was enough is taken, else 0.49
(our rule; the paper takes whatever was tried last). Rows that are then missing are filled up by the largest support
|PPL - Ent|, both between 0 and 1; too many are cut by the least support (our rule; the paper has none).
"""

from __future__ import annotations

import numpy as np

LARGEST_NATS = 20.0
"""Mean losses are cut there before they become perplexities."""
WIDEST = 0.49
STEPS = 10


def quantile(values: np.ndarray, share: float) -> float:
    """The smallest of the values that at least a share of them does not exceed."""
    at = max(0, int(np.ceil(share * len(values) - 1e-9)) - 1)
    return float(np.partition(values, at)[at])


def thresholds(perplexity: np.ndarray, entropy: np.ndarray, alpha: float) -> tuple[float, float, float, float]:
    """Perplexity below and above which it is low and high, and entropy likewise."""
    return (
        quantile(perplexity, alpha), quantile(perplexity, 1 - alpha),
        quantile(entropy, alpha), quantile(entropy, 1 - alpha),
    )  # fmt: skip


def quadrants(perplexity: np.ndarray, entropy: np.ndarray, lines: tuple[float, float, float, float]) -> np.ndarray:
    """Quadrant of n rows, int8, 0 for none."""
    low_error, high_error = perplexity <= lines[0], perplexity >= lines[1]
    low_doubt, high_doubt = entropy <= lines[2], entropy >= lines[3]
    found = np.zeros(len(perplexity), np.int8)
    for number, where in enumerate(
        (high_error & high_doubt, high_error & low_doubt, low_error & low_doubt, low_error & high_doubt), 1
    ):
        found[where & (found == 0)] = number
    return found


def bisect(perplexity: np.ndarray, entropy: np.ndarray, share: float) -> float:
    """The alpha with which quadrants 2 and 4 hold at least a share of the rows, as tight as ten halvings make it."""
    low, high, enough = 0.0, WIDEST, WIDEST
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = quadrants(perplexity, entropy, thresholds(perplexity, entropy, middle))
        if np.isin(found, (2, 4)).mean() < share:
            low = middle
        else:
            high = enough = middle
    return enough


def between(values: np.ndarray, least: float, most: float) -> np.ndarray:
    """Values as shares of the way from `least` to `most`; 0 where these are the same."""
    if most <= least:
        return np.zeros(len(values))
    return np.asarray(np.clip((values - least) / (most - least), 0, 1))


def support(perplexity: np.ndarray, entropy: np.ndarray) -> np.ndarray:
    """|PPL - Ent| of n rows, both from 0 at the least of them to 1 at the largest."""
    scaled = [between(v, float(v.min()), float(v.max())) for v in (perplexity, entropy)]
    return np.asarray(np.abs(scaled[0] - scaled[1]))


def smoothed(perplexity: np.ndarray, lengths: np.ndarray, smoothing: float) -> np.ndarray:
    """(1 - lam) PPL_i + lam (PPL_{i-1} + PPL_{i+1}) / 2 of tokens, row after row; a row's ends repeat their value.

    `perplexity` (N,) of the tokens of rows with these `lengths`, none of them 0.
    """
    ends = np.cumsum(lengths)
    before, after = np.roll(perplexity, 1), np.roll(perplexity, -1)
    before[ends - lengths] = perplexity[ends - lengths]
    after[ends - 1] = perplexity[ends - 1]
    return np.asarray((1 - smoothing) * perplexity + smoothing * (before + after) / 2)


def lowest(values: np.ndarray, lengths: np.ndarray, share: float) -> np.ndarray:
    """Which of the values (N,) are among the lowest share of their row: max(1, floor(share * length)) of each; ties by
    position."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((np.arange(len(values)), values, row))
    rank = np.empty(len(values), np.int64)
    rank[order] = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.asarray(rank < np.maximum(1, np.floor(share * lengths + 1e-9).astype(np.int64))[row])


def token_perplexity(nats: np.ndarray) -> np.ndarray:
    """exp of losses, cut at `LARGEST_NATS`; float64."""
    return np.asarray(np.exp(np.minimum(nats.astype(np.float64), LARGEST_NATS)))
