"""Rows to concepts: the column `concept`, the nearest centroid by cosine, exactly, and how far it is.

The search is FAISS's IndexFlatIP over float32, all rows of a batch at once; 2 k d FLOPs a row.
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
