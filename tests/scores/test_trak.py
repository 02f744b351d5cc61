"""TRAK: its linear model in closed form, its Gram matrix as a sum, and a target of birds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

pytest.importorskip("torch")

from two_domains import MASKED, Domains, two_domains

from pipeline.scores._influence import MASKED as NO_TOKEN
from pipeline.scores.trak import Gram, RankOnes, Trak, directions, rank_one_directions


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Domains:
    return two_domains(tmp_path_factory.mktemp("trak"))


def test_on_least_squares_it_is_first_order_influence_and_ranks_as_leaving_out_does() -> None:
    """X = [1, t], y = (0, 1, 1, 3), query (1, 4): section 7 of the influence literature's own toy."""
    x, y, query = np.array([[1.0, t] for t in range(4)]), np.array([0.0, 1, 1, 3]), np.array([[1.0, 4.0]])
    residual = y - x @ np.linalg.solve(x.T @ x, x.T @ y)
    np.testing.assert_allclose(residual, [0.1, 0.2, -0.7, 0.4], atol=1e-12)
    (direction,) = directions(x.T @ x, 1, query, damping=1e-12)
    found = (residual[:, None] * x) @ direction
    np.testing.assert_allclose(found, [-0.05, 0, -0.35, 0.40], atol=1e-9)
    exact = np.array([-0.166667, 0, -0.5, 1.333333])
    assert np.argsort(found).tolist() == np.argsort(exact).tolist()


def test_damping_counts_in_mean_eigenvalues_and_saves_a_singular_matrix() -> None:
    phi = np.array([[2.0, 0], [2, 0]])
    np.testing.assert_allclose(directions(phi.T @ phi, 2, np.array([[1.0, 1]]), 0.5), [[1 / 5, 1]])


def batch_of(phi: np.ndarray) -> pa.RecordBatch:
    """Rows as they are stored: unit vectors and their norms."""
    norm = np.linalg.norm(phi, axis=1)
    flat = pa.array((phi / norm[:, None]).astype(np.float16).ravel())
    vectors = pa.FixedSizeListArray.from_arrays(flat, phi.shape[1])
    return pa.record_batch([vectors, pa.array(norm.astype(np.float32))], ["s.vector", "s.norm"])


def test_datainf_is_the_mean_of_the_inverses_and_not_the_inverse_of_the_mean() -> None:
    phi, v = np.array([[1.0, 0], [0, 2]]), np.array([[1.0, 1]])
    state = RankOnes("s.vector", "s.norm", v, 1.0).update({}, batch_of(phi))
    np.testing.assert_allclose(rank_one_directions(state, v, 1.0), [[0.75, 0.60]], atol=1e-6)
    np.testing.assert_allclose(np.linalg.solve(phi.T @ phi / 2 + np.eye(2), v[0]), [0.6667, 0.3333], atol=1e-4)


@settings(max_examples=20)
@given(st.integers(2, 20), st.floats(0.01, 10), st.integers(0, 2**32 - 1))
def test_datainf_is_its_definition_whatever_the_shards(rows: int, ridge: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    unit = np.sign(rng.standard_normal((rows, 4))) / 2  # exact in float16
    phi, v = unit * rng.integers(1, 9, (rows, 1)), rng.standard_normal((3, 4))
    statistic = RankOnes("s.vector", "s.norm", v, ridge)
    states = [statistic.update({}, batch_of(part)) for part in (phi[: rows // 2], phi[rows // 2 :])]
    inverses = np.mean([np.linalg.inv(np.outer(g, g) + ridge * np.eye(4)) for g in phi], axis=0)
    np.testing.assert_allclose(
        rank_one_directions(statistic.merge(states), v, ridge), v @ inverses, rtol=1e-6, atol=1e-9
    )


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_gram_is_a_sum_over_shards(rows: int, shards: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    phi, norm = rng.standard_normal((rows, 5)).astype(np.float16), rng.random(rows, np.float32) * 1000
    statistic = Gram("s.vector", "s.norm")
    states = []
    for part in np.array_split(np.arange(rows), shards):
        if len(part):
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(phi[part].ravel()), 5)
            states.append(
                statistic.update({}, pa.record_batch([vectors, pa.array(norm[part])], ["s.vector", "s.norm"]))
            )
    state = statistic.merge(states)
    whole = phi.astype(np.float64) * norm[:, None]
    np.testing.assert_allclose(state["gram"], whole.T @ whole, rtol=1e-5, atol=1e-3 * norm.max() ** 2)
    assert state["rows"].tolist() == [rows]


@pytest.mark.parametrize("inverse", ["gram", "datainf"])
def test_the_best_tenth_is_of_the_target_and_equals_the_formula(domains: Domains, inverse: str) -> None:
    options = {"size": 256, "subtask": "task", "pool": "mean", "gradients": "full", "inverse": inverse}
    found = domains.run(inverse, {"kind": "trak", "models": [str(domains.model)]} | options)
    assert domains.birds[found["keep"].to_numpy()].mean() > 0.9
    score, rule = found["score"].to_numpy(), np.array(found["rule"].to_pylist())
    assert (score[list(MASKED)] == 0).all()
    assert np.flatnonzero(rule == NO_TOKEN).tolist() == list(MASKED)

    (column,) = (domains.folder / inverse / "columns").glob("sketch-*")
    sketches = pa.concat_tables([pq.read_table(part) for part in sorted(column.iterdir())])
    phi = np.stack(sketches["vector"].to_numpy()).astype(np.float64) * sketches["norm"].to_numpy()[:, None]
    target = np.load(domains.folder / inverse / "artifacts/trak-target/targets.npy")[0].mean(axis=0)
    gram = phi.T @ phi / len(phi)
    ridge = 0.1 * np.trace(gram) / 256
    if inverse == "gram":
        expected = phi @ np.linalg.solve(gram + ridge * np.eye(256), target)
    else:
        each = [target - g * (g @ target) / (ridge + g @ g) for g in phi]
        expected = phi @ np.mean(each, axis=0) / ridge
    np.testing.assert_allclose(score, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_models_are_averaged_and_a_model_counts_once_however_often_it_is_named(domains: Domains) -> None:
    once, twice = (
        domains.run(name, {"kind": "trak", "models": [str(domains.model)] * count, "size": 64, "gradients": "last"})
        for name, count in (("once", 1), ("twice", 2))
    )
    np.testing.assert_array_equal(once["score"].to_numpy(), twice["score"].to_numpy())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"models": []}, "at least 1"),
        ({"models": ["hf://a/b"], "size": 4096}, "2048"),
        ({"models": ["no"]}, "no folder"),
    ],
)
def test_errors_at_the_door(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Trak.model_validate({"target": "t.txt"} | fields)
