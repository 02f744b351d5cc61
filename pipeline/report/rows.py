"""Rows of the source by their address: for looking at some tens of them, not for reading a corpus.

Only row groups that hold a wanted row are read, only the columns asked for, in small batches, and no further than the
last wanted row. A text is cut to its first bytes before anything else is done with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.chat import Chat
from pipeline.corpus.shards import Piece, Shard
from pipeline.corpus.storage import resolve
from pipeline.corpus.tar import is_tar, take_from_tar

START_BYTES = 4096
BATCH_ROWS = 512
READERS = 4

Address = tuple[int, int]
"""(shard, row in the shard)"""


def read_rows(
    shards: Sequence[Shard], addresses: Iterable[Address], columns: Sequence[str], chat: Chat | None = None
) -> dict[Address, list[str]]:
    """The start of some columns of some rows, as text; a null is an empty string, broken UTF-8 shows as U+FFFD.

    With `chat` the row's conversation comes before them, rendered, or what its columns hold where it cannot be.
    """
    wanted: dict[int, list[int]] = {}
    for shard, row in addresses:
        wanted.setdefault(shard, []).append(row)
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda item: list(_of_shard(shards[item[0]], sorted(item[1]), columns, chat)), wanted.items())
        return {(shard, row): values for shard, rows in zip(wanted, found, strict=True) for row, values in rows}


def read_contents(
    shards: Sequence[Shard],
    addresses: Sequence[Address],
    text: str | None,
    id: str | None,
    source: str | None,
    chat: Chat | None,
) -> dict[Address, tuple[str, str]]:
    """What to show of some rows, and where they come from: the text or conversation, the id of what has neither."""
    shown = id if text is None and chat is None else text
    columns = [name for name in (shown, source) if name is not None]
    if not columns and chat is None:  # images without an id, of which there is nothing to show
        return dict.fromkeys(addresses, ("", ""))
    found = read_rows(shards, addresses, columns, chat)
    has_content = shown is not None or chat is not None
    return {at: (v[0] if has_content else "", v[-1] if source is not None else "") for at, v in found.items()}


def _of_shard(
    shard: Shard, rows: Sequence[int], columns: Sequence[str], chat: Chat | None
) -> Iterator[tuple[int, list[str]]]:
    start = 0
    for piece in shard.pieces:
        end = start + sum(piece.rows)
        inside = [r for r in rows if start <= r < end]
        if inside:
            yield from ((r + start, v) for r, v in _of_piece(piece, [r - start for r in inside], columns, chat))
        start = end


def _of_piece(
    piece: Piece, rows: Sequence[int], columns: Sequence[str], chat: Chat | None
) -> Iterator[tuple[int, list[str]]]:
    filesystem, path = resolve(piece.uri)
    with contextlib.ExitStack() as sources:
        file = None
        if not is_tar(piece.uri):
            file = pq.ParquetFile(sources.enter_context(filesystem.open_input_file(path)))
        start = 0
        for group, count in enumerate(piece.rows):
            inside = np.array([r for r in rows if start <= r < start + count], np.int64) - start
            if len(inside):
                number = piece.first_group + group
                found = _of_samples(piece, number, inside, columns, chat)
                if file is not None:
                    found = _of_group(file, number, inside, columns, chat)
                yield from ((r + start, v) for r, v in found)
            start += count


def _of_samples(
    piece: Piece, group: int, rows: np.ndarray, columns: Sequence[str], chat: Chat | None
) -> Iterator[tuple[int, list[str]]]:
    taken = take_from_tar(piece, group, rows, _read(columns, chat), START_BYTES)
    yield from zip(rows.tolist(), _values(taken, columns, chat), strict=True)


def _of_group(
    file: pq.ParquetFile, group: int, rows: np.ndarray, columns: Sequence[str], chat: Chat | None
) -> Iterator[tuple[int, list[str]]]:
    start = 0
    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=_read(columns, chat), use_threads=False):
        here = rows[(rows >= start) & (rows < start + batch.num_rows)]
        if len(here):
            taken = batch.take(pa.array(here - start))
            yield from zip(here.tolist(), _values(taken, columns, chat), strict=True)
        start += batch.num_rows
        if start > rows[-1]:
            return


def _read(columns: Sequence[str], chat: Chat | None) -> list[str]:
    return list(dict.fromkeys([*columns, *(chat.columns if chat else ())]))


def _values(batch: pa.RecordBatch, columns: Sequence[str], chat: Chat | None) -> Iterator[list[str]]:
    values = [*([_conversations(batch, chat)] if chat else []), *(_texts(batch.column(c)) for c in columns)]
    return map(list, zip(*values, strict=True))


def _conversations(batch: pa.RecordBatch, chat: Chat) -> list[str]:
    rendered = _texts(chat.render({name: batch.column(name) for name in chat.columns}).text)
    stored = map(" ".join, zip(*(_texts(batch.column(name)) for name in chat.columns), strict=True))
    return [text or raw for text, raw in zip(rendered, stored, strict=True)]


def _texts(values: pa.Array) -> list[str]:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)) and "binary" not in str(
        values.type
    ):
        return ["" if v is None else str(v)[:START_BYTES] for v in values.to_pylist()]
    starts = pc.binary_slice(values.cast(pa.large_binary()), 0, START_BYTES).to_pylist()
    return ["" if v is None else v.decode(errors="replace") for v in starts]
