"""DSIR: the specification's numbers, sums over n-grams of one text, and a target found in a mixture."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.artifact import Artifact
from pipeline.corpus.storage import Store
from pipeline.curation import Curated, curate
from pipeline.errors import TamisError
from pipeline.scores.dsir import WEIGHTS, Dsir, NgramCounts, log_ratio, ngrams
from pipeline.select.combine import gumbel

TEXTS = st.lists(st.text(st.sampled_from("ab c,.\n!é字"), max_size=12), min_size=1, max_size=6)


def test_toy_of_three_buckets() -> None:
    diff = log_ratio(np.array([0.6, 0.2, 0.2]), np.array([0.2, 0.4, 0.4]))
    np.testing.assert_allclose(diff, [1.098612, -0.693147, -0.693147], atol=1e-6)
    assert np.array([3, 1, 0]) @ diff == pytest.approx(2.602690, abs=1e-6)
    assert np.array([0, 1, 3]) @ diff == pytest.approx(-2.772589, abs=1e-6)
    assert np.array([0.6, 0.2, 0.2]) @ diff == pytest.approx(0.381908, abs=2e-6)  # KL(target || corpus)


def test_a_bucket_that_the_target_never_shows_costs_about_nine_nats() -> None:
    assert log_ratio(np.array([0, 1]), np.array([1, 9999]))[0] == pytest.approx(-9.21, abs=0.01)


def scored(directory: Path, weights: np.ndarray, texts: list[str], **fields: Any) -> list[float]:
    np.save(directory / WEIGHTS, weights)
    recipe = Dsir(targets="t.txt", buckets=len(weights), **{"min_tokens": 0} | fields)
    transform = recipe._open(Artifact("dsir", "", Store(str(directory))))
    values: list[float] = transform(pa.record_batch([pa.array(texts)], ["text"]))["score"].to_pylist()
    return values


def test_a_score_is_the_sum_over_words_and_pairs(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(size=97) * 5
    text = "The cat, the CAT sat."
    buckets, _, tokens = ngrams(pa.array([text]), 2, 97)
    assert tokens[0] == 7  # the cat , the cat sat .
    assert len(buckets) == 7 + 6
    assert Counter(buckets.tolist()).most_common(1)[0][1] >= 2  # "the", "cat" and "the cat" are there twice
    (total,) = scored(tmp_path, weights, [text])
    assert total == pytest.approx(weights[buckets].sum(), rel=1e-6)
    assert scored(tmp_path, weights, [text], per_token=True)[0] == pytest.approx(total / 13, rel=1e-6)
    assert scored(tmp_path, weights, [text], cap=1.5)[0] == pytest.approx(weights.clip(-1.5, 1.5)[buckets].sum(), 1e-6)
    assert scored(tmp_path, weights, [text, "too short"], min_tokens=7) == [total, -np.inf]


@given(TEXTS)
@settings(max_examples=50)
def test_no_ngram_crosses_texts_and_neighbours_change_nothing(texts: list[str]) -> None:
    together = ngrams(pa.array(texts, pa.large_string()), 3, 1009)
    for i, text in enumerate(texts):
        alone = ngrams(pa.array([text], pa.large_string()), 3, 1009)
        assert sorted(together[0][together[1] == i]) == sorted(alone[0])
        n = int(alone[2][0])
        assert together[2][i] == n
        assert len(alone[0]) == n + max(n - 1, 0) + max(n - 2, 0)


@given(TEXTS, st.integers(0, 5))
@settings(max_examples=20)
def test_counts_merge_like_their_texts(texts: list[str], at: int) -> None:
    statistic = NgramCounts(2, 101)
    batches = [pa.record_batch([pa.array(t, pa.large_string())], ["text"]) for t in (texts, texts[:at], texts[at:])]
    whole, *halves = (statistic.update({}, b) for b in batches)
    assert (statistic.merge(halves)["count"] == whole["count"]).all()


def test_gumbel_noise_on_log_weights_draws_by_the_weights() -> None:
    logw = np.array([0.0, 1.0, 2.0])
    keys = pa.array([i.to_bytes(16, "little") for i in range(30_000)], pa.binary(16))
    noise = np.stack([gumbel(keys, seed) for seed in range(3)])
    drawn = np.bincount((logw[:, None] + noise).argmax(axis=0), minlength=3) / 30_000
    np.testing.assert_allclose(drawn, np.exp(logw) / np.exp(logw).sum(), atol=0.01)


def mixture(directory: Path, shared_data: Path) -> tuple[Path, Path, np.ndarray]:
    """A corpus with 5 % of encyclopaedia among letters and novels; 200 target rows that are not in it."""
    table = ds.dataset(shared_data / "text_corpus/parts").to_table(columns=["id", "text", "source"])
    kinds = np.array(table["source"].to_pylist())
    wiki = np.flatnonzero(kinds == "wikipedia_passage")
    other = np.flatnonzero(kinds == "book")[:1500]
    planted, targets = wiki[: len(other) // 19], wiki[-200:]
    (directory / "corpus").mkdir()
    pq.write_table(table.take(np.concatenate([other, planted])), directory / "corpus/part.parquet")
    pq.write_table(table.take(targets), directory / "targets.parquet")
    return directory / "corpus", directory / "targets.parquet", np.arange(len(other) + len(planted)) >= len(other)


def run(directory: Path, corpus: Path, targets: Path, rows: int, **fields: Any) -> Curated:
    return curate(
        {
            "corpus": {"path": str(corpus), "id": "id"},
            "scores": [{"kind": "dsir", "targets": str(targets), **fields}],
            "select": {"budget": {"rows": rows}},
            "engine": {"address": "inline"},
            "run": str(directory),
        },
        quiet=True,
    )


def test_two_hundred_target_rows_find_their_domain(tmp_path: Path, shared_data: Path) -> None:
    corpus, targets, is_target = mixture(tmp_path, shared_data)
    curated = run(tmp_path / "run", corpus, targets, rows=len(is_target) // 20, min_tokens=20)
    kept = set(ds.dataset(curated.path).to_table(columns=["id"])["id"].to_pylist())
    ids = np.array(pq.read_table(corpus / "part.parquet", columns=["id"])["id"].to_pylist())
    hits = np.isin(ids[is_target], list(kept)).sum()
    assert hits > 0.9 * len(kept)
    facts = json.loads((tmp_path / "run/artifacts/dsir/dsir.json").read_text())
    assert facts["targets"] == 200
    assert facts["contained_rows"] == 0
    assert facts["kl_target_from_corpus_nats"] > 0


def test_targets_in_the_corpus_and_a_single_one_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "corpus").mkdir()
    texts = [f"row {i} tells of {w}" for i, w in enumerate(["cats", "dogs", "boats", "maps"])]
    pq.write_table(pa.table({"id": ["a", "b", "c", "d"], "text": texts}), tmp_path / "corpus/p.parquet")
    (tmp_path / "targets.txt").write_text("Row 2 tells of BOATS.\n")
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "run", tmp_path / "corpus", tmp_path / "targets.txt", rows=1, min_tokens=0)
    assert "there is one example" in caplog.text
    assert "Row ids: c" in caplog.text
    facts = json.loads((tmp_path / "run/artifacts/dsir/dsir.json").read_text())
    assert facts["contained_ids"] == ["c"]
    kept = ds.dataset(tmp_path / "run/curated").to_table(columns=["id"])["id"].to_pylist()
    assert kept == ["c"]


@pytest.mark.parametrize(
    ("targets", "says"),
    [("nowhere.txt", "dsir.targets: no such file"), ("{tmp}/empty.txt", "dsir.targets: there is no usable text")],
)
def test_targets_that_are_not_there(tmp_path: Path, targets: str, says: str) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "corpus").mkdir()
    pq.write_table(pa.table({"id": ["a"], "text": ["some text"]}), tmp_path / "corpus/p.parquet")
    with pytest.raises(TamisError, match=says):
        run(tmp_path / "run", tmp_path / "corpus", Path(targets.replace("{tmp}", str(tmp_path))), rows=1)


def test_errors_at_the_door() -> None:
    with pytest.raises(ValidationError, match="targets"):
        Dsir.model_validate({})
    with pytest.raises(ValidationError, match="greater than 0"):
        Dsir(targets="t.txt", cap=0)
