"""`regroup` against polars' group_by, and its rounds being resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toys
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.rows import row_column
from pipeline.engine.pool import InlinePool, Pool, RayPool
from pipeline.engine.regroup import GatherTask, blocks_of, key_groups, partition_of, unopened
from pipeline.errors import TamisError
from pipeline.hashing import row_keys
from pipeline.recipe import Column
from pipeline.run import Run
from pipeline.vectors import matrix

FIELDS = pa.schema([("size", pa.int32()), ("tokens", pa.int64())])


def same(identity: str = "1", inputs: tuple[str, ...] = ("row.tokens",)) -> Column:
    return Column("same", inputs, FIELDS, toys.absent, identity)


def expected(run: Run) -> pl.DataFrame:
    rows = pl.read_parquet(f"{run.store.path}/columns/row/*.parquet")
    found = rows.select(
        size=pl.len().over("bytes").cast(pl.Int32), tokens=pl.col("tokens").sum().over("bytes").cast(pl.Int64)
    )
    alone = found["size"] == 1
    missing = rows["bytes"].is_null()
    return found.with_columns(pl.when(~alone & ~missing).then(pl.all()))


def stored(run: Run) -> pl.DataFrame:
    return pl.read_parquet(f"{run.store.path}/columns/same/*.parquet")


@pytest.mark.parametrize(("partition_bytes", "block_rows"), [(1 << 27, 1 << 22), (400, 25), (60, 1)])
def test_groups_are_those_of_polars(
    write_corpus: Any,
    open_run: Any,
    any_pool: Callable[[], Pool],
    monkeypatch: pytest.MonkeyPatch,
    partition_bytes: int,
    block_rows: int,
) -> None:
    monkeypatch.setattr("pipeline.run.PARTITION_BYTES", partition_bytes)
    monkeypatch.setattr("pipeline.engine.regroup.BLOCK_ROWS", block_rows)
    corpus = write_corpus(files=4, rows=30, groups=2)
    pq.write_table(pa.table({"id": ["x", "y"], "text": [None, "abc"]}), corpus / "f99.parquet")
    with open_run(corpus, any_pool) as run:
        run.materialize([row_column(False, None)])
        run.regroup(same(), "row.bytes", toys.groups)
        assert stored(run).equals(expected(run))
        assert stored(run)["size"].null_count() > 0
        assert not Path(run.store.path, "scratch", "regroup", "same").exists()


def test_parts_do_not_depend_on_workers(
    write_corpus: Any, open_run: Any, lasting_pool: RayPool, ray_pool: Callable[..., RayPool]
) -> None:
    corpus = write_corpus(files=3)
    parts = []
    for name, pool in (("inline", InlinePool), ("w2", lambda: lasting_pool), ("w4", lambda: ray_pool(4))):
        with open_run(corpus, pool, name) as run:
            run.materialize([row_column(False, None)])
            run.regroup(same(), "row.bytes", toys.groups)
            parts.append([f.read_bytes() for f in sorted(Path(run.store.path, "columns", "same").iterdir())])
    assert parts[0] == parts[1] == parts[2]


def test_by_the_key_of_a_row(tmp_path: Path, open_run: Any) -> None:
    texts = ["a", "b", "a", "c", "b", "a"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "c.parquet", row_group_size=2)
    with open_run(tmp_path / "c.parquet") as run:
        run.materialize([row_column(False, None)])
        run.regroup(same(inputs=("row.tokens", "row.bytes")), "row.key", by_key)
        assert stored(run)["size"].to_list() == [3, 2, 3, 1, 2, 3]


def by_key(table: pa.Table) -> pa.Table:
    sizes = [n for group in key_groups(table, "row.key") for n in [len(group)] * len(group)]
    return (
        table.select(["address.shard", "address.row"])
        .append_column("size", pa.array(sizes))
        .append_column("tokens", table["row.tokens"])
    )


def test_what_is_done_is_not_done_again(write_corpus: Any, open_run: Any) -> None:
    corpus = write_corpus()
    with open_run(corpus) as run:
        run.materialize([row_column(False, None)])
        run.regroup(same(), "row.bytes", toys.groups)
        first, passes = stored(run), len(run.manifest["passes"])
        run.regroup(same(), "row.bytes", toys.groups)
        assert len(run.manifest["passes"]) == passes
        Path(run.store.path, "columns/same/part-00002.parquet").unlink()
        run.regroup(same(), "row.bytes", toys.groups)
        assert stored(run).equals(first)
        run.regroup(same("2"), "row.bytes", toys.groups)
        assert [p["pass"] for p in run.manifest["passes"][-3:]] == ["same split", "same gather", "same scatter"]


def test_another_key_is_another_result(write_corpus: Any, open_run: Any) -> None:
    with open_run(write_corpus()) as run:
        base = row_column(False, None)
        run.materialize([base])
        found = []
        for column, key in ((base, "row.bytes"), (base, "row.tokens"), (replace(base, identity="x"), "row.tokens")):
            run.plan(column)
            run.regroup(same(inputs=()), key, partial(by, key))
            found.append((run.plans["same"].fingerprint, run.manifest["columns"]["same"]["computed"]))
        assert len({fingerprint for fingerprint, _ in found}) == 3
        assert [computed for _, computed in found] == [6, 6, 6]


def by(key: str, table: pa.Table) -> pa.Table:
    return table.append_column("size", table[key]).append_column("tokens", table[key])


def test_a_dead_driver_leaves_its_rounds(write_corpus: Any, open_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.run.PARTITION_BYTES", 400)
    corpus = write_corpus()
    gather, done = GatherTask.__call__, []

    def dying(self: GatherTask, partition: int, attempt: int) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(partition)
        return gather(self, partition, attempt)

    with monkeypatch.context() as patch:
        patch.setattr(GatherTask, "__call__", dying)
        with open_run(corpus) as run:
            run.materialize([row_column(False, None)])
            with pytest.raises(KeyboardInterrupt):
                run.regroup(same(), "row.bytes", toys.groups)
    with open_run(corpus) as run:
        run.materialize([row_column(False, None)])
        run.regroup(same(), "row.bytes", toys.groups)
        units = {p["pass"]: p["units"] for p in run.manifest["passes"]}
        assert "same split" not in units
        assert "row" not in units
        assert stored(run).equals(expected(run))
    with open_run(corpus, name="undisturbed") as fresh:
        fresh.materialize([row_column(False, None)])
        fresh.regroup(same(), "row.bytes", toys.groups)
        whole = {p["pass"]: p["units"] for p in fresh.manifest["passes"]}
        assert units["same gather"] == whole["same gather"] - 2 > 0
        assert stored(fresh).equals(stored(run))


def test_a_key_of_another_type_is_refused(write_corpus: Any, open_run: Any) -> None:
    with open_run(write_corpus()) as run, pytest.raises(TamisError, match=r"regrouped by corpus\.id, which is string"):
        run.regroup(same(inputs=()), "corpus.id", toys.groups)


def test_a_key_larger_than_a_partition_takes_its_vectors_along(
    write_corpus: Any, open_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.run.PARTITION_BYTES", 100)

    def rows_of(file: int, rows: int) -> dict[str, Any]:
        vectors = [[file, i] for i in range(rows)]
        return {"text": ["x"] * rows, "v": pa.array(vectors, pa.list_(pa.float16(), 2)), "one": [7] * rows}

    with open_run(write_corpus(rows_of=rows_of)) as run:
        run.regroup(same(inputs=("corpus.v",)), "corpus.one", largest)
        assert stored(run)["size"].to_list() == [60] * 60
        assert stored(run)["tokens"].to_list() == [file * 100 + i for file in range(3) for i in range(20)]


def largest(table: pa.Table) -> pa.Table:
    x = matrix(table["corpus.v"].combine_chunks()) if len(table) else np.zeros((0, 2))
    sizes = np.full(len(table), len(table))
    return table.append_column("size", pa.array(sizes)).append_column("tokens", pa.array(x @ [100, 1]))


def test_a_regrouped_column_is_not_opened() -> None:
    with pytest.raises(TamisError, match="filled by regrouping"):
        unopened()


@given(st.lists(st.integers(0, 5), max_size=30))
def test_runs_of_equal_keys(values: list[int]) -> None:
    table = pa.table({"k": pa.array(sorted(values), pa.int64())})
    found = [group["k"].to_pylist() for group in key_groups(table, "k")]
    assert found == [[v] * values.count(v) for v in sorted(set(values))]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=50), st.integers(1, 9))
def test_equal_keys_meet_in_one_partition(values: list[int], partitions: int) -> None:
    keys = pa.array(values, pa.int64())
    found = partition_of(keys, partitions)
    assert found.tolist() == [partition_of(keys.slice(i, 1), partitions)[0] for i in range(len(values))]
    assert ((found >= 0) & (found < partitions)).all()


def test_partitions_are_even() -> None:
    for keys in (pa.array(np.arange(100_000) * 1024), row_keys(pa.array([str(i) for i in range(100_000)]))):
        counts = np.bincount(partition_of(keys, 10), minlength=10)
        assert (abs(counts - 10_000) < 500).all()  # five standard deviations


def test_blocks_hold_consecutive_shards(write_corpus: Any, open_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run(write_corpus(files=5, rows=10, groups=1)) as run:
        for rows, row_bytes, held in (
            (25, 1, [2, 2, 1]),
            (10, 1, [1] * 5),
            (1, 1, [1] * 5),
            (1000, 1, [5]),
            (1000, 40, [2, 2, 1]),
            (1000, 9999, [1] * 5),
        ):
            monkeypatch.setattr("pipeline.engine.regroup.BLOCK_ROWS", rows)
            monkeypatch.setattr("pipeline.engine.regroup.BLOCK_BYTES", 1000)
            blocks = blocks_of(run.live, row_bytes)
            assert [len(shards) for _, shards in blocks] == held
            assert [s.index for _, shards in blocks for s in shards] == list(range(5))
