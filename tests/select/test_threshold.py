from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import TamisError
from pipeline.hashing import hash64
from pipeline.select import threshold
from pipeline.select.ranking import Ranking
from pipeline.select.threshold import Cut, Totals, exact, find

SEED = 5
Budget = Callable[[Totals], np.ndarray]


def of(*budget: int) -> Budget:
    return lambda _: np.array(budget)


def by_sorting(run: Any, ranking: Ranking, budget: list[int], skip: bool = False) -> np.ndarray:
    """The reference: sort everything, walk down each group until a row does not fit."""
    scores = [run.column(s).astype(np.float64) for s in ranking.scores]
    keys = pa.chunked_array([c for s in run.shards for c in s["row.key"].chunks]).combine_chunks()
    order = np.lexsort(
        [run.column("address.row"), run.column("address.shard"), ~hash64(keys, SEED), *(-s for s in reversed(scores))]
    )
    weight = run.column(ranking.unit) if ranking.unit else np.ones(run.rows, np.int64)
    group = run.column(ranking.group) if ranking.group else np.zeros(run.rows, int)
    keep, left, closed = np.zeros(run.rows, bool), list(budget), [False] * len(budget)
    for row in order:
        g = group[row]
        fits = weight[row] <= left[g]
        closed[g] |= not fits and not skip
        if fits and not closed[g]:
            keep[row] = True
            left[g] -= int(weight[row])
    return keep


def kept(run: Any, ranking: Ranking, *budget: int, skip: bool = False) -> tuple[np.ndarray, Cut]:
    cut = exact(run, ranking, of(*budget), skip=skip)
    keep = run.kept(cut.lines)
    assert keep.sum() == cut.rows.sum()
    return keep, cut


# ---- toys and off-by-ones


def test_a_million_normals_equal_a_full_sort(memory_run: Any) -> None:
    scores = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    run = memory_run.of({"a.score": scores}, shards=7, batch_rows=65_536)
    keep, cut = kept(run, Ranking(("a.score",), seed=SEED), 123_457)
    lowest = scores[keep].min()
    assert (keep.sum(), (scores > lowest).sum(), (scores == lowest).sum()) == (123_457, 123_456, 1)
    assert lowest == np.sort(scores)[-123_457]
    assert lowest == pytest.approx(1.158, abs=0.005)
    assert cut.passes == 2


def test_two_passes_of_histograms_beyond_what_is_listed(memory_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threshold, "LISTED", 1)
    scores = np.random.default_rng(1).standard_normal(50_000).astype(np.float32)
    run = memory_run.of({"a.score": scores}, shards=5, batch_rows=4096)
    keep, cut = kept(run, Ranking(("a.score",), seed=SEED), 5_000)
    assert (np.flatnonzero(keep) == np.sort(np.argsort(-scores, kind="stable")[:5_000])).all()
    assert cut.passes == run.passes == 2


@pytest.mark.parametrize("count", [1, 2, 99, 100])
def test_n_f_rows_not_one_more(memory_run: Any, count: int) -> None:
    """sorted_desc[int(n f)] with >= keeps n f + 1."""
    run = memory_run.of({"a.score": np.arange(100, dtype=np.float32)}, shards=3)
    keep, cut = kept(run, Ranking(("a.score",)), count)
    assert np.flatnonzero(keep).tolist() == list(range(100 - count, 100))
    assert cut.next_weight == (1 if count < 100 else 0)


def test_a_quota_of_zero_keeps_none(memory_run: Any) -> None:
    """argsort[-0:] keeps all."""
    columns = {"a.score": np.arange(10, dtype=np.float32), "concept.concept": np.arange(10, dtype=np.int32) % 2}
    keep, _ = kept(memory_run.of(columns), Ranking(("a.score",), group="concept.concept", groups=2), 0, 2)
    assert np.flatnonzero(keep).tolist() == [7, 9]


def test_tokens_stop_at_the_first_row_that_does_not_fit(memory_run: Any) -> None:
    tokens = np.array([500, 300, 900, 200, 400])
    run = memory_run.of({"a.score": np.arange(5, 0, -1, dtype=np.float32), "row.tokens": tokens}, shards=2)
    ranking = Ranking(("a.score",), unit="row.tokens")
    keep, cut = kept(run, ranking, 1500)
    assert (np.flatnonzero(keep).tolist(), cut.weight.tolist(), cut.next_weight) == ([0, 1], [800], 900)
    keep, cut = kept(run, ranking, 1500, skip=True)
    assert (np.flatnonzero(keep).tolist(), cut.weight.tolist(), cut.next_weight) == ([0, 1, 3, 4], [1400], 0)


def test_the_first_row_too_large_is_an_error_with_its_size(memory_run: Any) -> None:
    run = memory_run.of({"a.score": np.array([2, 1], np.float32), "row.tokens": np.array([1_700, 3])})
    ranking = Ranking(("a.score",), unit="row.tokens")
    with pytest.raises(
        TamisError, match=r"first row alone has 1,700 tokens, more than the budget of 1,500.*skip: true"
    ):
        exact(run, ranking, of(1500))
    assert kept(run, ranking, 1500, skip=True)[0].tolist() == [False, True]
    with pytest.raises(TamisError, match="every row is larger"):
        exact(run, ranking, of(2), skip=True)


def test_rows_of_weight_zero_cost_nothing_above_the_line(memory_run: Any) -> None:
    weights = np.array([0, 5, 0, 0, 1, 0])
    run = memory_run.of({"a.score": np.arange(6, 0, -1, dtype=np.float32), "row.tokens": weights})
    assert kept(run, Ranking(("a.score",), unit="row.tokens"), 5)[0].tolist() == [True, True, True, True, False, False]


def test_negative_weights_overflow_and_nan_are_refused(memory_run: Any) -> None:
    score = np.array([1, 2], np.float32)
    ranking = Ranking(("a.score",), unit="row.bytes")
    with pytest.raises(TamisError, match="cannot be negative"):
        exact(memory_run.of({"a.score": score, "row.bytes": np.array([1, -1])}), ranking, of(1))
    for shards, batch in ((1, 2), (1, 1), (2, 1)):
        large = memory_run.of({"a.score": score, "row.bytes": np.array([2**62, 2**62])}, shards, batch)
        with pytest.raises(TamisError, match=r"above 2\*\*63"):
            exact(large, ranking, of(1))
    with pytest.raises(ValueError, match="NaN"):
        exact(memory_run.of({"a.score": np.array([1, np.nan], np.float32)}), Ranking(("a.score",)), of(1))


@pytest.mark.parametrize("listed", [1, 100])
def test_sums_of_weights_are_exact_where_float64_is_not(
    memory_run: Any, listed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threshold, "LISTED", listed)
    weights = np.array([2**60 + 1, 2**60 + 1, 1, 1])
    run = memory_run.of({"a.score": np.array([4, 4, 4, 4], np.float32), "row.bytes": weights})
    _, cut = kept(run, Ranking(("a.score",), unit="row.bytes", seed=SEED), int(weights.sum()) - 1)
    assert cut.totals.weight.tolist() == [2**61 + 4]
    assert cut.weight[0] <= 2**61 + 3 < cut.weight[0] + cut.next_weight


def test_a_constant_score_is_a_draw_by_hash_and_identical_rows_go_by_address(memory_run: Any) -> None:
    columns = {"a.score": np.zeros(1_000, np.float32), "row.key": np.repeat(np.arange(100), 10)}
    run = memory_run.of(columns, shards=4)
    ranking = Ranking(("a.score",), seed=SEED)
    keep, cut = kept(run, ranking, 305)
    assert (keep == by_sorting(run, ranking, [305])).all()
    copies = keep.reshape(100, 10).sum(axis=1)
    assert sorted(copies)[-31:] == [5] + [10] * 30
    assert keep.reshape(100, 10)[copies == 5].tolist() == [[True] * 5 + [False] * 5]  # the first addresses
    assert cut.lines[0].tied.tolist() == [True]
    above, tied = cut.lines[0].compare(run.shards[0].combine_chunks().to_batches()[0])
    assert tied.all()
    assert not above.all()


def test_no_rows_and_only_nulls_are_errors(memory_run: Any) -> None:
    null = memory_run.of({"a.score": pa.array([None, None], pa.float32())})
    with pytest.raises(TamisError, match="in quarantine"):
        exact(null, Ranking(("a.score",)), of(1))
    run = memory_run.of({"a.score": np.array([1, 2], np.float32)})
    with pytest.raises(TamisError, match="below a floor"):
        exact(run, Ranking(("a.score",), floors=(("a.score", 3.0),)), of(1))


def test_an_unknown_group_is_an_error(memory_run: Any) -> None:
    columns = {"a.score": np.zeros(3, np.float32), "concept.concept": np.array([0, 1, 2], np.int32)}
    with pytest.raises(TamisError, match=r"0 to 2, outside of 0 to 1"):
        exact(memory_run.of(columns), Ranking(("a.score",), group="concept.concept", groups=2), of(1, 1))


def test_a_shard_lost_between_passes_starts_the_search_again(memory_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threshold, "LISTED", 1)
    scores = np.random.default_rng(2).standard_normal(3_000).astype(np.float32)
    run = memory_run.of({"a.score": scores}, shards=3)
    whole_shards, count = run.shards, run.aggregate

    def losing(statistic: Any) -> Any:
        state = count(statistic)
        run.shards = whole_shards[:2]
        return state

    monkeypatch.setattr(run, "aggregate", losing)
    keep, cut = kept(run, Ranking(("a.score",)), 700)
    assert (np.flatnonzero(keep) == np.sort(np.argsort(-scores[:2000], kind="stable")[:700])).all()
    assert cut.totals.seen_rows == 2_000


# ---- properties


@st.composite
def corpora(draw: st.DrawFn) -> dict[str, np.ndarray]:
    rows = draw(st.integers(1, 60))
    values = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 1.0000001]), st.floats(width=32, allow_nan=False))
    lists = st.lists(values, min_size=rows, max_size=rows)
    return {
        "a.score": np.array(draw(lists), np.float32) + np.float32(0),
        "b.score": np.array(draw(lists), np.float32) + np.float32(0),
        "row.tokens": np.array(draw(st.lists(st.integers(0, 9), min_size=rows, max_size=rows))),
        "concept.concept": np.array(draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows)), np.int32),
        "row.key": np.array(draw(st.lists(st.integers(0, 40), min_size=rows, max_size=rows))),
    }


@settings(max_examples=150, deadline=None)
@given(
    columns=corpora(),
    budget=st.lists(st.integers(0, 60), min_size=4, max_size=4),
    shards=st.integers(1, 4),
    unit=st.sampled_from(["", "row.tokens"]),
    scores=st.sampled_from([(), ("a.score",), ("a.score", "b.score")]),
    grouped=st.booleans(),
    skip=st.booleans(),
    few=st.booleans(),
)
def test_equals_sorting_everything(memory_run: Any, **case: Any) -> None:
    """Whatever the digits' widths: one pass that lists, or many of few bits."""
    run = memory_run.of(case["columns"], case["shards"])
    groups = 4 if case["grouped"] else 1
    ranking = Ranking(
        case["scores"], case["unit"], SEED, group="concept.concept" if case["grouped"] else "", groups=groups
    )
    budget = case["budget"][:groups]
    with pytest.MonkeyPatch.context() as patch:
        if case["few"]:
            patch.setattr(threshold, "LISTED", 2)
            patch.setattr(threshold, "BINS", 2**7)
        search = find(run, ranking, of(*budget))
        keep = run.kept([search.line()])
        assert (keep == by_sorting(run, ranking, budget)).all()
        weight = run.column(ranking.unit) if ranking.unit else np.ones(run.rows, np.int64)
        group = run.column("concept.concept") if case["grouped"] else np.zeros(run.rows, int)
        for g in range(groups):
            spent = weight[keep & (group == g)].sum()
            assert (search.rows[g], search.weight[g]) == ((keep & (group == g)).sum(), spent)
            rest = (~keep & (group == g)).any()
            assert spent <= budget[g]
            assert spent + search.next_weight[g] > budget[g] if rest else search.next_weight[g] == 0
        if case["skip"] and search.rows.any() and case["unit"]:
            assert (
                run.kept(exact(run, ranking, of(*budget), skip=True).lines) == by_sorting(run, ranking, budget, True)
            ).all()


@settings(max_examples=60, deadline=None)
@given(columns=corpora(), order=st.randoms(use_true_random=False), shards=st.integers(1, 5), count=st.integers(1, 60))
def test_the_order_and_the_sharding_of_rows_do_not_matter(
    memory_run: Any, columns: dict[str, np.ndarray], order: Any, shards: int, count: int
) -> None:
    columns |= {"row.key": np.arange(len(columns["a.score"]))}
    shuffled = list(range(len(columns["a.score"])))
    order.shuffle(shuffled)
    ranking = Ranking(("a.score",), "row.tokens", SEED)
    one, other = (
        memory_run.of(columns),
        memory_run.of({n: v[shuffled] for n, v in columns.items()}, shards, batch_rows=3),
    )
    first, second = (r.kept([find(r, ranking, of(count)).line()]) for r in (one, other))
    assert (first[shuffled] == second).all()


@settings(max_examples=60, deadline=None)
@given(columns=corpora(), counts=st.tuples(st.integers(1, 200), st.integers(1, 200)))
def test_a_smaller_budget_keeps_a_subset(
    memory_run: Any, columns: dict[str, np.ndarray], counts: tuple[int, int]
) -> None:
    run = memory_run.of(columns)
    for unit in ("", "row.tokens"):
        few, many = (run.kept([find(run, Ranking(("a.score",), unit, SEED), of(c)).line()]) for c in sorted(counts))
        assert not (few & ~many).any()


@settings(max_examples=100, deadline=None)
@given(columns=corpora(), budget=st.lists(st.integers(0, 40), min_size=4, max_size=4), few=st.booleans())
def test_leftovers_of_groups_are_spent_to_within_a_row(
    memory_run: Any, columns: dict[str, np.ndarray], budget: list[int], few: bool
) -> None:
    run = memory_run.of(columns)
    for scores in (("a.score",), ()):
        ranking = Ranking(scores, "row.tokens", SEED, "concept.concept", 4)
        with pytest.MonkeyPatch.context() as patch:
            if few:
                patch.setattr(threshold, "LISTED", 2)
                patch.setattr(threshold, "BINS", 2**7)
            plain = find(run, ranking, of(*budget))
            if not plain.rows.any():
                continue
            cut = exact(run, ranking, of(*budget))
        before, after = run.kept([plain.line()]), run.kept(cut.lines)
        assert not (before & ~after).any()
        extra = np.bincount(run.column("concept.concept")[after & ~before], minlength=4)
        assert extra.max() <= 1
        assert (cut.rows == plain.rows + extra).all()
        assert (cut.weight == plain.weight + extra * plain.next_weight).all()
        assert cut.rows.sum() == after.sum()
        spent = run.column("row.tokens")[after].sum()
        whole = sum(min(b, t) for b, t in zip(budget, plain.totals.weight, strict=True))
        assert spent <= sum(budget)
        assert spent + cut.next_weight > sum(budget) or whole < sum(budget) or after.all()


def test_the_least_excess_is_rounded_up_first(memory_run: Any) -> None:
    columns = {"a.score": np.array([4, 3, 4, 3], np.float32), "row.tokens": np.array([8, 3, 6, 9])}
    run = memory_run.of(columns | {"concept.concept": np.array([0, 0, 1, 1], np.int32)})
    keep, cut = kept(run, Ranking(("a.score",), "row.tokens", group="concept.concept", groups=2), 10, 10)
    assert (keep.tolist(), cut.weight.tolist(), cut.next_weight) == ([True, True, True, False], [11, 6], 9)


def test_masks_floors_and_lines_beyond_leave_rows_out(memory_run: Any) -> None:
    score = np.arange(8, 0, -1, dtype=np.float32)
    run = memory_run.of(
        {"a.score": score, "b.score": -score, "in.keep": np.arange(8) % 2 == 0, "out.keep": np.arange(8) == 2}
    )
    ranking = Ranking(("a.score",), floors=(("b.score", -7.0),), where=("in.keep",), where_not=("out.keep",))
    first = exact(run, ranking, of(1))
    above = run.kept(first.lines)
    assert above[4]
    assert not above[6]
    assert (first.totals.rows.tolist(), first.totals.seen_rows) == ([2], 8)
    second = exact(run, Ranking(("a.score",), beyond=first.lines), of(1))
    assert np.flatnonzero(run.kept(second.lines) & ~above).tolist() == [np.flatnonzero(~above)[0]]
