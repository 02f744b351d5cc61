"""Projections keep inner products on average, with the variance that theory gives, and come out alike everywhere."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.models import projection as module
from pipeline.models.projection import CountSketch, Kind, Rademacher, projection

torch = pytest.importorskip("torch")

U, V = [1.0, 2.0, 0.0, -1.0], [2.0, 1.0, 1.0, 0.0]


def project(kind: Kind, x: np.ndarray, size: int, seed: int = 0, layer: str = "layer") -> np.ndarray:
    sums = torch.zeros(len(x), size)
    projection(kind, size, seed).add(layer, torch.from_numpy(x.astype(np.float32)), sums)
    return np.asarray(sums.numpy(), np.float64)


@pytest.mark.parametrize(("kind", "size", "variance"), [("countsketch", 8, 4.5), ("rademacher", 64, 36 / 64)])
def test_products_of_the_toy_have_the_mean_and_the_variance_of_theory(kind: Kind, size: int, variance: float) -> None:
    """(|u|^2 |v|^2 + <u,v>^2 - 2 sum u_i^2 v_i^2) / s = (36 + 16 - 16) / s, around <u,v> = 4."""
    draws, found = 250, []
    for layer in range(96):  # row i holds the toy at components 4i to 4i + 3, whose hashes are others for every i
        u, v = (np.kron(np.eye(draws), toy) for toy in (U, V))
        found.append((project(kind, u, size, layer=str(layer)) * project(kind, v, size, layer=str(layer))).sum(axis=1))
    products = np.concatenate(found)
    assert products.mean() == pytest.approx(4, abs=0.06)
    assert products.var() == pytest.approx(variance, rel=0.06)


@pytest.mark.parametrize("kind", ["countsketch", "rademacher"])
def test_the_same_everywhere_and_another_by_seed_and_layer(kind: Kind) -> None:
    x = np.random.default_rng(0).standard_normal((5, 700))
    first = project(kind, x, 64)
    np.testing.assert_array_equal(first, project(kind, x, 64))
    np.testing.assert_allclose(first[2:3], project(kind, x[2:3], 64), atol=1e-5)
    for other in (project(kind, x, 64, seed=1), project(kind, x, 64, layer="other")):
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.2


def splitmix(seed: int, layer: str, index: int) -> int:
    """The hash of an index, in Python's own integers."""
    mask = 2**64 - 1
    x = (
        index + int(hashlib.sha256(json.dumps([seed, layer], separators=(",", ":")).encode()).hexdigest()[:16], 16)
    ) & mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31)


def test_entries_come_from_seed_layer_and_index() -> None:
    """Scores that are stored stand on these: another hash would need another `version`."""
    hashes = [splitmix(7, "model.lm_head", i) for i in range(6)]
    expected = np.zeros((6, 1000))
    for i, h in enumerate(hashes):
        expected[i, (h >> 32) * 1000 >> 32] = 1 if h & 1 else -1
    np.testing.assert_array_equal(project("countsketch", np.eye(6), 1000, 7, "model.lm_head"), expected)
    bits = [[byte >> (7 - b) & 1 for byte in h.to_bytes(8, "little") for b in range(8)] for h in hashes]
    signs = (2 * np.array(bits).reshape(3, 128) - 1) / np.sqrt(128)
    np.testing.assert_allclose(project("rademacher", np.eye(3), 128, 7, "model.lm_head"), signs, atol=1e-6)


def test_the_dense_matrix_does_not_depend_on_how_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(1).standard_normal((3, 500))
    whole = project("rademacher", x, 128)
    monkeypatch.setattr(module, "BLOCK", 128 * 7)
    np.testing.assert_allclose(project("rademacher", x, 128), whole, atol=1e-4)
    assert np.abs(whole).max() < 20  # scaled by 1 / sqrt(size)


@settings(max_examples=20)
@given(st.integers(1, 300), st.sampled_from(["countsketch", "rademacher"]), st.integers(0, 2**32 - 1))
def test_linear_and_added_to_what_is_there(length: int, kind: Kind, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, 3, length))
    both = project(kind, x, 64) + project(kind, y, 64)
    np.testing.assert_allclose(project(kind, x + y, 64), both, atol=1e-4)
    sums = torch.ones(3, 64)
    projection(kind, 64, 0).add("layer", torch.from_numpy(x.astype(np.float32)), sums)
    np.testing.assert_allclose(sums.numpy() - 1, project(kind, x, 64), atol=1e-5)


def test_names_and_sizes() -> None:
    assert isinstance(projection("countsketch", 100, 0), CountSketch)
    assert isinstance(projection("rademacher", 128, 0), Rademacher)
    with pytest.raises(ValueError, match="a multiple of 64 components, not 100"):
        projection("rademacher", 100, 0)
