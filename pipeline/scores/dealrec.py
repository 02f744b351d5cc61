"""DEALRec: rows that a small model finds useful and the large one hard, drawn so that every level of both is covered.

1. Influence: <h, grad L_i> with h ~ H^-1 v by LiSSA, for a surrogate that predicts the row's label. v is the mean
   gradient of rows that the surrogate was not trained on.
2. Effort: norm of the large model's gradient on the row, by the value projection of its last layer alone.
3. Both become strata and turns in `pipeline.scores._dealrec`: the best rows by score are the stratified draw of so
   many rows, whatever the budget is.

Source: Lin et al. 2024, arXiv 2401.17197, `Linxyhaha/DEALRec` (code read). The paper's: damping 0.01, scale 25, 5,000
steps of LiSSA with one row each, hard_prune 0.1, 25 strata (50 used), effort_weight 0.5 (0.3 on games, 1 elsewhere).

Other than the paper:
- `v: train`, its mean gradient over the surrogate's own training rows, is nil where the surrogate has converged, and so
  is every influence then: it measures what is left to descend. The default is `v: validation`.
- The surrogate is softmax regression on `embed.vector`: its loss is convex, so H has no negative direction, and
  Hessian-vector products are closed forms. Without `model` the effort is the surrogate's own. `dealrec_sequences` has
  the paper's SASRec, for rows that are sequences of items.
- Effort by the value projection itself, where the paper takes a random projection of it (LoRA's B at its start).
- A constant influence or effort counts 0, not NaN; `clip` keeps a few outliers from emptying the strata (ours).
- Dropped rows come last rather than never: `rule` is `hard_prune` there.

What the surrogate misses of the large model only effort makes good, and effort likes long and noisy rows.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.artifact import Artifact
from pipeline.recipe import Column, State, Transform, fingerprint
from pipeline.sample import Sample, draw, needs_fit
from pipeline.scores._dealrec import PARTS, StratifiedDraw, lissa
from pipeline.scores._head import (
    FEWEST,
    VECTOR,
    affine,
    classes_of,
    errors,
    forward,
    gradient_norms,
    label_reference,
    load_heads,
    sampled,
    save_heads,
    softmax,
    train,
)
from pipeline.vectors import matrix

if TYPE_CHECKING:
    from pipeline.run import Run


class Dealrec(StratifiedDraw):
    """A stratified draw over influence plus effort, as turns."""

    needs: ClassVar[Literal["text", "vectors", "concepts"]] = "vectors"
    claim = "early in a draw that covers all levels of influence plus effort but the very hardest"
    cost = "2 d classes FLOPs, and with a model about 2N a token, N parameters"
    source = "Lin et al. 2024 (DEALRec), arXiv 2401.17197"
    kind: Literal["dealrec"] = "dealrec"
    label: str = Field(description="source column that the surrogate predicts")
    epochs: int = Field(20, ge=1, description="epochs that the surrogate is trained")
    sample: int = Field(20_000, ge=2 * FEWEST, description="rows for the surrogate, a fifth of them for validation")

    def fit(self, run: Run) -> None:
        self._surrogate(run)

    def _parts(self, run: Run) -> Column:
        surrogate, effort = self._surrogate(run), [f"{column.name}.effort" for column in self.support(run)]
        inputs = (VECTOR, f"corpus.{self.label}", *effort)
        identity = fingerprint("dealrec parts", 1, surrogate.fingerprint)
        return Column(f"{self.column_name}-parts", inputs, PARTS, partial(_open_parts, surrogate, inputs), identity)

    def _surrogate(self, run: Run) -> Artifact:
        """`heads.npz`: the surrogate; `h.npy`: (classes, d + 1); `surrogate.json`: facts."""
        role = f"{self.column_name}.label"
        reference = label_reference(run, self.label, role)
        sample = Sample((VECTOR, reference), self.sample, run.rows, self._seed(run))
        lissa = self.model_dump(include={"v", "epochs", "damping", "scale", "steps"})
        name = f"{self.column_name}-surrogate"
        identity = fingerprint("surrogate", 1, lissa, self.sample, self._seed(run), run.identity(*sample.inputs))
        state = draw(run, sample) if needs_fit(run, name, identity) else {}
        return run.artifact(name, identity, partial(_fit_surrogate, state, reference, role, lissa, self._seed(run)))


def softmax_product(weight: np.ndarray, x: np.ndarray, h: np.ndarray) -> np.ndarray:
    """H h of softmax regression on one row x (d + 1,) that ends in 1: ((diag p - p p^T) h x) x^T; (classes, d + 1)."""
    p = softmax((weight @ x)[None])[0]
    u = h @ x
    return np.outer(p * u - p * (p @ u), x)


def _fit_surrogate(state: State, reference: str, role: str, asked: dict[str, Any], seed: int, directory: Path) -> None:
    x, y, names = sampled(state, reference, role)
    held = len(x) // 5
    (weight,) = train(x[held:], y[held:], len(names), 0, asked["epochs"], seed)
    ones = np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1).astype(np.float64)
    taken = slice(held) if asked["v"] == "validation" else slice(held, None)
    v = errors(forward([weight], x[taken]).p, y[taken]).T @ ones[taken] / len(x[taken])
    rows = np.random.default_rng(seed).integers(held, len(x), asked["steps"])
    wide = weight.astype(np.float64)
    h, scale = lissa(
        v, lambda h, step: softmax_product(wide, ones[rows[step]], h), asked["damping"], asked["scale"], asked["steps"]
    )
    save_heads([[weight]], names, directory)
    np.save(directory / "h.npy", h.astype(np.float32))
    right = float((forward([weight], x[:held]).p.argmax(axis=1) == y[:held]).mean())
    facts = {"rows": len(x), "held_out": held, "accuracy": right, "v": float(np.linalg.norm(v)), "scale": scale}
    (directory / "surrogate.json").write_text(json.dumps(facts, indent=2))


def _open_parts(surrogate: Artifact, inputs: tuple[str, ...]) -> Transform:
    (layers, *_), names = load_heads(surrogate.local())
    h = np.load(surrogate.local() / "h.npy", allow_pickle=False)

    def parts(batch: pa.RecordBatch) -> pa.RecordBatch:
        x, y = matrix(batch.column(VECTOR)).astype(np.float32), classes_of(batch.column(inputs[1]), names)
        influence = np.vecdot(errors(forward(layers, x).p, y), affine(h, x))
        effort = batch.column(inputs[2]).to_numpy() if len(inputs) > 2 else gradient_norms(layers, x, y, only_last=True)
        finite = np.isfinite(influence)
        why = pa.array(np.full(len(x), "influence is not finite"), mask=finite)
        columns = [pa.array(influence, mask=~finite), pa.array(effort.astype(np.float32), mask=~finite), why]
        return pa.record_batch(columns, schema=PARTS)

    return parts
