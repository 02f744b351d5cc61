"""The column `select`: for every row `keep` and the reason, and what that adds up to.

| reason | meaning |
| --- | --- |
| `kept` | it is in |
| `floor:<score>` | below the floor of a score, the first one in their order |
| `<score>:<rule>` | the same, where the score's column has a field `rule` that names the rule that fired |
| `below_threshold` | ranked after the rows that filled the budget |
| `tie_lost` | the same scores as the last rows kept, lost by hash |
| `quota` | lost inside its concept, with a score that was enough in another |
| `too_large` | ranked above the threshold, but larger than what was left of the budget (only with `skip`) |

A row that is null here was in quarantine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline.recipe import Column, State, Transform
from pipeline.select.ranking import Line, load_lines, numpy_of

if TYPE_CHECKING:
    from pipeline.run import Artifact

FIELDS = pa.schema([("keep", pa.bool_()), ("reason", pa.dictionary(pa.int32(), pa.string()))])
REASONS = ("kept", "below_threshold", "tie_lost", "quota", "too_large")
KEPT, BELOW, TIE, QUOTA, LARGE = range(len(REASONS))
LINES = "lines.npz"


@dataclass(frozen=True)
class Floor:
    """Rows with `score` (a reference) below `value` are out; `rule` is the reference of the reason, or ""."""

    name: str
    score: str
    value: float
    rule: str = ""

    def reached(self, batch: pa.RecordBatch) -> np.ndarray:
        return np.asarray(numpy_of(batch, self.score) >= np.float32(self.value))


@dataclass(frozen=True)
class Verdict:
    """What decides on a row. `score`: the first that ranks; `elsewhere`: its lowest value kept in any concept, where
    concepts have quotas, else None."""

    lines: tuple[Line, ...]
    floors: tuple[Floor, ...]
    present: tuple[str, ...]
    score: str
    elsewhere: float | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        of_floors = [r for f in self.floors for r in (f.score, f.rule) if r]
        return tuple(
            dict.fromkeys([self.score, *(r for line in self.lines for r in line.inputs), *of_floors, *self.present])
        )

    def keeps(self, batch: pa.RecordBatch) -> np.ndarray:
        """Whether each row is kept; bool (n,)."""
        keep: np.ndarray = np.logical_or.reduce([line.keeps(batch) for line in self.lines])
        for floor in self.floors:
            keep &= floor.reached(batch)
        return keep

    def decide(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The column's values, from a batch of `inputs`."""
        compared = [line.compare(batch) for line in self.lines]
        above, tied = (np.logical_or.reduce(flags) for flags in zip(*compared, strict=True))
        keep = self.keeps(batch) if self.floors or len(self.lines) > 1 else above
        code = np.full(batch.num_rows, BELOW, np.int32)
        if self.elsewhere is not None:
            code[numpy_of(batch, self.score) >= np.float32(self.elsewhere)] = QUOTA
        code[tied] = TIE
        code[above] = LARGE
        code[keep] = KEPT
        names = list(REASONS)
        for floor in reversed(self.floors):  # the first floor has the last word
            self._explain(floor, batch, code, names)
        reason = pa.DictionaryArray.from_arrays(pa.array(code), pa.array(names))
        return pa.RecordBatch.from_arrays([pa.array(keep), reason], schema=FIELDS)

    def _explain(self, floor: Floor, batch: pa.RecordBatch, code: np.ndarray, names: list[str]) -> None:
        """Enter the reasons of the rows below a floor: codes into `code`, what they mean into `names`."""
        rows = np.flatnonzero(~floor.reached(batch))
        code[rows] = len(names)
        names.append(f"floor:{floor.name}")
        if floor.rule and len(rows):
            fired = batch.column(floor.rule).cast(pa.string()).take(pa.array(rows)).dictionary_encode()
            rules = fired.dictionary.to_pylist()
            meaning = np.array([len(names) - 1 if not r else len(names) + i for i, r in enumerate(rules)], np.int32)
            code[rows] = meaning[fired.indices.to_numpy()]
            names += [f"{floor.name}:{r}" for r in rules]


def verdict_column(verdict: Verdict, lines: Artifact) -> Column:
    """The column `select`; workers read the lines from their artifact."""
    bare = replace(verdict, lines=())
    return Column("select", verdict.inputs, FIELDS, partial(_open, bare, lines), lines.fingerprint, batch_rows=2**16)


def _open(bare: Verdict, lines: Artifact) -> Transform:
    return replace(bare, lines=load_lines(lines.local() / LINES)).decide


@dataclass(frozen=True)
class Lowest:
    """Statistic: `lowest` value of the first score that is kept, float32 (1,)."""

    verdict: Verdict

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.verdict.inputs

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        kept = numpy_of(batch, self.verdict.score)[self.verdict.keeps(batch)]
        new = {"lowest": np.array([kept.min(initial=np.float32(np.inf))], np.float32)}
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        return {"lowest": np.min([s["lowest"] for s in states], axis=0)}


AMOUNTS = ("rows", "tokens", "bytes")


@dataclass(frozen=True)
class Realised:
    """Statistic over the column `select`: what was kept, and why the rest was not.

    State: `reason` (text) with `count`; rows, tokens and bytes that were kept in all (`kept`, int64 (3,)), of every
    `shard` (`of_shard`, (shards, 3)) and concept (`of_concept`, (concepts, 3)); `lowest` kept value of the first score.
    """

    score: str
    concepts: int = 0

    @property
    def inputs(self) -> tuple[str, ...]:
        concept = ("concept.concept",) if self.concepts else ()
        return ("select.keep", "select.reason", "row.tokens", "row.bytes", "address.shard", self.score, *concept)

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        kept = np.flatnonzero(numpy_of(batch, "select.keep"))
        sizes = [numpy_of(batch, f"row.{unit}", kept) for unit in AMOUNTS[1:]]
        amounts = np.stack([np.ones_like(kept), *sizes], axis=1)
        total = amounts.sum(axis=0)
        reason = batch.column("select.reason")
        new = {
            "reason": np.array(reason.dictionary.to_pylist(), dtype=np.str_),
            "count": np.bincount(reason.indices.to_numpy(), minlength=len(reason.dictionary)),
            "kept": total,
            "shard": numpy_of(batch, "address.shard")[:1].astype(np.int64),
            "of_shard": total[None],
            "of_concept": np.zeros((self.concepts, len(AMOUNTS)), np.int64),
            "lowest": np.array([numpy_of(batch, self.score, kept).min(initial=np.float32(np.inf))], np.float32),
        }
        if self.concepts:
            np.add.at(new["of_concept"], numpy_of(batch, "concept.concept", kept), amounts)
        return self.merge([state, new] if state else [new])

    def merge(self, states: Sequence[State]) -> State:
        reason, at = np.unique(np.concatenate([s["reason"] for s in states]), return_inverse=True)
        shard, of = np.unique(np.concatenate([s["shard"] for s in states]), return_inverse=True)
        count, of_shard = np.zeros(len(reason), np.int64), np.zeros((len(shard), len(AMOUNTS)), np.int64)
        np.add.at(count, at, np.concatenate([s["count"] for s in states]))
        np.add.at(of_shard, of, np.concatenate([s["of_shard"] for s in states]))
        summed = {name: np.sum([s[name] for s in states], axis=0) for name in ("kept", "of_concept")}
        lowest = np.min([s["lowest"] for s in states], axis=0)
        return {"reason": reason, "count": count, "shard": shard, "of_shard": of_shard, "lowest": lowest, **summed}
