"""Density: the score is the stored distance; the quotas that it brings are the selection's (tests/select)."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression

from pipeline.concepts.kmeans import spherical_kmeans
from pipeline.concepts.table import ConceptTotals, make_table
from pipeline.config import parse
from pipeline.recipe import Column
from pipeline.scores.density import Density
from pipeline.select.config import Quotas
from pipeline.select.quotas import allocate, floors, softmax
from pipeline.vectors import flat_index, nearest


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


def test_quotas_by_complexity_beat_equal_fractions_and_random_rows() -> None:
    """Ten tight and ten wide classes, keep 10 %, linear probe. Rows inside a concept are drawn at random here, so that
    only the quotas differ; the hardest rows of a Gaussian are its outliers and would mislead a probe."""
    mean = dict.fromkeys(("density", "equal fractions", "random"), 0.0)
    seeds, rows, keep = 3, 10_000, 1000
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        centres = rng.standard_normal((20, 32))
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
        label = rng.integers(0, 20, rows + 4000)
        x = centres[label] + np.where(label < 10, 0.1, 0.35)[:, None] * rng.standard_normal((rows + 4000, 32))
        x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        points, _ = spherical_kmeans(x[:rows], 20, 20, seed)
        concept, distance = nearest(x[:rows], points, flat_index(points))
        ones = np.ones(rows, np.int64)
        names = ["concept.concept", "concept.distance", "row.bytes", "row.tokens"]
        totals = ConceptTotals(len(points)).update({}, pa.record_batch([concept, distance, ones, ones], names))
        table = make_table(totals, points, neighbours=20)
        n, complexity = table["n"].to_numpy(), table["complexity"].to_numpy()
        assert np.median(np.sort(complexity)[10:]) > 2 * np.median(np.sort(complexity)[:10])
        shares = {"density": softmax(complexity, 0.1), "equal fractions": n / rows}
        order = rng.permutation(rows)
        for name, share in shares.items():
            quota = allocate(share, n, keep, floors(n, keep, 0.5 if name == "density" else 0.0, 1))
            kept = np.concatenate([order[concept[order] == j][: quota[j]] for j in range(len(points))])
            mean[name] += probe(x, label, kept, rows) / seeds
        mean["random"] += probe(x, label, order[:keep], rows) / seeds
    assert mean["density"] > mean["equal fractions"] + 0.003
    assert mean["density"] > mean["random"] + 0.001


def probe(x: np.ndarray, label: np.ndarray, kept: np.ndarray, rows: int) -> float:
    """Mean accuracy a class, on the rows behind `rows`, of a logistic regression on the rows kept."""
    found = LogisticRegression(C=10, max_iter=300, tol=1e-3).fit(x[kept], label[kept]).predict(x[rows:])
    return float(np.mean([(found == j)[label[rows:] == j].mean() for j in range(20)]))


def test_density_brings_its_quotas() -> None:
    config = parse({"corpus": {"path": "x"}, "scores": ["density"], "select": {"budget": {"rows": 1}}, "run": "r"})
    assert config.select.quotas_for(config.scores) == Quotas(rule="density", tau=0.1)
    assert config.needs_concepts
