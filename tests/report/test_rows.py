from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus.shards import Piece, Shard
from pipeline.report.rows import START_BYTES, read_rows


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    """Shard 0 is the end of a file and a whole other one; shard 1 the middle of the first. Row groups of 600 rows."""
    pieces = {}
    for name in ("a", "b"):
        texts = pa.array([f"{name}{i}".encode() for i in range(1800)] + [b"\xff broken", None], pa.binary())
        label = pa.array([f"l{i % 3}" for i in range(1802)]).dictionary_encode()
        file = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"text": texts, "label": label, "n": np.arange(1802)}), file, row_group_size=600)
        pieces[name] = lambda first, *rows, file=file: Piece(str(file), file.stat().st_size, "", first, rows, 0)
    a, b = pieces["a"], pieces["b"]
    return [Shard(0, (a(2, 600, 2), b(0, 600, 600, 600, 2))), Shard(1, (a(1, 600),))]


def test_rows_come_from_their_addresses(shards: list[Shard]) -> None:
    wanted = [(0, 0), (0, 599), (0, 600), (0, 601), (0, 602), (0, 1201), (0, 1202), (0, 2402), (1, 0), (1, 599), (0, 5)]
    found = read_rows(shards, wanted, ["text"])
    texts = [found[address][0] for address in wanted]
    assert texts[:3] == ["a1200", "a1799", "\ufffd broken"]
    assert texts[3:] == ["", "b0", "b599", "b600", "\ufffd broken", "a600", "a1199", "a1205"]


def test_any_column_comes_as_text(shards: list[Shard]) -> None:
    assert read_rows(shards, [(1, 1)], ["text", "label", "n", "text"]) == {(1, 1): ["a601", "l1", "601", "a601"]}
    assert read_rows(shards, [], ["text"]) == {}


def test_a_giant_text_is_cut_before_it_is_decoded(tmp_path: Path) -> None:
    file = tmp_path / "giant.parquet"
    pq.write_table(pa.table({"text": ["é" * 10_000_000]}), file)
    shard = Shard(0, (Piece(str(file), file.stat().st_size, "", 0, (1,), 0),))
    assert read_rows([shard], [(0, 0)], ["text"]) == {(0, 0): ["é" * (START_BYTES // 2)]}
