"""Q-Tuning as a column: where a row of instructions lies on the error-uncertainty plane, and which tokens to learn.

Wang et al. 2025, "Winning the Pruning Gamble" (arXiv 2509.23873) choose within every batch while a model is tuned; that
is the batch operator of this name. This is the same choice made once, for a checkpoint and the whole corpus:

    score = |PPL - Ent| + 1 in quadrants 2 and 4,    in [0, 2]

of a row's perplexity and mean entropy over its response (in a corpus of texts: over all tokens from the second on). So
a budget of `{fraction: rows}` keeps confident mistakes (quadrant 2) and what the model is unsure of (4) first, and
fills up by support. The field `mask` says for every token of the `lm-` column's `ids` whether a trainer should count
its loss: of a confident mistake the `tokens` share whose smoothed perplexity is lowest, of other rows the whole
response, never a prompt. It goes along in the curated files, as `tamis.<name>_mask` beside `tamis.<name>_quadrant`.

The plane's lines are drawn on up to `sample` rows, which is exact for a corpus with no more distinct ones; 65,536 rows
put a share to within 0.004 (two standard deviations). PPL and Ent are scaled to [0, 1] between the first and the last
percentile and not, as in a batch, between the extremes: one row of perplexity 1e6 would put all others at 0 (below a
hundred rows it is the same).

What it trades away: the model learns on, and the plane with it; a choice that was made once grows stale. The paper's
results are of the dynamic choice. The model reads every row once; its column has entropies, so it is not shared with
criteria that need none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.batches._plane import between, bisect, quadrants, quantile, thresholds, token_perplexity
from pipeline.batches.q_tuning import MISTAKE, UNSURE
from pipeline.batches.q_tuning import QTuning as Dynamic
from pipeline.errors import ConfigError, CorpusError
from pipeline.models.causal import ENTROPY, as_mask, losses_of, row_losses, token_column
from pipeline.recipe import Column, State, Transform, fingerprint
from pipeline.sample import Sample, draw, needs_fit
from pipeline.scores._prior import ByModel

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.run import Run

FIELDS = pa.schema(
    [
        ("score", pa.float32()),
        ("perplexity", pa.float32()),
        ("entropy", pa.float32()),
        ("quadrant", pa.int8()),
        ("mask", pa.list_(pa.bool_())),
    ]
)
PLACE = pa.schema([("nats", pa.float32()), ("entropy", pa.float32())])
PLANE = "plane.json"
EDGE = 0.01
"""PPL and Ent are 0 up to this quantile, and 1 from the one as far from the end."""


class QTuning(ByModel):
    """Support of a row, one more in quadrants 2 and 4."""

    claim = "worth tuning on: a confident mistake, or right and unsure"
    cost = "2 N FLOPs a token, a forward pass of N parameters with entropies"
    source = "Wang et al. 2025, arXiv 2509.23873"
    kind: Literal["q_tuning"] = "q_tuning"
    rows: float = Field(0.25, gt=0, le=1, description="share of the rows that quadrants 2 and 4 should hold")
    tokens: float = Field(0.5, gt=0, le=1, description="share of a confident mistake's tokens to learn from")
    smoothing: float = Field(0.5, ge=0, le=1, description="lam: weight of a token's neighbours")
    sample: int = Field(65_536, ge=8, description="rows that the lines are drawn on")

    def support(self, run: Run) -> Sequence[Column]:
        if run.config.output.rewrite:
            raise ConfigError(
                f"{self.column_name} marks the tokens of whole texts, and output.rewrite shortens them: remove one"
            )
        tokens = token_column(run, self._model(run), self.max_tokens, entropy=True)
        return [tokens, place_column(tokens)]

    @property
    def along(self) -> Mapping[str, str]:
        return {f"{self.column_name}_{field}": field for field in ("quadrant", "mask")}

    def column(self, run: Run) -> Column:
        tokens, place = self.support(run)
        nats, entropy = (f"{place.name}.{name}" for name in PLACE.names)
        plane = self._plane(run, nats, entropy)
        masked = self.model_dump(include={"tokens", "smoothing"})
        identity = fingerprint(type(self).__name__, self.version, masked, plane.fingerprint)
        return Column(
            self.column_name, (nats, entropy, *losses_of(tokens)), FIELDS, partial(self._open, plane), identity
        )

    def fill(self, run: Run) -> None:
        """After all rows have their place: the lines are drawn among all of them."""
        run.materialize([self.column(run)])

    def _plane(self, run: Run, nats: str, entropy: str) -> Artifact:
        """Artifact `<name>-plane`: `plane.json` with alpha, the lines and the ranges of both axes."""
        name = f"{self.column_name}-plane"
        identity = fingerprint("plane", self.version, self.rows, self.sample, run.seed, run.identity(nats, entropy))
        asked = Sample((nats, entropy), self.sample, run.rows, run.seed)
        state = draw(run, asked) if needs_fit(run, name, identity) else {}
        return run.artifact(name, identity, partial(_draw_plane, state, nats, entropy, self.rows), resources=None)

    def _open(self, plane: Artifact) -> Transform:
        facts = json.loads((plane.local() / PLANE).read_text())
        dynamic = Dynamic(tokens=self.tokens, smoothing=self.smoothing)

        def score(batch: pa.RecordBatch) -> pa.RecordBatch:
            nats, entropy, logp, *target = batch.columns
            values, perplexity, quadrant = place(nats.to_numpy(), entropy.to_numpy(), facts)
            mask = masks(dynamic, logp, as_mask(target[0]) if target else None, quadrant == MISTAKE)
            entries = [values, perplexity, entropy, quadrant, mask]
            return pa.record_batch(entries, names=FIELDS.names).cast(FIELDS)

        return score


def place_column(tokens: Column) -> Column:
    """Support column of a row's mean loss and mean entropy over the tokens that count, `nats` a token."""
    name = "place-" + tokens.name.removeprefix("lm-")
    inputs = (*losses_of(tokens), f"{tokens.name}.{ENTROPY.name}")
    return Column(name, inputs, PLACE, _open_place, "place 1", tokens.resources)


def _open_place() -> Transform:
    def measure(batch: pa.RecordBatch) -> pa.RecordBatch:
        logp, *target, entropy = batch.columns
        nats, _ = row_losses(logp, *target)
        doubt, _ = row_losses(entropy, *target)  # the mean with the sign of a loss
        return pa.record_batch([nats, -doubt], names=PLACE.names).cast(PLACE)

    return measure


def _draw_plane(state: State, nats: str, entropy: str, rows: float, directory: Path) -> None:
    if not state:
        raise CorpusError("q_tuning: no row has a loss; see quarantine/ for the reasons")
    perplexity, doubt = token_perplexity(state[nats]), state[entropy].astype(np.float64)
    alpha = bisect(perplexity, doubt, rows)
    lines = thresholds(perplexity, doubt, alpha)
    found = quadrants(perplexity, doubt, lines)
    facts = {
        "rows": len(found),
        "alpha": alpha,
        "lines": lines,
        "perplexity": [quantile(perplexity, EDGE), quantile(perplexity, 1 - EDGE)],
        "entropy": [quantile(doubt, EDGE), quantile(doubt, 1 - EDGE)],
        "shares": {str(q): float((found == q).mean()) for q in range(5)},
    }
    (directory / PLANE).write_text(json.dumps(facts, indent=2))


def place(nats: np.ndarray, entropy: np.ndarray, facts: Mapping[str, Sequence[float]]) -> tuple[np.ndarray, ...]:
    """Scores (float64), perplexities and quadrants of n rows on the plane that `facts` describe."""
    perplexity, doubt = token_perplexity(nats), entropy.astype(np.float64)
    low_error, high_error, low_doubt, high_doubt = facts["lines"]
    quadrant = quadrants(perplexity, doubt, (low_error, high_error, low_doubt, high_doubt))
    support = np.abs(between(perplexity, *facts["perplexity"]) - between(doubt, *facts["entropy"]))
    return support + np.isin(quadrant, (MISTAKE, UNSURE)), perplexity, quadrant


def masks(recipe: Dynamic, logp: pa.ListArray, target: np.ndarray | None, mistake: np.ndarray) -> pa.ListArray:
    """One list<bool> a row, an entry a token: whether its loss counts; the first of a row's never.

    `logp`: lists of T - 1; `target`: bool like their values, which are of a response; `mistake` (n,): whose tokens are
    ranked.
    """
    lengths = logp.value_lengths().to_numpy().astype(np.int64)
    values = logp.flatten().to_numpy()
    counts = np.ones(len(values), bool) if target is None else target.copy()
    row = np.repeat(np.arange(len(lengths)), lengths)
    ranked = counts & mistake[row]
    if ranked.any():
        of_row = np.bincount(row[ranked], minlength=len(lengths))
        counts[ranked] = recipe.token_mask(-values[ranked], of_row[of_row > 0])
    ends = np.cumsum(lengths + 1)
    mask = np.zeros(int(ends[-1]) if len(ends) else 0, bool)
    follows = np.ones(len(mask), bool)
    follows[ends - lengths - 1] = False
    mask[follows] = counts
    return pa.ListArray.from_arrays(pa.array(np.append(0, ends), pa.int32()), pa.array(mask))
