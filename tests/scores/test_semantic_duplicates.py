"""SemDeDup: its toy with its numbers, against a dense reference, and whole runs over vectors that are given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.curation import curate
from pipeline.engine.pool import InlinePool
from pipeline.scores._head import forward, train
from pipeline.scores.semantic_duplicates import SemanticDuplicates, compare, follow, listed, max_products


def at_degrees(*degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def units(rng: np.random.Generator, n: int, d: int = 16) -> np.ndarray:
    x = rng.standard_normal((n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def dense(vectors: np.ndarray, order: np.ndarray) -> np.ndarray:
    """M by the definition, over one n x n product."""
    x = vectors[order].astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    s = np.tril(x @ x.T, -1) + np.triu(np.full((len(x), len(x)), -np.inf))
    m = s.max(axis=1)
    m[0] = 0
    back = np.empty(len(m))
    back[order] = np.minimum(m, 1)
    return back


def kept_of(m: np.ndarray, epsilon: float) -> np.ndarray:
    return np.asarray(-m >= np.float32(epsilon - 1))


# M


def test_toy_a_chain_collapses_to_one() -> None:
    m, closest = compare(at_degrees(0, 15, 30), np.arange(3), 100, 0)
    np.testing.assert_allclose(m, [0, 0.965926, 0.965926], atol=1e-6)
    assert closest.tolist() == [-1, 0, 1]
    assert kept_of(m, 0.05).tolist() == [True, False, False]


def test_a_pass_over_kept_rows_would_keep_two_of_the_chain() -> None:
    # The other definition, which NeMo and the paper do not use: a row is compared with kept rows alone.
    x = at_degrees(0, 15, 30)
    s = x @ x.T
    np.testing.assert_allclose(s[0, 2], 0.866025, atol=1e-6)
    kept: list[int] = []
    for i in range(3):
        if all(s[i, j] <= 0.95 for j in kept):
            kept.append(i)
    assert kept == [0, 2]


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_blocks_give_what_the_dense_product_gives(n: int, block: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = units(rng, n, 4)
    vectors[rng.random(n) < 0.3] = vectors[0]  # copies
    order = rng.permutation(n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.scores.semantic_duplicates.BLOCK", block)
        patch.setattr("pipeline.scores.semantic_duplicates.HASHED", block)
        m, closest = compare(vectors, order, 1000, 0)
    np.testing.assert_allclose(m, dense(vectors, order), atol=1e-6)
    place = np.argsort(order)
    assert ((closest >= 0) == (place > 0)).all()
    later = closest >= 0
    assert (place[closest[later]] < place[later]).all()
    x = vectors.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(np.sum(x[later] * x[closest[later]], axis=1), m[later], atol=1e-6)


def test_a_higher_epsilon_keeps_a_subset_and_none_keeps_all() -> None:
    m, _ = compare(units(np.random.default_rng(0), 500, 4), np.arange(500), 1000, 0)
    kept = [kept_of(m, epsilon) for epsilon in (0, 1e-4, 0.01, 0.05, 0.3)]
    assert kept[0].all()
    assert all(not (other & ~one).any() for one, other in pairwise(kept))
    assert [k.sum() for k in kept] == sorted((k.sum() for k in kept), reverse=True)
    assert kept[-1].sum() < 100


@pytest.mark.parametrize("epsilon", [1e-6, 0.01, 0.2])
def test_a_copy_of_every_row_changes_nothing(epsilon: float) -> None:
    vectors = units(np.random.default_rng(0), 300, 8)
    alone = compare(vectors, np.arange(300), 1000, 0)[0]
    twice, closest = compare(np.concatenate([vectors, vectors]), np.arange(600), 1000, 0)
    np.testing.assert_allclose(twice[:300], alone, atol=1e-6)
    assert (twice[300:] == 1).all()
    assert closest[300:].tolist() == list(range(300))
    assert kept_of(twice, epsilon).sum() == kept_of(alone, epsilon).sum()


def test_planted_pairs_lose_one_each() -> None:
    rng = np.random.default_rng(0)
    base = units(rng, 1000, 64)
    noisy = base + 0.01 * rng.standard_normal(base.shape)
    noisy = (noisy / np.linalg.norm(noisy, axis=1, keepdims=True)).astype(np.float16)
    cosine = np.sum(base.astype(np.float32) * noisy.astype(np.float32), axis=1)
    assert cosine.min() > 0.99
    m, _ = compare(np.concatenate([base, noisy]), rng.permutation(2000), 10_000, 0)
    kept = kept_of(m, 0.05)
    assert kept.sum() == 1000
    assert (kept[:1000] ^ kept[1000:]).all()


def test_half_of_the_rows_teach_as_much_as_all_where_half_are_copies() -> None:
    """The headline in spirit: 300 rows and 300 near copies of 30 of them, 10 classes, a linear classifier. SemDeDup's
    half loses less than a point against all rows (0.915 to 0.917), a random half 5."""
    right: dict[str, list[float]] = {"all": [], "kept": [], "random": []}
    for seed in range(4):
        rng = np.random.default_rng(seed)
        centres, label, new_label = rng.standard_normal((10, 24)), rng.integers(0, 10, 300), rng.integers(0, 10, 3000)
        base, new = (centres[y] + 1.2 * rng.standard_normal((len(y), 24)) for y in (label, new_label))
        of = rng.integers(0, 30, 300)
        x, y = np.concatenate([base, base[of] + 0.05 * rng.standard_normal((300, 24))]), np.append(label, label[of])
        x, new = (np.float32(v / np.linalg.norm(v, axis=1, keepdims=True)) for v in (x, new))
        m, _ = compare(x.astype(np.float16), rng.permutation(600), 10_000, 0)
        halves = {
            "all": np.arange(600),
            "kept": np.argsort(m, kind="stable")[:300],
            "random": rng.permutation(600)[:300],
        }
        for name, rows in halves.items():
            found = forward(train(x[rows], y[rows], 10, 0, 30, seed), new).p.argmax(axis=1)
            right[name].append(float((found == new_label).mean()))
    mean = {name: np.mean(found) for name, found in right.items()}
    assert mean["kept"] > mean["all"] - 0.01
    assert mean["random"] < mean["all"] - 0.03


def test_no_cosine_is_above_one() -> None:
    rng = np.random.default_rng(0)
    near = (units(rng, 1, 64).astype(np.float32) + 1e-3 * rng.standard_normal((500, 64))).astype(np.float16)
    m, _ = max_products(near, np.arange(500))
    assert m.max() <= 1
    assert kept_of(m, 0).all()


# Lists, cuts, groups


def concept(distance: list[float], keys: list[bytes]) -> pa.Table:
    return pa.table(
        {
            "concept.distance": pa.array(distance, pa.float32()),
            "row.key": pa.array(keys, pa.binary(16)),
        }
    )


def test_rows_are_listed_by_distance_and_ties_by_address() -> None:
    table = concept([0.2, 0.5, 0.2, 0.1, 0.5], [bytes([i] * 16) for i in range(5)])
    assert listed("hard", 0, table).tolist() == [1, 4, 0, 2, 3]
    assert listed("easy", 0, table).tolist() == [3, 0, 2, 1, 4]
    drawn = [tuple(listed("random", seed, table)) for seed in range(20)]
    assert len(set(drawn)) > 10
    assert drawn[0] == tuple(listed("random", 0, table))


def test_a_large_concept_is_cut_and_finds_most() -> None:
    rng = np.random.default_rng(0)
    base = units(rng, 300, 8)
    noisy = (base + 0.005 * rng.standard_normal(base.shape)).astype(np.float16)
    vectors, order = np.concatenate([base, noisy]), rng.permutation(600)
    whole, cut = compare(vectors, order, 600, 0)[0], compare(vectors, order, 100, 0)[0]
    assert (cut <= np.maximum(whole, 0) + 1e-6).all()  # 0 for the first of every part
    assert (cut < whole - 0.01).any()
    assert (~kept_of(cut, 0.05)).sum() > 0.9 * (~kept_of(whole, 0.05)).sum()
    np.testing.assert_array_equal(cut, compare(vectors, order, 100, 0)[0])


def test_vectors_that_do_not_come_apart_are_cut_in_their_order() -> None:
    direction = np.full(8, 8**-0.5)
    vectors = (np.linspace(1, 2, 250)[:, None] * direction).astype(np.float16)  # distinct, and parallel
    distinct = len(np.unique(vectors[:, 0]))
    m, closest = compare(vectors, np.arange(250), 100, 0)
    assert (m == 0).sum() == -(-distinct // 100) == 3
    assert (m[m > 0] > 0.999).all()
    assert (closest >= 0).sum() == 247


def table_of(address: list[int], max_sim: list[float], nearest: list[int]) -> pa.Table:
    return pa.table(
        {
            "address.shard": pa.array([a >> 32 for a in address], pa.int32()),
            "address.row": pa.array([a & 0xFFFFFFFF for a in address], pa.int64()),
            "x.max_sim": pa.array(max_sim, pa.float32()),
            "x.nearest": pa.array(nearest, pa.int64()),
        }
    )


def test_a_group_is_what_leads_to_a_kept_row() -> None:
    # 3 -> 1 -> 4 (kept), 2 -> 0 (kept), 5 is near to 2 but not near enough
    address = [10, 11, (1 << 32) + 2, (1 << 32) + 5, (2 << 32), (2 << 32) + 1]
    table = table_of(address, [0, 0.99, 0.96, 0.98, 0.3, 0.9], [-1, address[4], 10, 11, 10, address[2]])
    found = follow("x", 0.05, "semantic_duplicate", table).to_pydict()
    assert found["representative"] == [True, False, False, False, True, True]
    assert found["group"] == [10, 11, 10, 11, 11, -1]
    assert found["size"] == [2, 3, 2, 3, 3, 1]
    np.testing.assert_allclose(found["score"], [0, -0.99, -0.96, -0.98, -0.3, -0.9], atol=1e-6)
    assert found["rule"] == ["", *["semantic_duplicate"] * 3, "", ""]


# Whole runs


def corpus(directory: Path, vectors: np.ndarray, shard_rows: int = 50, texts: list[str] | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    flat = pa.array(vectors.astype(np.float32).ravel())
    table = pa.table(
        {
            "text": texts or [f"text {i}" for i in range(len(vectors))],
            "v": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
        }
    )
    pq.write_table(table, directory / "corpus.parquet", row_group_size=shard_rows)
    return directory / "corpus.parquet"


def curated(
    directory: Path, path: Path, k: int = 4, floor: float = -0.95, before: Sequence[dict[str, Any]] = (), **fields: Any
) -> dict[str, Any]:
    config = {
        "corpus": {"path": str(path), "shard_mb": 1e-6},
        "embed": {"kind": "precomputed", "column": "v"},
        "cluster": {"k": k},
        "scores": [*before, {"kind": "semantic_duplicates", **fields}],
        "select": {
            "floors": {"semantic_duplicates": floor} | {s["kind"]: 0 for s in before},
            "budget": {"fraction": 1.0},
        },
        "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
        "engine": {"address": "inline"},
        "run": str(directory / "run"),
    }
    result = curate(config, pool=InlinePool, quiet=True)
    columns = {
        name: pa.concat_tables([pq.read_table(p) for p in sorted((directory / "run/columns" / name).glob("*"))])
        for name in ("semantic_duplicates", "semantic_duplicates-nearest", "concept", "embed")
    }
    manifest = json.loads((directory / "run/manifest.json").read_text())
    return {"result": result, "passes": [p["pass"] for p in manifest["passes"]], **columns}


def doubled(rows: int = 200, d: int = 32) -> np.ndarray:
    """Rows at random, then every one again with a little noise."""
    rng = np.random.default_rng(0)
    base = units(rng, rows, d).astype(np.float32)
    return np.concatenate([base, base + 0.003 * rng.standard_normal(base.shape)])


def test_planted_copies_are_found_inside_concepts_across_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.run.PARTITION_BYTES", 4000)
    found = curated(tmp_path, corpus(tmp_path, doubled()))
    concepts = found["concept"]["concept"].to_numpy()
    together = concepts[:200] == concepts[200:]
    assert together.mean() > 0.95  # pairs across the border of a concept are missed, as published
    kept = found["semantic_duplicates"]["representative"].to_numpy()
    assert (kept[:200] ^ kept[200:])[together].all()
    assert found["result"].rows_kept == kept.sum() == 200 + (~together).sum()
    assert found["result"].reasons["semantic_duplicates:semantic_duplicate"] == together.sum()
    distance, group = found["concept"]["distance"].to_numpy(), found["semantic_duplicates"]["group"].to_numpy()
    first = np.flatnonzero(together)
    assert (group[first] == group[first + 200]).all()
    assert (
        np.where(kept[first], distance[first] - distance[first + 200], distance[first + 200] - distance[first]) >= 0
    ).all()


def test_m_of_a_run_is_the_definition_s(tmp_path: Path) -> None:
    found = curated(tmp_path, corpus(tmp_path, doubled(60), 17), k=3)
    concepts, distance = (found["concept"][f].to_numpy() for f in ("concept", "distance"))
    vectors = np.array(found["embed"]["vector"].to_pylist(), np.float16)
    score = found["semantic_duplicates"]["score"].to_numpy()
    for concept_ in np.unique(concepts):
        rows = np.flatnonzero(concepts == concept_)
        order = np.argsort(-distance[rows], kind="stable")
        np.testing.assert_allclose(-score[rows], dense(vectors[rows], order), atol=1e-6)


def test_another_epsilon_moves_no_vector_and_another_floor_nothing(tmp_path: Path) -> None:
    path = corpus(tmp_path, doubled(60))
    kept = curated(tmp_path, path)["result"].rows_kept
    more = curated(tmp_path, path, epsilon=0.6, floor=-0.4)
    assert not [p for p in more["passes"] if "nearest" in p]
    assert "semantic_duplicates gather" in more["passes"]
    assert more["result"].rows_kept < kept
    assert not more["semantic_duplicates"]["representative"].to_numpy().all()
    same = curated(tmp_path, path, epsilon=0.6, floor=-0.95)
    assert not [p for p in same["passes"] if "semantic" in p]
    assert same["result"].rows_kept == kept


def test_representatives_of_an_earlier_criterion_stay(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = units(rng, 60, 16).astype(np.float32)
    vectors = np.concatenate([vectors, vectors + 0.003 * rng.standard_normal(vectors.shape)])
    texts = [f"some text {i % 60}" for i in range(120)]  # exact copies, whose vectors differ a little
    path = corpus(tmp_path, vectors, texts=texts)
    before = [{"kind": "exact_duplicates"}]
    for keep in ("hard", "easy"):
        found = curated(tmp_path, path, k=1, keep=keep, before=before)
        assert found["result"].rows_kept == 60  # and not the 30 or so of which both keep the same copy
        assert found["semantic_duplicates"]["representative"].to_pylist() == [True] * 60 + [False] * 60


@pytest.mark.parametrize("keep", ["hard", "easy", "random"])
def test_shards_and_partitions_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str) -> None:
    one = curated(tmp_path / "a", corpus(tmp_path / "a", doubled(40), 80), keep=keep)
    monkeypatch.setattr("pipeline.run.PARTITION_BYTES", 500)
    monkeypatch.setattr("pipeline.engine.regroup.BLOCK_BYTES", 1000)
    two = curated(tmp_path / "b", corpus(tmp_path / "b", doubled(40), 9), keep=keep)
    for name in ("score", "representative", "size", "rule"):
        assert one["semantic_duplicates"][name].to_pylist() == two["semantic_duplicates"][name].to_pylist()


def test_a_corpus_of_nothing_but_copies(tmp_path: Path) -> None:
    found = curated(tmp_path, corpus(tmp_path, np.ones((120, 8))), k=2)
    assert found["result"].rows_kept == 1
    assert found["semantic_duplicates"]["score"].to_pylist() == [0.0] + [-1.0] * 119
    assert set(found["semantic_duplicates"]["group"].to_pylist()) == {0}


def test_a_large_concept_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = curated(tmp_path, corpus(tmp_path, doubled(60)), k=2, max_rows=20)
    assert "2 concepts have more than max_rows = 20 rows" in caplog.text
    assert found["result"].rows_kept < 120


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"epsilon": 1.5}, "less than or equal to 1"), ({"keep": "first"}, "hard"), ({"max_rows": 1}, "equal to 2")],
)
def test_errors_at_the_door(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        SemanticDuplicates.model_validate(fields)


def test_a_copy_is_never_more_than_alike() -> None:
    x = np.repeat(units(np.random.default_rng(0), 400, 384), 2, axis=0)
    x32 = x.astype(np.float32) / np.linalg.norm(x.astype(np.float32), axis=1, keepdims=True)
    assert (x32[::2] * x32[1::2]).sum(axis=1).max() > 1  # float32 rounds so: an epsilon of 0 would drop them
    m, _ = max_products(x, np.arange(len(x)))
    assert m.max() == 1
