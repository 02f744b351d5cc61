"""Target examples: distinct, balanced by benchmark, the same in any order of files, embedded as rows are."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError
from pipeline.recipe import Column
from pipeline.scores._targets import balanced, embedded, read_examples, read_targets
from pipeline.vectors import vector_schema


def test_every_group_gives_as_many_as_the_smallest() -> None:
    table = pa.table({"group": ["a", "a", "b", "a", "c", "b", "c"], "n": range(7)})
    assert balanced(table, "group")["n"].to_pylist() == [0, 1, 2, 4, 5, 6]
    assert balanced(table.slice(0, 3), "group")["n"].to_pylist() == [0, 2]


def test_examples_are_distinct_and_in_the_order_of_their_hashes(tmp_path: Path) -> None:
    rows = [{"q": f"question {i % 40}", "suite": "xyz"[i % 3]} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:20]))
    pq.write_table(pa.Table.from_pylist([*rows[20:], {"q": "  ", "suite": "x"}, {"q": None}]), tmp_path / "b.parquet")
    uris = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")]
    texts = read_targets(uris, "q", "t")["text"].to_pylist()
    assert sorted(texts) == sorted({r["q"] for r in rows})
    assert texts == read_targets(uris[::-1], "q", "t")["text"].to_pylist()
    by_suite = read_targets(uris, "q", "t", group="suite")
    assert by_suite.column_names == ["text"]
    assert len(by_suite) == 3 * 13  # 14, 13 and 13 of the three suites


def test_what_the_embedding_reads_comes_along_and_nulls_are_left_out(tmp_path: Path) -> None:
    vectors = pa.array([[1, 0], None, [0, 1]], pa.list_(pa.float32(), 2))
    pq.write_table(pa.table({"text": ["a", "b", "c"], "v": vectors}), tmp_path / "e.parquet")
    read = Column("embed", ("corpus.v",), vector_schema(2), dict, "")
    table = read_examples([str(tmp_path / "e.parquet")], "text", "t", embed=read)
    assert table.column_names == ["text", "corpus.v"]
    assert table["text"].to_pylist() == ["a", "c"]
    odd = Column("embed", ("text", "row.bytes"), vector_schema(2), dict, "")
    with pytest.raises(ConfigError, match=r"t: an embedding that reads row\.bytes cannot embed examples"):
        read_examples([str(tmp_path / "e.parquet")], "text", "t", embed=odd)


def test_examples_without_a_vector_are_told_apart() -> None:
    half = [[1.0, 0.0], None]

    def embed(batch: pa.RecordBatch) -> pa.RecordBatch:
        values = [half[len(t) % 2] for t in batch.column("text").to_pylist()]
        vectors = pa.array(values, pa.list_(pa.float16(), 2))
        reasons = pa.array([None if v else "odd length" for v in values], pa.string())
        return pa.record_batch([vectors, reasons], schema=vector_schema(2))

    column = Column("embed", ("text",), vector_schema(2), lambda: embed, "", batch_rows=2)
    vectors, taken = embedded(column, pa.table({"text": ["aa", "b", "cc", "d", "ee"]}), "t")
    assert taken.tolist() == [0, 2, 4]
    assert vectors.tolist() == [[1, 0]] * 3
    with pytest.raises(ConfigError, match="t: no example has a vector: odd length"):
        embedded(column, pa.table({"text": ["b"]}), "t")
