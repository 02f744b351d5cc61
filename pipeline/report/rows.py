"""Rows of the source by their address: for looking at some tens of them, not for reading a corpus.

Only row groups that hold a wanted row are read, only the columns asked for, in small batches, and no further than the
last wanted row. A text is cut to its first bytes before anything else is done with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.shards import Piece, Shard
from pipeline.corpus.storage import resolve

START_BYTES = 4096
BATCH_ROWS = 512
READERS = 4

Address = tuple[int, int]
"""(shard, row in the shard)"""


def read_rows(
    shards: Sequence[Shard], addresses: Iterable[Address], columns: Sequence[str]
) -> dict[Address, list[str]]:
    """The start of some columns of some rows, as text; a null is an empty string, broken UTF-8 shows as U+FFFD."""
    wanted: dict[int, list[int]] = {}
    for shard, row in addresses:
        wanted.setdefault(shard, []).append(row)
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda item: list(_of_shard(shards[item[0]], sorted(item[1]), columns)), wanted.items())
        return {(shard, row): values for shard, rows in zip(wanted, found, strict=True) for row, values in rows}


def _of_shard(shard: Shard, rows: Sequence[int], columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    start = 0
    for piece in shard.pieces:
        end = start + sum(piece.rows)
        inside = [r for r in rows if start <= r < end]
        if inside:
            yield from ((r + start, values) for r, values in _of_piece(piece, [r - start for r in inside], columns))
        start = end


def _of_piece(piece: Piece, rows: Sequence[int], columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    filesystem, path = resolve(piece.uri)
    with filesystem.open_input_file(path) as source:
        file = pq.ParquetFile(source)
        start = 0
        for group, count in enumerate(piece.rows):
            inside = np.array([r for r in rows if start <= r < start + count], np.int64) - start
            if len(inside):
                yield from ((r + start, v) for r, v in _of_group(file, piece.first_group + group, inside, columns))
            start += count


def _of_group(
    file: pq.ParquetFile, group: int, rows: np.ndarray, columns: Sequence[str]
) -> Iterator[tuple[int, list[str]]]:
    start = 0
    for batch in file.iter_batches(
        BATCH_ROWS, row_groups=[group], columns=list(dict.fromkeys(columns)), use_threads=False
    ):
        here = rows[(rows >= start) & (rows < start + batch.num_rows)]
        if len(here):
            taken = batch.take(pa.array(here - start))
            yield from zip(
                here.tolist(), map(list, zip(*(_texts(taken.column(c)) for c in columns), strict=True)), strict=True
            )
        start += batch.num_rows
        if start > rows[-1]:
            return


def _texts(values: pa.Array) -> list[str]:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)) and "binary" not in str(
        values.type
    ):
        return ["" if v is None else str(v)[:START_BYTES] for v in values.to_pylist()]
    starts = pc.binary_slice(values.cast(pa.large_binary()), 0, START_BYTES).to_pylist()
    return ["" if v is None else v.decode(errors="replace") for v in starts]
