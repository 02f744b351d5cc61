"""DEALRec on interactions: sequences of items that a small recommender finds useful and the language model hard.

A row has a column of items in the order of time (`items`, list of integers) and, as every row, a text: the history as a
prompt and the next item as the response, say (docs/instructions.md makes such a corpus of MovieLens).

1. Influence: <h, grad L_i> with h ~ H^-1 v by LiSSA, for a SASRec (`pipeline.models.sasrec`) that is trained here on a
   sample and says the last item of a row from those before it. v is the mean gradient of rows that it was not trained
   on. As in the paper, the gradients are those of one matrix of 64 x 64, what the second attention gives out.
2. Effort: norm of the language model's gradient on the row's text, in a corpus of instructions on the response, by the
   value projection of its last layer. Without `model` it is the norm of the recommender's.
3. Both become strata and turns in `pipeline.scores._dealrec`: the best rows by score are the stratified draw of so
   many rows, whatever the budget is.

Source: Lin et al. 2024, arXiv 2401.17197, `Linxyhaha/DEALRec` (code read), which keeps 2 % of its sequences. What
differs from it is in `pipeline.scores.dealrec`. Its loss is not convex, so H may have negative directions: LiSSA then
doubles `scale` until it no longer diverges, and `surrogate.json` says at which. Rows of fewer than two items, and those
whose items are null, have nothing to predict and go to quarantine. On 575 users of MovieLens (8,711 films) a step of
LiSSA takes 5.2 ms of one core and an epoch 0.9 s.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from pipeline.artifact import Artifact
from pipeline.engine import threads
from pipeline.errors import ConfigError
from pipeline.models.files import check_installed
from pipeline.recipe import Column, State, Transform, fingerprint
from pipeline.sample import Sample, draw, needs_fit, sampled
from pipeline.scores._dealrec import PARTS, StratifiedDraw, lissa

if TYPE_CHECKING:
    import torch

    from pipeline.run import Run

FEWEST = 20
MAX_BYTES = 1 << 16
"""Of a sequence in the sample: 8,192 items."""
SHORT, NOT_FINITE = "fewer than two items", "influence is not finite"


class DealrecSequences(StratifiedDraw):
    """A stratified draw over influence plus effort of sequences of items, as turns."""

    needs: ClassVar[Literal["text", "vectors", "concepts"]] = "text"
    claim = "early in a draw that covers all levels of influence plus effort but the very hardest"
    cost = "a pass of a transformer of width 64, and with a model about 2N FLOPs a token, N parameters"
    source = "Lin et al. 2024 (DEALRec), arXiv 2401.17197"
    kind: Literal["dealrec_sequences"] = "dealrec_sequences"
    items: str = Field(description="source column of the items of a row, a list of integers in the order of time")
    length: int = Field(50, ge=1, description="items before the last one that the recommender looks at")
    epochs: int = Field(200, ge=1, description="epochs that the recommender is trained")
    sample: int = Field(20_000, ge=2 * FEWEST, description="rows for it, a fifth of them for validation")

    @model_validator(mode="after")
    def _has_torch(self) -> Self:
        check_installed(f"scores.{self.kind}", "models", "torch", "safetensors")
        return self

    def fit(self, run: Run) -> None:
        self._surrogate(run)

    def _parts(self, run: Run) -> Column:
        surrogate, effort = self._surrogate(run), [f"{column.name}.effort" for column in self.support(run)]
        inputs = (self._reference(run), *effort)
        identity = fingerprint("dealrec sequences", 1, surrogate.fingerprint)
        return Column(f"{self.column_name}-parts", inputs, PARTS, partial(_open_parts, surrogate), identity)

    def _reference(self, run: Run) -> str:
        role = f"{self.column_name}.items"
        if self.items not in run.schema.names:
            there = ", ".join(run.schema.names)
            raise ConfigError(f"{role}: the corpus has no column {self.items!r}; it has {there}")
        kind = run.schema.field(self.items).type
        listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if not listed or not pa.types.is_integer(kind.value_type):
            raise ConfigError(f"{role}: column {self.items!r} is {kind}: it takes a list of integers a row")
        return f"corpus.{self.items}"

    def _surrogate(self, run: Run) -> Artifact:
        """The recommender; `h.npy`: (64, 64); `surrogate.json`: facts."""
        reference = self._reference(run)
        sample = Sample((reference,), self.sample, run.rows, self._seed(run), max_bytes=MAX_BYTES)
        asked = self.model_dump(include={"v", "epochs", "length", "damping", "scale", "steps"})
        name = f"{self.column_name}-surrogate"
        identity = fingerprint("sasrec", 1, asked, self.sample, self._seed(run), run.identity(*sample.inputs))
        state = draw(run, sample) if needs_fit(run, name, identity) else {}
        return run.artifact(name, identity, partial(_fit_surrogate, state, reference, asked, self._seed(run)))


def _fit_surrogate(state: State, reference: str, asked: dict[str, Any], seed: int, directory: Path) -> None:
    import torch

    from pipeline.models.gradients import outer
    from pipeline.models.sasrec import ROWS, Sequences, gradients, hessian_product, save_sasrec, train_sasrec

    torch.set_num_threads(threads.cpus())
    lists = sampled(state, reference) if state else pa.array([], pa.list_(pa.int64()))
    lists = lists.filter(pa.array(lists.value_lengths().to_numpy() > 1))
    if len(lists) < FEWEST:
        raise ConfigError(f"dealrec_sequences: {len(lists)} sequences are too few to learn from: it takes {FEWEST}")
    held = len(lists) // 5
    known = np.unique(lists.slice(held).flatten().to_numpy())
    rows = Sequences.of(lists, known, asked["length"])
    validation, train = rows.take(np.arange(held)), rows.take(np.arange(held, len(lists)))
    model, facts = train_sasrec(train, validation, len(known), asked["epochs"], seed)
    v = torch.zeros(0)
    over = validation if asked["v"] == "validation" else train

    def add(layer: str, a: torch.Tensor, b: torch.Tensor) -> None:
        nonlocal v
        total = outer(a, b).sum(dim=0)
        v = v + total if len(v) else total

    for _, part in over.batches(ROWS):
        gradients(model, part, add)
    width = int(len(v) ** 0.5)
    mean = (v / len(over.sizes)).view(width, width).double().numpy()
    drawn = np.random.default_rng(seed).integers(0, len(train.sizes), asked["steps"])

    def product(h: np.ndarray, step: int) -> np.ndarray:
        row = train.take(drawn[step : step + 1])
        return np.asarray(hessian_product(model, row, torch.from_numpy(h).float()).double().numpy())

    h, scale = lissa(mean, product, asked["damping"], asked["scale"], asked["steps"])
    save_sasrec(model, known, directory)
    np.save(directory / "h.npy", h.astype(np.float32))
    facts |= {"rows": len(lists), "held_out": held, "items": len(known), "scale": scale}
    (directory / "surrogate.json").write_text(json.dumps(facts | {"v": float(np.linalg.norm(mean))}, indent=2))


def _open_parts(surrogate: Artifact) -> Transform:
    import torch

    from pipeline.models.gradients import along, squared_norms
    from pipeline.models.sasrec import ROWS, Sequences, gradients, load_sasrec

    torch.set_num_threads(threads.cpus())
    model, known, length = load_sasrec(surrogate.local())
    h = torch.from_numpy(np.load(surrogate.local() / "h.npy", allow_pickle=False))

    def parts(batch: pa.RecordBatch) -> pa.RecordBatch:
        lists = batch.column(0)
        there = np.flatnonzero(lists.value_lengths().to_numpy() > 1)
        influence, norms = np.full((2, batch.num_rows), np.nan, np.float32)
        rows = Sequences.of(lists.take(pa.array(there)), known, length)
        for part, sequences in rows.batches(ROWS):

            def take(layer: str, a: torch.Tensor, b: torch.Tensor, at: np.ndarray = there[part]) -> None:
                influence[at], norms[at] = along(a, b, h).numpy(), squared_norms(a, b).sqrt().numpy()

            gradients(model, sequences, take)
        effort = batch.column(1).to_numpy() if batch.num_columns > 1 else norms
        finite = np.isfinite(influence)
        why = np.full(batch.num_rows, NOT_FINITE, object)
        why[lists.value_lengths().to_numpy() < 2] = SHORT
        columns = [pa.array(influence, mask=~finite), pa.array(effort.astype(np.float32), mask=~finite)]
        return pa.record_batch([*columns, pa.array(why, pa.string(), mask=finite)], schema=PARTS)

    return parts
