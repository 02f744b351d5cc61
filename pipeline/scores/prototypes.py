"""Self-supervised prototypes: rows near the centroid of their concept are easy, rows far from it are hard.

Source: Sorscher et al. 2022, "Beyond neural scaling laws: beating power law scaling via data pruning", arXiv
2206.14486. Unlike `density`, one ranking over all concepts. Which end to keep depends on how much data there is: hard
rows where data abound, easy rows where they are scarce, and nobody knows the border beforehand. `keep: auto` therefore
trains a small model on either end at the target budget and on random draws, keeps the end with the lower loss on rows
held out, and writes what it saw to `artifacts/<name>-choice/choice.json`; see `pipeline.scores._proxy`.

All metrics of this kind amplify the imbalance of concepts: the paper gives every class half of an equal share first,
which this score brings along: `select.quotas: {balance: 0.5}`. Outliers, spam and wrong labels are the hardest rows of
all: `max_distance_quantile` puts the farthest ones last; the paper has no such guard.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from pipeline.errors import ConfigError, CorpusError
from pipeline.recipe import Column, State, Transform, fingerprint
from pipeline.sample import LENGTH, Sample, draw, needs_fit, texts
from pipeline.scores._proxy import bigram_loss, compare, label_loss
from pipeline.scores.base import Score
from pipeline.words import hashed_words

if TYPE_CHECKING:
    from pipeline.run import Run

log = logging.getLogger(__name__)

FIELDS = pa.schema([("score", pa.float32())])
DISTANCE, CONCEPT, VECTOR = "concept.distance", "concept.concept", "embed.vector"
BINS = 1 << 16
CHOICE, LIMIT = "choice.json", "limit.json"
BUCKETS = 1 << 20
MAX_CHARS = 4096
FEWEST = 50


class Prototypes(Score):
    """Distance to the own centroid (1 - cosine), kept from the far end (`hard`) or the near one (`easy`)."""

    needs: ClassVar[Literal["text", "vectors", "concepts"]] = "concepts"
    quotas: ClassVar[Mapping[str, Any]] = MappingProxyType({"balance": 0.5})
    claim = "hard (far from its centroid) or easy (near it), whichever end taught a small model more"
    cost = "2 k d FLOPs, those of the assignment to a concept"
    source = "Sorscher et al. 2022, arXiv 2206.14486"
    kind: Literal["prototypes"] = "prototypes"
    keep: Literal["hard", "easy", "auto"] = Field("auto", description="which end; auto asks two small models")
    max_distance_quantile: float | None = Field(
        None, gt=0, lt=1, description="hard: rows farther out than this share of all rows come last, as outliers"
    )
    share: float | None = Field(
        None, gt=0, lt=1, description="auto: share of the corpus to decide for (default: the budget's)"
    )
    label: str | None = Field(None, description="auto: source column of labels to predict instead of the next word")
    sample: int = Field(10_000, ge=100, description="auto: rows to decide on")
    seed: int | None = Field(None, description="auto: seed of the sample and of the random arm (default: the run's)")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.keep == "easy" and self.max_distance_quantile is not None:
            raise ValueError(
                "max_distance_quantile guards hard rows: with keep: easy outliers come last anyway, remove it"
            )
        if self.keep != "auto" and (given := sorted({"share", "label", "sample", "seed"} & self.model_fields_set)):
            raise ValueError(f"{' and '.join(given)} belong to keep: auto, not to {self.keep!r}: remove them")
        return self

    def fit(self, run: Run) -> None:
        self._choice(run, self._limit(run))

    def column(self, run: Run) -> Column:
        limit = self._limit(run)
        keep = self._choice(run, limit)
        limit = limit if keep == "hard" else None
        identity = fingerprint("prototypes", self.version, keep, limit)
        return Column(self.column_name, (DISTANCE,), FIELDS, partial(_open, keep, limit), identity)

    def _limit(self, run: Run) -> float | None:
        """The distance beyond which rows are outliers: upper edge of the bin (3e-5 wide) that holds the quantile."""
        if self.max_distance_quantile is None:
            return None
        name = f"{self.column_name}-limit"
        identity = fingerprint("distance quantile", self.max_distance_quantile, run.identity(DISTANCE))
        state = run.aggregate(Distances()) if needs_fit(run, name, identity) else {}
        artifact = run.artifact(
            name, identity, partial(_write_limit, state, self.max_distance_quantile), resources=None
        )
        return float(json.loads((artifact.local() / LIMIT).read_text())["distance"])

    def _choice(self, run: Run, limit: float | None) -> str:
        """The end to keep; for `auto` from the artifact `<name>-choice`."""
        if self.keep != "auto":
            return self.keep
        if self.label is not None and self.label not in run.schema.names:
            there = ", ".join(run.schema.names)
            raise ConfigError(f"{self.column_name}.label: the corpus has no column {self.label!r}; it has {there}")
        budget = run.config.select.budget
        if budget.compute is not None and self.share is None:
            raise ConfigError(f"{self.column_name}.share: say at which to decide; a budget of compute has none yet")
        trial = Trial(
            label=None if self.label is None else f"corpus.{self.label}",
            size=None if budget.unit == "rows" else f"row.{budget.unit}",
            share=self.share or budget.fraction,
            budget=getattr(budget, budget.unit),
            rows=run.rows,
            balance=run.config.select.quotas_for(run.config.scores).least_share,
            limit=limit,
            seed=run.seed if self.seed is None else self.seed,
        )
        name = f"{self.column_name}-choice"
        sample = Sample(trial.values, self.sample, run.rows, trial.seed, max_bytes=4 * MAX_CHARS)
        identity = fingerprint("choice", self.version, asdict(trial), self.sample, run.identity(*sample.inputs))
        state = draw(run, sample) if needs_fit(run, name, identity) else {}
        artifact = run.artifact(name, identity, partial(_choose, trial, state))
        return str(json.loads((artifact.local() / CHOICE).read_text())["keep"])


@dataclass(frozen=True)
class Trial:
    """What `keep: auto` tries: on which rows, at which budget. `size`: reference of a row's size, None to count rows;
    `share` of the corpus to keep, or the `budget` in its unit; `rows` of the corpus; the rest as in the recipe."""

    label: str | None
    size: str | None
    share: float | None
    budget: int | None
    rows: int
    balance: float
    limit: float | None
    seed: int

    @property
    def values(self) -> tuple[str, ...]:
        return (
            DISTANCE,
            CONCEPT,
            *((self.size,) if self.size else ()),
            *((VECTOR, self.label) if self.label else ("text",)),
        )


def _choose(trial: Trial, sample: State, directory: Path) -> None:
    rows = len(sample["hash"]) if sample else 0
    if rows < FEWEST:
        raise ConfigError(
            f"prototypes: keep: auto needs {FEWEST} distinct rows to try on, there are {rows}: set keep to hard or easy"
        )
    size = sample[trial.size].astype(np.int64) if trial.size else np.ones(rows, np.int64)
    share = trial.share or min(1.0, (trial.budget or 0) / (size.mean() * trial.rows))
    if trial.label is None:
        words, offsets = hashed_words(pa.array(texts(sample), pa.large_string()), BUCKETS, MAX_CHARS)
        loss, measure = bigram_loss(words, offsets, BUCKETS), "bits a word of a bigram model on rows held out"
    else:
        labels = np.array(texts(sample, trial.label)) if trial.label + LENGTH in sample else sample[trial.label]
        loss, measure = label_loss(sample[VECTOR].astype(np.float32), labels), "share of wrong labels on rows held out"
    score = hardness(sample[DISTANCE], trial.limit)
    choice = compare(score, sample[CONCEPT], size, share, trial.balance, loss, trial.seed) | {"loss": measure}
    arms = choice["arms"]
    said = "keep %s: loss %.4f hard, %.4f easy, %.4f random, at %.1f %% of the corpus"
    log.info(said, choice["keep"], arms["hard"]["loss"], arms["easy"]["loss"], arms["random"]["loss"], 100 * share)
    if not choice["better_than_random"]:
        log.warning("prototypes: neither end taught the small model more than random rows did; see %s", CHOICE)
    (directory / CHOICE).write_text(json.dumps(choice, indent=2))


@dataclass(frozen=True)
class Distances:
    """Statistic: histogram of distances. State: `rows` (65,536,) int64 over equal bins of [0, 2]."""

    @property
    def inputs(self) -> tuple[str, ...]:
        return (DISTANCE,)

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        bins = np.minimum((batch.column(DISTANCE).to_numpy() * (BINS / 2)).astype(np.int64), BINS - 1)
        new = {"rows": np.bincount(bins, minlength=BINS)}
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        return {"rows": np.sum([s["rows"] for s in states], axis=0)}


def _write_limit(state: State, quantile: float, directory: Path) -> None:
    if not state:
        raise CorpusError("prototypes: no row has a concept; see quarantine/embed for the reasons")
    running = np.cumsum(state["rows"])
    edge = 2 / BINS * (1 + int(np.searchsorted(running, quantile * running[-1])))
    (directory / LIMIT).write_text(
        json.dumps({"quantile": quantile, "distance": edge, "rows": int(running[-1])}, indent=2)
    )


def hardness(distance: np.ndarray, limit: float | None) -> np.ndarray:
    """The distance (float32), or its negative beyond the limit: outliers come last, the farthest at the very end."""
    return distance if limit is None else np.where(distance <= np.float32(limit), distance, -distance)


def _open(keep: str, limit: float | None) -> Transform:
    def score(batch: pa.RecordBatch) -> pa.RecordBatch:
        distance = batch.column(DISTANCE).to_numpy()
        return pa.record_batch([pa.array(hardness(distance, limit) if keep == "hard" else -distance)], schema=FIELDS)

    return score
