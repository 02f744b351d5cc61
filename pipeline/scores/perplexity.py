"""Perplexity: how surprised a language model is by a row; rows it expects come first, or those of a wanted band.

    perplexity(x) = exp(-1/T sum_t ln p(x_t | x_<t)) = 10^(-sum log10 p / T)

over the T tokens of a row from the second on, of its first `max_tokens`; of instructions over those of the responses,
given all that stands before them. The model is any causal one, or a small one
trained here on a sample of the corpus (artifact `<name>-prior`), which finds what is rare in this corpus.

`rank` is the share of the corpus that has a lower perplexity, from a histogram in bins of 5e-4 nats, and `band` what
CCNet (Wenzek et al. 2019, arXiv 1911.00359) would call a row: `head` below the 30th percentile, `middle` below the
60th, else `tail`. Without `around` the score is -log10 perplexity; with it, minus the distance of the rank to the
wanted one: `around: 0.45` with `floors: {perplexity: -0.15}` is CCNet's middle, `around: 0.5` with a budget keeps the
middle of the corpus, `around: 1` the high end. "Perplexity pruning" (Ankner et al. 2024, arXiv 2405.20541) found the
medium and high bands best more often than the low one (from memory, unverified).

What it trades away: CCNet's percentiles are of a reference and a language each, with a 5-gram model of Wikipedia; these
are of the corpus itself, with the one model that is given. Perplexity alone is no quality: boilerplate that repeats
itself scores well, old novels badly, and short rows are unreliable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.errors import CorpusError
from pipeline.models.causal import losses_of, row_losses, token_column
from pipeline.recipe import Column, State, Transform, fingerprint
from pipeline.sample import needs_fit
from pipeline.scores._prior import ByModel

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.run import Run

FIELDS = pa.schema(
    [("score", pa.float32()), ("perplexity", pa.float32()), ("rank", pa.float32()), ("band", pa.string())]
)
LOSS = pa.schema([("nats", pa.float32()), ("tokens", pa.int32())])
BINS, LARGEST = 1 << 16, 32.0
"""The histogram: equal bins of the loss in [0, 32) nats a token; what is above is in the last."""
HEAD, TAIL = 0.3, 0.6
REFERENCE = "ranks.npy"


class Perplexity(ByModel):
    """-log10 perplexity, or minus the distance to a wanted rank among the rows of the corpus."""

    claim = "what a language model expects, or the band of perplexity that is asked for"
    cost = "2 N FLOPs a token, a forward pass of N parameters"
    source = "Wenzek et al. 2019 (CCNet), arXiv 1911.00359; Ankner et al. 2024, arXiv 2405.20541"
    kind: Literal["perplexity"] = "perplexity"
    around: float | None = Field(None, ge=0, le=1, description="rank to be near: 0 lowest, 1 highest perplexity")

    def support(self, run: Run) -> Sequence[Column]:
        tokens = token_column(run, self._model(run), self.max_tokens)
        return [tokens, loss_column(tokens)]

    def column(self, run: Run) -> Column:
        loss = f"{self.support(run)[1].name}.nats"
        ranks = self._ranks(run, loss)
        identity = fingerprint(type(self).__name__, self.version, self.around, ranks.fingerprint)
        return Column(self.column_name, (loss,), FIELDS, partial(_open, ranks, self.around), identity)

    def fill(self, run: Run) -> None:
        """After the losses of all rows are known: a rank is among all of them."""
        run.materialize([self.column(run)])

    def _ranks(self, run: Run, loss: str) -> Artifact:
        name = f"{self.column_name}-ranks"
        identity = fingerprint("ranks", self.version, run.identity(loss))
        state = run.aggregate(Losses(loss)) if needs_fit(run, name, identity) else {}
        return run.artifact(name, identity, partial(_write_ranks, state), resources=None)


def loss_column(tokens: Column) -> Column:
    """Support column of a row's mean loss (`nats` a token) and how many `tokens` it is of; few bytes a row."""
    name = "loss-" + tokens.name.removeprefix("lm-")
    return Column(name, losses_of(tokens), LOSS, _open_loss, "mean loss 1", tokens.resources)


def _open_loss() -> Transform:
    def mean(batch: pa.RecordBatch) -> pa.RecordBatch:
        nats, tokens = row_losses(*batch.columns)
        return pa.record_batch([nats, tokens], names=LOSS.names).cast(LOSS)

    return mean


@dataclass(frozen=True)
class Losses:
    """Statistic: histogram of a loss. State: `rows` (65,536,) int64 over equal bins of [0, 32) nats."""

    loss: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.loss,)

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        bins = np.minimum(batch.column(self.loss).to_numpy() * (BINS / LARGEST), BINS - 1).astype(np.int64)
        new = {"rows": np.bincount(bins, minlength=BINS)}
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        return {"rows": np.sum([s["rows"] for s in states], axis=0)}


def _write_ranks(state: State, directory: Path) -> None:
    """The share of rows below each edge of a bin, (65,537,) float64."""
    if not state:
        raise CorpusError("perplexity: no row has a loss; see quarantine/ for the reasons")
    np.save(directory / REFERENCE, np.concatenate([[0], np.cumsum(state["rows"])]) / state["rows"].sum())


def _open(ranks: Artifact, around: float | None) -> Transform:
    below = np.load(ranks.local() / REFERENCE, allow_pickle=False)
    edges = np.linspace(0, LARGEST, BINS + 1)

    def score(batch: pa.RecordBatch) -> pa.RecordBatch:
        nats = batch.column(0).to_numpy()
        rank = np.interp(nats, edges, below)
        value = -nats / np.log(10) if around is None else -np.abs(rank - around)
        band = np.array(["head", "middle", "tail"])[np.digitize(rank, [HEAD, TAIL])]
        with np.errstate(over="ignore"):  # a loss above 88 nats is a perplexity of infinity
            return pa.record_batch([value, np.exp(nats), rank, band], names=FIELDS.names).cast(FIELDS)

    return score
