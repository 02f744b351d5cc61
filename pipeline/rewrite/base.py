"""The contract of a rewrite: which pieces of a kept text stay in the curated set. The source itself never changes.

A rewrite is an optional step of the output, after the selection and over the kept rows alone. It names the characters
of the original that stay (`prune`); everything else follows from those spans: the shortened text (`render`), what was
removed, the share that is left and the new size. The spans are stored in `columns/rewrite`, so the removed text can be
looked up in the source at any time, and go along in the column `tamis` of the curated files.

Rows are selected by their original size. A budget of tokens is therefore an upper bound: the curated set holds the
budget's rows, shortened, and its card gives both totals. A text of which nothing would be left keeps its best piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.corpus.rows import row_column
from pipeline.recipe import Column, Recipe, Resources, State, Transform

if TYPE_CHECKING:
    from pipeline.run import Run

REWRITE = "rewrite"
"""Name of the column."""
BATCH_ROWS = 256
SPANS = pa.list_(pa.struct([("start", pa.int32()), ("end", pa.int32())]))
FIELDS = pa.schema(
    [
        ("kept", SPANS),
        ("removed", SPANS),
        ("kept_fraction", pa.float32()),
        ("bytes", pa.int64()),
        ("tokens", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Pieces:
    """Pieces of a batch of texts: characters [start, end) of text `row`; int64 arrays of one length.

    Ordered by row and start, disjoint, not empty.
    """

    row: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, which: np.ndarray) -> Pieces:
        return Pieces(self.row[which], self.start[which], self.end[which])

    @classmethod
    def between(cls, edges: Sequence[Sequence[int]]) -> Pieces:
        """The pieces that tile every text, from its edges: 0, ascending cuts, its length. Equal edges count once."""
        counts = np.fromiter(map(len, edges), np.int64, len(edges))
        flat = np.fromiter((e for text in edges for e in text), np.int64, int(counts.sum()))
        row = np.repeat(np.arange(len(edges)), counts)
        real = np.flatnonzero((row[1:] == row[:-1]) & (flat[1:] > flat[:-1]))
        return cls(row[real], flat[real], flat[real + 1])

    @classmethod
    def of(cls, spans: pa.ListArray) -> Pieces:
        """From a column of spans as it is stored."""
        values = spans.flatten()
        row = np.repeat(np.arange(len(spans)), pc.fill_null(pc.list_value_length(spans), 0).to_numpy())
        start, end = (values.field(name).to_numpy().astype(np.int64) for name in ("start", "end"))
        return cls(row, start, end)

    def keep(self, mask: np.ndarray) -> Pieces:
        """The pieces under a mask, those that touch joined."""
        some = self[mask]
        if not len(some):
            return some
        opens = np.append(True, (some.row[1:] != some.row[:-1]) | (some.start[1:] != some.end[:-1]))
        first = np.flatnonzero(opens)
        return Pieces(some.row[first], some.start[first], some.end[np.append(first[1:], len(some)) - 1])

    def rest(self, lengths: np.ndarray) -> Pieces:
        """What texts of these lengths (characters) hold outside the pieces."""
        rows = np.arange(len(lengths))
        opens = _sorted(np.append(self.row, rows), np.append(self.end, np.zeros(len(rows), np.int64)))
        closes = _sorted(np.append(self.row, rows), np.append(self.start, lengths))
        gaps = Pieces(opens[0], opens[1], closes[1])
        return gaps[gaps.end > gaps.start]

    def lists(self, rows: int) -> pa.ListArray:
        """One list of spans a text, as it is stored."""
        offsets = np.append(0, np.cumsum(np.bincount(self.row, minlength=rows))).astype(np.int32)
        ends = [pa.array(v.astype(np.int32)) for v in (self.start, self.end)]
        return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(ends, ["start", "end"])).cast(SPANS)

    def sum(self, values: np.ndarray, rows: int) -> np.ndarray:
        """Sum of a number a piece over every text; float64 (rows,)."""
        return np.bincount(self.row, weights=values, minlength=rows)


def _sorted(row: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((at, row))
    return row[order], at[order]


Prune = Callable[[pa.RecordBatch], Pieces]
"""From a batch of inputs to the pieces that stay: at least one of every text that has any."""


class Rewrite(Recipe):
    """A way to shorten texts. Subclasses live in `pipeline/rewrite/<kind>.py` and fix `kind` to the module's name."""

    claim: ClassVar[str] = ""
    cost: ClassVar[str] = ""
    source: ClassVar[str] = ""

    kind: str

    def fit(self, run: Run) -> None:
        """Fit artifacts; most have nothing to fit."""

    def reads(self) -> tuple[str, ...]:
        """References that `prune` asks for; `text` is the first."""
        return ("text",)

    def resources(self, run: Run) -> Resources:
        """What a worker that prunes reserves."""
        return Resources()

    def prune(self, run: Run) -> tuple[Callable[[], Prune], str]:
        """What a worker opens to get the pieces that stay, and the identity of what that computes."""
        raise NotImplementedError(f"{type(self).__name__} has no prune()")

    def render(self, texts: pa.LargeStringArray, kept: Pieces) -> pa.LargeStringArray:
        """The shortened texts: their kept pieces one after the other."""
        return cut(texts, kept)

    def column(self, run: Run, keep: str | None = "select.keep") -> Column:
        """The column `rewrite` of the rows that `keep` names (None: of all): FIELDS, null for the other rows."""
        open_prune, identity = self.prune(run)
        counted = row_column(False, run.config.corpus.tokenizer)
        inputs = (*self.reads(), *([keep] if keep else []))
        made = partial(_open, self, open_prune, counted.open, keep)
        identity = self.identity(identity, counted.identity)
        return Column(REWRITE, inputs, FIELDS, made, identity, self.resources(run), BATCH_ROWS)


def _open(
    rewrite: Rewrite, open_prune: Callable[[], Prune], open_row: Callable[[], Transform], keep: str | None
) -> Transform:
    prune, size = open_prune(), open_row()

    def transform(batch: pa.RecordBatch) -> pa.RecordBatch:
        wanted = batch.column(keep).to_numpy(zero_copy_only=False) if keep else np.ones(len(batch), bool)
        some = batch.filter(pa.array(wanted))
        texts = some.column("text").cast(pa.large_string())
        lengths = pc.utf8_length(texts).to_numpy().astype(np.int64)
        kept = prune(some)
        amounts = size(pa.record_batch([rewrite.render(texts, kept)], ["text"]))
        share = kept.sum(kept.end - kept.start, len(texts)) / np.maximum(lengths, 1)
        values = [kept.lists(len(texts)), kept.rest(lengths).lists(len(texts)), pa.array(share, pa.float32())]
        at = pa.array(np.cumsum(wanted) - 1, mask=~wanted)
        columns = [v.take(at) for v in (*values, amounts.column("bytes"), amounts.column("tokens"))]
        return pa.RecordBatch.from_arrays(columns, schema=FIELDS)

    return transform


def layout(texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of n texts end to end (uint8) and where each begins and the last ends (int64, n + 1)."""
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(texts.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    return data, offsets - offsets[0]


def in_bytes(data: np.ndarray, offsets: np.ndarray, pieces: Pieces) -> tuple[np.ndarray, np.ndarray]:
    """Where pieces start and end in the bytes of `layout`."""
    if not len(data) or data.max() < 128:
        return offsets[pieces.row] + pieces.start, offsets[pieces.row] + pieces.end
    heads = np.append(np.flatnonzero((data & 0xC0) != 0x80), len(data))  # where characters begin
    first = np.searchsorted(heads, offsets[:-1])[pieces.row]
    return heads[first + pieces.start], heads[first + pieces.end]


def cut(texts: pa.LargeStringArray, pieces: Pieces) -> pa.LargeStringArray:
    """The pieces of every text one after the other; as many strings as texts."""
    return _gather(texts, pieces, pieces.row, len(texts))


def strings(texts: pa.LargeStringArray, pieces: Pieces) -> pa.LargeStringArray:
    """Every piece as a string of its own."""
    return _gather(texts, pieces, np.arange(len(pieces)), len(pieces))


def _gather(texts: pa.LargeStringArray, pieces: Pieces, into: np.ndarray, count: int) -> pa.LargeStringArray:
    data, offsets = layout(texts)
    start, end = in_bytes(data, offsets, pieces)
    turns = np.zeros(len(data) + 1, np.int8)
    turns[start] += 1
    turns[end] -= 1  # pieces are disjoint: no position starts or ends two
    inside = np.cumsum(turns[:-1], dtype=np.int8).view(bool)
    sizes = np.bincount(into, weights=end - start, minlength=count).astype(np.int64)
    ends = np.append(0, np.cumsum(sizes))
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(data[inside])]
    return pa.Array.from_buffers(pa.large_string(), count, buffers)


def above(pieces: Pieces, score: np.ndarray, threshold: float) -> np.ndarray:
    """Mask of the pieces whose score reaches the threshold; in a text without any, its best (the first of equals)."""
    keep = np.asarray(score >= threshold)
    order = np.lexsort((-score, pieces.row))
    best = order[np.append(True, pieces.row[order][1:] != pieces.row[order][:-1])] if len(order) else order
    served = np.zeros(int(pieces.row.max()) + 1 if len(pieces) else 0, bool)
    served[pieces.row[keep]] = True
    keep[best[~served[pieces.row[best]]]] = True
    return keep


@dataclass(frozen=True)
class Shortened:
    """Statistic: rows rewritten, and their tokens, bytes and mean share kept; `rows` int64, the others summed."""

    inputs: tuple[str, ...] = (f"{REWRITE}.tokens", f"{REWRITE}.bytes", f"{REWRITE}.kept_fraction")

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        tokens, size, share = (batch.column(name).to_numpy() for name in self.inputs)
        new = {
            "rows": np.array([len(batch)]),
            "tokens": np.array([tokens.sum()]),
            "bytes": np.array([size.sum()]),
            "shortened": np.array([(share < 1).sum()]),
        }
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        return {name: np.sum([s[name] for s in states], axis=0) for name in states[0]}
