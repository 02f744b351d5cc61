"""Diversity: the order in which a greedy selector picks the rows of a concept, for whatever quota comes later.

The score is -(pick order) / (rows of the concept), 0 for the first pick: any quota of a concept is a prefix of its
order. It ranks rows inside their concept only, and brings `select.quotas: proportional`. `method` picks the selector:

- `facility_location` (default): rows that stand for the others. The best coverage for what it costs, but it holds
  4 n^2 bytes for a concept of n rows.
- `k_center`, `max_min`: the row farthest from what is picked, begun in the middle (Gonzalez 1985) or with the loneliest
  row (DivPrune). Outliers and junk are the farthest of all: put filters before, or `trim` the loneliest rows.
- `max_sum`: the border of the concept (ToDRE v2). Near copies on the border come early; there to be compared with.
- `mmr`, `mig`: another score, `importance`, against similarity (IDPruner, COMI); the score is scaled to [0, 1] inside
  the concept. `mig` is no greedy: it compares with all rows, picked or not, and so puts both of two copies last.

What it trades away: floors act after the picks, so a row that a floor drops has been picked all the same, and those
near it wait behind it. Above `cap` rows a concept is split at random, its parts are ordered and then the union of their
first picks (composable core-sets), which loses a constant factor of the guarantees. `depth` below 1 picks that share
of a concept one by one, in that share of the time, and takes the rest by what each row would add after that.

The sources choose visual tokens or context groups of one prompt; that their rules help on rows of a corpus is our
transfer. Defaults: lam 0.5 as in IDPruner's code, alpha = beta = 1 as in COMI's; facility location first, cap, depth
and trim are ours. Measured on one core, all n = 5,000 rows of a concept ordered at d = 384: 0.20 ms a row for facility
location, 0.30 for k-center, max-sum and MMR, 0.03 for MIG; with `depth: 0.1` 0.12 and 0.03.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from pipeline.engine.regroup import ROW, SHARD, key_groups, unopened
from pipeline.errors import ConfigError
from pipeline.hashing import hash64
from pipeline.recipe import Column, fingerprint
from pipeline.scores import _selectors as greedy
from pipeline.scores.base import Score
from pipeline.vectors import as_float32, matrix

if TYPE_CHECKING:
    from pipeline.run import Run

FIELDS = pa.schema([("score", pa.float32()), ("pick_order", pa.int32())])
VECTOR, CONCEPT, KEY = "embed.vector", "concept.concept", "row.key"
CAP = {"facility_location": 10_000}
"""Its kernel takes 0.4 GB there. The others hold no matrix."""
MOST = 20_000
Method = Literal["facility_location", "k_center", "max_min", "max_sum", "mmr", "mig"]


class Diversity(Score):
    """Greedy picks inside concepts; `pick_order` counts from 0."""

    needs: ClassVar[Literal["text", "vectors", "concepts"]] = "concepts"
    quotas: ClassVar[Mapping[str, Any]] = MappingProxyType({"rule": "proportional"})
    claim = "unlike the rows of its concept that come before it, or standing for those that come behind"
    cost = "2 n d FLOPs for a concept of n rows; 0.2 to 0.3 ms at n = 5,000 and d = 384"
    source = "Alvar et al. 2025 (DivPrune); ToDRE, arXiv 2505.18757; IDPruner 2026; COMI 2026; facility location"
    kind: Literal["diversity"] = "diversity"
    method: Method = "facility_location"
    importance: str | None = Field(None, description="mmr, mig: name of a score listed before this one")
    lam: float = Field(0.5, ge=0, le=1, description="mmr: weight of the importance; similarity has the rest")
    alpha: float = Field(1, ge=0, allow_inf_nan=False, description="mig: weight of the importance")
    beta: float = Field(1, ge=0, allow_inf_nan=False, description="mig: weight of the similarity")
    depth: float = Field(1, gt=0, le=1, description="share of a concept that is picked one by one")
    trim: float = Field(0, ge=0, lt=1, description="share of a concept, the rows farthest from any other, put last")
    cap: int | None = Field(
        None, ge=2, description="rows compared with one another (default: 20,000; facility_location 10,000)"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        weighs = self.method in ("mmr", "mig")
        if weighs and self.importance is None:
            raise ValueError(
                f"{self.method} weighs another score against similarity: set importance to its name, or use k_center"
            )
        own = {"mmr": {"importance", "lam"}, "mig": {"importance", "alpha", "beta"}}.get(self.method, set())
        default = {n: type(self).model_fields[n].default for n in ("importance", "lam", "alpha", "beta")}
        if unused := [n for n, value in default.items() if n not in own and getattr(self, n) != value]:
            raise ValueError(f"method: {self.method} does not use {' and '.join(unused)}: remove what it does not use")
        return self

    def support(self, run: Run) -> Sequence[Column]:
        """None; but here, before any work, is where a missing `importance` shows."""
        before = [s.column_name for s in run.config.scores]
        before = before[: before.index(self.column_name)]
        if self.importance is not None and self.importance not in before:
            raise ConfigError(
                f"{self.column_name}.importance: no score {self.importance!r} is listed before this one; "
                f"there {'are ' + ', '.join(before) if before else 'is none'}"
            )
        return ()

    def column(self, run: Run) -> Column:
        inputs = (VECTOR, KEY, *((f"{self.importance}.score",) if self.importance else ()))
        identity = fingerprint("diversity", self.version, self.model_dump(mode="json", exclude={"name"}), run.seed)
        return Column(self.column_name, inputs, FIELDS, unopened, identity)

    def fill(self, run: Run) -> None:
        run.regroup(self.column(run), CONCEPT, partial(_pick, self, run.seed))

    def order(self, x: np.ndarray, importance: np.ndarray, hashes: np.ndarray) -> np.ndarray:
        """Order in which the n rows of a concept are picked; int64 (n,).

        `x` (n, d) float32 unit vectors, `importance` (n,), zeros where there is none, `hashes` (n,) to split it by.
        """
        cap = self.cap or CAP.get(self.method, MOST)
        parts = -(-len(x) // cap)
        part = np.argsort(np.argsort(hashes, kind="stable")) % parts
        weight = greedy.scaled(importance)
        last = self._lonely(x, part)
        rows = np.setdiff1d(np.arange(len(x)), last)

        def order_of(subset: np.ndarray) -> np.ndarray:
            return self._picks(x[rows[subset]], weight[rows[subset]])

        everything = np.arange(len(rows))
        order = order_of(everything) if parts == 1 else greedy.in_two_stages(order_of, part[rows], cap)
        return np.concatenate([rows[order], last])

    def _lonely(self, x: np.ndarray, part: np.ndarray) -> np.ndarray:
        """The `trim` of every part whose nearest row in the part is farthest off, the loneliest last; int64."""
        lonely, nearness = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
        for number in range(int(part.max()) + 1) if self.trim else ():
            rows = np.flatnonzero(part == number)
            nearest = greedy.nearest_cosines(x[rows])
            farthest = np.argsort(nearest, kind="stable")[: int(self.trim * len(rows))]
            lonely.append(rows[farthest])
            nearness.append(nearest[farthest])
        return np.concatenate(lonely)[np.argsort(-np.concatenate(nearness), kind="stable")]

    def _picks(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        n, m = len(x), math.ceil(self.depth * len(x))
        match self.method:
            case "facility_location":
                return greedy.facility_location(greedy.kernel(x), m)
            case "k_center":
                return greedy.farthest_first(greedy.distances_from(x), n, m, _central(x))
            case "max_min":
                return greedy.farthest_first(greedy.distances_from(x), n, m, int(greedy.nearest_cosines(x).argmin()))
            case "max_sum":
                return greedy.greatest_sum(greedy.distances_from(x), n, m, _marginal(x))
            case "mmr":
                return greedy.marginal_relevance(greedy.cosines_from(x), weight, m, self.lam)
            case "mig":
                gain = greedy.information_gain(greedy.nearest_cosines(x), weight, self.alpha, self.beta)
                return np.argsort(-gain, kind="stable")


def _central(x: np.ndarray) -> int:
    """The row nearest to the mean."""
    return int(greedy.on_grid(np.vecdot(x, x.mean(axis=0, dtype=np.float64))).argmax())


def _marginal(x: np.ndarray) -> int:
    """The row with the greatest mean distance to all."""
    return int(greedy.on_grid(np.vecdot(x, x.mean(axis=0, dtype=np.float64))).argmin())


def _pick(recipe: Diversity, seed: int, table: pa.Table) -> pa.Table:
    """What `regroup` finds about the rows of some concepts: their place in the order of their own."""
    picked = np.empty(len(table), np.int32)
    score = np.empty(len(table), np.float32)
    start = 0
    for concept in key_groups(table, CONCEPT):
        n = len(concept)
        x = as_float32(matrix(concept[VECTOR].combine_chunks()))
        x /= np.sqrt(np.vecdot(x, x))[:, None]  # float16 leaves norms off by up to 5e-4
        name = f"{recipe.importance}.score"
        importance = concept[name].to_numpy() if recipe.importance else np.zeros(n)
        order = recipe.order(x, importance, hash64(concept[KEY].combine_chunks(), seed))
        picked[start + order] = np.arange(n)
        score[start + order] = -np.arange(n) / n + 0.0  # no negative zero
        start += n
    found = table.select([SHARD, ROW])
    return found.append_column("score", pa.array(score)).append_column("pick_order", pa.array(picked))
