"""`materialize`: values, addresses and faults, on both engines."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import toys

from pipeline.corpus.rows import row_column
from pipeline.engine.pool import InlinePool, Pool, RayPool
from pipeline.errors import ConfigError, NoShardLeft, TamisError, TooManyBadRows
from pipeline.recipe import Resources
from pipeline.run import Run

Pools = Callable[[], Pool]


def stored(run: Run, column: str) -> pa.Table:
    """A column as stored, in the order of the shards."""
    return pa.concat_tables(
        pq.read_table(f"{run.store.path}/columns/{column}/part-{s.index:05d}.parquet") for s in run.live
    )


def quarantine(run: Run, column: str) -> list[dict[str, Any]]:
    parts = sorted(Path(run.store.path, "quarantine", column).glob("*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def source_row(address: dict[str, Any]) -> dict[str, Any]:
    """The row of the source that an address points to."""
    group = pq.ParquetFile(address["file"]).read_row_group(address["row_group"])
    return group.slice(address["row"], 1).to_pylist()[0]


def digests(run: Run) -> dict[str, str]:
    files = [f for kind in ("columns", "quarantine") for f in Path(run.store.path, kind).rglob("*") if f.is_file()]
    return {str(f.relative_to(run.store.path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def plant(word: str, at: dict[int, list[int]], others: str = "word") -> Callable[[int, int], dict[str, Any]]:
    """Rows in which those at (file: rows) hold a word."""

    def rows_of(file: int, rows: int) -> dict[str, Any]:
        return {"text": [f"{word if i in at.get(file, []) else others} {file} {i}" for i in range(rows)]}

    return rows_of


def test_values_in_the_order_of_the_rows(write_corpus: Any, open_run: Any, any_pool: Pools) -> None:
    corpus = write_corpus(files=3, rows=50, groups=4)
    with open_run(corpus, any_pool) as run:
        run.materialize([toys.column("len", toys.length)])
        assert len(run.shards) == 12
        source = pq.read_table(corpus)["text"]
        assert stored(run, "len")["score"].to_pylist() == pc.binary_length(source).to_pylist()


def test_parts_do_not_depend_on_engine_or_workers(write_corpus: Any, open_run: Any, ray_pool: Any) -> None:
    corpus = write_corpus(files=4, rows=40, groups=3, rows_of=plant("BAD", {1: [3, 30], 3: [0]}))
    columns = [row_column(False, None), toys.column("len", toys.length), toys.column("bad", toys.refusing, "BAD")]
    found = []
    for name, pool in [("inline", InlinePool), *((f"w{n}", lambda n=n: ray_pool(n)) for n in (1, 2, 4))]:
        with open_run(corpus, pool, name) as run:
            run.materialize(columns)
            found.append(digests(run))
    assert len(found[0]) == 12 * 3 + 3  # three rows in three shards are in quarantine
    assert all(other == found[0] for other in found[1:])


def test_columns_of_one_pass_share_one_read(write_corpus: Any, open_run: Any) -> None:
    with open_run(write_corpus(rows=10)) as run:
        run.materialize([toys.column("a", toys.length), toys.column("b", toys.length, 2.0)])
        (together,) = run.manifest["passes"]
        assert (together["units"], together["rows"]) == (6, 30)
        assert stored(run, "b")["score"].to_pylist() == pc.multiply(stored(run, "a")["score"], 2).to_pylist()


def test_a_column_reads_one_of_the_same_pass_or_of_an_earlier_one(write_corpus: Any, open_run: Any) -> None:
    first, then = toys.column("a", toys.length), toys.column("b", toys.double, "a.score", inputs=("a.score",))
    with open_run(write_corpus(), name="same") as run:
        run.materialize([first, then])
        together = stored(run, "b")
    with open_run(write_corpus(), name="later") as run:
        run.materialize([first])
        run.materialize([then])
        assert stored(run, "b").equals(together)
        assert together["score"].to_pylist() == pc.multiply(stored(run, "a")["score"], 2).to_pylist()
    with open_run(write_corpus(), name="wrong") as run, pytest.raises(TamisError, match=r"'a.score' is read before"):
        run.materialize([then, first])


def test_a_column_reads_one_that_another_kind_of_actor_fills(write_corpus: Any, open_run: Any) -> None:
    a = toys.column("a", toys.length)
    b = toys.column("b", toys.double, "a.score", inputs=("a.score",), resources=Resources(cpus=2))
    c = toys.column("c", toys.double, "b.score", inputs=("b.score",))
    with open_run(write_corpus()) as run:
        run.materialize([a, b, c, toys.column("d", toys.length)])
        assert [p["pass"] for p in run.manifest["passes"]] == ["a+d", "b", "c"]
        assert stored(run, "c")["score"].to_pylist() == pc.multiply(stored(run, "a")["score"], 4).to_pylist()


def test_quarantine_points_to_the_very_row(write_corpus: Any, open_run: Any, any_pool: Pools) -> None:
    planted = {0: [5, 17], 2: [0, 19]}
    corpus = write_corpus(rows_of=plant("BAD", planted), groups=3)
    options = {"shard_mb": 1}  # one shard of many row groups and files
    with open_run(corpus, any_pool, corpus_options=options, max_bad_fraction=0.1) as run:
        run.materialize([toys.column("len", toys.refusing, "BAD")])
        found = quarantine(run, "len")
        assert [(Path(r["file"]).name, source_row(r)["text"], r["reason"]) for r in found] == [
            (f"f{f:02d}.parquet", f"BAD {f} {i}", "holds BAD") for f, rows in planted.items() for i in rows
        ]
        scores = stored(run, "len")["score"]
        assert [i for i, s in enumerate(scores) if not s.is_valid] == [r["shard_row"] for r in found] == [5, 17, 40, 59]
        assert run.manifest["columns"]["len"]["quarantined"] == 4


def test_unusable_texts_are_recorded_once_and_null_everywhere(tmp_path: Path, open_run: Any, any_pool: Pools) -> None:
    big = "x" * 20_000_000
    raw = [b"fine", None, b"", b" \n\t\xe3\x80\x80", b"\xff\xfe broken", big.encode(), b"\x00", "né".encode()]
    pq.write_table(pa.table({"text": pa.array(raw, pa.binary())}), tmp_path / "bad.parquet")
    with open_run(tmp_path / "bad.parquet", any_pool, max_bad_fraction=0.6) as run:
        run.materialize([row_column(False, None), toys.column("len", toys.length)])
        assert {r["row"]: r["reason"] for r in quarantine(run, "row")} == {
            1: "null text",
            2: "blank text",
            3: "blank text",
            4: "text is not UTF-8",
        }
        assert quarantine(run, "len") == []
        assert stored(run, "len")["score"].to_pylist() == [4, None, None, None, None, 20_000_000, 1, 3]
        assert stored(run, "row")["bytes"].to_pylist() == [4, None, None, None, None, 20_000_000, 1, 3]
        assert stored(run, "row")["tokens"].to_pylist() == [1, None, None, None, None, 5_000_000, 1, 1]


def test_nulls_pass_from_column_to_column(write_corpus: Any, open_run: Any) -> None:
    corpus = write_corpus(rows_of=plant("BAD", {1: [2, 3]}))
    refusing = toys.column("a", toys.refusing, "BAD")
    then = toys.column("b", toys.double, "a.score", inputs=("a.score",))
    with open_run(corpus) as run:
        run.materialize([refusing])
        run.materialize([then])
        assert np.flatnonzero(stored(run, "b")["score"].is_null()).tolist() == [22, 23]
        assert quarantine(run, "b") == []  # they are in quarantine already
        assert run.aggregate(toys.Total("b.score"))["rows"].tolist() == [58]


def test_a_null_in_another_source_column_is_recorded_by_its_reader(write_corpus: Any, open_run: Any) -> None:
    corpus = write_corpus(files=1, rows=20, rows_of=lambda f, n: {"text": ["abc"] * n, "w": [None, *range(1, n)]})
    with open_run(corpus) as run:
        run.materialize([toys.column("w", toys.double, "corpus.w", inputs=("corpus.w", "text"))])
        assert [(r["row"], r["reason"]) for r in quarantine(run, "w")] == [(0, "corpus.w is null")]


def test_nan_is_refused_and_zero_has_one_sign(write_corpus: Any, open_run: Any) -> None:
    with open_run(write_corpus(rows_of=plant("BAD", {0: [4]}))) as run:
        run.materialize([toys.column("s", toys.nan_where, "BAD")])
        assert [(r["reason"], source_row(r)["text"]) for r in quarantine(run, "s")] == [("score is NaN", "BAD 0 4")]
        scores = stored(run, "s")["score"].to_numpy()
        assert np.isnan(scores[4])
        assert not np.signbit(np.delete(scores, 4)).any()


def test_too_many_bad_rows_stop_the_run(write_corpus: Any, open_run: Any, any_pool: Pools) -> None:
    corpus = write_corpus(rows_of=plant("BAD", {0: [1, 2, 3], 1: [0]}))
    bad = toys.column("len", toys.refusing, "BAD")
    with pytest.raises(TooManyBadRows, match=r"4 of 60 rows .*max_bad_fraction = 0.06 .*quarantine/len"):
        with open_run(corpus, any_pool, max_bad_fraction=0.06) as run:
            run.materialize([bad])
    with pytest.raises(TooManyBadRows, match="4 of 60"):  # what is stored counts again
        with open_run(corpus, any_pool, max_bad_fraction=0.06) as run:
            run.materialize([bad])
    with open_run(corpus, any_pool, max_bad_fraction=0.07) as run:
        run.materialize([bad])


def test_out_of_memory_halves_the_batch_and_refuses_the_row_that_never_fits(
    write_corpus: Any, open_run: Any, tmp_path: Path, any_pool: Pools
) -> None:
    corpus = write_corpus(files=1, rows=32, groups=1, rows_of=plant("BIG", {0: [9]}))
    with open_run(corpus, any_pool) as run:
        run.materialize([toys.column("len", toys.hungry, 4, "BIG", tmp_path / "seen", batch_rows=16)])
        assert [(r["row"], r["reason"]) for r in quarantine(run, "len")] == [(9, "out of memory")]
        assert stored(run, "len").num_rows - stored(run, "len")["score"].null_count == 31
    seen = [int(n) for n in (tmp_path / "seen").read_text().split()]
    assert seen == [16, 8, 4, 4, 8, 4, 2, 1, 1, 2, 4, 16, 8, 4, 4, 8, 4, 4]


def test_a_worker_that_is_killed_once_is_replaced(
    write_corpus: Any, open_run: Any, tmp_path: Path, lasting_pool: RayPool
) -> None:
    corpus = write_corpus(rows_of=plant("KILL", {1: [3]}))
    with open_run(corpus, lambda: lasting_pool) as run:
        run.materialize([toys.column("len", toys.deadly, "KILL", tmp_path / "once")])
        assert run.failed == {}
        assert run.manifest["passes"][0]["workers_lost"] == 1
        found = stored(run, "len")["score"]
        assert found.null_count == 0
        assert list(Path(run.store.path, "scratch", "suspects").iterdir()) == []
    with open_run(corpus, name="undisturbed") as run:
        run.materialize([toys.column("len", toys.length)])
        assert stored(run, "len")["score"].equals(found)


def test_a_row_that_always_kills_its_worker_is_found_and_refused(
    write_corpus: Any, open_run: Any, lasting_pool: RayPool
) -> None:
    corpus = write_corpus(files=2, rows=40, groups=1, rows_of=plant("KILL", {1: [21]}))
    columns = [toys.column("before", toys.length), toys.column("len", toys.deadly, "KILL")]
    with open_run(corpus, lambda: lasting_pool) as run:
        run.materialize(columns)
        assert run.failed == {}
        assert [(source_row(r)["text"], r["reason"]) for r in quarantine(run, "len")] == [
            ("KILL 1 21", "its worker died on this row")
        ]
        assert stored(run, "len")["score"].null_count == 1
        assert stored(run, "before")["score"].null_count == 0
        assert quarantine(run, "before") == []


def test_a_stuck_unit_is_killed_and_tried_again(
    write_corpus: Any, open_run: Any, tmp_path: Path, ray_pool: Any
) -> None:
    corpus = write_corpus(files=2, rows=10, groups=1, rows_of=plant("STUCK", {0: [3]}))
    with open_run(corpus, lambda: ray_pool(2, timeout_s=8)) as run:
        run.materialize([toys.column("len", toys.sticky, "STUCK", tmp_path / "once")])
        assert run.failed == {}
        assert run.manifest["passes"][0]["workers_lost"] == 1
        assert stored(run, "len")["score"].null_count == 0


def test_a_shard_that_always_fails_is_listed_and_the_others_go_on(
    write_corpus: Any, open_run: Any, any_pool: Pools
) -> None:
    corpus = write_corpus(files=3, rows=10, groups=2, rows_of=plant("FAIL", {1: [7]}))
    with open_run(corpus, any_pool) as run:
        run.materialize([toys.column("len", toys.failing, "FAIL")])
        (failure,) = run.failures
        assert failure["file"].endswith("f01.parquet")
        assert failure["row_groups"] == "1..1"
        assert "ValueError: cannot do FAIL (at toys.py:" in failure["reason"]
        assert len(stored(run, "len")) == 25
        assert run.aggregate(toys.Total("len.score"))["rows"].tolist() == [25]
        run.finish()
        assert run.manifest["status"] == "finished with failed shards"
    with open_run(corpus, any_pool) as run:  # tried again in the next run, the others are done
        run.materialize([toys.column("len", toys.failing, "FAIL")])
        assert run.manifest["columns"]["len"]["computed"] == 1
        assert len(run.failures) == 1


def test_no_shard_left_is_an_error(write_corpus: Any, open_run: Any, any_pool: Pools) -> None:
    with open_run(write_corpus(), any_pool) as run, pytest.raises(NoShardLeft, match="cannot do word"):
        run.materialize([toys.column("len", toys.failing, "word")])


def test_a_model_that_is_not_there_ends_the_run_at_once(write_corpus: Any, open_run: Any, any_pool: Pools) -> None:
    with pytest.raises(ConfigError, match=r"column 'len' cannot start: FileNotFoundError: model.bin"):
        with open_run(write_corpus(), any_pool) as run:
            run.materialize([toys.column("len", toys.absent)])


@pytest.mark.parametrize(
    ("out", "says"),
    [
        (pa.record_batch({"score": pa.array([1.0], pa.float32())}), "gave 1 rows for 8"),
        (pa.record_batch({"points": pa.array([1.0] * 8)}), r"gave fields \['points'\], its schema says \['score'\]"),
    ],
)
def test_a_transform_is_held_to_its_contract(write_corpus: Any, open_run: Any, out: pa.RecordBatch, says: str) -> None:
    with open_run(write_corpus(files=1, rows=8, groups=1)) as run, pytest.raises(NoShardLeft, match=says):
        run.materialize([toys.column("len", lambda: lambda batch: out)])


def test_all_rows_alike_and_a_file_without_rows(write_corpus: Any, open_run: Any) -> None:
    corpus = write_corpus(files=2, rows_of=lambda f, n: {"text": ["same"] * n})
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), corpus / "f99.parquet")
    with open_run(corpus) as run:
        run.materialize([row_column(False, None), toys.column("len", toys.length)])
        assert len(stored(run, "row")["key"].unique()) == 1
        assert stored(run, "len")["score"].to_pylist() == [4] * 40
