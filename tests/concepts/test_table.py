"""The concept table: sums by concept, and how far concepts are from each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.concepts.assign import concept_column
from pipeline.concepts.table import SCHEMA, ConceptTotals, concept_table, inter_distances, make_table
from pipeline.config import parse
from pipeline.corpus.rows import row_column
from pipeline.engine.pool import InlinePool
from pipeline.errors import ConfigError
from pipeline.run import Run
from pipeline.scores.density import Density


def unit(rows: int, dims: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, dims)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@settings(deadline=None)
@given(st.integers(2, 60), st.integers(1, 25), st.integers(0, 2**32 - 1))
def test_inter_distance_is_the_mean_over_the_nearest_others(k: int, neighbours: int, seed: int) -> None:
    points = unit(k, 8, seed)
    distance = 1 - points.astype(np.float64) @ points.T
    np.fill_diagonal(distance, np.inf)
    expected = np.sort(distance, axis=1)[:, : min(neighbours, k - 1)].mean(axis=1)
    np.testing.assert_allclose(inter_distances(points, neighbours), expected, atol=1e-6)


def test_inter_distance_of_one_and_of_identical_centroids() -> None:
    assert inter_distances(unit(1, 4, 0), 20).tolist() == [0]
    np.testing.assert_allclose(inter_distances(np.tile(unit(1, 4, 0), (30, 1)), 5), np.zeros(30), atol=1e-6)
    three = np.float32([[1, 0], [1, 0], [0, 1]])
    np.testing.assert_allclose(inter_distances(three, 1), [0, 0, 1], atol=1e-6)


def batch(concept: np.ndarray, distance: np.ndarray, size: np.ndarray) -> pa.RecordBatch:
    names = ["concept.concept", "concept.distance", "row.bytes", "row.tokens"]
    return pa.record_batch([concept.astype(np.int32), distance.astype(np.float32), size, size // 4], names)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_totals_are_sums_by_concept_whatever_the_shards(rows: int, k: int, shards: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    concept, distance, size = rng.integers(0, k, rows), rng.random(rows), rng.integers(1, 1 << 40, rows)
    totals = ConceptTotals(k)
    whole = batch(concept, distance, size)
    states = [totals.update({}, whole.slice(p[0], len(p))) for p in np.array_split(np.arange(rows), shards) if len(p)]
    state = totals.merge(states)
    for j in range(k):
        here = concept == j
        assert state["n"][j] == here.sum()
        assert state["bytes"][j] == size[here].sum()
        assert state["tokens"][j] == (size[here] // 4).sum()
        np.testing.assert_allclose(state["distance"][j], distance[here].astype(np.float32).sum(dtype=float), rtol=1e-9)


def test_complexity_is_the_product_and_an_empty_concept_has_none() -> None:
    concept, distance = np.array([0, 0, 2]), np.array([0.2, 0.4, 0.1])
    points = np.float32([[1, 0], [0, 1], [-1, 0]])
    state = ConceptTotals(3).update({}, batch(concept, distance, np.array([8, 8, 4])))
    table = make_table(state, points, neighbours=20)
    assert table.schema == SCHEMA
    assert table["n"].to_pylist() == [2, 0, 1]
    assert (table["bytes"].to_pylist(), table["tokens"].to_pylist()) == ([16, 0, 4], [4, 0, 1])
    np.testing.assert_allclose(table["d_intra"], [0.3, 0, 0.1], rtol=1e-6)
    np.testing.assert_allclose(table["d_inter"], [1.5, 1, 1.5], rtol=1e-6)
    np.testing.assert_allclose(table["complexity"], [0.45, 0, 0.15], rtol=1e-6)


def test_table_of_a_run(tmp_path: Path) -> None:
    x = unit(300, 8, 3)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 8)
    texts = [f"row {i} " * (i % 7 + 1) for i in range(300)]
    pq.write_table(pa.table({"text": texts, "emb": vectors}), tmp_path / "corpus.parquet")
    config = {"corpus": {"path": str(tmp_path / "corpus.parquet")}, "embed": {"kind": "precomputed", "column": "emb"}}
    config |= {"cluster": {"k": 12}, "scores": ["density"], "select": {"budget": {"rows": 1}}}
    with Run(parse(config | {"run": str(tmp_path / "run")}), InlinePool, quiet=True) as run:
        assert run.config.embed is not None
        run.materialize([row_column(False, None)])
        run.materialize([run.config.embed.column(run)])
        run.materialize([concept_column(run, run.config.cluster)])
        table = concept_table(run, run.config.scores)
        two = concept_table(run, [Density(neighbours=2)])
        with pytest.raises(ConfigError, match=r"ask for \[2, 20\] neighbours: give all the same"):
            concept_table(run, [Density(neighbours=2), Density(name="other")])
    stored = pq.read_table(tmp_path / "run/artifacts/concepts/table.parquet")
    assert stored.equals(two)
    columns = pq.read_table(tmp_path / "run/columns/concept/part-00000.parquet")
    concept, distance = columns["concept"].to_numpy(), columns["distance"].to_numpy()
    assert table["concept"].to_pylist() == list(range(12))
    assert table["n"].to_pylist() == np.bincount(concept, minlength=12).tolist()
    assert table["bytes"].to_numpy().sum() == sum(map(len, texts))
    for j in range(12):
        assert table["d_intra"][j].as_py() == pytest.approx(distance[concept == j].mean(), rel=1e-5)
    points = np.load(tmp_path / "run/artifacts/centroids/centroids.npy")
    np.testing.assert_allclose(two["d_inter"], np.sort(1 - points @ points.T, axis=1)[:, 1:3].mean(axis=1), atol=1e-6)
    assert (two["d_inter"].to_numpy() < table["d_inter"].to_numpy()).all()
