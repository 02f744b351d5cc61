from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.hashing import KEY, hash64
from pipeline.recipe import State
from pipeline.report import counts
from pipeline.report.counts import LEVELS, OTHER, Overview, Sources, bins, level_values, tally
from pipeline.select.keys import order_keys

SCORES = st.floats(width=32, allow_nan=False, allow_infinity=True)


def levels_of(scores: np.ndarray, keep: np.ndarray) -> np.ndarray:
    level = (order_keys(scores) >> np.uint32(16)).astype(np.int64)
    return np.bincount(level + LEVELS * keep, minlength=2 * LEVELS).reshape(2, LEVELS)


@settings(deadline=None)
@given(SCORES)
def test_the_value_of_a_level_is_within_a_128th(score: float) -> None:
    level = int(order_keys(np.array([score], np.float32))[0] >> np.uint32(16))
    value = level_values()[level]
    if np.isinf(score):
        assert value == score
    else:
        assert abs(value) <= abs(score) <= abs(value) * (1 + 2**-7) + 2.0**-133


@pytest.mark.parametrize(
    "draw",
    [
        lambda r: r.random(20_000),
        lambda r: r.normal(size=20_000) * 3,
        lambda r: -r.exponential(size=20_000),
        lambda r: r.lognormal(sigma=3, size=20_000),
        lambda r: r.integers(-3, 4, 20_000),
        lambda r: 0.99 + 0.001 * r.random(20_000),
    ],
    ids=["uniform", "normal", "negative", "long tail", "integers", "narrow"],
)
def test_bins_count_every_row_in_its_place(draw: Any) -> None:
    rng = np.random.default_rng(0)
    scores = draw(rng).astype(np.float32)
    keep = rng.random(len(scores)) < 0.2
    shown = bins(levels_of(scores, keep))
    assert shown is not None
    assert len(shown.all) <= 50
    assert (np.diff(shown.edges) > 0).all()
    # numpy.histogram has bins [a, b); on the negative side ours are (a, b]
    for rows, counted in ((scores, shown.all), (scores[keep], shown.kept)):
        exact = rows.astype(np.float64)
        at = np.where(
            exact < 0, np.searchsorted(shown.edges, exact, "left"), np.searchsorted(shown.edges, exact, "right")
        )
        expected = np.bincount(np.clip(at - 1, 0, len(counted) - 1), minlength=len(counted))
        assert counted.tolist() == expected.tolist()
    assert shown.below == bool((scores <= shown.edges[0]).any() and scores.min() < shown.edges[0])


def test_bins_of_the_degenerate() -> None:
    assert bins(np.zeros((2, LEVELS), np.int64)) is None
    assert bins(levels_of(np.full(3, np.inf, np.float32), np.ones(3, bool))) is None
    one = bins(levels_of(np.full(5, 0.25, np.float32), np.array([True] * 2 + [False] * 3)))
    assert one is not None
    assert (one.all.tolist(), one.kept.tolist()) == ([5], [2])
    mixed = bins(levels_of(np.array([-np.inf, 0, 1, np.inf], np.float32), np.zeros(4, bool)))
    assert mixed is not None
    assert (int(mixed.all.sum()), mixed.below, mixed.above) == (4, True, True)


def test_a_tally_holds_the_largest_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "NAMES", 2)
    names, sums = tally(
        np.array(["a", "b", "c", "d", "b", OTHER]), np.array([[1, 10], [2, 20], [5, 50], [1, 10], [2, 20], [9, 90]])
    )
    assert dict(zip(names.tolist(), sums.tolist(), strict=True)) == {"b": [4, 40], "c": [5, 50], OTHER: [11, 110]}


# ---- statistics


def batch_of(rows: int, seed: int = 0) -> pa.RecordBatch:
    rng = np.random.default_rng(seed)
    keep = rng.random(rows) < 0.3
    why = np.where(keep, 0, rng.integers(1, 3, rows)).astype(np.int32)
    return pa.record_batch(
        {
            "select.keep": pa.array(keep),
            "select.reason": pa.DictionaryArray.from_arrays(pa.array(why), pa.array(["kept", "quota", "floor:a"])),
            "row.key": pa.array([rng.bytes(16) for _ in range(rows)], KEY),
            "row.tokens": rng.integers(1, 100, rows),
            "row.bytes": rng.integers(1, 400, rows),
            "address.shard": pa.array(rng.integers(0, 4, rows), pa.int32()),
            "address.row": np.arange(rows),
            "concept.concept": pa.array(rng.integers(0, 5, rows), pa.int32()),
            "a.score": rng.normal(size=rows).astype(np.float32),
            "corpus.source": pa.array([f"s{i}" for i in rng.integers(0, 6, rows)]).dictionary_encode(),
        }
    )


def folded(statistic: Overview | Sources, batch: pa.RecordBatch, cuts: list[int]) -> State:
    """One state a shard of two batches, merged two by two."""
    edges = [0, *sorted(cuts), batch.num_rows]
    states = []
    for start, end in pairwise(edges):
        middle, state = (start + end) // 2, {}
        for a, b in ((start, middle), (middle, end)):
            if b > a:
                state = statistic.update(state, batch.slice(a, b - a).select(list(statistic.inputs)))
        if state:
            states.append(state)
    while len(states) > 1:
        states = [
            statistic.merge(states[i : i + 2]) if i + 1 < len(states) else states[i] for i in range(0, len(states), 2)
        ]
    return states[0]


OVERVIEW = Overview(("a.score",), (4, 1), (0, 2, 3), rows=3, seed=7)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 299), max_size=5, unique=True))
def test_how_rows_fall_into_batches_and_shards_changes_nothing(cuts: list[int]) -> None:
    batch = batch_of(300)
    for statistic in (OVERVIEW, Sources("corpus.source")):
        whole, parts = folded(statistic, batch, []), folded(statistic, batch, cuts)
        assert whole.keys() == parts.keys()
        for name in whole:
            assert np.array_equal(whole[name], parts[name]), name


def test_an_overview_is_what_counting_finds() -> None:
    batch = batch_of(300)
    state = folded(OVERVIEW, batch, [100])
    table = {n: batch.column(n).to_pylist() for n in batch.schema.names}
    for reason, amount in zip(state["reason"].tolist(), state["amount"].tolist(), strict=True):
        rows = [i for i, r in enumerate(table["select.reason"]) if r == reason]
        assert amount == [
            len(rows),
            sum(table["row.tokens"][i] for i in rows),
            sum(table["row.bytes"][i] for i in rows),
        ]
    assert set(state["reason"].tolist()) == set(table["select.reason"])
    keep = np.array(table["select.keep"])
    assert np.array_equal(state["levels"][0], levels_of(np.array(table["a.score"], np.float32), keep))

    hashed = hash64(batch.column("row.key"), OVERVIEW.seed)
    for group in range(4):
        concept, kept = OVERVIEW.concepts[group // 2], bool(group % 2)
        rows = [
            i
            for i in range(300)
            if table["concept.concept"][i] == concept
            and table["select.keep"][i] == kept
            and table["address.shard"][i] != 1
        ]
        expected = sorted(rows, key=lambda i: hashed[i])[:3]
        here = state["group"] == group
        assert state["row"][here].tolist() == expected
        assert state["why"][here].tolist() == [table["select.reason"][i] for i in expected]
        assert state["score"][here, 0].tolist() == [np.float32(table["a.score"][i]) for i in expected]


def test_rows_with_the_same_key_are_sampled_once() -> None:
    batch = batch_of(300)
    same = pa.array([b"0" * 16] * 300, KEY)
    state = folded(OVERVIEW, batch.set_column(batch.schema.get_field_index("row.key"), "row.key", same), [100])
    assert state["group"].tolist() == [0, 1, 2, 3]


def test_sources_are_what_counting_finds() -> None:
    batch = batch_of(300)
    state = folded(Sources("corpus.source"), batch, [50, 200])
    rows = Counter(batch.column("corpus.source").to_pylist())
    kept = Counter(
        s
        for s, k in zip(batch.column("corpus.source").to_pylist(), batch.column("select.keep").to_pylist(), strict=True)
        if k
    )
    found = {n: a.tolist() for n, a in zip(state["name"].tolist(), state["amount"], strict=True)}
    assert {n: (a[0], a[2]) for n, a in found.items()} == {n: (rows[n], kept[n]) for n in rows}
    assert sum(a[1] for a in found.values()) == sum(batch.column("row.tokens").to_pylist())


@settings(deadline=None)
@given(arrays(np.float32, st.integers(1, 50), elements=SCORES))
def test_bins_hold_every_finite_draw(scores: np.ndarray) -> None:
    shown = bins(levels_of(scores, np.zeros(len(scores), bool)))
    if np.isfinite(scores).any():
        assert shown is not None
        assert int(shown.all.sum()) == len(scores)
        assert len(shown.all) <= 50
