"""The draw of DEALRec, whatever the surrogate: influence and effort to values, values to strata, strata to turns.

1. value = minmax(influence) + effort_weight x minmax(effort), each over the whole corpus.
2. The top `hard_prune` by value is dropped as too hard, the rest cut into `strata` of equal width in value.
3. A budget is spent by giving the stratum with the fewest rows an equal share or all it has, then the next of what is
   left. That is the same as taking turns, a row from each stratum that has any left, the largest first; so the score
   is minus a row's turn, and the best rows by score are the stratified draw at any budget. Inside a stratum the order
   is that of the hashes of the rows' keys. float32 tells 16.7 M turns apart; later ones tie, and hashes break ties.

Source and what differs from it: `pipeline.scores.dealrec`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from pipeline.artifact import Artifact
from pipeline.errors import CorpusError, TamisError
from pipeline.hashing import hash64
from pipeline.recipe import QUARANTINE, Column, State, Transform, fingerprint
from pipeline.sample import needs_fit
from pipeline.scores.base import Score

if TYPE_CHECKING:
    import torch

    from pipeline.run import Run

PARTS = pa.schema([("influence", pa.float32()), ("effort", pa.float32()), (QUARANTINE, pa.string())])
EFFORT = pa.schema([("effort", pa.float32()), (QUARANTINE, pa.string())])
PLACES = pa.schema([("value", pa.float32()), ("stratum", pa.int32()), ("place", pa.int32())])
FIELDS = pa.schema([("score", pa.float32()), ("rule", pa.string())])
KEY = "row.key"
BINS = 1 << 16
"""Of values and of their parts: strata and limits are exact to one of them."""
SLOTS = 256
"""Ranges of hashes a stratum, each of which has to fit a worker."""
PRUNED = "hard_prune"
DOUBLINGS = 40


class StratifiedDraw(Score, ABC):
    """Base of the scores that draw by influence and effort; a child has a surrogate and fills `<name>-parts`."""

    model: str | None = Field(
        None, description="causal LM whose gradient norm is the effort (default: the surrogate's)"
    )
    v: Literal["validation", "train"] = Field("validation", description="whose mean gradient influence is on")
    effort_weight: float = Field(0.5, ge=0, description="how much effort counts beside influence")
    hard_prune: float = Field(0.1, ge=0, lt=1, description="share of the rows, those of highest value, that comes last")
    strata: int = Field(25, ge=1, le=1000, description="strata of equal width in value")
    clip: float = Field(0, ge=0, lt=0.5, description="quantile at either end to which influence and effort are clipped")
    damping: float = Field(0.01, gt=0, description="LiSSA: added to the Hessian")
    scale: float = Field(25, gt=0, description="LiSSA: divides the Hessian; doubled where it diverges")
    steps: int = Field(5000, ge=1, description="LiSSA: steps, with the Hessian of one row each")
    max_tokens: int = Field(512, ge=2, description="tokens of a row that the model reads")
    seed: int | None = Field(None, description="seed of sample, surrogate and draw (default: the run's)")

    @model_validator(mode="after")
    def _there(self) -> Self:
        if self.model is not None:
            from pipeline.models.causal import check_model

            check_model(self.kind, self.model)
        return self

    def support(self, run: Run) -> Sequence[Column]:
        if self.model is None:
            return ()
        from pipeline.models.causal import model_source
        from pipeline.models.files import folder_digest, folder_of
        from pipeline.scores._influence import BATCH_ROWS, engine_resources

        source, (resources, precision) = model_source(run, self.model), engine_resources(run)
        identity = fingerprint("effort", 1, folder_digest(folder_of(source)), self.max_tokens, precision)
        opened = partial(open_effort, source, self.max_tokens, precision)
        return [Column(f"effort-{identity[:12]}", run.layout.spoken, EFFORT, opened, identity, resources, BATCH_ROWS)]

    def column(self, run: Run) -> Column:
        """The column as `fill` leaves it; it is not opened."""
        return Column(self.column_name, (KEY,), FIELDS, _not_opened, self.identity(str(self._seed(run))))

    def fill(self, run: Run) -> None:
        name, asked = self.column_name, [self.effort_weight, self.hard_prune, self.strata, self.clip]
        parts = self._parts(run)
        run.materialize([parts])
        references = (f"{parts.name}.influence", f"{parts.name}.effort")
        identity = fingerprint("dealrec scale", 1, asked, run.identity(*references))
        found = self._scale(run, references) if needs_fit(run, f"{name}-scale", identity) else None
        scale = run.artifact(f"{name}-scale", identity, partial(_write_scale, found), resources=None)

        opened = partial(_open_places, scale, references, self._seed(run))
        identity = fingerprint("dealrec places", 1, scale.fingerprint, self._seed(run))
        places = Column(f"{name}-places", (*references, KEY), PLACES, opened, identity)
        run.materialize([places])
        place = f"{places.name}.place"
        identity = fingerprint("dealrec turns", 1, run.identity(place))
        rows = (
            run.aggregate(Counts(place, (self.strata + 1) * SLOTS)) if needs_fit(run, f"{name}-turns", identity) else {}
        )
        turns = run.artifact(f"{name}-turns", identity, partial(_write_turns, rows), resources=None)
        run.regroup(self.column(run), place, partial(_take_turns, turns, place, self._seed(run)))

    def _seed(self, run: Run) -> int:
        return run.seed if self.seed is None else self.seed

    @abstractmethod
    def _parts(self, run: Run) -> Column:
        """The column `<name>-parts` of `PARTS`: influence and effort of every row."""

    def _scale(self, run: Run, references: tuple[str, str]) -> dict[str, Any]:
        """Where influence and effort begin and end, and the bins of value between which the strata lie."""
        spans = [run.aggregate(Span(reference)) for reference in references]
        if not all(spans):
            raise CorpusError(f"{self.column_name}: no row has both influence and effort; see quarantine/")
        limits = [(float(s["least"][0]), float(s["most"][0])) for s in spans]
        if self.clip:
            rows = [run.aggregate(Values((r,), (ends,), (1.0,))) for r, ends in zip(references, limits, strict=True)]
            limits = [clipped(s["rows"], ends, self.clip) for s, ends in zip(rows, limits, strict=True)]
        weights = (1.0, self.effort_weight)
        rows_of = run.aggregate(Values(references, tuple(limits), weights))["rows"]
        first, last = kept_bins(rows_of, self.hard_prune)
        return {"limits": limits, "weights": weights, "first": first, "last": last, "strata": self.strata}


def lissa(
    v: np.ndarray, product: Callable[[np.ndarray, int], np.ndarray], damping: float, scale: float, steps: int
) -> tuple[np.ndarray, float]:
    """Fixed point h of v = (damping I + H / scale) h, and the scale with which it was found.

    h <- v + (1 - damping) h - product(h, step) / scale, where `product` is H_s h of that step's row. Where H has no
    negative direction |h| never exceeds |v| / damping; where it does, the scale was below the largest eigenvalue, and
    the steps begin again with twice of it. Raises TamisError after 40 doublings.
    """
    bound = 2 * np.linalg.norm(v) / damping
    for doubling in range(DOUBLINGS):
        h, divisor = v.copy(), scale * 2.0**doubling
        for step in range(steps):
            h = v + (1 - damping) * h - product(h, step) / divisor
            if not np.linalg.norm(h) <= bound:  # NaN, too
                break
        else:
            return h, divisor
    raise TamisError("dealrec: LiSSA diverges at any scale: the surrogate's Hessian is not finite or not positive")


def open_effort(source: Artifact | Path, max_tokens: int, precision: str) -> Transform:
    from pipeline.models.files import folder_of
    from pipeline.models.gradients import backward, linear_layers, squared_norms
    from pipeline.scores._influence import NOT_FINITE, Reader

    reader = Reader(folder_of(source), max_tokens, precision)
    *_, last = linear_layers(reader.model, "v_proj").items()
    layers = dict([last])

    def effort(batch: pa.RecordBatch) -> pa.RecordBatch:
        tokens = reader.read({name: batch.column(name) for name in batch.schema.names})
        norms = np.zeros(batch.num_rows, np.float32)
        for rows, ids, weight in reader.batches(tokens):

            def take(layer: str, a: torch.Tensor, b: torch.Tensor, rows: np.ndarray = rows) -> None:
                norms[rows] = squared_norms(a, b).sqrt().cpu().numpy()

            backward(reader.model, layers, ids, weight, take)
        finite = np.isfinite(norms)
        why = pa.array(np.full(len(norms), NOT_FINITE), mask=finite)
        return pa.record_batch([pa.array(norms, mask=~finite), why], schema=EFFORT)

    return effort


@dataclass(frozen=True)
class Span:
    """Statistic: `least` and `most` of a column, float64 (1,)."""

    reference: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.reference,)

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        values = batch.column(self.reference).to_numpy().astype(np.float64)
        new = {"least": values.min(keepdims=True), "most": values.max(keepdims=True)}
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        return {
            "least": np.min([s["least"] for s in states], axis=0),
            "most": np.max([s["most"] for s in states], axis=0),
        }


@dataclass(frozen=True)
class Values:
    """Statistic: `rows` (65,536,) int64 by bin of the weighted sum of columns, each scaled between its limits."""

    references: tuple[str, ...]
    limits: tuple[tuple[float, float], ...]
    weights: tuple[float, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.references

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        bins = binned(value_of(batch, self.references, self.limits, self.weights), sum(self.weights))
        new = {"rows": np.bincount(bins, minlength=BINS)}
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        return {"rows": np.sum([s["rows"] for s in states], axis=0)}


@dataclass(frozen=True)
class Counts:
    """Statistic: `rows` (places,) int64 by place."""

    reference: str
    places: int

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.reference,)

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        new = {"rows": np.bincount(batch.column(self.reference).to_numpy(), minlength=self.places)}
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        return {"rows": np.sum([s["rows"] for s in states], axis=0)}


def minmax(values: np.ndarray, least: float, most: float) -> np.ndarray:
    """(z - least) / (most - least), clipped to [0, 1]; 0 for all where least is most. float64 (n,)."""
    if most <= least:
        return np.zeros(len(values))
    return np.asarray(np.clip((values.astype(np.float64) - least) / (most - least), 0, 1))


def value_of(
    batch: pa.RecordBatch,
    references: Sequence[str],
    limits: Sequence[Sequence[float]],
    weights: Sequence[float],
) -> np.ndarray:
    """Weighted sum of columns between their limits, in [0, sum of weights]; float64 (n,)."""
    columns = [minmax(batch.column(r).to_numpy(), *ends) for r, ends in zip(references, limits, strict=True)]
    return np.asarray(np.sum([w * z for w, z in zip(weights, columns, strict=True)], axis=0))


def binned(value: np.ndarray, top: float) -> np.ndarray:
    """Bin in [0, 65,536) of values in [0, top]; the largest value is in the last bin. int64 (n,)."""
    return np.asarray(np.minimum((value * (BINS / top)).astype(np.int64), BINS - 1))


def clipped(rows: np.ndarray, ends: tuple[float, float], quantile: float) -> tuple[float, float]:
    """The quantile at either end, to the width of a bin; `rows` by bin between the ends."""
    below = np.cumsum(rows) / rows.sum()
    first, last = np.searchsorted(below, [quantile, 1 - quantile], side="left")
    width = (ends[1] - ends[0]) / BINS
    return ends[0] + int(first) * width, ends[0] + (int(last) + 1) * width


def kept_bins(rows: np.ndarray, hard_prune: float) -> tuple[int, int]:
    """First and last bin of what stays: at most a share `hard_prune` of the rows lies above the last."""
    there = np.flatnonzero(rows)
    above = rows.sum() - np.cumsum(rows)
    last = int(there[np.argmax(above[there] <= hard_prune * rows.sum())])
    return int(there[0]), last


def strata_of(bins: np.ndarray, first: int, last: int, strata: int) -> np.ndarray:
    """Stratum of every bin, of equal width from the first bin to the last; `strata` for those beyond. int64 (n,)."""
    return np.where(bins > last, strata, (bins - first) * strata // (last - first + 1))


def turns_of(rank: np.ndarray, stratum: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """When a row's turn comes, from its rank in its stratum; int64 (n,), a permutation of 0 .. n - 1.

    Each round takes one row from every stratum that has any left, the largest stratum first (of two alike the later).
    The first m turns are DEALRec's draw of m rows.
    """
    place = np.empty(len(sizes), np.int64)
    place[np.lexsort((np.arange(len(sizes)), sizes))[::-1]] = np.arange(len(sizes))
    turn = np.zeros(len(rank), np.int64)
    for other, size in enumerate(sizes):
        # rows that it has given in whole rounds before, and one more where it comes earlier in this round
        turn += np.minimum(rank, size) + ((place[other] < place[stratum]) & (rank < size))
    return turn


def _write_scale(found: dict[str, Any] | None, directory: Path) -> None:
    (directory / "scale.json").write_text(json.dumps(found, indent=2))


def _open_places(artifact: Artifact, references: tuple[str, str], seed: int) -> Transform:
    scale = json.loads((artifact.local() / "scale.json").read_text())

    def places(batch: pa.RecordBatch) -> pa.RecordBatch:
        value = value_of(batch, references, scale["limits"], scale["weights"])
        bins = binned(value, sum(scale["weights"]))
        stratum = strata_of(bins, scale["first"], scale["last"], scale["strata"])
        slot = (hash64(batch.column(KEY), seed) >> np.uint64(56)).astype(np.int64)
        columns = [value.astype(np.float32), stratum.astype(np.int32), (stratum * SLOTS + slot).astype(np.int32)]
        return pa.record_batch(columns, schema=PLACES)

    return places


def _write_turns(state: State, directory: Path) -> None:
    np.save(directory / "rows.npy", state["rows"])


def _take_turns(artifact: Artifact, place: str, seed: int, table: pa.Table) -> pa.Table:
    """Every row's score, from the rows of some places; `rows.npy` says how many each place has."""
    rows = np.load(artifact.local() / "rows.npy", allow_pickle=False).reshape(-1, SLOTS)
    before = (np.cumsum(rows, axis=1) - rows).ravel()
    sizes = rows.sum(axis=1)
    places = table[place].to_numpy()
    order = np.lexsort((hash64(table[KEY].combine_chunks(), seed), places))  # stable: rows with one key by address
    firsts = np.searchsorted(places[order], places[order], side="left")
    rank = np.empty(len(order), np.int64)
    rank[order] = before[places[order]] + np.arange(len(order)) - firsts
    stratum = places // SLOTS
    pruned = stratum == len(sizes) - 1
    turn = np.where(pruned, sizes[:-1].sum() + rank, 0)
    turn[~pruned] = turns_of(rank[~pruned], stratum[~pruned], sizes[:-1])
    return (
        table.select(["address.shard", "address.row"])
        .append_column("score", pa.array(-turn.astype(np.float32)))
        .append_column("rule", pa.array(np.where(pruned, PRUNED, "")))
    )


def _not_opened() -> Transform:
    raise TamisError("dealrec fills its column by regrouping")
