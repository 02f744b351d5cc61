"""Unit vectors, what is refused, and the nearest point."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.vectors import as_float32, flat_index, matrix, nearest, unit_vectors, vector_schema


def unit(rng: np.random.Generator, rows: int, dims: int) -> np.ndarray:
    x = rng.standard_normal((rows, dims)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_vectors_are_float16_of_unit_norm_and_the_rest_is_refused_with_a_reason() -> None:
    x = np.array([[3, 4], [np.nan, 1], [0, 0], [np.inf, 1], [1e30, 1e30], [1e-30, 0], [7, 7]], np.float32)
    batch = unit_vectors(x, np.array(["", "", "", "", "", "", "not wanted"], dtype=object))
    assert batch.schema == vector_schema(2)
    assert batch["quarantine"].to_pylist() == [
        None,
        "vector is not finite",
        "vector is zero",
        "vector is not finite",
        None,
        None,
        "not wanted",
    ]
    assert batch["vector"].is_null().to_pylist() == [False, True, True, True, False, False, True]
    kept = matrix(batch["vector"].drop_null()).astype(np.float32)
    np.testing.assert_allclose(kept, [[0.6, 0.8], [0.5**0.5, 0.5**0.5], [1, 0]], atol=5e-4)


def test_float64_that_overflows_float32_keeps_its_direction() -> None:
    assert unit_vectors(np.array([[3e200, -4e200]]))["vector"].to_pylist() == [[np.float16(0.6), np.float16(-0.8)]]


def test_matrix_respects_slices() -> None:
    values = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(12, dtype=np.float16)), 3)
    assert matrix(values.slice(1, 2)).tolist() == [[3, 4, 5], [6, 7, 8]]


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 30), st.integers(2, 24), st.integers(0, 2**32 - 1))
def test_nearest_is_the_greatest_cosine(rows: int, k: int, dims: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, points = unit(rng, rows, dims), unit(rng, k, dims)
    found, distance = nearest(x, points, flat_index(points))
    cosine = x.astype(np.float64) @ points.T.astype(np.float64)
    np.testing.assert_allclose(distance, 1 - cosine.max(axis=1), atol=1e-6)
    np.testing.assert_allclose(cosine[np.arange(rows), found], cosine.max(axis=1), atol=1e-6)


def test_distance_does_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(0)
    x, points = unit(rng, 1000, 96), unit(rng, 50, 96)
    index = flat_index(points)
    found, distance = nearest(x, points, index)
    for step in (1, 7, 300):
        pieces = [nearest(x[i : i + step], points, index) for i in range(0, len(x), step)]
        np.testing.assert_array_equal(np.concatenate([p[0] for p in pieces]), found)
        np.testing.assert_array_equal(np.concatenate([p[1] for p in pieces]), distance)


def test_float16_becomes_float32_exactly() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)].reshape(-1, 8)
    np.testing.assert_array_equal(as_float32(finite), finite.astype(np.float32))


def test_distance_forgives_the_rounding_of_float16() -> None:
    rng = np.random.default_rng(0)
    points = unit(rng, 10, 64)
    half = points.astype(np.float16)
    _, distance = nearest(half, points, flat_index(points))
    assert distance.max() < 1e-6  # 1 - <x, c> without the norm is off by more than 1e-5 here
    assert np.abs(1 - np.einsum("ij,ij->i", half.astype(np.float32), points)).max() > 1e-5
