"""BETR: the specification's ranks, lists that agree with the full matrix, and a corpus with targeted domains."""

from __future__ import annotations

import json
import logging
from itertools import pairwise
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
from sklearn.metrics import roc_auc_score

from pipeline.artifact import Artifact
from pipeline.corpus.storage import Store
from pipeline.curation import Curated, curate
from pipeline.errors import TamisError
from pipeline.hashing import KEY as KEY_TYPE
from pipeline.hashing import hash64
from pipeline.recipe import State
from pipeline.scores._proxy import bigram_loss
from pipeline.scores.betr import KEY, VECTOR, VECTORS, Betr, NearestRows, alike, is_certain, optimal_percent, ranks
from pipeline.vectors import matrix, unit_vectors
from pipeline.words import hashed_words

TOY = np.array([[0.9, 0.1], [0.8, 0.7], [0.2, 0.6], [0.1, 0.2]])
"""Cosines of four rows to two examples."""


def lists(cosine: np.ndarray) -> State:
    """Complete lists of a (rows, examples) matrix; row i has the hash i."""
    rows, examples = cosine.shape
    target = np.repeat(np.arange(examples, dtype=np.int32), rows)
    state = {
        "target": target,
        "cosine": cosine.T.ravel().astype(np.float32),
        "hash": np.tile(np.arange(rows, dtype=np.uint64), examples),
    }
    return NearestRows(Artifact("", "", Store("")), rows, 0, 0).merge([state])


def by_row(nearest: State, examples: int, aggregation: Any) -> np.ndarray:
    hashes, value, _ = ranks(nearest, examples, aggregation)
    return value[np.argsort(hashes)]


def test_toy_of_four_rows_and_two_examples() -> None:
    nearest = lists(TOY)
    np.testing.assert_allclose(by_row(nearest, 2, "max"), [1, 1, 0.5, 1 / 3], atol=1e-6)
    np.testing.assert_allclose(by_row(nearest, 2, "mean"), [0.6250, 0.7500, 0.4167, 0.2917], atol=1e-4)
    np.testing.assert_allclose(by_row(nearest, 2, "mean_log"), [-1, -0.5, -1.2925, -1.7925], atol=1e-4)
    hashes, _, owed = ranks(nearest, 2, "max")
    assert hashes.tolist() == [0, 1, 2, 3]
    assert owed.tolist() == [0, 1, 1, 1]
    assert TOY.max(axis=1)[0] > TOY.max(axis=1)[1]  # by cosine the first two do not tie


def test_optimal_share_grows_with_compute() -> None:
    shares = [round(optimal_percent(c), 1) for c in (1e20, 1e21, 1e22, 1e23, 1e24)]
    assert shares == [4.0, 7.1, 12.6, 22.5, 40.0]


@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.integers(1, 6))
@settings(max_examples=30)
def test_ranks_survive_any_increasing_change_of_one_examples_cosines(seed: int, rows: int, examples: int) -> None:
    cosine = np.random.default_rng(seed).choice([-0.5, 0, 0.25, 0.5, 0.75], (rows, examples))
    changed = cosine.copy()
    changed[:, 0] = np.exp(3 * changed[:, 0]) - 7
    for aggregation in ("max", "mean", "mean_log"):
        before, after = (by_row(lists(c), examples, aggregation) for c in (cosine, changed))
        assert (before == after).all()


@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.integers(2, 6))
@settings(max_examples=30)
def test_another_example_never_lowers_a_best_rank(seed: int, rows: int, examples: int) -> None:
    cosine = np.random.default_rng(seed).normal(size=(rows, examples))
    fewer = by_row(lists(cosine[:, 1:]), examples - 1, "max")
    assert (by_row(lists(cosine), examples, "max") >= fewer).all()


def nearest_of(
    directory: Path, rows: np.ndarray, examples: np.ndarray, depth: int, cuts: int, last: int = 2**64 - 1
) -> tuple[State, np.ndarray, np.ndarray]:
    """The lists of a statistic over batches; the hashes of the rows and the dense (rows, examples) cosines."""
    store = Store(str(directory))
    vectors, stored = (unit_vectors(x).column("vector") for x in (rows, examples))
    np.save(directory / VECTORS, matrix(stored))
    keys = pa.array([int(i).to_bytes(16, "little") for i in range(len(rows))], KEY_TYPE)
    batch = pa.record_batch([keys, vectors], [KEY, VECTOR])
    statistic = NearestRows(Artifact("", "", store), depth, 0, last)
    edges = np.linspace(0, len(rows), cuts + 1).astype(int)
    states = [statistic.update({}, batch.slice(a, b - a)) for a, b in pairwise(edges) if b > a]
    x, y = (matrix(v).astype(np.float64) for v in (vectors, stored))
    dense = ((x @ y.T) / np.linalg.norm(x, axis=1)[:, None]).astype(np.float32)
    return statistic.merge(states), hash64(keys, 0), dense


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 5), st.integers(1, 12), st.integers(1, 5))
@settings(max_examples=40)
def test_lists_agree_with_the_full_matrix_as_far_as_they_say(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rows: int, examples: int, depth: int, cuts: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(max(1, rows // 2), 4))
    x = np.concatenate([x, x])[:rows]  # many equal vectors, hence equal cosines
    found, hashes, dense = nearest_of(tmp_path_factory.mktemp("t"), x, rng.normal(size=(examples, 4)), depth, cuts)
    rank = 1 + (dense[None, :, :] > dense[:, None, :]).sum(axis=1)
    best = 1 / rank.min(axis=1)
    order = np.lexsort((hashes, -best))
    ranked, value, _ = ranks(found, examples, "max")
    for wanted in range(1, len(x) + 1):
        if is_certain(found, depth, value, wanted):
            assert ranked[:wanted].tolist() == hashes[order][:wanted].tolist()
            np.testing.assert_array_equal(value[:wanted], best[order][:wanted])
    assert depth <= len(x) or is_certain(found, depth, value, len(x))
    if depth >= len(x):
        assert ranked.tolist() == hashes[order].tolist()


def test_equal_vectors_tie_whatever_batch_they_stand_in(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 96))
    rows = np.concatenate([rng.normal(size=(37, 96)), x, rng.normal(size=(501, 96)), x])
    found, hashes, _ = nearest_of(tmp_path, rows, rng.normal(size=(11, 96)), 540, 3)
    cosines = [found["cosine"][found["hash"] == hashes[i]] for i in (37, 539)]
    assert cosines[0].tobytes() == cosines[1].tobytes()


def test_only_rows_of_the_sample_are_ranked(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(50, 4))
    keys = hash64(pa.array([i.to_bytes(16, "little") for i in range(50)], KEY_TYPE), 0)
    last = int(np.sort(keys)[19])
    found, hashes, _ = nearest_of(tmp_path, x, x[:2], 50, 2, last)
    assert set(found["hash"].tolist()) == set(np.sort(hashes)[:20].tolist())


DOMAINS = ["wikipedia_passage", "nih_web", "book", "us_speech"]


@pytest.fixture(scope="module")
def domains(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, np.ndarray]:
    """300 rows of each of four domains; 50 examples of each of the first two, as two benchmarks; domain of a row."""
    directory = tmp_path_factory.mktemp("domains")
    table = ds.dataset(shared_data / "text_corpus/parts").to_table(columns=["id", "text", "source"])
    kinds = np.array(table["source"].to_pylist())
    rows = [np.flatnonzero(kinds == d) for d in DOMAINS]
    (directory / "corpus").mkdir()
    corpus = table.take(np.concatenate([r[:300] for r in rows]))
    pq.write_table(corpus, directory / "corpus/part.parquet")
    pq.write_table(table.take(np.concatenate([r[-50:] for r in rows[:2]])), directory / "targets.parquet")
    return directory / "corpus", directory / "targets.parquet", np.array(corpus["source"].to_pylist())


def run(directory: Path, corpus: Path, targets: Path, shard_mb: float = 8, **fields: Any) -> Curated:
    return curate(
        {
            "corpus": {"path": str(corpus), "id": "id", "shard_mb": shard_mb},
            "embed": {"kind": "lsa", "dims": 32},
            "scores": [{"kind": "betr", "targets": str(targets), **fields}],
            "select": {"budget": {"fraction": 0.1}},
            "engine": {"address": "inline"},
            "run": str(directory),
        },
        quiet=True,
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"fasttext": {"dim": 16, "bucket": 50_000, "lr": 0.5, "epoch": 15}, "depth": 3},
        {"classifier": "linear"},
        {"classifier": "linear", "aggregation": "mean"},
    ],
    ids=["fasttext", "linear", "linear of means"],
)
def test_domains_of_the_examples_score_above_the_others(
    tmp_path: Path, domains: tuple[Path, Path, np.ndarray], fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    corpus, targets, kinds = domains
    with caplog.at_level(logging.WARNING):
        curated = run(tmp_path, corpus, targets, group="source", positive_share=0.2, **fields)
    assert curated.rows_kept == 120
    score = ds.dataset(tmp_path / "columns/betr").to_table()["score"].to_numpy()
    assert ((score >= 0) & (score <= 1)).all()
    assert roc_auc_score(np.isin(kinds, DOMAINS[:2]), score) > 0.9
    facts = json.loads((tmp_path / "artifacts/betr/betr.json").read_text())
    assert (facts["sample"], facts["targets"], facts["positives"]) == (1200, 100, 240)
    if fields.get("depth") == 3:
        assert facts["depth"] == 10  # no less than are compared with each other, and enough
    assert sum(e["positives"] for e in facts["positives_by_example"]) <= 240
    assert "1200 rows are ranked, 240 of them positive" in caplog.text


def test_shards_change_nothing(tmp_path: Path, domains: tuple[Path, Path, np.ndarray]) -> None:
    table = pq.read_table(domains[0] / "part.parquet").slice(200, 300)
    (tmp_path / "corpus").mkdir()
    pq.write_table(table, tmp_path / "corpus/p.parquet", row_group_size=37)
    for name, shard_mb in (("one", 8), ("nine", 1e-6)):
        run(tmp_path / name, tmp_path / "corpus", domains[1], shard_mb, classifier="linear", depth=5)
    scores = [ds.dataset(tmp_path / name / "columns/betr").to_table()["score"].to_numpy() for name in ("one", "nine")]
    assert scores[0].tobytes() == scores[1].tobytes()


def test_an_example_near_a_template_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Pages of one form around an odd example would all be positives; without it the rows like the others are."""
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(300)]
    prose = [" ".join(rng.choice(words[(i % 2) * 150 :][:150], 40)) for i in range(120)]
    forms = [f"price of item {i} : call our shop and order now at the usual address" for i in range(40)]
    texts = [[*prose, *forms][i] for i in rng.permutation(160)]
    corpus = tiny(tmp_path, texts)
    examples = [
        *(" ".join(rng.choice(words[:150], 40)) for _ in range(6)),
        "call our shop and order now : price of item",
    ]
    (tmp_path / "targets.txt").write_text("\n".join(examples) + "\n")
    owed = []
    for constant in (1.0, 0.98):
        directory = tmp_path / str(constant)
        fields = {"classifier": "linear", "positive_share": 0.25, "constant": constant}
        with caplog.at_level(logging.WARNING):
            run(directory, corpus, tmp_path / "targets.txt", **fields)
        facts = json.loads((directory / "artifacts/betr/betr.json").read_text())
        assert [e["example"][:13] for e in facts["left_out"]] == (["call our shop"] if constant < 1 else [])
        by_example = {e["example"][:13]: e["positives"] for e in facts["positives_by_example"]}
        owed.append(by_example["call our shop"])
        assert sum(by_example.values()) == 40
    assert "nearest to 1 of 7 examples are all alike (betr.constant); these examples are left out" in caplog.text
    assert owed[0] > 0 == owed[1]
    recipe = Betr(targets="t.txt")
    assert recipe._odd(np.array([0.99, 0.99, 0.5])).tolist() == [False] * 3  # most: no oddity
    assert recipe._odd(np.array([0.99, 0.5])).tolist() == [True, False]


def test_likeness_is_the_mean_cosine_of_any_two_of_the_nearest(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 6)), rng.normal(size=(5, 6))
    found, hashes, dense = nearest_of(tmp_path, x, y, 20, 3)
    order = np.argsort(hashes)
    unit = (x / np.linalg.norm(x, axis=1, keepdims=True))[order]
    likeness = alike(found, hashes[order], unit, 6)
    for target in range(5):
        near = np.argsort(-dense[order][:, target])[:10]
        product = unit[near] @ unit[near].T
        assert likeness[target] == pytest.approx((product.sum() - 10) / 90, abs=1e-6)
    assert likeness[5] == 0  # no row is listed for it


def test_what_it_keeps_helps_on_the_target_and_hurts_elsewhere(
    tmp_path: Path, domains: tuple[Path, Path, np.ndarray], shared_data: Path
) -> None:
    """The Goodhart test: a bigram model at equal words, of BETR's choice and of random rows, tried on both sides."""
    corpus, targets, _ = domains
    run(tmp_path, corpus, targets, group="source", positive_share=0.2, classifier="linear")
    score = ds.dataset(tmp_path / "columns/betr").to_table()["score"].to_numpy()
    table = ds.dataset(shared_data / "text_corpus/parts").to_table(columns=["text", "source"])
    kinds = np.array(table["source"].to_pylist())
    unseen = table.take(np.concatenate([np.flatnonzero(kinds == d)[300:350] for d in DOMAINS]))
    texts = pa.concat_tables([ds.dataset(corpus).to_table(columns=["text"]), unseen.select(["text"])])["text"]
    words, offsets = hashed_words(texts.combine_chunks().cast(pa.large_string()), 1 << 14, 4000)
    bits = bigram_loss(words, offsets, 1 << 14)
    aimed_at, elsewhere = 1200 + np.arange(100), 1300 + np.arange(100)

    def losses(order: np.ndarray) -> list[float]:
        kept = order[np.cumsum(np.diff(offsets)[order]) <= 40_000]
        return [bits(kept, side) for side in (aimed_at, elsewhere)]

    betr = losses(np.argsort(-score))
    random = [losses(np.random.default_rng(seed).permutation(1200)) for seed in range(3)]
    assert betr[0] < min(loss for loss, _ in random) - 0.5  # 7.3 bits a word against 8.0 to 8.2
    assert betr[1] > max(loss for _, loss in random) + 1.5  # 11.9 against 9.7 to 9.8


def tiny(directory: Path, texts: list[str]) -> Path:
    (directory / "corpus").mkdir()
    ids = [f"r{i}" for i in range(len(texts))]
    pq.write_table(pa.table({"id": ids, "text": texts}), directory / "corpus/p.parquet")
    return directory / "corpus"


def test_one_example_that_stands_in_the_corpus(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = [f"{w} and {w} or {o}" for w in ("cats", "boats") for o in "abcdefghijklmno"]
    corpus = tiny(tmp_path, texts)
    (tmp_path / "targets.txt").write_text(texts[20].upper() + "\n")
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "run", corpus, tmp_path / "targets.txt", classifier="linear", positive_share=0.3)
    assert "there is one example" in caplog.text
    assert "Row ids: r20" in caplog.text
    score = ds.dataset(tmp_path / "run/columns/betr").to_table()["score"].to_numpy()
    assert score[15:].min() > score[:15].max()


def test_means_over_more_than_memory_holds_and_too_few_rows_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tiny(tmp_path, [f"row {i}" for i in range(20)])
    (tmp_path / "targets.txt").write_text("row\nrow 3\n")
    monkeypatch.setattr("pipeline.scores.betr.MOST_BYTES", 100)
    with pytest.raises(TamisError, match=r"2 examples times their 20 nearest rows .*: lower betr\.sample"):
        run(tmp_path / "run", corpus, tmp_path / "targets.txt", aggregation="mean")
    monkeypatch.undo()
    with pytest.raises(TamisError, match=r"20 positive and 0 negative rows: raise betr\.sample"):
        run(tmp_path / "run", corpus, tmp_path / "targets.txt", positive_share=0.999)


def test_errors_at_the_door() -> None:
    with pytest.raises(ValidationError, match="`fasttext` is for `classifier: fasttext`"):
        Betr.model_validate({"targets": "t.txt", "classifier": "linear", "fasttext": {"dim": 4}})
    recipe = Betr(targets="t.txt")
    assert (recipe.fasttext.dim, recipe.fasttext.bucket, recipe.positive_share) == (100, 2_000_000, 0.1)
