"""Shards: cut by bytes alone, stable when files go, and every row at its address."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.listing import LISTING, read_footers
from pipeline.corpus.shards import (
    FILES_A_SHARD,
    MIB,
    Piece,
    Shard,
    default_shard_bytes,
    plan_shards,
    read_source,
)
from pipeline.errors import CorpusError

groups = st.lists(st.integers(1, 50), min_size=0, max_size=6)


def listing_of(sizes: list[list[int]], gone: set[int] = frozenset(), bad: set[int] = frozenset()) -> pa.Table:  # type: ignore[assignment]  # a frozen set is a set
    rows = [
        {
            "uri": f"f{i}",
            "size": 1,
            "mtime": 0,
            "identity": f"i{i}",
            "schema": b"",
            "rows": [s * 10 for s in sizes_],
            "bytes": sizes_,
            "error": "schema: another" if i in bad else None,
            "gone": i in gone,
        }
        for i, sizes_ in enumerate(sizes)
    ]
    return pa.Table.from_pylist(rows, schema=LISTING)


def held(shards: list[Shard]) -> list[tuple[str, int, int]]:
    """File, group and rows of every row group, in the order of the shards."""
    return [(p.uri, p.first_group + g, n) for s in shards for p in s.pieces for g, n in enumerate(p.rows)]


@given(st.lists(groups, min_size=1, max_size=12), st.integers(1, 120))
def test_every_row_group_is_in_one_shard_in_order(sizes: list[list[int]], target: int) -> None:
    shards = plan_shards(listing_of(sizes), target)
    assert held(shards) == [(f"f{i}", g, s * 10) for i, file in enumerate(sizes) for g, s in enumerate(file)]
    assert [s.index for s in shards] == list(range(len(shards)))
    for shard in shards:
        assert shard.bytes <= target or sum(len(p.rows) for p in shard.pieces) == 1
    for one, two in pairwise(shards):  # none could have taken the next row group too
        assert one.bytes + next_group(two, sizes) > target


def next_group(shard: Shard, sizes: list[list[int]]) -> int:
    first = shard.pieces[0]
    return sizes[int(first.uri[1:])][first.first_group]


@given(st.lists(groups, min_size=1, max_size=10), st.integers(1, 120), st.sets(st.integers(0, 9)), st.booleans())
def test_files_that_are_out_change_no_other_shard(
    sizes: list[list[int]], target: int, out: set[int], vanished: bool
) -> None:
    whole = plan_shards(listing_of(sizes), target)
    left = plan_shards(listing_of(sizes, gone=out) if vanished else listing_of(sizes, bad=out), target)
    assert len(left) == len(whole)
    for before, after in zip(whole, left, strict=True):
        assert after.pieces == tuple(p for p in before.pieces if int(p.uri[1:]) not in out)
        if after.pieces == before.pieces:
            assert after.fingerprint == before.fingerprint
        else:
            assert after.fingerprint != before.fingerprint


def test_added_files_change_the_last_shard_at_most() -> None:
    before = plan_shards(listing_of([[10, 10], [10]]), 20)
    after = plan_shards(listing_of([[10, 10], [10], [10], [30]]), 20)
    assert [s.fingerprint for s in after[:1]] == [s.fingerprint for s in before[:1]]
    assert [[p.uri for p in s.pieces] for s in after] == [["f0"], ["f1", "f2"], ["f3"]]


def test_empty_groups_and_files_hold_no_rows() -> None:
    listing = listing_of([[5], [], [5]])
    rows = listing.set_column(5, "rows", pa.array([[0], [], [7]], pa.list_(pa.int64())))
    (shard,) = plan_shards(rows, 100)
    assert [(p.uri, p.rows) for p in shard.pieces] == [("f2", (7,))]
    assert shard.rows == 7


def test_a_shard_joins_only_so_many_files() -> None:
    shards = plan_shards(listing_of([[1]] * (2 * FILES_A_SHARD + 5)), 10**9)
    assert [len(s.pieces) for s in shards] == [FILES_A_SHARD, FILES_A_SHARD, 5]


def test_the_default_size_follows_the_corpus() -> None:
    def size(total: int) -> int:
        return default_shard_bytes(listing_of([[total // 2, total - total // 2]]))

    assert [size(t * MIB) for t in (1, 32, 320, 2048, 10**6)] == [MIB, MIB, 10 * MIB, 64 * MIB, 64 * MIB]
    assert default_shard_bytes(listing_of([[320 * MIB], [10**12]], gone={1})) == 10 * MIB


def test_an_address_leads_to_its_row(tmp_path: Path) -> None:
    files = []
    for i, (rows, group) in enumerate([(7, 3), (4, 2), (1, 1)]):
        path = tmp_path / f"{i}.parquet"
        pq.write_table(pa.table({"text": [f"{i} {j}" for j in range(rows)]}), path, row_group_size=group)
        files.append((str(path), path.stat().st_size, 0))
    (shard,) = plan_shards(read_footers(files), 10**9)
    texts = [t for b in read_source(shard, ["text"], 5) for t in b["text"].to_pylist()]
    rows = np.array([11, 0, 3, 6, 7, 10])
    for row, where in zip(rows.tolist(), shard.locate(rows).to_pylist(), strict=True):
        group = pq.ParquetFile(where["file"]).read_row_group(where["row_group"])
        assert group["text"][where["row"]].as_py() == texts[row]


def test_batches_are_no_larger_than_asked_nor_than_memory_allows(tmp_path: Path) -> None:
    path = tmp_path / "big.parquet"
    pq.write_table(pa.table({"text": ["x" * 20_000_000] * 9, "n": range(9)}), path, use_dictionary=False)
    (shard,) = plan_shards(read_footers([(str(path), path.stat().st_size, 0)]), 10**9)
    assert [len(b) for b in read_source(shard, ["text"], 1024)] == [3, 3, 3]
    assert [len(b) for b in read_source(shard, ["text"], 2)] == [2, 2, 2, 2, 1]
    assert [len(b) for b in read_source(shard, ["n"], 1024)] == [9]  # what is not read does not count


def test_only_the_columns_asked_for_are_read_and_nested_ones_whole(tmp_path: Path) -> None:
    path = tmp_path / "n.parquet"
    table = pa.table({"a": [1], "s": [{"x": 1, "y": [2, 3]}], "z": [0]})
    pq.write_table(table, path)
    (shard,) = plan_shards(read_footers([(str(path), path.stat().st_size, 0)]), 10**9)
    (batch,) = read_source(shard, ["s"], 10)
    assert batch.to_pylist() == [{"s": {"x": 1, "y": [2, 3]}}]


@pytest.mark.parametrize("harm", ["another size", "gone", "damaged"])
def test_a_file_that_is_not_the_one_listed_is_an_error(tmp_path: Path, harm: str) -> None:
    path = tmp_path / "1.parquet"
    pq.write_table(pa.table({"text": ["abc" * 100, "d"]}), path)
    size = path.stat().st_size
    (shard,) = plan_shards(read_footers([(str(path), size, 0)]), 10**9)
    if harm == "another size":
        pq.write_table(pa.table({"text": ["other"]}), path)
    elif harm == "gone":
        path.unlink()
    else:
        path.write_bytes(b"\0" * (size - 8) + path.read_bytes()[-8:])
    with pytest.raises(CorpusError, match=r"1.parquet( has changed since it was listed: run again|: )"):
        list(read_source(shard, ["text"], 10))


def test_pieces_are_small_and_pickle() -> None:
    import pickle

    piece = Piece("s3://bucket/name", 1, "i" * 32, 0, (1000,), 10)
    assert pickle.loads(pickle.dumps(piece)) == piece  # noqa: S301  # our own bytes
    assert not hasattr(piece, "__dict__")
