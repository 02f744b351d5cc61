"""Rows to concepts: the column `concept`, the nearest centroid by cosine, exactly, and how far it is.

The search is FAISS's IndexFlatIP over float32, all rows of a batch at once; 2 k d FLOPs a row. 1 M vectors of d = 384
and k = 1000 take 5.1 s on two cores of a Xeon of 2023, a bare IndexFlatIP search 21.3 s as its wheel comes, and 5.5 s
with the kernels that `pipeline.vectors.load_faiss` picks (bench/assign.py).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa

from pipeline.concepts.kmeans import Cluster, load_centroids
from pipeline.recipe import Column, Transform, fingerprint
from pipeline.vectors import flat_index, matrix, nearest

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.run import Run

FIELDS = pa.schema([("concept", pa.int32()), ("distance", pa.float32())])
BATCH_ROWS = 16384


def concept_column(run: Run, cluster: Cluster | None = None) -> Column:
    """Fit the centroids if need be, and give the column `concept`: `concept` (int32, row of the centroids) and
    `distance` (float32, 1 - cosine, in [0, 2])."""
    centroids = (cluster or Cluster()).centroids(run)
    identity = fingerprint("concept", 1, centroids.fingerprint)
    return Column("concept", ("embed.vector",), FIELDS, partial(_open, centroids), identity, batch_rows=BATCH_ROWS)


def _open(centroids: Artifact) -> Transform:
    points = load_centroids(centroids)
    index = flat_index(points)

    def assign(batch: pa.RecordBatch) -> pa.RecordBatch:
        concept, distance = nearest(matrix(batch.column("embed.vector")), points, index)
        return pa.record_batch([pa.array(concept), pa.array(distance)], schema=FIELDS)

    return assign
