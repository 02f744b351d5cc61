"""Spread: in how many directions the rows point, before and after the selection, in every concept and in the whole.

Two measures of (n, d) unit vectors Z, both from the eigenvalues l of Z^T Z, which are those of Z Z^T but for zeros, so
the smaller of the two is taken:

- `erank`, the effective rank exp(-sum p ln p) of p = s / sum s with the singular values s = sqrt(l) (Roy and Vetterli
  2007; AgilePruner 2026): between 1 and min(n, d).
- `entropy`, the matrix entropy -sum q ln q of q = l / sum l, in nats (EntropyPrune 2026, arXiv 2602.17196).

A smaller set has less room to spread, so what was kept is compared with as many rows drawn at random as well: kept
above drawn means that the selection is more diverse than chance. The papers measure visual tokens; reading it as a
corpus's diversity is ours, and AgilePruner's warning holds: diverse is not good by itself.

`measure` fills the artifact `spread`: `concepts.parquet` with a row a concept (`concept`, `rows`, `rows_kept`, `erank`,
`erank_kept`, `erank_drawn`, `entropy`, `entropy_kept`, `entropy_drawn`), and `spread.json` with the same of the whole.
The whole is one aggregate of three d x d sums. Of k concepts these would be k times as large and written for every
shard, 75 GB at k = 1,000, d = 384 and 32 shards; so the rows of a concept are brought together instead.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.engine.regroup import ROW, SHARD, key_groups, unopened
from pipeline.errors import TamisError
from pipeline.hashing import hash64, uniform
from pipeline.recipe import Column, State, fingerprint
from pipeline.sample import needs_fit
from pipeline.vectors import matrix

if TYPE_CHECKING:
    from pipeline.run import Run

NAME = "spread"
TABLE, WHOLE = "concepts.parquet", "spread.json"
CONCEPT, VECTOR, KEEP, KEY = "concept.concept", "embed.vector", "select.keep", "row.key"
SETS = ("", "_kept", "_drawn")
COUNTS = ("rows", "rows_kept")
MEASURES = tuple(f"{measure}{which}" for measure in ("erank", "entropy") for which in SETS)
FIELDS = pa.schema([*((name, pa.int64()) for name in COUNTS), *((name, pa.float64()) for name in MEASURES)])


@dataclass(frozen=True)
class Spread:
    """`whole`: the measures of the corpus by name; `concepts`: those of every concept that has rows, by number."""

    whole: dict[str, float]
    concepts: pa.Table


def measure(run: Run) -> Spread:
    """Spread of what was there and of what `select` kept; stored, so a second call reads it.

    Call it after the selection of a run that has vectors and concepts. Raises TamisError where there are none.
    """
    if missing := [name for name in ("embed", "concept", "select") if name not in run.plans]:
        raise TamisError(f"spread needs vectors, concepts and a selection; this run has no {' and '.join(missing)}")
    identity = fingerprint(NAME, 1, run.seed, run.identity(VECTOR, CONCEPT, KEEP, KEY))
    table, whole = None, {}
    if needs_fit(run, NAME, identity):
        inputs = (VECTOR, KEEP, KEY)
        run.regroup(Column(NAME, inputs, FIELDS, unopened, identity), CONCEPT, partial(_by_concept, run.seed))
        table = pa.table(run.aggregate(OnePerConcept())).sort_by("concept")
        counts = {name: int(table[name].to_numpy().sum()) for name in COUNTS}
        sums = run.aggregate(Grams(counts["rows_kept"] / counts["rows"], run.seed))
        whole = counts | {k: v for which in SETS for k, v in _measured(sums[f"gram{which}"], which).items()}
    artifact = run.artifact(NAME, identity, partial(_write, table, whole), resources=None)
    found = json.loads((artifact.local() / WHOLE).read_text())
    return Spread(found, pq.read_table(artifact.local() / TABLE))


def effective_rank(singular_values: np.ndarray) -> float:
    """exp of the entropy of the singular values; between 1 and their number, 0 where all are 0."""
    return float(np.exp(_entropy(singular_values))) if singular_values.any() else 0.0


def matrix_entropy(eigenvalues: np.ndarray) -> float:
    """Entropy of a Gram matrix's eigenvalues, in nats."""
    return _entropy(eigenvalues)


def _entropy(values: np.ndarray) -> float:
    p = values[values > 0] / values.sum()
    return float(-(p * np.log(p)).sum()) + 0.0


def gram(x: np.ndarray) -> np.ndarray:
    """X^T X of (n, d) or X X^T, whichever is smaller, in float64: float32 would make up ranks out of its noise."""
    x = x.astype(np.float64)
    return np.asarray(x @ x.T if len(x) < x.shape[1] else x.T @ x)


def _measured(gram: np.ndarray, which: str) -> dict[str, float]:
    eigenvalues = np.linalg.eigvalsh(gram) if gram.any() else np.zeros(1)
    eigenvalues[eigenvalues < len(gram) * np.finfo(np.float64).eps * eigenvalues.max(initial=0)] = 0
    return {
        f"erank{which}": effective_rank(np.sqrt(eigenvalues)),
        f"entropy{which}": matrix_entropy(eigenvalues) if eigenvalues.any() else 0.0,
    }


def _by_concept(seed: int, table: pa.Table) -> pa.Table:
    """What `regroup` finds: the measures of every concept, at the address of its first row."""
    found: dict[str, list[float]] = {name: [] for name in FIELDS.names}
    places = []
    for concept in key_groups(table, CONCEPT):
        places.append(concept.select([SHARD, ROW]).slice(0, 1))
        x, keep = matrix(concept[VECTOR].combine_chunks()), concept[KEEP].to_numpy()
        drawn = np.argsort(hash64(concept[KEY].combine_chunks(), seed), kind="stable")[: keep.sum()]
        measured: dict[str, float] = {"rows": len(x), "rows_kept": int(keep.sum())}
        for which, rows in zip(SETS, (slice(None), keep, drawn), strict=True):
            measured |= _measured(gram(x[rows]), which)
        for name, value in measured.items():
            found[name].append(value)
    at = pa.concat_tables(places) if places else table.select([SHARD, ROW])
    return pa.table({SHARD: at[SHARD], ROW: at[ROW], **{f.name: pa.array(found[f.name], f.type) for f in FIELDS}})


@dataclass(frozen=True)
class OnePerConcept:
    """Statistic: the rows that `_by_concept` filled. State: `concept` (k,) int32 and the fields of `spread`, (k,)."""

    @property
    def inputs(self) -> tuple[str, ...]:
        return (CONCEPT, *(f"{NAME}.{field}" for field in FIELDS.names))

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        new = {name.rpartition(".")[2]: batch.column(name).to_numpy() for name in self.inputs}
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        return {name: np.concatenate([s[name] for s in states]) for name in states[0]}


@dataclass(frozen=True)
class Grams:
    """Statistic: Z^T Z of all rows, of those kept and of a random `share`; `gram`, `gram_kept`, `gram_drawn` (d, d)."""

    share: float
    seed: int

    @property
    def inputs(self) -> tuple[str, ...]:
        return (VECTOR, KEEP, KEY)

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        x = matrix(batch.column(VECTOR)).astype(np.float64)
        keep = batch.column(KEEP).to_numpy(zero_copy_only=False)
        drawn = uniform(batch.column(KEY), self.seed) < self.share
        sets = zip(SETS, (slice(None), keep, drawn), strict=True)
        new = {f"gram{which}": x[rows].T @ x[rows] for which, rows in sets}
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        return {name: np.sum([s[name] for s in states], axis=0) for name in states[0]}


def _write(table: pa.Table | None, whole: dict[str, float], directory: Path) -> None:
    assert table is not None  # it is there whenever the artifact is not
    pq.write_table(table, directory / TABLE)
    (directory / WHOLE).write_text(json.dumps(whole, indent=2))
