"""A small softmax classifier on `embed.vector`, for criteria that ask how a model treats a row's label.

One hidden layer of rectified units, or none. Plain NumPy, so it needs no torch; every number about a row comes from dot
products of that row alone, so it does not depend on the rows beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline.errors import ConfigError
from pipeline.recipe import Column, State, Transform, fingerprint
from pipeline.sample import LENGTH, Sample, draw, needs_fit, texts
from pipeline.scores.base import Score
from pipeline.vectors import matrix

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.run import Run

VECTOR = "embed.vector"
FIELDS = pa.schema([("score", pa.float32())])
LR, BATCH = 1e-2, 64
FEWEST = 20

Layers = Sequence[np.ndarray]
"""Weights (out, in + 1) float32 from input to logits; the last component is the bias."""


@dataclass(frozen=True)
class Passed:
    """What one forward pass over n rows leaves: inputs of every layer, and class probabilities p (n, classes)."""

    inputs: list[np.ndarray]
    p: np.ndarray


def forward(layers: Layers, x: np.ndarray) -> Passed:
    """Pass (n, d) float32 through the layers."""
    inputs = [x]
    for weight in layers[:-1]:
        inputs.append(np.maximum(affine(weight, inputs[-1]), 0))
    return Passed(inputs, softmax(affine(layers[-1], inputs[-1])))


def affine(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """W x + b row by row, (n, out); `vecdot`, since a matrix product's last bits depend on the rows beside."""
    rows = np.ascontiguousarray(weight[:, :-1])
    return np.asarray(np.stack([np.vecdot(x, row) for row in rows], axis=1) + weight[:, -1])


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (n, classes) of logits."""
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


def errors(p: np.ndarray, y: np.ndarray) -> np.ndarray:
    """p - y, the gradient of cross-entropy by the logits; y: class of every row, -1 for one that the head never saw."""
    known = y >= 0
    delta = p.copy()
    delta[np.flatnonzero(known), y[known]] -= 1
    return delta


def error_norms(layers: Layers, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """EL2N, |p - y|; (n,). A class that was never seen has p = 0, and its own component counts 1."""
    return np.asarray(np.sqrt(np.square(errors(forward(layers, x).p, y)).sum(axis=1) + (y < 0)))


def gradient_norms(layers: Layers, x: np.ndarray, y: np.ndarray, only_last: bool) -> np.ndarray:
    """Norms of the gradients of cross-entropy by the last layer's weights and biases, or by all; (n,).

    A layer's gradient is delta (a, 1)^T, so its squared norm is |delta|^2 (|a|^2 + 1): no gradient is made.
    """
    passed = forward(layers, x)
    delta = errors(passed.p, y)
    total = np.zeros(len(x), np.float32)
    for weight, a in zip(layers[::-1], passed.inputs[::-1], strict=True):
        unseen = (y < 0) if weight is layers[-1] else 0
        total += (np.square(delta).sum(axis=1) + unseen) * (np.square(a).sum(axis=1) + 1)
        if only_last:
            break
        back = np.concatenate([weight[:, :-1].T, np.zeros((weight.shape[1] - 1, 1), np.float32)], axis=1)
        delta = affine(back, delta) * (a > 0)
    return np.sqrt(total)


def train(
    x: np.ndarray, y: np.ndarray, classes: int, hidden: int, epochs: int, seed: int, lr: float = LR
) -> list[np.ndarray]:
    """Layers after `epochs` of Adam over (n, d) float32 rows and their classes, in batches of 64; He's initialisation.

    `hidden`: units of the hidden layer; 0 is softmax regression.
    """
    rng = np.random.default_rng(seed)
    widths = [x.shape[1], *([hidden] if hidden else []), classes]
    layers = [
        np.pad(rng.standard_normal((o, i), np.float32) * np.float32(np.sqrt(2 / i)), ((0, 0), (0, 1)))
        for i, o in pairwise(widths)
    ]
    means = [np.zeros((2, *w.shape), np.float32) for w in layers]
    step = 0
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x), BATCH):
            rows, step = order[start : start + BATCH], step + 1
            inputs = [x[rows]]
            for weight in layers[:-1]:
                inputs.append(np.maximum(inputs[-1] @ weight[:, :-1].T + weight[:, -1], 0))
            p = softmax(inputs[-1] @ layers[-1][:, :-1].T + layers[-1][:, -1])
            delta = errors(p, y[rows]) / np.float32(len(rows))
            for i in reversed(range(len(layers))):
                gradient = np.concatenate([delta.T @ inputs[i], delta.sum(axis=0)[:, None]], axis=1)
                delta = (delta @ layers[i][:, :-1]) * (inputs[i] > 0)
                m, v = means[i]
                m += np.float32(0.1) * (gradient - m)
                v += np.float32(0.001) * (gradient * gradient - v)
                layers[i] -= np.float32(lr / (1 - 0.9**step)) * m / (np.sqrt(v / np.float32(1 - 0.999**step)) + 1e-8)
    return layers


def as_labels(values: pa.Array) -> pa.Array:
    """Labels as strings, whatever the column's type."""
    values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
    return values.cast(pa.large_string())


def label_reference(run: Run, label: str, role: str) -> str:
    """`corpus.<label>`. Raises ConfigError where the corpus has no such column, or it holds no labels."""
    if label not in run.schema.names:
        raise ConfigError(f"{role}: the corpus has no column {label!r}; it has {', '.join(run.schema.names)}")
    kind = run.schema.field(label).type
    if pa.types.is_nested(kind) or pa.types.is_floating(kind):
        raise ConfigError(f"{role}: column {label!r} is {kind}: labels are texts, whole numbers or booleans")
    return f"corpus.{label}"


def sampled(state: State, reference: str, role: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Vectors (n, d) float32, classes (n,) and their names of a drawn sample. Raises ConfigError for too little."""
    labels = texts(state, reference) if reference + LENGTH in state else state[reference].astype(str) if state else []
    names, y = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    if len(y) < FEWEST or len(names) < 2:
        raise ConfigError(
            f"{role}: {len(y)} rows with {len(names)} labels are too few to learn from: "
            f"it takes {FEWEST} distinct rows and two labels"
        )
    return state[VECTOR].astype(np.float32), y, names.tolist()


def classes_of(labels: pa.Array, names: list[str]) -> np.ndarray:
    """Class of every label, -1 for one that is not among the names; (n,) int64."""
    found = pc.index_in(as_labels(labels), pa.array(names, pa.large_string()))
    return np.asarray(pc.fill_null(found, -1).to_numpy(), np.int64)


def save_heads(heads: Sequence[Layers], names: list[str], directory: Path) -> None:
    arrays = {f"{i}.{j}": weight for i, layers in enumerate(heads) for j, weight in enumerate(layers)}
    np.savez(directory / "heads.npz", **arrays)  # type: ignore[arg-type]  # keywords are arrays
    (directory / "labels.json").write_text(json.dumps(names))


def load_heads(directory: Path) -> tuple[list[list[np.ndarray]], list[str]]:
    with np.load(directory / "heads.npz", allow_pickle=False) as arrays:
        heads: list[list[np.ndarray]] = []
        for name in arrays.files:
            if name.endswith(".0"):
                heads.append([])
            heads[-1].append(arrays[name])
    return heads, json.loads((directory / "labels.json").read_text())


class LabelledScore(Score):
    """Base of criteria that average a measure of a row over heads that were trained briefly, from different seeds."""

    needs: ClassVar[Literal["text", "vectors", "concepts"]] = "vectors"
    label: str = Field(description="source column of the labels")
    keep: Literal["hard", "easy"] = Field("hard", description="keep what the heads get most wrong, or least")
    models: int = Field(10, ge=1, description="heads to average over, each of a seed of its own")
    epochs: int = Field(2, ge=1, description="epochs that a head is trained; the score is meant for early training")
    hidden: int = Field(64, ge=0, description="units of the hidden layer; 0 for softmax regression")
    sample: int = Field(20_000, ge=FEWEST, description="rows to train on")
    seed: int | None = Field(None, description="seed of the sample and of the heads (default: the run's)")

    def fit(self, run: Run) -> None:
        self._heads(run)

    def column(self, run: Run) -> Column:
        heads = self._heads(run)
        reference = f"corpus.{self.label}"
        opened = partial(_open, heads, reference, self.measure(), self.keep)
        return Column(self.column_name, (VECTOR, reference), FIELDS, opened, self.identity(heads.fingerprint))

    def measure(self) -> Callable[[Layers, np.ndarray, np.ndarray], np.ndarray]:
        """Layers, vectors (n, d) and classes (n,) to a number a row; greater is harder."""
        raise NotImplementedError(f"{type(self).__name__} has no measure()")

    def _heads(self, run: Run) -> Artifact:
        role = f"{self.column_name}.label"
        reference = label_reference(run, self.label, role)
        seed = run.seed if self.seed is None else self.seed
        sample = Sample((VECTOR, reference), self.sample, run.rows, seed)
        trained = [self.models, self.epochs, self.hidden, self.sample, seed]
        identity = fingerprint("heads", 1, trained, run.identity(*sample.inputs))
        state = draw(run, sample) if needs_fit(run, self.column_name, identity) else {}
        return run.artifact(self.column_name, identity, partial(_train, state, reference, role, trained))


def _train(state: State, reference: str, role: str, trained: list[int], directory: Path) -> None:
    models, epochs, hidden, _, seed = trained
    x, y, names = sampled(state, reference, role)
    heads = [train(x, y, len(names), hidden, epochs, seed * models + i) for i in range(models)]
    save_heads(heads, names, directory)


def _open(
    artifact: Artifact, reference: str, measure: Callable[[Layers, np.ndarray, np.ndarray], np.ndarray], keep: str
) -> Transform:
    heads, names = load_heads(artifact.local())
    sign = np.float32(1 if keep == "hard" else -1)

    def score(batch: pa.RecordBatch) -> pa.RecordBatch:
        x = matrix(batch.column(VECTOR)).astype(np.float32)
        y = classes_of(batch.column(reference), names)
        mean = np.mean([measure(layers, x, y) for layers in heads], axis=0, dtype=np.float32)
        return pa.record_batch([pa.array(sign * mean)], schema=FIELDS)

    return score
