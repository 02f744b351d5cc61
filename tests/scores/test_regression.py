"""Regression: the exact least-squares head, FineWeb-Edu's rounding, and grades that carry over to the corpus."""

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
from pydantic import ValidationError

from pipeline.curation import curate
from pipeline.errors import TamisError
from pipeline.recipe import Column
from pipeline.scores.regression import HEAD, Regression, _fit, measure, rounded
from pipeline.vectors import unit_vectors, vector_schema

WORDS = ["proof theorem lemma", "recipe flour oven", "goal league striker", "login cart cookie"]


def test_rounding_is_half_to_even_so_a_grade_of_3_means_above_two_and_a_half() -> None:
    grades = np.array([2.49, 2.5, 2.51, 3.5, 4.5, 7.2, -1.0])
    assert rounded(grades, 0, 5).tolist() == [2, 2, 3, 4, 4, 5, 0]
    assert ((rounded(grades, 0, 5) >= 3) == (grades > 2.5)).all()


def vectors_of_texts() -> Any:
    """A transform that reads a vector from the digits of a text."""

    def embed(batch: pa.RecordBatch) -> pa.RecordBatch:
        return unit_vectors(np.array([[float(v) for v in t.split()] for t in batch.column("text").to_pylist()]))

    return embed


def test_the_head_is_the_least_squares_solution(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5)).round(3)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    true = np.array([1.0, -2.0, 0.5, 0.0, 3.0])
    grades = x @ true + 2
    examples = pa.table({"text": [" ".join(map(str, row)) for row in x], "label": grades})
    _fit(examples, Column("embed", ("text",), vector_schema(5), vectors_of_texts, ""), 0.1, (1e-6,), 0, tmp_path)
    with np.load(tmp_path / HEAD) as head:
        np.testing.assert_allclose(head["weights"], true, atol=5e-3)  # vectors are float16
        assert head["intercept"][0] == pytest.approx(2, abs=2e-3)
    facts = json.loads((tmp_path / "regression.json").read_text())
    assert (facts["trained_on"], facts["held_out"]["rows"]) == (180, 20)
    assert facts["held_out"]["correlation"] > 0.999


def test_measures_are_null_where_nothing_varies() -> None:
    assert measure(np.array([1.0]), np.array([1.0])) == {
        "rows": 1,
        "root_mean_square_error": 0.0,
        "correlation": None,
        "f1_above_middle": None,
        "macro_f1": None,
    }


def graded(directory: Path) -> list[str]:
    """A corpus of four subjects, and examples graded 5, 3, 1 and 0 by subject; returns the corpus's texts."""
    rng = np.random.default_rng(0)
    subjects = [w.split() for w in WORDS]
    texts = [" ".join(rng.choice(subjects[i % 4], 12)) for i in range(200)]
    (directory / "corpus").mkdir()
    pq.write_table(pa.table({"text": texts[:120]}), directory / "corpus/p.parquet")
    labels = [(5, 3, 1, 0)[i % 4] for i in range(200)]
    pq.write_table(pa.table({"text": texts[119:], "label": labels[119:]}), directory / "graded.parquet")
    for grade in (5, 0):
        rows = [i for i in range(120, 200) if labels[i] == grade]
        pq.write_table(pa.table({"text": [texts[i] for i in rows]}), directory / f"{grade}.parquet")
    return texts[:120]


def run(directory: Path, examples: Any, **fields: Any) -> np.ndarray:
    curate(
        {
            "corpus": {"path": str(directory / "corpus")},
            "embed": {"kind": "lsa", "dims": 8, "features": 4096},
            "scores": [{"kind": "regression", "examples": examples, **fields}],
            "select": {"budget": {"rows": 30}},
            "engine": {"address": "inline"},
            "run": str(directory / "run"),
        },
        quiet=True,
    )
    values: np.ndarray = ds.dataset(directory / "run/columns/regression").to_table()["score"].to_numpy()
    return values


def test_rows_get_the_grades_of_their_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = graded(tmp_path)
    with caplog.at_level(logging.WARNING):
        score = run(tmp_path, str(tmp_path / "graded.parquet"))
    means = [score[i::4].mean() for i in range(4)]
    np.testing.assert_allclose(means, [5, 3, 1, 0], atol=0.3)
    kept = ds.dataset(tmp_path / "run/curated").to_table()["text"].to_pylist()
    assert sorted(kept) == sorted(texts[0::4])
    assert "regression.examples: 1 rows of the corpus are target texts" in caplog.text  # row 119 is an example, too
    held_out = json.loads((tmp_path / "run/artifacts/regression/regression.json").read_text())["held_out"]
    assert held_out["f1_above_middle"] == held_out["macro_f1"] == 1


def test_grades_may_be_those_of_files(tmp_path: Path) -> None:
    graded(tmp_path)
    score = run(tmp_path, {5: str(tmp_path / "5.parquet"), 0: str(tmp_path / "0.parquet")})
    assert score[0::4].mean() > 4
    assert score[3::4].mean() < 1


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([1.0] * 40, r"at least 10 texts of two grades are needed; there are 40 distinct texts with the grades 1"),
        ([1.0, 2.0], r"there are 2 distinct texts with the grades 1, 2"),
        (["good", "bad"] * 20, r"column 'label' is string, not numbers"),
        ([1.0, float("nan")] * 20, r"a grade is not a finite number"),
    ],
    ids=["one class", "two examples", "words", "nan"],
)
def test_examples_that_teach_nothing_are_errors(tmp_path: Path, labels: list[Any], says: str) -> None:
    graded(tmp_path)
    texts = [f"flour and oven {i}" for i in range(len(labels))]
    pq.write_table(pa.table({"text": texts, "label": labels}), tmp_path / "bad.parquet")
    with pytest.raises(TamisError, match=says):
        run(tmp_path, str(tmp_path / "bad.parquet"))


def test_errors_at_the_door(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="gives each file its grade"):
        Regression(examples={1: "a.txt"}, example_label="grade")
    with pytest.raises(ValidationError, match="penalties must be above 0"):
        Regression(examples="a.parquet", penalties=(0.0,))
    graded(tmp_path)
    with pytest.raises(TamisError, match="has no column 'grade'; it has text, label"):
        run(tmp_path, str(tmp_path / "graded.parquet"), example_label="grade")
