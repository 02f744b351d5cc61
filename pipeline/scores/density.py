"""Density-Based Pruning: the distance of a row to the centroid of its concept. Greater is harder, and kept.

Source: Abbas et al. 2024, "Effective pruning of web-scale datasets based on complexity of concept clusters", arXiv
2401.04578. The score ranks rows inside their concept only: a tight concept has small distances throughout. How many
rows each concept may keep is the other half of the method and belongs to the selection, which this score brings along:
quotas by softmax(complexity / tau) of the concept table (`select.quotas: {rule: density, tau: 0.1}`).

What is spread out for being junk scores as hard: remove duplicates and junk first, as the paper does.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from pipeline.recipe import Column, Transform
from pipeline.scores.base import Score

if TYPE_CHECKING:
    from pipeline.run import Run

FIELDS = pa.schema([("score", pa.float32())])


class Density(Score):
    """1 - cosine to the own centroid, in [0, 2]; valid inside a concept."""

    needs: ClassVar[Literal["text", "vectors", "concepts"]] = "concepts"
    quotas: ClassVar[Mapping[str, Any]] = MappingProxyType({"rule": "density"})
    claim = "harder than its concept's other rows: far from the centroid"
    cost = "2 k d FLOPs, those of the assignment to a concept"
    source = "Abbas et al. 2024, arXiv 2401.04578"
    kind: Literal["density"] = "density"
    neighbours: int = Field(20, ge=1, description="nearest other centroids that a concept's complexity averages over")

    def column(self, run: Run) -> Column:
        # The number of neighbours shapes the concept table, not this column.
        return Column(self.column_name, ("concept.distance",), FIELDS, _open, "density 1")


def _open() -> Transform:
    return lambda batch: pa.record_batch([batch.column("concept.distance")], schema=FIELDS)
