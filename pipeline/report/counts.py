"""What the report counts, in one pass over thin columns and one over the column that names a row's source.

Bounded whatever the corpus: a histogram a score, the totals of every reason, a few sampled rows a concept, and the
largest sources with the rest as "other".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.hashing import hash64
from pipeline.recipe import State
from pipeline.select.keys import order_keys
from pipeline.select.ranking import numpy_of

LEVELS = 2**16
OTHER = "(other)"
NAMES = 1000
"""Names that a tally holds. Smaller ones are added up as `(other)`: beyond 1,000 sources a count is a lower bound."""
NAME_CHARACTERS = 200

# ---- histograms


@dataclass(frozen=True)
class Bins:
    """A histogram ready to draw: `edges` (n + 1,) ascending, `all` and `kept` (n,) rows; the end bins hold the rest."""

    edges: np.ndarray
    all: np.ndarray
    kept: np.ndarray
    below: bool
    above: bool
    """Whether rows lie outside of the edges, counted in the end bins."""


def level_values() -> np.ndarray:
    """The value inside of each of the 65,536 levels (top 16 bits of the order key) that is nearest zero; float64."""
    keys = np.arange(LEVELS, dtype=np.uint32) << np.uint32(16)
    negative = keys < np.uint32(1 << 31)
    bits = np.where(negative, ~keys, keys ^ np.uint32(1 << 31))
    values = (bits & np.uint32(0xFFFF0000)).view(np.float32)
    values[np.isnan(values)] = np.inf  # levels that no score has
    return values.astype(np.float64)


def bins(levels: np.ndarray, most: int = 48, tail: float = 0.002) -> Bins | None:
    """Equal bins out of `levels` (2, 65536): rows dropped and kept of each level. None where no row has a finite score.

    A level spans 1/128 of a power of two, so bins whose width is a multiple of the widest level shown count exactly,
    with no row spread or misplaced. At most `most` bins between the quantiles `tail` and 1 - `tail`; scores that vary
    by less than a level get fewer.
    """
    values, total = level_values(), levels.sum(axis=0)
    there = np.flatnonzero((total > 0) & np.isfinite(values))
    if not len(there):
        return None
    running = np.cumsum(total[there])
    low, high = (there[np.searchsorted(running, q * running[-1])] for q in (tail, 1 - tail))
    if values[there[-1]] - values[there[0]] < 1.5 * (values[high] - values[low]):
        low, high = there[0], there[-1]
    widest = max(abs(values[low]), abs(values[high]), 1e-30)
    step = 2.0 ** (np.floor(np.log2(widest)) - 7)
    span = values[high] - values[low]
    width = step * max(1, int(np.ceil(span / step / most)))
    # A level on the negative side reaches away from zero: its values lie below the one that stands for it.
    place = np.where(values < 0, np.ceil(values / width) - 1, np.floor(values / width))
    first, last = place[low], place[high]
    at = np.clip(place, first, last) - first
    count = int(last - first) + 1
    dropped, kept = (np.bincount(at[side > 0].astype(np.int64), side[side > 0], count) for side in levels)
    edges = (first + np.arange(count + 1)) * width
    outside = total > 0
    return Bins(edges, dropped + kept, kept, bool((place[outside] < first).any()), bool((place[outside] > last).any()))


# ---- totals by name


def tally(names: np.ndarray, amounts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum `amounts` (n, m) by name, and join what is beyond the `NAMES` names with the most rows (the first column)."""
    found, at = np.unique(names, return_inverse=True)
    sums = np.zeros((len(found), amounts.shape[1]), np.int64)
    np.add.at(sums, at, amounts)
    if len(found) <= NAMES + 1:
        return found, sums
    rank = np.lexsort((found, -sums[:, 0], found == OTHER))
    most, rest = np.sort(rank[:NAMES]), rank[NAMES:]
    return np.append(found[most], OTHER), np.vstack([sums[most], sums[rest].sum(axis=0)])


def _named(values: pa.Array, amounts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sum each of m `amounts` (n,) by the text of n values: names, and sums (names, m)."""
    coded = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
    at, size = coded.indices.to_numpy(), len(coded.dictionary)
    sums = np.stack([np.bincount(at, a, size) for a in amounts], axis=1).astype(np.int64)  # float64: exact below 2**53
    used = np.flatnonzero(sums[:, 0])
    names = [_name(v) for v in coded.dictionary.take(pa.array(used)).to_pylist()]
    return tally(np.array(names, np.str_), sums[used])


def _name(value: object) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return text[:NAME_CHARACTERS].rstrip("\0")


@dataclass(frozen=True)
class Sources:
    """Statistic: rows and tokens of each source, all and kept. State: `name` (m,) text, `amount` int64 (m, 4)."""

    source: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.source, "select.keep", "row.tokens")

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        keep, tokens = numpy_of(batch, "select.keep"), numpy_of(batch, "row.tokens")
        amounts = [np.ones(len(keep)), tokens, keep, np.where(keep, tokens, 0)]
        name, amount = _named(batch.column(self.source), amounts)
        new = {"name": name, "amount": amount}
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        name, amount = tally(*(np.concatenate([s[k] for s in states]) for k in ("name", "amount")))
        return {"name": name, "amount": amount}


# ---- everything else


@dataclass(frozen=True)
class Overview:
    """Statistic over the thin columns: rows, tokens and bytes by reason, a histogram a score, and sampled rows.

    `scores`: references. `concepts`: those to sample rows of (empty: all rows are one group). `shards`: those to sample
    from. A group is `2 * i + kept` for the i-th of `concepts`; of each the `rows` rows with the smallest hashes.
    State: `reason` (m,) text and `amount` int64 (m, 3); `levels` int64 (scores, 2, 65536), dropped and kept; and for
    each sampled row `group`, `hash`, `shard`, `row`, `score` float32 (n, scores) and `why` text.
    """

    scores: tuple[str, ...]
    concepts: tuple[int, ...]
    shards: tuple[int, ...]
    rows: int
    seed: int

    @property
    def inputs(self) -> tuple[str, ...]:
        concept = ("concept.concept",) if self.concepts else ()
        size = ("row.key", "row.tokens", "row.bytes", "address.shard", "address.row")
        return ("select.keep", "select.reason", *size, *concept, *self.scores)

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        keep = numpy_of(batch, "select.keep")
        amounts = [np.ones(len(keep)), numpy_of(batch, "row.tokens"), numpy_of(batch, "row.bytes")]
        reason, amount = _named(batch.column("select.reason"), amounts)
        new = {"reason": reason, "amount": amount} | self._sample(batch, keep)
        levels = state["levels"] if state else np.zeros((len(self.scores), 2, LEVELS), np.int64)
        for number, name in enumerate(self.scores):
            level = (order_keys(numpy_of(batch, name)) >> np.uint32(16)).astype(np.int64)
            levels[number] += np.bincount(level + LEVELS * keep, minlength=2 * LEVELS).reshape(2, LEVELS)
        return (self._joined([state, new]) if state else new) | {"levels": levels}

    def merge(self, states: Sequence[State]) -> State:
        return self._joined(states) | {"levels": np.sum([s["levels"] for s in states], axis=0)}

    def _joined(self, states: Sequence[State]) -> State:
        """All but the histograms."""
        joined = {name: np.concatenate([s[name] for s in states]) for name in states[-1] if name != "levels"}
        reason, amount = tally(joined.pop("reason"), joined.pop("amount"))
        chosen = _smallest(joined["group"], joined["hash"], self.rows)
        return {"reason": reason, "amount": amount} | {name: values[chosen] for name, values in joined.items()}

    def _sample(self, batch: pa.RecordBatch, keep: np.ndarray) -> State:
        rows = np.flatnonzero(np.isin(numpy_of(batch, "address.shard"), self.shards))
        group = keep[rows].astype(np.int64)
        if self.concepts:
            known = np.array(sorted(self.concepts))
            concept = numpy_of(batch, "concept.concept", rows)
            at = np.minimum(np.searchsorted(known, concept), len(known) - 1)
            inside = known[at] == concept
            rows, group = rows[inside], 2 * np.argsort(self.concepts)[at[inside]] + group[inside]
        hashed = hash64(batch.column("row.key").take(pa.array(rows)), self.seed)
        chosen = _smallest(group, hashed, self.rows)
        rows = rows[chosen]
        why = batch.column("select.reason").take(pa.array(rows)).cast(pa.string()).to_pylist()
        return {
            "group": group[chosen],
            "hash": hashed[chosen],
            "shard": numpy_of(batch, "address.shard", rows).astype(np.int64),
            "row": numpy_of(batch, "address.row", rows),
            "score": np.stack([numpy_of(batch, name, rows) for name in self.scores], axis=1),
            "why": np.array([_name(w) for w in why], np.str_),
        }


def _smallest(group: np.ndarray, hashed: np.ndarray, rows: int) -> np.ndarray:
    """Indices of the `rows` smallest hashes of each group, ordered by (group, hash); the same hash counts once."""
    order = np.lexsort((hashed, group))
    group, hashed = group[order], hashed[order]
    new_group = np.diff(group, prepend=-1) != 0
    first_seen = new_group | (np.diff(hashed, prepend=np.uint64(0)) != 0)
    order, group = order[first_seen], group[first_seen]
    rank = np.arange(len(group)) - np.searchsorted(group, group)
    return np.asarray(order[rank < rows])
