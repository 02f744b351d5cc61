"""Density: the score is the stored distance; the quotas that it brings are the selection's (tests/select)."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from pipeline.config import parse
from pipeline.recipe import Column
from pipeline.scores.density import Density
from pipeline.select.config import Quotas


def column(recipe: Density) -> Column:
    return recipe.column(None)  # type: ignore[arg-type]  # the column depends on nothing of the run


def test_score_is_the_distance_to_the_own_centroid() -> None:
    distance = np.random.default_rng(0).random(100, np.float32)
    out = column(Density()).open()(pa.record_batch([distance], ["concept.distance"]))
    assert out.schema == column(Density()).fields == pa.schema([("score", pa.float32())])
    np.testing.assert_array_equal(out["score"], distance)


def test_neighbours_leave_the_column_as_it_is() -> None:
    assert column(Density(neighbours=5)).identity == column(Density()).identity
    with pytest.raises(ValidationError):
        Density(neighbours=0)


def test_density_brings_its_quotas() -> None:
    config = parse({"corpus": {"path": "x"}, "scores": ["density"], "select": {"budget": {"rows": 1}}, "run": "r"})
    assert config.select.quotas_for(config.scores) == Quotas(rule="density", tau=0.1)
    assert config.needs_concepts
