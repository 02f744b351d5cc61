"""Similarity: cosines of different examples on one scale, from moments alone, and one threshold for all."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from pipeline.artifact import Artifact
from pipeline.corpus.storage import Store
from pipeline.curation import curate
from pipeline.errors import TamisError
from pipeline.scores.similarity import MAP, VECTOR, Moments, _open, linear_map
from pipeline.vectors import unit_vectors

TEXTS = [f"{word} {other} and {word} again" for word in ("cat", "boat", "map", "song") for other in "abcdefghij"]


def batch_of(x: np.ndarray) -> pa.RecordBatch:
    return pa.record_batch([unit_vectors(x).column("vector")], [VECTOR])


def units(rng: np.random.Generator, rows: int, dims: int, towards: float = 0.5) -> np.ndarray:
    x = rng.normal(size=(rows, dims)) + towards
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
@settings(max_examples=20)
def test_the_map_standardises_every_examples_cosines_over_the_corpus(seed: int, cuts: int) -> None:
    rng = np.random.default_rng(seed)
    rows, examples = units(rng, 400, 6), units(rng, 7, 6, towards=-0.2)
    statistic = Moments()
    states = [statistic.update({}, batch_of(piece)) for piece in np.array_split(rows, cuts)]
    scale, shift = linear_map(examples, statistic.merge(states))
    mapped = (rows @ examples.T) * scale + shift
    np.testing.assert_allclose(mapped.mean(axis=0), 0, atol=0.02)
    np.testing.assert_allclose(mapped.std(axis=0), 1, atol=0.02)
    assert (scale > 0).all()  # increasing for every example: it never reorders the rows of one


def scored(directory: Path, rows: np.ndarray, best: bool = True, **arrays: np.ndarray) -> pa.RecordBatch:
    np.savez(directory / MAP, **arrays)  # type: ignore[arg-type]  # keywords are arrays
    return _open(Artifact("similarity", "", Store(str(directory))), best)(batch_of(rows))


def test_the_score_is_that_of_the_nearest_example_in_mapped_terms(tmp_path: Path) -> None:
    examples = np.eye(2, dtype=np.float32)
    arrays = {"vectors": examples, "scale": np.float32([1, 10]), "shift": np.float32([0, -1])}
    out = scored(tmp_path, np.array([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]), **arrays)
    assert out["target"].to_pylist() == [0, 1, 1]  # 0.6 from the second is more of a surprise than 0.8 from the first
    np.testing.assert_allclose(out["score"].to_numpy(), [1, 7, 5], atol=5e-3)
    mean = scored(tmp_path, np.array([[0.6, 0.8]]), best=False, **arrays)
    assert mean["score"][0].as_py() == pytest.approx((0.6 + 7) / 2, abs=5e-3)


def test_a_plain_cosine_is_that_of_the_directions_alone(tmp_path: Path) -> None:
    """The toy of CLIP-score filtering: (1, 0) and (0.6, 0.8), whichever is the row, however long they are."""
    for row, example in (((1, 0), (0.6, 0.8)), ((0.6, 0.8), (1, 0)), ((7, 0), (0.6, 0.8))):
        arrays = {"vectors": np.float32([example]), "scale": np.ones(1, np.float32), "shift": np.zeros(1, np.float32)}
        out = scored(tmp_path, np.array([row], float), **arrays)
        assert out["score"][0].as_py() == pytest.approx(0.6, abs=5e-4)


def test_one_threshold_serves_examples_of_different_reach_where_cosines_do_not() -> None:
    """A hub that is near to everything, and an example that only its own kind is near to."""
    rng = np.random.default_rng(0)
    common = np.zeros(16)
    common[0] = 1
    rows = 0.6 * common + 0.15 * rng.normal(size=(2000, 16))
    rows[:40] = 0.4 * np.eye(16)[3] + 0.15 * rng.normal(size=(40, 16))  # the kind of the second example
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    examples = np.stack([common, np.eye(16)[3]]).astype(np.float32)
    truth = np.arange(2000) < 40
    cosine = rows @ examples.T
    scale, shift = linear_map(examples, Moments().update({}, batch_of(rows)))
    raw = roc_auc_score(truth, cosine.max(axis=1))
    mapped = roc_auc_score(truth, (cosine * scale + shift).max(axis=1))
    assert raw < 0.3  # the hub's everyday cosines are above anything that the second example sees
    assert mapped > 0.95


def test_a_rows_score_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows, examples = units(rng, 300, 8), units(rng, 5, 8)
    arrays = {"vectors": examples, "scale": np.float32([1, 2, 3, 4, 5]), "shift": np.zeros(5, np.float32)}
    whole = scored(tmp_path, rows, **arrays)["score"].to_numpy()
    parts = [scored(tmp_path, rows[i : i + 7], **arrays)["score"].to_numpy() for i in range(0, 300, 7)]
    assert whole.tobytes() == np.concatenate(parts).tobytes()


def run(directory: Path, texts: list[str], targets: Path, **fields: Any) -> dict[str, np.ndarray]:
    (directory / "corpus").mkdir(exist_ok=True)
    ids = [str(i) for i in range(len(texts))]
    vectors = pa.array(np.random.default_rng(0).normal(size=(len(texts), 4)).tolist(), pa.list_(pa.float32(), 4))
    pq.write_table(pa.table({"id": ids, "text": texts, "vector": vectors}), directory / "corpus/p.parquet")
    embed = fields.pop("embed", {"kind": "lsa", "dims": 16, "features": 4096})
    curated = curate(
        {
            "corpus": {"path": str(directory / "corpus"), "id": "id"},
            "embed": embed,
            "scores": [{"kind": "similarity", "targets": str(targets), **fields}],
            "select": {"budget": {"rows": 10}},
            "engine": {"address": "inline"},
            "run": str(directory / "run"),
        },
        quiet=True,
    )
    kept = ds.dataset(curated.path).to_table()["id"].to_pylist()
    column = ds.dataset(directory / "run/columns/similarity").to_table()
    return {"kept": np.array(sorted(map(int, kept))), "score": column["score"].to_numpy()}


@pytest.mark.parametrize("fields", [{}, {"calibrate": False}, {"best": False}])
def test_rows_of_the_targets_kind_are_kept(
    tmp_path: Path, fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "targets.txt").write_text("boat boat\nthe boat, again\nzzz\n" + TEXTS[13] + "\n")
    with caplog.at_level(logging.WARNING):
        found = run(tmp_path, TEXTS, tmp_path / "targets.txt", **fields)
    assert found["kept"].tolist() == list(range(10, 20))
    assert "similarity.targets: 1 rows of the corpus are target texts" in caplog.text
    assert "Row ids: 13" in caplog.text
    facts = json.loads((tmp_path / "run/artifacts/similarity/similarity.json").read_text())
    assert facts == {"targets": 3, "without_vector": 1, "contained_rows": 1}  # zzz: no word that the corpus has


def test_one_example_works_and_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "targets.txt").write_text("song\n")
    with caplog.at_level(logging.WARNING):
        found = run(tmp_path, TEXTS, tmp_path / "targets.txt")
    assert found["kept"].tolist() == list(range(30, 40))
    assert "there is one example" in caplog.text


def test_vectors_that_are_there_already_are_read_from_the_examples_too(tmp_path: Path) -> None:
    embed = {"kind": "precomputed", "column": "vector"}
    vectors = np.random.default_rng(0).normal(size=(40, 4))
    target = pa.array([vectors[7].tolist()], pa.list_(pa.float32(), 4))
    pq.write_table(pa.table({"text": ["anything"], "vector": target}), tmp_path / "targets.parquet")
    found = run(tmp_path, TEXTS, tmp_path / "targets.parquet", embed=embed)
    assert found["score"].argmax() == 7
    (tmp_path / "targets.txt").write_text("boat\n")
    with pytest.raises(TamisError, match=r"targets\.txt' has no column 'vector'"):
        run(tmp_path, TEXTS, tmp_path / "targets.txt", embed=embed)


def test_examples_without_a_vector_are_an_error_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "targets.txt").write_text("!!! ...\n??? !\n")
    with pytest.raises(TamisError, match=r"similarity\.targets: no example has a vector: no word in the first"):
        run(tmp_path, TEXTS, tmp_path / "targets.txt")
