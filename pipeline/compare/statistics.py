"""What a difference between two models is worth: intervals over items and over runs, equivalence, churn.

Two questions, two intervals. Would it hold on other items (documents, questions)? `over_items`: the paired percentile
bootstrap. An item is drawn with the values of all runs on it, for runs share their items. Would it hold for another
training or another draw of calibration data? `over_runs`: Student's t over seeds, or over a grid of seeds and draws,
both of which vary at random. Neither answers the other, and a difference is shown only where both leave out 0.

"Matches the dense model" is a claim of its own: `equivalent` within a margin fixed beforehand (two one-sided tests),
not a difference that was not significant. Net accuracy hides churn: `flips` counts both directions.

All of it is determined by the values and a seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.compare.verdict import CONFIDENCE, interval

RESAMPLES = 10_000
CHUNK = 1 << 22
"""Values drawn at a time: what 10,000 resamples of many items would take in memory."""


@dataclass(frozen=True)
class Estimate:
    """A mean, the ends of its 95 % interval, and the two-sided p-value of its being 0."""

    mean: float
    low: float
    high: float
    p: float

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True)
class Equivalence:
    """Whether a difference lies within ± `margin`; `p` is the larger of the two one-sided p-values."""

    margin: float
    mean: float
    p: float

    @property
    def shown(self) -> bool:
        return self.p < 1 - CONFIDENCE


@dataclass(frozen=True)
class Flips:
    """Items that one model has right and the other wrong."""

    gained: int
    lost: int
    items: int

    @property
    def net(self) -> float:
        return (self.gained - self.lost) / self.items

    @property
    def churn(self) -> float:
        """Share of items that changed, in either direction."""
        return (self.gained + self.lost) / self.items


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a - b item by item, float64. Raises ValueError where they are not pairs or not finite."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"values of shapes {a.shape} and {b.shape} are not pairs")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a value that is not finite has no difference")
    return np.asarray(a - b)


def over_items(a: np.ndarray, b: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean of a - b over items. `a`, `b`: (items,), or (runs, items) where the same runs saw the same items."""
    pairs = np.atleast_2d(difference(a, b)).mean(axis=0)
    return _percentiles(pairs, seed, resamples)


def interaction(
    c: np.ndarray, b: np.ndarray, f: np.ndarray, e: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """(C - B) - (F - E): what curated data do for a pruned model beyond what they do for one from scratch.

    Values as in `over_items`, all on the same items. Positive: pruning and curation help each other, where more is
    better.
    """
    return over_items(difference(c, b), difference(f, e), seed, resamples)


def over_runs(values: np.ndarray) -> Estimate:
    """Mean over runs of a quantity, such as the difference of two arms trained with the same seed.

    `values`: (seeds,), or (seeds, draws) where every seed met every draw of calibration data. Then seeds and draws are
    crossed random effects: the mean's variance is (MS_seed + MS_draw - MS_rest) / (seeds draws), with Satterthwaite's
    degrees of freedom. Raises ValueError for fewer than two of either.
    """
    from scipy import stats

    values = np.asarray(values, np.float64)
    if values.ndim == 1:
        found = interval(values.tolist())
        spread, freedom = found.half / float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)), float(len(values) - 1)
        mean = found.mean
    else:
        if values.ndim != 2 or min(values.shape) < 2:
            raise ValueError(f"a grid of {values.shape} runs has no interval: it takes two seeds and two draws")
        mean = float(values.mean())
        seeds, draws = values.shape
        by_seed, by_draw = values.mean(axis=1) - mean, values.mean(axis=0) - mean
        rest = values - mean - by_seed[:, None] - by_draw
        squares = np.array([
            draws * (by_seed**2).sum() / (seeds - 1),
            seeds * (by_draw**2).sum() / (draws - 1),
            (rest**2).sum() / ((seeds - 1) * (draws - 1)),
        ])  # fmt: skip
        # An effect that comes out negative is none: the variance never falls below that of either effect alone.
        total = max(squares[0] + squares[1] - squares[2], squares[0], squares[1])
        degrees = np.array([seeds - 1, draws - 1, (seeds - 1) * (draws - 1)])
        below = float((squares**2 / degrees).sum())
        freedom = max(min(seeds, draws) - 1.0, total**2 / below) if below else float(min(seeds, draws) - 1)
        spread = math.sqrt(total / values.size)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * spread
    p = 2 * float(stats.t.sf(abs(mean) / spread, freedom)) if spread else float(mean == 0)
    return Estimate(mean, mean - half, mean + half, p)


def equivalent(a: np.ndarray, b: np.ndarray, margin: float, seed: int = 0, resamples: int = RESAMPLES) -> Equivalence:
    """Two one-sided bootstrap tests that |a - b| < margin, which is to be fixed before anything is measured."""
    if not 0 < margin < math.inf:
        raise ValueError(f"a margin of {margin:g} tests nothing: name the difference that would not matter")
    pairs = np.atleast_2d(difference(a, b)).mean(axis=0)
    means = np.concatenate(list(_resampled(pairs, seed, resamples)))
    p = max(_share(means <= -margin), _share(means >= margin))
    return Equivalence(margin, float(pairs.mean()), p)


def holm(p: Sequence[float]) -> np.ndarray:
    """p-values of a family of comparisons, adjusted step down (Holm 1979); (n,) in the order given."""
    values = np.asarray(p, np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("p-values lie between 0 and 1")
    order = np.argsort(values, kind="stable")
    adjusted = np.empty(len(values))
    steps = values[order] * np.arange(len(values), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps)) if len(values) else steps
    return adjusted


def flips(before: np.ndarray, after: np.ndarray) -> Flips:
    """From which items were right (1) or wrong (0) before and after; (items,) each."""
    change = difference(after, before)
    if not np.isin(change, (-1, 0, 1)).all() or not np.isin(before, (0, 1)).all():
        raise ValueError("flips are counted of items that are right (1) or wrong (0)")
    return Flips(int((change > 0).sum()), int((change < 0).sum()), len(change))


def _percentiles(values: np.ndarray, seed: int, resamples: int) -> Estimate:
    means = np.concatenate(list(_resampled(values, seed, resamples)))
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    p = min(1.0, 2 * min(_share(means <= 0), _share(means >= 0)))
    return Estimate(float(values.mean()), float(low), float(high), p)


def _share(hits: np.ndarray) -> float:
    """Share of resamples, the observed one among them, so that no p-value is 0."""
    return float((1 + np.count_nonzero(hits)) / (1 + len(hits)))


def _resampled(values: np.ndarray, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Means of `resamples` draws of the items with replacement, a chunk at a time."""
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // len(values))
    for start in range(0, resamples, step):
        yield values[rng.integers(len(values), size=(min(step, resamples - start), len(values)))].mean(axis=1)
