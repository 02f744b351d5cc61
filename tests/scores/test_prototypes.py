"""Prototypes: both ends, the guard against outliers, and the rule that chooses, down to the theory behind it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.svm import SVC

from pipeline.concepts.assign import concept_column
from pipeline.config import parse
from pipeline.corpus.rows import row_column
from pipeline.embed.lsa import Lsa
from pipeline.engine.pool import InlinePool
from pipeline.errors import TamisError
from pipeline.run import Run
from pipeline.scores._proxy import best, bigram_loss, compare, label_loss
from pipeline.scores.prototypes import BINS, LIMIT, Distances, Prototypes, _open, _write_limit, hardness
from pipeline.vectors import flat_index, nearest
from pipeline.words import hashed_words


def scores(keep: str, distance: np.ndarray, limit: float | None = None) -> list[float]:
    batch = pa.record_batch([distance.astype(np.float32)], ["concept.distance"])
    values: list[float] = _open(keep, limit)(batch)["score"].to_pylist()
    return values


def test_toy_of_four_rows_and_one_centroid() -> None:
    x = np.float32([[1, 0], [0.8, 0.6], [0.6, 0.8], [0, 1]])
    centroid = x.mean(axis=0, keepdims=True)
    centroid /= np.linalg.norm(centroid)
    np.testing.assert_allclose(centroid, [[0.70711, 0.70711]], atol=1e-5)
    _, distance = nearest(x, centroid, flat_index(centroid))
    np.testing.assert_allclose(distance, [0.292893, 0.010051, 0.010051, 0.292893], atol=1e-6)
    assert set(np.argsort(scores("hard", distance))[-2:]) == {0, 3}
    assert set(np.argsort(scores("easy", distance))[-2:]) == {1, 2}


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_distances_survive_a_rotation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((50, 6)).astype(np.float32)
    points = rng.standard_normal((4, 6)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    turn = np.linalg.qr(rng.standard_normal((6, 6)))[0].astype(np.float32)
    _, before = nearest(x, points, flat_index(points))
    _, after = nearest(x @ turn, points @ turn, flat_index(points @ turn))
    np.testing.assert_allclose(before, after, atol=2e-6)


def test_balance_gives_floors_and_fills_by_global_rank() -> None:
    concept = np.repeat([0, 1], [1000, 100])
    score = np.where(concept == 0, 10, 0) + np.random.default_rng(0).random(1100)  # every row of 0 is harder
    kept = best(score, concept, np.ones(1100, np.int64), budget=220, balance=0.5)
    assert np.bincount(concept[kept]).tolist() == [165, 55]
    assert len(set(kept)) == 220
    of_one = np.sort(score[concept == 1])[-55:]
    assert sorted(score[kept][concept[kept] == 1]) == of_one.tolist()
    assert np.bincount(concept[best(score, concept, np.ones(1100, np.int64), 220, 0.0)], minlength=2).tolist() == [
        220,
        0,
    ]


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 8), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_what_is_kept_fits_the_budget(rows: int, k: int, share: float, balance: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 50, rows)
    budget = int(share * size.sum())
    kept = best(rng.random(rows), rng.integers(0, k, rows), size, budget, balance)
    assert len(set(kept)) == len(kept)
    assert size[kept].sum() <= budget
    assert size[kept].sum() > budget - 50 or len(kept) == rows


def test_outliers_come_last_and_the_farthest_at_the_very_end() -> None:
    distance = np.array([0.1, 0.9, 0.5, 1.4, 0.6])
    assert np.argsort(scores("hard", distance, 0.6))[::-1].tolist() == [4, 2, 0, 1, 3]


@settings(deadline=None)
@given(st.integers(1, 500), st.floats(0.01, 0.99), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_limit_is_the_quantile_to_the_width_of_a_bin(rows: int, quantile: float, shards: int, seed: int) -> None:
    distance = np.random.default_rng(seed).random(rows, np.float32) * 2
    statistic = Distances()
    parts = [p for p in np.array_split(distance, shards) if len(p)]
    state = statistic.merge([statistic.update({}, pa.record_batch([p], ["concept.distance"])) for p in parts])
    with tempfile.TemporaryDirectory() as directory:
        _write_limit(state, quantile, Path(directory))
        limit = json.loads((Path(directory) / LIMIT).read_text())["distance"]
    exact = np.sort(distance)[int(np.ceil(quantile * rows)) - 1]
    assert exact <= limit + 1e-6
    assert limit - exact <= 2 / BINS + 1e-6


def perceptron(margin: np.ndarray, x: np.ndarray, teacher: np.ndarray) -> Any:
    """Loss of the theory: the angle between teacher and max-margin student, over pi."""
    side = np.sign(x @ teacher)

    def loss(train: np.ndarray, held_out: np.ndarray) -> float:
        right = x[train] * side[train, None]
        student = (
            SVC(kernel="linear", C=1e5).fit(np.concatenate([right, -right]), np.repeat([1, -1], len(train))).coef_[0]
        )
        cosine = student @ teacher / np.linalg.norm(student) / np.linalg.norm(teacher)
        return float(np.arccos(np.clip(cosine, -1, 1)) / np.pi)

    return loss


@pytest.mark.parametrize(
    ("alpha", "seeds", "order"),
    [(1.5, 10, ["easy", "random", "hard"]), (10, 4, ["hard", "easy", "random"]), (30, 2, ["hard", "easy", "random"])],
)
def test_the_choice_flips_with_the_data_as_the_theory_says(alpha: float, seeds: int, order: list[str]) -> None:
    """Teacher and student perceptrons (Sorscher et al. 2022, section 7 of the spec): easy rows where data are scarce,
    hard ones where they abound. Hard is near the teacher's border."""
    dims, pool = 40, int(alpha * 40)
    losses: dict[str, list[float]] = {arm: [] for arm in order}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        teacher = rng.standard_normal(dims)
        x = rng.standard_normal((pool * 5 // 4, dims))
        margin = np.abs(x @ teacher)
        ones = np.ones(len(x), np.int64)
        choice = compare(-margin, np.zeros(len(x), np.int32), ones, 0.5, 0.0, perceptron(margin, x, teacher), seed)
        assert choice["pool_rows"] == pool
        assert choice["arms"]["hard"]["rows"] == choice["arms"]["easy"]["rows"] == pool // 2
        for arm in order:
            losses[arm].append(choice["arms"][arm]["loss"])
    assert sorted(losses, key=lambda arm: float(np.mean(losses[arm]))) == order


def test_bigram_model_is_witten_bells() -> None:
    words, offsets = hashed_words(pa.array(["a b a c", "a b", "a q c"]), 16, 100)
    a, b, c, q = (int(words[i]) for i in (0, 1, 3, 7))
    assert len({a, b, c, q}) == 4
    loss = bigram_loss(words, offsets, 16)
    train, tried = np.array([0, 1]), np.array([2])

    def p(count: int) -> float:
        return (count + 3 / 16) / (6 + 3)  # six words of three kinds, the rest of the mass over 16 buckets

    # after the mark: a twice; after a: b twice and c once, two kinds; after q, which was never seen, nothing
    expected = [(2 + 1 * p(3)) / (2 + 1), (0 + 2 * p(0)) / (3 + 2), p(1)]
    assert loss(train, tried) == pytest.approx(-np.log2(expected).mean())
    assert loss(np.array([], int), tried) == pytest.approx(4)  # an untrained model knows 1 of 16
    after_a = [np.array([a, b, a, c, a, w], np.int32) for w in range(16)]
    total = sum(2 ** (-2 * bigram_loss(w, np.array([0, 4, 6]), 16)(np.array([0]), np.array([1]))) for w in after_a)
    first = (1 + 1 * (2 + 3 / 16) / 7) / (1 + 1)
    assert total == pytest.approx(first)  # the probabilities of what follows a sum to one


def test_label_model_learns_and_survives_one_label() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(["x", "y"], 50)
    vectors = rng.standard_normal((100, 4)).astype(np.float32) + 4 * (labels == "x")[:, None]
    loss = label_loss(vectors, labels)
    assert loss(np.arange(0, 100, 2), np.arange(1, 100, 2)) < 0.05
    assert loss(np.arange(10), np.arange(100)) == 0.5


def corpus(directory: Path, rows: int, seed: int = 0) -> Path:
    """Nine topics in which every word has two successors, and a quarter of rows of noise, far from every centroid."""
    rng = np.random.default_rng(seed)
    texts = []
    for i in range(rows):
        walk = rng.integers(40) + np.cumsum(rng.integers(1, 3, 20))
        clean = " ".join(f"topic{i % 9}word{step % 40}" for step in walk)
        noise = f"topic{i % 9}word0 " + " ".join("".join(rng.choice(list("qxzwvkj"), 8)) for _ in range(20))
        texts.append(noise if rng.random() < 0.25 else clean)
    table = pa.table({"text": texts, "kind": [f"label {i % 9}" for i in range(rows)]})
    pq.write_table(table, directory / "corpus.parquet", row_group_size=200)
    return directory / "corpus.parquet"


def run_prototypes(
    directory: Path, path: Path, select: dict[str, Any] | None = None, **fields: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and distances of a run over LSA vectors."""
    config = {
        "corpus": {"path": str(path)},
        "cluster": {"k": 9},
        "embed": {"kind": "lsa", "dims": 16, "features": 4096},
    }
    config |= {"scores": [{"kind": "prototypes", **fields}], "select": select or {"budget": {"fraction": 0.3}}}
    with Run(parse(config | {"run": str(directory / "run")}), InlinePool, quiet=True) as run:
        run.materialize([row_column(False, None)])
        embed = run.config.embed
        assert isinstance(embed, Lsa)
        run.materialize([embed.column(run)])
        run.materialize([concept_column(run, run.config.cluster)])
        score = run.config.scores[0]
        score.fit(run)
        run.materialize([score.column(run)])
    columns = directory / "run/columns"
    found = [
        pq.read_table(columns / f / "part-00000.parquet")[n].to_numpy()
        for f, n in (("prototypes", "score"), ("concept", "distance"))
    ]
    return found[0], found[1]


def test_auto_keeps_the_end_that_teaches_more_and_says_why(tmp_path: Path) -> None:
    score, distance = run_prototypes(tmp_path, corpus(tmp_path, 1200), keep="auto")
    choice = json.loads((tmp_path / "run/artifacts/prototypes-choice/choice.json").read_text())
    assert choice["keep"] == "easy"  # the far end is noise
    np.testing.assert_array_equal(score, -distance)
    arms = choice["arms"]
    assert arms["easy"]["loss"] < arms["hard"]["loss"]
    assert choice["better_than_random"] == (arms["easy"]["loss"] < arms["random"]["loss"])
    assert (choice["share"], choice["pool_rows"] + choice["held_out_rows"]) == (0.3, 1200)
    assert arms["easy"]["rows"] == pytest.approx(0.3 * choice["pool_rows"], abs=1)


@pytest.mark.parametrize(
    ("select", "fields", "share"),
    [
        ({"budget": {"rows": 240}}, {}, 0.2),
        ({"budget": {"fraction": 0.25, "of": "tokens"}}, {}, 0.25),
        ({"budget": {"bytes": 20_000}, "quotas": {"balance": 0.2}}, {}, None),
        ({"budget": {"rows": 240}}, {"share": 0.5}, 0.5),
        ({"budget": {"rows": 240}}, {"label": "kind"}, 0.2),
    ],
    ids=["rows", "fraction of tokens", "bytes and balance", "share", "label"],
)
def test_auto_decides_at_the_budget_of_the_selection(
    tmp_path: Path, select: dict[str, Any], fields: dict[str, Any], share: float | None
) -> None:
    path = corpus(tmp_path, 1200)
    run_prototypes(tmp_path, path, select, **fields)
    choice = json.loads((tmp_path / "run/artifacts/prototypes-choice/choice.json").read_text())
    total = sum(len(t) for t in pq.read_table(path)["text"].to_pylist())
    assert choice["share"] == pytest.approx(share or 20_000 / total, rel=0.02)  # sizes are estimated on the sample
    assert choice["balance"] == (0.2 if "quotas" in select else 0.5)  # the method's own, unless the user says otherwise
    assert ("labels" in choice["loss"]) == ("label" in fields)


def test_the_guard_puts_a_share_of_all_rows_last(tmp_path: Path) -> None:
    score, distance = run_prototypes(tmp_path, corpus(tmp_path, 600), keep="hard", max_distance_quantile=0.9)
    assert (score < 0).sum() == pytest.approx(60, abs=2)
    assert distance[score < 0].min() > distance[score >= 0].max()
    np.testing.assert_array_equal(
        score, hardness(distance, (distance[score < 0].min() + distance[score >= 0].max()) / 2)
    )


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"keep": "easy", "max_distance_quantile": 0.9}, "guards hard rows"),
        ({"keep": "hard", "share": 0.5, "label": "x"}, "label and share belong to keep: auto, not to 'hard'"),
        ({"keep": "medium"}, "hard"),
        ({"share": 1.5}, "less than 1"),
    ],
)
def test_errors_at_the_door(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Prototypes.model_validate(fields)


@pytest.mark.parametrize(
    ("rows", "fields", "says"), [(40, {}, "needs 50 distinct rows"), (60, {"label": "no"}, "no column 'no'")]
)
def test_errors_of_a_run(tmp_path: Path, rows: int, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(TamisError, match=says):
        run_prototypes(tmp_path, corpus(tmp_path, rows), **fields)
