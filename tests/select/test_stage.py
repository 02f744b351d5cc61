"""The stage on the real engine, in process: a corpus in Parquet files whose columns play scores and concepts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import parse
from pipeline.corpus.rows import row_column
from pipeline.engine.pool import InlinePool
from pipeline.errors import ConfigError, TamisError
from pipeline.recipe import Column, Transform
from pipeline.run import Run
from pipeline.scores.base import Score
from pipeline.select.combine import gumbel
from pipeline.select.config import Select
from pipeline.select.stage import Selection, select, stream
from pipeline.select.subset import subset


def rename(fields: pa.Schema) -> Transform:
    return lambda batch: pa.RecordBatch.from_arrays(batch.columns, schema=fields)


class Given(Score):
    """A score that lies in the corpus; with a rule where one is given."""

    kind: Literal["given"] = "given"
    rule: bool = False

    def column(self, run: Run) -> Column:
        inputs = (f"corpus.{self.name}", *([f"corpus.{self.name}_rule"] if self.rule else []))
        fields = pa.schema([("score", pa.float32()), *([("rule", pa.string())] if self.rule else [])])
        return Column(self.name, inputs, fields, partial(rename, fields), self.identity())


class Sieve:
    """A run directory over a corpus, opened anew for every selection as the command line does."""

    def __init__(self, directory: Path, rows: pa.Table, files: int) -> None:
        self.directory, self.files = directory, files
        (directory / "corpus").mkdir(parents=True)
        edges = np.linspace(0, rows.num_rows, files + 1).astype(int)
        for i, (start, stop) in enumerate(pairwise(edges)):
            pq.write_table(rows.slice(start, stop - start), directory / "corpus" / f"{i}.parquet", row_group_size=16)
        self.names = [n for n in rows.column_names if n not in ("text", "id", "concept") and not n.endswith("_rule")]
        self.rules = [n for n in self.names if f"{n}_rule" in rows.column_names]
        self.has_concepts = "concept" in rows.column_names
        self.passes: list[dict[str, Any]] = []

    @contextmanager
    def open(self) -> Iterator[Run]:
        given = {"corpus": {"path": str(self.directory / "corpus"), "id": "id", "shard_mb": 1e-6}}
        given |= {
            "scores": ["random"],
            "select": {"budget": {"rows": 1}},
            "engine": {"max_bad_fraction": 1},
            "run": str(self.directory / "run"),
        }
        with Run(parse(given), InlinePool, quiet=True) as run:
            columns = [row_column(True, None), *(s.column(run) for s in self.scores)]
            if self.has_concepts:
                fields = pa.schema([("concept", pa.int32())])
                columns.append(Column("concept", ("corpus.concept",), fields, partial(rename, fields), "given"))
            run.materialize(columns)
            yield run
            self.passes = run.manifest["passes"]

    @property
    def scores(self) -> list[Score]:
        return [Given(kind="given", name=n, rule=n in self.rules) for n in self.names]

    def select(self, concepts: pa.Table | None = None, **config: Any) -> Selection:
        with self.open() as run:
            return select(run, Select.model_validate(config), self.scores, concepts)

    def column(self, name: str) -> pa.Table:
        parts = sorted((self.directory / "run" / "columns" / name).glob("*.parquet"))
        return pa.concat_tables([pq.read_table(p) for p in parts]).unify_dictionaries()

    @property
    def keep(self) -> np.ndarray:
        return self.column("select")["keep"].to_numpy(zero_copy_only=False)

    @property
    def reasons(self) -> list[str | None]:
        return self.column("select")["reason"].cast(pa.string()).to_pylist()


@pytest.fixture
def sieve(tmp_path: Path) -> Any:
    def make(columns: dict[str, Any], files: int = 3, name: str = "one") -> Sieve:
        rows = len(next(iter(columns.values())))
        table = pa.table({"id": [f"r{i}" for i in range(rows)], "text": ["abc"] * rows} | columns)
        return Sieve(tmp_path / name, table, files)

    return make


def f32(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32)


def texts(tokens: list[int]) -> list[str]:
    """Texts of so many tokens at 4 bytes a token."""
    return ["abcd" * n for n in tokens]


def concepts(sizes: list[int], complexity: list[float]) -> pa.Table:
    numbers = np.arange(len(sizes), dtype=np.int32)
    return pa.table({"concept": numbers, "n": np.array(sizes), "complexity": np.array(complexity)})


def test_a_budget_of_rows_with_every_reason(sieve: Any) -> None:
    job = sieve(
        {
            "a": f32([5, 4, 3, 3, 3, 2, 9, np.nan]),
            "b": f32([1, 1, 1, 1, 1, 1, 0, 1]),
            "b_rule": [""] * 6 + ["short", ""],
        }
    )
    found = job.select(budget={"rows": 4}, weights={"a": 1}, floors={"b": 0.5})
    assert found.reasons == {"kept": 4, "below_threshold": 1, "tie_lost": 1, "b:short": 1, "quarantined": 1}
    reasons = job.reasons
    assert [reasons[i] for i in (0, 1, 5, 6, 7)] == ["kept", "kept", "below_threshold", "b:short", None]
    assert sorted(r or "" for r in reasons[2:5]) == ["kept", "kept", "tie_lost"]
    assert (found.budget, found.rows, found.available, found.corpus) == (4, 4, 7, 8)
    assert (found.threshold, found.next_row, found.ranked_by, found.unit) == (3.0, 1, ("a.score",), "rows")
    assert (found.tokens, found.bytes, found.kept) == (4, 12, 4)  # three bytes are one token
    assert {r: sum(k is True for k, s in zip(job.keep, job.reasons, strict=True) if s == r) for r in set(reasons)} == {
        "kept": 4,
        "tie_lost": 0,
        "below_threshold": 0,
        "b:short": 0,
        None: 0,
    }
    shards = found.shards()
    assert (shards["rows"].sum(), shards["bytes"].sum(), len(shards["shard"])) == (4, 12, 3)
    assert found.concepts() is None


def test_floors_go_in_their_order(sieve: Any) -> None:
    job = sieve({"a": f32([1, 2, 3, 4]), "b": f32([0, 0, 1, 1])})
    found = job.select(budget={"rows": 1}, weights={"a": 1}, floors={"b": 1, "a": 4})
    assert job.reasons == ["floor:b", "floor:b", "floor:a", "kept"]
    assert found.notes == ()


def test_the_prefix_rule_and_skip_on_tokens(sieve: Any) -> None:
    job = sieve({"text": texts([500, 300, 900, 200, 400]), "a": f32([5, 4, 3, 2, 1])})
    found = job.select(budget={"tokens": 1500})
    assert (found.rows, found.tokens, found.bytes, found.next_row) == (2, 800, 3200, 900)
    assert job.reasons == ["kept", "kept", "below_threshold", "below_threshold", "below_threshold"]
    assert found.tokens_named == "bytes/4"
    found = job.select(budget={"tokens": 1500}, skip=True)
    assert (found.rows, found.tokens, found.next_row) == (4, 1400, 0)
    assert job.reasons == ["kept", "kept", "too_large", "kept", "kept"]
    with pytest.raises(TamisError, match="first row alone has 2,000 bytes, more than the budget of 1,999"):
        job.select(budget={"bytes": 1999})


def test_a_row_in_quarantine_for_any_score_is_never_kept(sieve: Any) -> None:
    job = sieve({"a": f32([5, 4, 3]), "b": f32([np.nan, 1, 1])})
    found = job.select(budget={"rows": 2}, weights={"a": 1})
    assert job.keep.tolist() == [None, True, True]
    assert (found.available, found.reasons) == (2, {"kept": 2, "quarantined": 1})


def test_ties_of_which_none_fits_are_below_the_threshold(sieve: Any) -> None:
    job = sieve({"text": texts([1, 10, 10]), "a": f32([5, 3, 3])})
    found = job.select(budget={"tokens": 6})
    assert (found.reasons, found.next_row) == ({"below_threshold": 2, "kept": 1}, 10)


def test_a_budget_above_at_and_below_the_corpus(sieve: Any) -> None:
    job = sieve({"a": f32([1, 2, np.nan, 4])})
    with pytest.raises(ConfigError, match=r"4 is more than the corpus has, 3 rows without quarantined rows"):
        job.select(budget={"rows": 4})
    for budget in ({"rows": 3}, {"fraction": 1.0}):
        found = job.select(budget=budget)
        assert (found.rows, found.notes) == (3, ("the budget takes all 3 rows that there are",))
    assert job.select(budget={"fraction": 0.5, "of": "bytes"}).kept == 3  # 4.5 of 9 bytes hold one text of 3
    found = job.select(budget={"rows": 2}, floors={"a": 3})
    assert found.notes == ("only 1 rows reach the floors, less than the budget: all are kept",)
    assert found.rows == 1
    with pytest.raises(ConfigError, match=r"select.strict: 1 of 3 rows reach the floors"):
        job.select(budget={"rows": 2}, floors={"a": 3}, strict=True)
    with pytest.raises(TamisError, match="below a floor"):
        job.select(budget={"rows": 1}, floors={"a": 30})
    with pytest.raises(TamisError, match="in quarantine"):
        sieve({"a": f32([np.nan] * 3)}, name="nan").select(budget={"rows": 1})


def test_gates_let_pass_and_the_rest_rank_one_after_the_other(sieve: Any) -> None:
    job = sieve({"gate": f32([1, 1, 0, 1, 1]), "coarse": f32([1, 2, 9, 2, 2]), "fine": f32([9, 1, 9, 3, 2])})
    found = job.select(budget={"rows": 2}, combine="gates", floors={"gate": 1})
    assert job.reasons == ["below_threshold", "below_threshold", "floor:gate", "kept", "kept"]
    assert found.ranked_by == ("coarse.score", "fine.score")


def test_combined_scores_are_stored_and_their_order_is_kept(sieve: Any) -> None:
    job = sieve({"a": f32([4, 3, 2, 1]), "b": f32([2, 4, 1, 3])})
    for rule in ("rank", "rrf", "geometric", "zscore"):
        found = job.select(budget={"rows": 2}, combine=rule)
        assert (job.keep.tolist(), found.ranked_by) == ([True, True, False, False], ("combined.score",))
    job.select(budget={"rows": 1}, combine="rank")
    assert job.column("combined")["score"].to_pylist() == [0.625, 0.75, 0.25, 0.375]
    assert job.keep.tolist() == [False, True, False, False]
    job.select(budget={"rows": 1}, weights={"a": 1})
    assert job.keep.tolist() == [True, False, False, False]


def test_a_temperature_draws_and_its_extremes_are_the_cut_and_chance(sieve: Any) -> None:
    scores = f32(np.arange(200))
    job = sieve({"a": scores})
    job.select(budget={"rows": 50}, temperature=20.0, seed=9)
    keys = job.column("row")["key"].combine_chunks()
    drawn = scores / 20 + gumbel(keys, stream(9, "draw"))
    assert job.column("combined")["score"].to_numpy() == pytest.approx(drawn, rel=1e-6)
    cold, warm = [], []
    for seed in range(3):
        job.select(budget={"rows": 50}, temperature=1e-3, seed=seed)
        cold.append(job.keep)
        job.select(budget={"rows": 50}, temperature=50.0, seed=seed)
        warm.append(job.keep)
    assert all((k == (scores >= 150)).all() for k in cold)
    assert not (warm[0] == warm[1]).all()
    assert all(scores[k].mean() > 110 and (k & (scores < 150)).any() for k in warm)


def test_another_budget_reads_scores_alone_and_the_same_one_nothing(sieve: Any) -> None:
    job = sieve({"a": f32(np.arange(40)), "b": f32(np.arange(40) ** 2 % 41)})
    first = job.select(budget={"rows": 10})
    assert [p["pass"] for p in job.passes if p["units"]] == [
        "row+a+b",
        "percentiles",
        "fit combined",
        "combined",
        "histogram",
        "fit threshold",
        "select",
        "realised",
        "fit selection",
    ]
    kept = job.keep
    assert job.select(budget={"rows": 10}) == first
    assert job.passes == []
    assert (job.keep == kept).all()
    job.select(budget={"rows": 20})
    assert [p["pass"] for p in job.passes] == ["histogram", "fit threshold", "select", "realised", "fit selection"]


def test_sharding_does_not_matter(sieve: Any) -> None:
    rng = np.random.default_rng(4)
    columns = {"a": f32(rng.integers(0, 9, 120)), "concept": rng.integers(0, 4, 120).astype(np.int32)}
    columns["text"] = texts(rng.integers(1, 30, 120).tolist())
    table = concepts(np.bincount(columns["concept"]).tolist(), [0.1, 0.2, 0.3, 0.1])
    flags = []
    for files in (1, 4, 7):
        job = sieve(columns, files, name=f"files{files}")
        job.select(table, budget={"tokens": 500}, quotas="density")
        flags.append(job.keep)
    assert (flags[0] == flags[1]).all()
    assert (flags[0] == flags[2]).all()


def toy() -> tuple[dict[str, np.ndarray], pa.Table]:
    sizes = [400, 60, 50, 90]
    concept = np.repeat(np.arange(4, dtype=np.int32), sizes)
    score = np.random.default_rng(5).permutation(600)
    return {"a": f32(score), "concept": concept}, concepts(sizes, [0.10, 0.15, 0.20, 0.30])


def test_the_toy_of_density_based_pruning(sieve: Any) -> None:
    columns, table = toy()
    job = sieve(columns)
    found = job.select(table, budget={"rows": 240}, quotas={"rule": "density", "tau": 0.1, "balance": 0})
    assert np.bincount(columns["concept"][job.keep]).tolist() == [44, 56, 50, 90]
    stored = found.concepts()
    assert stored is not None
    assert stored["quota"].to_pylist() == stored["kept_rows"].to_pylist() == [44, 56, 50, 90]
    hardest = np.argsort(-columns["a"][:400])[:44]
    assert job.keep[:400].nonzero()[0].tolist() == sorted(hardest.tolist())
    assert found.notes == ("quotas spread over 3.0 effective concepts of 4",)
    lowest = columns["a"][job.keep].min()
    lost = np.array(job.reasons) == "quota"
    assert (lost == (~job.keep & (columns["a"] >= lowest))).all()
    assert set(job.reasons) == {"kept", "quota", "below_threshold"} or lost.sum() == 360


def test_density_leaves_no_concept_without_a_row(sieve: Any) -> None:
    columns, table = toy()
    job = sieve(columns)
    job.select(table, budget={"rows": 80}, quotas={"rule": "density", "tau": 1e-4, "balance": 0})
    assert np.bincount(columns["concept"][job.keep]).tolist() == [1, 1, 1, 77]


@pytest.mark.parametrize(
    ("quotas", "kept"),
    [
        ("equal", [65, 60, 50, 65]),
        ("proportional", [160, 24, 20, 36]),
        ({"rule": "proportional", "balance": 1}, [70, 60, 50, 60]),
    ],
)
def test_other_quotas(sieve: Any, quotas: Any, kept: list[int]) -> None:
    columns, table = toy()
    job = sieve(columns)
    job.select(table, budget={"rows": 240}, quotas=quotas)
    assert np.bincount(columns["concept"][job.keep]).tolist() == kept


def test_balance_gives_every_concept_its_best_rows_and_the_rest_by_rank(sieve: Any) -> None:
    concept = np.repeat(np.arange(2, dtype=np.int32), [1000, 100])
    job = sieve({"a": f32(np.arange(1100)[::-1]), "concept": concept})  # every row of concept 0 is harder
    table = concepts([1000, 100], [0.1, 0.1])
    found = job.select(table, budget={"rows": 220}, quotas={"balance": 0.5})
    assert np.bincount(concept[job.keep]).tolist() == [165, 55]
    assert job.keep[:165].all()
    assert job.keep[1000:1055].all()
    assert found.reasons == {"kept": 220, "quota": 835, "below_threshold": 45}
    assert job.select(table, budget={"rows": 1}, quotas={"balance": 0.5}).notes[0].startswith("balance has no effect")
    assert np.bincount(concept[job.keep]).tolist() == [1]
    job.select(table, budget={"rows": 200}, quotas={"balance": 1.0})
    assert np.bincount(concept[job.keep]).tolist() == [100, 100]


def test_quotas_in_tokens_leave_less_than_a_row_unspent(sieve: Any) -> None:
    rng = np.random.default_rng(6)
    concept = rng.integers(0, 8, 400).astype(np.int32)
    tokens = rng.integers(1, 60, 400)
    job = sieve({"a": f32(rng.random(400)), "concept": concept, "text": texts(tokens.tolist())})
    found = job.select(concepts(np.bincount(concept).tolist(), [0.1] * 8), budget={"tokens": 3000}, quotas="equal")
    assert found.tokens == tokens[job.keep].sum() <= 3000 < found.tokens + found.next_row
    stored = found.concepts()
    assert stored is not None
    assert stored["quota"].to_pylist() == [375] * 8
    assert (np.abs(stored["kept_tokens"].to_numpy() - 375) < 60).all()
    assert stored["kept_tokens"].to_pylist() == np.bincount(concept, tokens * job.keep).astype(int).tolist()


def test_floors_come_before_quotas_and_rows_without_concept_are_out(sieve: Any) -> None:
    concept = pa.array([0, 0, 0, 1, 1, None], pa.int32())
    job = sieve({"a": f32([6, 5, 4, 3, 2, 9]), "b": f32([1, 1, 1, 1, 0, 1]), "concept": concept})
    table = concepts([3, 2], [0.1, 0.1])
    found = job.select(table, budget={"rows": 3}, quotas="equal", weights={"a": 1}, floors={"b": 1})
    assert job.reasons == ["kept", "kept", "quota", "kept", "floor:b", None]
    assert found.available == 5


def test_quotas_need_concepts_in_order(sieve: Any) -> None:
    columns, table = toy()
    job = sieve(columns)
    with pytest.raises(ConfigError, match=r"equal needs concepts: add `cluster"):
        job.select(budget={"rows": 5}, quotas="equal")
    with pytest.raises(TamisError, match="every concept from 0 on"):
        job.select(table.slice(1), budget={"rows": 5}, quotas="equal")
    job.select(table.take([3, 1, 0, 2]), budget={"rows": 240}, quotas={"rule": "density", "balance": 0})
    assert np.bincount(columns["concept"][job.keep]).tolist() == [44, 56, 50, 90]


def test_relative_tau_is_in_deviations_of_the_complexity(sieve: Any) -> None:
    columns, table = toy()
    job = sieve(columns)
    tau = 0.1 / np.std([0.10, 0.15, 0.20, 0.30])
    job.select(table, budget={"rows": 240}, quotas={"rule": "density", "tau": tau, "relative": True, "balance": 0})
    assert np.bincount(columns["concept"][job.keep]).tolist() == [44, 56, 50, 90]


def test_subsets_are_random_disjoint_and_cover_concepts(sieve: Any) -> None:
    rng = np.random.default_rng(7)
    concept = np.minimum(rng.geometric(0.3, 500) - 1, 9).astype(np.int32)
    tokens = rng.integers(1, 40, 500)
    job = sieve({"a": f32(rng.random(500)), "concept": concept, "text": texts(tokens.tolist())})
    with job.open() as run:
        select(run, Select.model_validate({"budget": {"rows": 300}}), job.scores)
        calibration = subset(run, "calibration", rows=40, seed=1, concepts=10)
        recovery = subset(run, "recovery", tokens=900, seed=1, without=("calibration",))
        everything = subset(run, "everything", rows=10_000)
        again = len(run.manifest["passes"])
        assert subset(run, "recovery", tokens=900, seed=1, without=("calibration",)) == recovery
        assert len(run.manifest["passes"]) == again
        with pytest.raises(TamisError, match="no row is left"):
            subset(run, "nothing", rows=1, without=("select",))
        for wrong in ({}, {"rows": 1, "tokens": 1}, {"rows": -1}):
            with pytest.raises(ValueError, match="needs one of rows, tokens and bytes"):
                subset(run, "wrong", **wrong)
    first, second, kept = (
        job.column(n)["keep"].to_numpy(zero_copy_only=False) for n in ("calibration", "recovery", "select")
    )
    assert not (first & second).any()
    assert not ((first | second) & ~kept).any()
    assert (calibration.rows, calibration.amount, first.sum()) == (40, 40, 40)
    per_concept, there = np.bincount(concept[first], minlength=10), np.bincount(concept[kept], minlength=10)
    assert (per_concept[there > 0] > 0).all()
    assert per_concept[there > per_concept].max() - per_concept[there > per_concept].min() <= 1
    assert recovery.amount == tokens[second].sum() <= 900 < recovery.amount + 40
    assert (everything.rows, everything.amount) == (300, 300)


def test_what_is_stored_is_plain_and_readable(sieve: Any) -> None:
    job = sieve({"a": f32([1, 2, 3])})
    found = job.select(budget={"rows": 2})
    stored = json.loads((job.directory / "run" / "artifacts" / "selection" / "selection.json").read_text())
    assert stored["reasons"] == found.reasons == {"kept": 2, "below_threshold": 1}
    assert (stored["rows"], stored["budget"], stored["unit"]) == (2, 2, "rows")
    schema = pq.read_schema(next((job.directory / "run" / "columns" / "select").glob("*.parquet")))
    assert schema.field("keep").type == pa.bool_()
    assert schema.field("reason").type == pa.dictionary(pa.int32(), pa.string())
