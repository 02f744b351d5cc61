"""TRAK: influence of a row on a target set by a linear model of projected gradients, averaged over models.

score = mean over models of phi_target^T (Phi^T Phi / n + lambda I)^-1 phi_i, by subtask, then pooled. phi is the
projected gradient of a row's mean loss; Phi^T Phi is a sum over the corpus, one pass over stored projections. What it
adds to a plain product: directions in which the whole corpus has large gradients count less.

Source: Park et al. 2023, "TRAK: Attributing Model Behavior at Scale", arXiv 2303.14186 (from memory, unverified). The
paper projects the gradient of log(p / (1 - p)) and weighs rows by 1 - p; a text of many tokens has no such p, and the
gradient of the loss holds the factor already. Ours: `damping` (lambda, in mean eigenvalues; the paper's code has
none), which a Gram matrix of fewer rows than `size` cannot do without.

`inverse: datainf` takes the mean of the rank-one inverses in the place of the inverse of the mean (Kwon et al. 2023,
DataInf, arXiv 2310.00902; from memory, unverified):

    (1/n) sum_i (phi_i phi_i^T + lambda I)^-1 v = (1/n) sum_i (v - phi_i <phi_i, v> / (lambda + |phi_i|^2)) / lambda

with the same lambda, which at 0.1 mean eigenvalues is theirs. It has no size x size matrix and a second pass over the
projections. It is not the inverse: on (1, 0) and (0, 2) with lambda 1 it makes (0.75, 0.60) of (1, 1), the inverse of
the mean (0.67, 0.33). Theirs is by layer, on gradients of adapters that are not projected; here all layers are one.

Costs `models` x (2 size + 4) bytes of disk a row, and size^2 x 8 bytes a shard while the sums are made, so `size` is at
most 2,048. The projections stay as the columns `sketch-<12 hex digits>`: vectors of unit length and their norms.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from pipeline.artifact import Artifact
from pipeline.errors import CorpusError
from pipeline.models.causal import check_model, model_source
from pipeline.models.files import folder_digest, folder_of
from pipeline.models.projection import Kind, projection
from pipeline.recipe import QUARANTINE, Column, State, Transform, fingerprint
from pipeline.sample import needs_fit
from pipeline.scores._influence import (
    BATCH_ROWS,
    FIELDS,
    NOT_FINITE,
    Influence,
    Lens,
    Reader,
    Target,
    engine_resources,
    layers_of,
    pooled,
    scored,
    spoken,
    subtask_means,
    unit,
)
from pipeline.vectors import matrix

if TYPE_CHECKING:
    from pipeline.run import Run


class Trak(Influence):
    """phi_target^T (Phi^T Phi / n + lambda I)^-1 phi_i, averaged over models."""

    claim = "a linear model of the gradients says that training on it lowers the loss on the target set"
    cost = "models x 6N FLOPs a token (last: 4N), N parameters, and 2 size^2 a row"
    source = "Park et al. 2023, arXiv 2303.14186"
    kind: Literal["trak"] = "trak"
    models: list[str] = Field(min_length=1, description="causal LMs to average over: folders or hf://org/name")
    gradients: Literal["last", "full"] = Field("full", description="of all linear layers, or of the head")
    projection: Kind = Field("countsketch", description="how gradients are made shorter")
    size: int = Field(1024, ge=64, le=2048, multiple_of=64, description="components of a projected gradient")
    inverse: Literal["gram", "datainf"] = Field(
        "gram", description="of the mean outer product, or mean of the inverses"
    )
    damping: float = Field(0.1, gt=0, description="lambda, in mean eigenvalues of the Gram matrix")

    @model_validator(mode="after")
    def _there(self) -> Self:
        for model in self.models:
            check_model("trak", model)
        return self

    def support(self, run: Run) -> Sequence[Column]:
        asked, inputs = self._asked(run), self.inputs(run)
        resources, precision = engine_resources(run)
        fields = pa.schema(
            [("vector", pa.list_(pa.float16(), self.size)), ("norm", pa.float32()), (QUARANTINE, pa.string())]
        )
        columns = {}
        for model in self.models:
            source = model_source(run, model)
            identity = fingerprint("sketch", 1, folder_digest(folder_of(source)), asked, self.prompt, precision)
            opened = partial(_open_sketch, source, asked, precision, inputs, fields)
            name = f"sketch-{identity[:12]}"
            columns[name] = Column(name, inputs, fields, opened, identity, resources, BATCH_ROWS)
        return list(columns.values())

    def fit(self, run: Run) -> None:
        self._aims(run)

    def fill(self, run: Run) -> None:
        run.materialize([self.column(run)])

    def column(self, run: Run) -> Column:
        aims = self._aims(run)
        inputs = tuple(f"{column.name}.{field}" for column in self.support(run) for field in ("vector", "norm"))
        name = f"{self.column_name}-directions"
        asked = [self.damping, *(["datainf"] if self.inverse == "datainf" else [])]
        identity = fingerprint("trak", self.version, aims.fingerprint, *asked, run.identity(*inputs))
        found: list[np.ndarray] = []
        if needs_fit(run, name, identity):
            targets = np.load(aims.local() / "targets.npy", allow_pickle=False)
            pairs = zip(inputs[::2], inputs[1::2], strict=True)
            found = [self._towards(run, *pair, aim) for pair, aim in zip(pairs, targets, strict=True)]
        directions = run.artifact(name, identity, partial(_save, found), resources=None)
        opened = partial(_open, directions, self.pool, inputs)
        identity = fingerprint("trak", self.version, directions.fingerprint, self.pool)
        return Column(self.column_name, inputs, FIELDS, opened, identity)

    def _towards(self, run: Run, vector: str, norm: str, targets: np.ndarray) -> np.ndarray:
        """Directions (subtasks, size) of one model's targets, by one pass over the projections or by two."""
        if self.inverse == "gram":
            state = run.aggregate(Gram(vector, norm))
            _check(state, "gram")
            return directions(state["gram"], int(state["rows"][0]), targets, self.damping)
        state = run.aggregate(SquaredNorms(norm))
        _check(state, "squares")
        ridge = self.damping * float(state["squares"][0]) / int(state["rows"][0]) / targets.shape[1]
        state = run.aggregate(RankOnes(vector, norm, targets.astype(np.float64), ridge))
        return rank_one_directions(state, targets, ridge)

    def _asked(self, run: Run) -> dict[str, Any]:
        names = {"max_tokens", "gradients", "projection", "size"}
        return self.model_dump(include=names) | {"seed": self.seed_of(run)}

    def _aims(self, run: Run) -> Artifact:
        """`targets.npy`: the target's mean projected gradients, (models, subtasks, size)."""
        target, asked = self.target_set(run), self._asked(run)
        resources, precision = engine_resources(run)
        sources = [model_source(run, model) for model in dict.fromkeys(self.models)]
        files = [folder_digest(folder_of(source)) for source in sources]
        name = f"{self.column_name}-target"
        identity = fingerprint("trak", 1, files, asked, target.identity, precision)
        if needs_fit(run, name, identity):
            self.warn_contained(run, target)
        return run.artifact(name, identity, partial(_aim, sources, target, asked, precision), resources)


@dataclass(frozen=True)
class Gram:
    """Statistic: sum of phi phi^T over the rows with a gradient. State: `gram` (s, s) float64, `rows` (1,) int64."""

    vector: str
    norm: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.vector, self.norm)

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        phi = _phi(batch, self.vector, self.norm).astype(np.float64)
        new = {"gram": phi.T @ phi, "rows": np.array([len(phi)])}
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        return {name: np.sum([s[name] for s in states], axis=0) for name in ("gram", "rows")}


@dataclass(frozen=True)
class SquaredNorms:
    """Statistic: `squares` (1,) float64, the sum of |phi|^2, over `rows` (1,) int64."""

    norm: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.norm,)

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        squares = batch.column(0).to_numpy().astype(np.float64) ** 2
        new = {"squares": np.array([squares.sum()]), "rows": np.array([len(squares)])}
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        return {name: np.sum([s[name] for s in states], axis=0) for name in ("squares", "rows")}


@dataclass(frozen=True)
class RankOnes:
    """Statistic: `sums` (m, s) float64, of phi <phi, v> / (ridge + |phi|^2) over the rows, for (m, s) targets v."""

    vector: str
    norm: str
    targets: np.ndarray
    ridge: float

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.vector, self.norm)

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        phi = _phi(batch, self.vector, self.norm).astype(np.float64)
        shares = (phi @ self.targets.T) / (self.ridge + np.vecdot(phi, phi))[:, None]
        new = {"sums": shares.T @ phi, "rows": np.array([len(phi)])}
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        return {name: np.sum([s[name] for s in states], axis=0) for name in ("sums", "rows")}


def rank_one_directions(state: State, targets: np.ndarray, ridge: float) -> np.ndarray:
    """Mean of (phi phi^T + ridge I)^-1 v over the rows of a `RankOnes`, for (m, s) targets v; (m, s) float64."""
    return np.asarray((targets - state["sums"] / state["rows"][0]) / ridge)


def directions(gram: np.ndarray, rows: int, targets: np.ndarray, damping: float) -> np.ndarray:
    """(Gram / rows + lambda I)^-1 phi_target for (m, s) targets, lambda in mean eigenvalues; (m, s) float64."""
    mean = gram / rows
    ridge = damping * np.trace(mean) / len(mean)
    return np.asarray(np.linalg.solve(mean + ridge * np.eye(len(mean)), targets.T).T)


def _phi(batch: pa.RecordBatch, vector: str, norm: str) -> np.ndarray:
    phi = matrix(batch.column(vector)).astype(np.float32) * batch.column(norm).to_numpy()[:, None]
    return np.asarray(phi)


def _lens(source: Artifact | Path, asked: dict[str, Any], precision: str) -> Lens:
    reader = Reader(folder_of(source), asked["max_tokens"], precision)
    return Lens(reader, layers_of(reader.model, asked["gradients"]))


def _open_sketch(
    source: Artifact | Path, asked: dict[str, Any], precision: str, inputs: tuple[str, ...], fields: pa.Schema
) -> Transform:
    lens = _lens(source, asked, precision)
    project = projection(asked["projection"], asked["size"], asked["seed"])

    def sketch(batch: pa.RecordBatch) -> pa.RecordBatch:
        tokens = lens.reader.read(spoken(batch, inputs))
        phi = lens.sketches(tokens, project)
        norms = np.linalg.norm(phi, axis=1)
        broken = ~np.isfinite(norms)
        phi[broken] = 0
        mask = pa.array(broken)
        flat = pa.array(unit(phi).astype(np.float16).ravel())
        vectors = pa.FixedSizeListArray.from_arrays(flat, project.size, mask=mask)
        why = pa.array(np.full(len(phi), NOT_FINITE), mask=~broken)
        return pa.record_batch([vectors, pa.array(norms.astype(np.float32), mask=broken), why], schema=fields)

    return sketch


def _aim(
    sources: Sequence[Artifact | Path], target: Target, asked: dict[str, Any], precision: str, directory: Path
) -> None:
    examples = target.read()
    project = projection(asked["projection"], asked["size"], asked["seed"])
    aims = []
    for source in sources:
        lens = _lens(source, asked, precision)
        tokens = lens.reader.read(examples.spoken)
        aims.append(subtask_means(lens.sketches(tokens, project), examples, ~tokens.masked, target.role))
    np.save(directory / "targets.npy", np.stack(aims))
    (directory / "subtasks.json").write_text(json.dumps(examples.names))


def _check(state: State, name: str) -> None:
    if not state or not state[name].any():
        raise CorpusError("trak: no row of the corpus has a gradient; see quarantine/ for the reasons")


def _save(found: list[np.ndarray], directory: Path) -> None:
    np.save(directory / "directions.npy", np.stack(found).astype(np.float32))


def _open(artifact: Artifact, pool: str, inputs: tuple[str, ...]) -> Transform:
    aims = np.load(artifact.local() / "directions.npy", allow_pickle=False)

    def score(batch: pa.RecordBatch) -> pa.RecordBatch:
        masked = np.zeros(batch.num_rows, bool)
        scores = np.zeros((batch.num_rows, aims.shape[1]))
        for vector, norm, aim in zip(inputs[::2], inputs[1::2], aims, strict=True):
            phi = _phi(batch, vector, norm)
            scores += np.stack([np.vecdot(phi, direction) for direction in aim], axis=1) / len(aims)
            masked |= batch.column(norm).to_numpy() == 0
        return scored(pooled(scores, pool), masked)

    return score
