"""Vectors to concepts: spherical k-means on a reproducible sample, or over every row of the corpus.

Rows are unit vectors, a centroid is the normalised mean of its rows, and the nearest one has the greatest cosine. FAISS
fits k centroids on the `k * sample_per_concept` rows with the smallest hashes (256 a concept, its own default, and no
more than 512 MiB), and what that costs does not grow with the corpus. `full_lloyd` goes on from there over all rows,
one pass an iteration, each a stored artifact, so that a run which dies continues with the iteration that it was in.

The result depends on (vectors, seed), not on workers or threads. Fewer than k concepts come out where the sample holds
fewer distinct rows, or where a concept ends up empty: it is dropped. A centroid is never NaN and never zero.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.errors import ConfigError
from pipeline.recipe import Recipe, State, fingerprint
from pipeline.sample import Sample, draw, needs_fit
from pipeline.vectors import as_float32, flat_index, load_faiss, matrix, nearest

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.run import Run

log = logging.getLogger(__name__)

MOST_CONCEPTS = 10_000
CENTROIDS = "centroids.npy"
NOTES = "kmeans.json"
STEP_ROWS = 1 << 14
SAMPLE_BYTES = 1 << 29
"""What the sample's vectors take at the most: the driver holds it, then one worker. 70 rows a concept at k = 10,000 and
d = 384; FAISS asks for 39."""

CONVERGED = 1e-4
"""Full Lloyd stops when an iteration lowers the mean distance by less than this share of it."""


class Cluster(Recipe):
    """Spherical k-means; sources: Sorscher et al. 2022 (k about the number of classes, little change for a tenth or ten
    times as many) and Abbas et al. 2024 (k = 500 for 280 M rows, code default 10,000)."""

    k: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="concepts; auto: the square root of the rows, 10,000 at the most"
    )
    sample_per_concept: int = Field(256, ge=1, description="rows of the sample per concept")
    iterations: int = Field(20, ge=1, description="Lloyd iterations on the sample")
    full_lloyd: bool = Field(
        False, description="go on with Lloyd iterations over all rows, each one pass over the vectors"
    )
    full_iterations: int = Field(
        10, ge=1, description="the most iterations over all rows; they stop when nothing moves"
    )
    seed: int | None = Field(None, description="seed of the sample and of the first centroids (default: the run's)")

    def concepts(self, rows: int) -> int:
        """k for a corpus of `rows` rows. Raises ConfigError where there are fewer rows than concepts."""
        if self.k == "auto":
            return max(1, min(MOST_CONCEPTS, round(math.sqrt(rows))))
        if self.k > rows:
            raise ConfigError(
                f"cluster.k = {self.k:,} but the corpus has {rows:,} rows: set k between 1 and {rows:,}, or auto"
            )
        return int(self.k)

    def centroids(self, run: Run) -> Artifact:
        """Artifact `centroids`: `centroids.npy` (k, d) float32, unit norm, and `kmeans.json` on how it went."""
        seed = run.seed if self.seed is None else self.seed
        k = self.concepts(run.rows)
        fitted = self.model_dump(exclude={"k", "seed", "full_lloyd", "full_iterations"})
        identity = fingerprint(
            type(self).__name__, self.version, fitted, k, seed, run.identity("embed.vector", "row.key")
        )
        dims = run.plans["embed"].column.fields.field("vector").type.list_size
        rows = max(k, min(k * self.sample_per_concept, SAMPLE_BYTES // (2 * dims)))
        sample = Sample(("embed.vector",), rows, run.rows, seed)
        name = "centroids-on-sample" if self.full_lloyd else "centroids"
        state = draw(run, sample) if needs_fit(run, name, identity) else {}
        build = partial(_fit, state, k, self.iterations, seed)
        centroids = run.artifact(name, identity, build)
        return self._over_all_rows(run, centroids) if self.full_lloyd else centroids

    def _over_all_rows(self, run: Run, centroids: Artifact) -> Artifact:
        """Lloyd iterations over the corpus; the last one is the artifact `centroids`."""
        before = np.inf
        for iteration in range(1, self.full_iterations + 1):
            identity = fingerprint("lloyd", centroids.fingerprint, iteration)
            name = f"centroids-iteration-{iteration:02d}"
            state = run.aggregate(Lloyd(centroids)) if needs_fit(run, name, identity) else {}
            centroids = run.artifact(name, identity, partial(_step, state, centroids), resources=None)
            distance = json.loads((centroids.local() / NOTES).read_text())["mean_distance"]
            log.info("iteration %d over all rows: mean distance %.6f", iteration, distance)
            if distance > before * (1 - CONVERGED):
                break
            before = distance
        return run.artifact(
            "centroids", fingerprint("last", centroids.fingerprint), partial(_copy, centroids), resources=None
        )


def load_centroids(artifact: Artifact) -> np.ndarray:
    """The (k, d) float32 unit centroids of an artifact `centroids`."""
    centroids: np.ndarray = np.load(artifact.local() / CENTROIDS)
    return centroids


@dataclass(frozen=True)
class Lloyd:
    """Statistic: one Lloyd step over unit vectors. State: `sums` (k, d) float64, `rows` (k,) int64 and the sum of
    distances `distance` (1,) float64."""

    centroids: Artifact

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("embed.vector",)

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        points = load_centroids(self.centroids)
        step = lloyd_step(matrix(batch.column("embed.vector")), points)
        return self.merge([state, step]) if state else step

    def merge(self, states: Sequence[State]) -> State:
        return {name: np.sum([s[name] for s in states], axis=0) for name in states[0]}


def lloyd_step(vectors: np.ndarray, points: np.ndarray) -> State:
    """Assign (n, d) unit vectors to (k, d) points; the state of `Lloyd`."""
    k, dims = points.shape
    sums, rows, total = np.zeros((k, dims)), np.zeros(k, np.int64), 0.0
    index = flat_index(points)
    for start in range(0, len(vectors), STEP_ROWS):
        x = as_float32(vectors[start : start + STEP_ROWS])
        concept, distance = nearest(x, points, index)
        order = np.argsort(concept, kind="stable")
        present, first = np.unique(concept[order], return_index=True)
        sums[present] += np.add.reduceat(x[order], first, axis=0)
        rows += np.bincount(concept, minlength=k)
        total += float(distance.sum(dtype=np.float64))
    return {"sums": sums, "rows": rows, "distance": np.array([total])}


def spherical_kmeans(vectors: np.ndarray, k: int, iterations: int, seed: int) -> tuple[np.ndarray, list[float]]:
    """FAISS's k-means with normalised means, on (n, d) unit vectors, n >= k >= 1.

    Returns (concepts, d) float32 unit centroids, concepts <= k, and the mean distance (1 - cosine) at each iteration.
    An empty concept takes half of a large one on the way; what is empty or without direction at the end is dropped.
    """
    faiss = load_faiss()
    x = as_float32(vectors)
    fit = faiss.Kmeans(x.shape[1], k, niter=iterations, spherical=True, seed=seed & 0x7FFFFFFF)
    fit.cp.min_points_per_centroid, fit.cp.max_points_per_centroid = 1, len(x)  # the sample has been drawn already
    fit.train(x)
    centroids: np.ndarray = fit.centroids
    alive = np.linalg.norm(centroids, axis=1) > 0.5  # rows that cancel out leave a mean of zero
    if k == len(x) or fit.iteration_stats[-1]["nsplit"]:  # else the last iteration left none empty
        alive &= np.bincount(flat_index(centroids).search(x, 1)[1][:, 0], minlength=k) > 0
    centroids = centroids[alive] if alive.any() else x[:1] / np.linalg.norm(x[:1])
    return centroids, [1 - float(s["obj"]) / len(x) for s in fit.iteration_stats]


def _fit(sample: State, k: int, iterations: int, seed: int, directory: Path) -> None:
    vectors = sample.get("embed.vector", np.empty((0, 0)))
    if not len(vectors):
        raise ConfigError("cluster: no row of the corpus has a vector; see quarantine/embed for the reasons")
    centroids, distances = spherical_kmeans(vectors, min(k, len(vectors)), iterations, seed)
    if len(centroids) < k:
        log.warning("%d concepts instead of %d: the sample of %d rows holds no more", len(centroids), k, len(vectors))
    _write(directory, centroids, asked=k, sample_rows=len(vectors), mean_distance=distances[-1], by_iteration=distances)


def _step(state: State, before: Artifact, directory: Path) -> None:
    """Move every centroid to the mean of its rows; one without rows is dropped, one whose rows cancel out stays."""
    norms = np.linalg.norm(state["sums"], axis=1)
    moved = np.where(norms[:, None] > 1e-6, state["sums"] / np.maximum(norms, 1e-6)[:, None], load_centroids(before))
    rows = state["rows"]
    _write(directory, moved[rows > 0], rows=int(rows.sum()), mean_distance=float(state["distance"][0] / rows.sum()))


def _copy(centroids: Artifact, directory: Path) -> None:
    for name in (CENTROIDS, NOTES):
        (directory / name).write_bytes((centroids.local() / name).read_bytes())


def _write(directory: Path, centroids: np.ndarray, **notes: object) -> None:
    np.save(directory / CENTROIDS, centroids.astype(np.float32))
    (directory / NOTES).write_text(json.dumps({"concepts": len(centroids), **notes}, indent=2))
