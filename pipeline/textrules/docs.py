"""A batch of texts as one array of code points, and the spans that rules look at: chunks, lines, paragraphs.

All texts stand in a row, each followed by one newline. A piece of text is a span [start, end) of that array, so a rule
is arithmetic on starts and ends, whatever the number and the size of the texts. Two spans hold the same text where
their 64-bit digests agree: a polynomial hash whose prefix sums are kept, so the digest of any span is one subtraction.
It does not depend on where the span lies. Memory: 17 bytes a character, 26 while the prefix sums are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.textrules import chars as kinds

NEWLINE, RETURN = 10, 13
MAX_DOCS = 1 << 16
"""Texts in one `Docs`: their number shares 64 bits with a digest in `groups`."""

_BASE = 0x9E3779B97F4A7C15
_PAGE = 1 << 12


def mix(x: np.ndarray) -> np.ndarray:
    """Finaliser of a 64-bit hash: every input bit reaches the high bits. Overwrites `x`."""
    x ^= x >> np.uint64(32)
    x *= np.uint64(0xD6E8FEB86659FD93)
    x ^= x >> np.uint64(32)
    return x


class _Powers:
    """base**i modulo 2**64 for i below `count`, from two short tables."""

    def __init__(self, base: int, count: int) -> None:
        def table(step: int, size: int) -> np.ndarray:
            factors = np.full(size, step, np.uint64)
            factors[0] = 1
            return np.cumprod(factors, dtype=np.uint64)

        self.low = table(base % 2**64, _PAGE)
        self.high = table(pow(base, _PAGE, 2**64), count // _PAGE + 1)

    def __getitem__(self, at: np.ndarray) -> np.ndarray:
        return self.low[at & (_PAGE - 1)] * self.high[at >> 12]

    def all(self, count: int) -> np.ndarray:
        return np.multiply.outer(self.high, self.low).ravel()[:count]


@dataclass(frozen=True)
class Spans:
    """Pieces of text in order: chars[starts[i]:ends[i]] of text docs[i]; int64 arrays of one length."""

    starts: np.ndarray
    ends: np.ndarray
    docs: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, which: np.ndarray) -> Spans:
        return Spans(self.starts[which], self.ends[which], self.docs[which])

    @property
    def lengths(self) -> np.ndarray:
        return self.ends - self.starts


@dataclass(frozen=True)
class Docs:
    """Texts as code points: text i is chars[starts[i]:ends[i]], and chars[ends[i]] is a newline that is not its own."""

    chars: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    unspaced: np.ndarray
    """Texts whose words are characters, because more than half of their letters have no spaces between words."""

    @classmethod
    def of(cls, texts: pa.Array | Sequence[str], segment: bool = False) -> Docs:
        """Lay out at most `MAX_DOCS` valid strings. `segment` decides whether any text counts as unspaced."""
        texts = pa.array(texts, pa.large_string()) if isinstance(texts, Sequence) else texts.cast(pa.large_string())
        if len(texts) >= MAX_DOCS:
            raise ValueError(f"{len(texts):,} texts in one batch; lay out fewer than {MAX_DOCS:,} at a time")
        joined = "".join(f"{text}\n" for text in texts.to_pylist())
        chars = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
        ends = np.cumsum(pc.utf8_length(texts).to_numpy(zero_copy_only=False).astype(np.int64) + 1) - 1
        docs = cls(chars, np.concatenate([[0], ends[:-1] + 1]).astype(np.int64), ends, np.zeros(len(ends), bool))
        if segment and (docs.flags & kinds.UNSPACED).any():
            unspaced, letters = docs.count(kinds.UNSPACED), docs.count(kinds.LETTER)
            docs.unspaced[:] = 2 * unspaced > letters
        return docs

    def __len__(self) -> int:
        return len(self.starts)

    @cached_property
    def flags(self) -> np.ndarray:
        """The bits of `kinds` of every code point; uint32."""
        return kinds.table()[self.chars]

    @property
    def lengths(self) -> np.ndarray:
        return self.ends - self.starts

    def count(self, bit: int) -> np.ndarray:
        """Characters of every text that have one of the bits; shape (texts,)."""
        return self.per_doc(np.flatnonzero(self.flags & np.uint32(bit)))

    def per_doc(self, positions: np.ndarray) -> np.ndarray:
        """How many of the sorted positions lie in every text; shape (texts,)."""
        return np.searchsorted(positions, self.ends) - np.searchsorted(positions, self.starts)

    def tally(self, spans_docs: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Number (or sum of the weights) of spans in every text; shape (texts,)."""
        return np.bincount(spans_docs, weights, minlength=len(self))

    def spans(self, starts: np.ndarray, ends: np.ndarray) -> Spans:
        return Spans(starts, ends, np.searchsorted(self.ends, starts))

    # Spans

    @cached_property
    def chunks(self) -> Spans:
        """What `str.split()` gives: maximal runs of characters that are not white space."""
        solid = np.zeros(len(self.chars) + 1, bool)
        np.equal(self.flags & np.uint32(kinds.SPACE), 0, out=solid[1:])
        edges = np.flatnonzero(solid[1:] != solid[:-1])
        starts, ends = edges[::2], edges[1::2]
        bounds = np.searchsorted(starts, np.append(self.starts, len(self.chars)))
        return Spans(starts, ends, np.repeat(np.arange(len(self)), np.diff(bounds)))

    @cached_property
    def lines(self) -> Spans:
        """What `text.split("\\n")` gives."""
        ends = np.flatnonzero(self.chars == NEWLINE)
        return self.spans(np.concatenate([[0], ends[:-1] + 1]), ends)

    @cached_property
    def stripped(self) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of `text.strip()` of every text; an empty span at the start where nothing is left."""
        return self.strip(Spans(self.starts, self.ends, np.arange(len(self))))

    @cached_property
    def screen_lines(self) -> Spans:
        """What `text.splitlines()` gives: also broken at \\r, \\r\\n, form feeds and Unicode's separators."""
        ends = np.flatnonzero(self.flags & np.uint32(kinds.LINE_BREAK))
        starts = np.concatenate([[0], ends[:-1] + 1])
        empty = starts == ends
        inside_crlf = empty & (self.chars[ends] == NEWLINE) & (self.chars[starts - 1] == RETURN)
        after_last_break = empty & np.isin(ends, self.ends)
        kept = ~(inside_crlf | after_last_break)
        return self.spans(starts[kept], ends[kept])

    @cached_property
    def paragraphs(self) -> Spans:
        """What `re.split(r"\\n{2,}", text.strip())` gives."""
        low, high = self.stripped
        lines = self.lines
        starts, ends = np.maximum(lines.starts, low[lines.docs]), np.minimum(lines.ends, high[lines.docs])
        lines = Spans(starts, ends, lines.docs)[starts < ends]
        first = np.ones(len(lines), bool)
        first[1:] = (lines.starts[1:] > lines.ends[:-1] + 1) | (lines.docs[1:] != lines.docs[:-1])
        return Spans(lines.starts[first], lines.ends[np.roll(first, -1)], lines.docs[first])

    def strip(self, spans: Spans) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of every span without the white space around it; (start, start) where nothing is left."""
        first, stop = self.chunks_in(spans)
        filled = first < stop
        if not len(self.chunks):
            return spans.starts, spans.starts
        starts = np.where(filled, self.chunks.starts[np.minimum(first, len(self.chunks) - 1)], spans.starts)
        return starts, np.where(filled, self.chunks.ends[stop - 1], spans.starts)

    def chunks_in(self, spans: Spans) -> tuple[np.ndarray, np.ndarray]:
        """Range [first, stop) of the chunks in every span. No chunk may cross the bounds of a span."""
        return np.searchsorted(self.chunks.starts, spans.starts), np.searchsorted(self.chunks.starts, spans.ends)

    def find(self, phrase: str) -> np.ndarray:
        """Positions where a phrase of ASCII letters begins, whatever its case."""
        points = np.array(list(map(ord, phrase.lower())), np.uint32)
        if not len(points) or len(self.chars) < len(points):
            return np.empty(0, np.int64)
        at = np.arange(0)
        for offset, point in enumerate(points):
            upper = np.uint32(ord(chr(point).upper()))
            if offset == 0:
                body = self.chars[: len(self.chars) - len(points) + 1]
                at = np.flatnonzero((body == point) | (body == upper))
            else:
                here = self.chars[at + offset]
                at = at[(here == point) | (here == upper)]
        return at

    # Digests

    @cached_property
    def _sums(self) -> tuple[np.ndarray, _Powers]:
        sums = np.zeros(len(self.chars) + 1, np.uint64)
        np.multiply(_Powers(_BASE, len(self.chars)).all(len(self.chars)), self.chars, out=sums[1:])
        np.cumsum(sums, out=sums)
        return sums, _Powers(pow(_BASE, -1, 2**64), len(self.chars))

    def digests(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """64-bit hash of the code points of every span; the same text, the same digest, in any `Docs`."""
        sums, inverse = self._sums
        return mix((sums[ends] - sums[starts]) * inverse[starts])

    # Editing

    def select(self, docs: np.ndarray) -> Docs:
        """The texts where a mask is true."""
        if docs.all():
            return self
        return self.cut(Spans(self.starts[docs], self.ends[docs], np.arange(np.count_nonzero(docs))), self.unspaced[docs])

    def cut(self, spans: Spans, unspaced: np.ndarray, removed: Spans | None = None) -> Docs:
        """New texts: text i is the spans of docs == i, joined by newlines, without the spans `removed` from them.

        The spans are sorted, do not touch, and every text has at least one.
        """
        kept = _mask(len(self.chars), spans.starts, spans.ends + 1)
        lengths = spans.lengths.copy()
        if removed is not None and len(removed):
            owner = np.searchsorted(spans.starts, removed.starts, "right") - 1
            inside = (owner >= 0) & (removed.ends <= spans.ends[owner])
            np.subtract.at(lengths, owner[inside], removed.lengths[inside])
            kept &= ~_mask(len(self.chars), removed.starts, removed.ends)
        chars = self.chars[kept]
        ends = np.cumsum(lengths + 1) - 1
        chars[ends] = NEWLINE
        last = np.append(np.flatnonzero(np.diff(spans.docs)), len(spans) - 1) if len(spans) else np.empty(0, np.int64)
        stops = ends[last]
        return Docs(chars, np.concatenate([[0], stops[:-1] + 1])[: len(stops)].astype(np.int64), stops, unspaced)


def _mask(size: int, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """True inside of sorted spans that do not overlap; shape (size,)."""
    step = np.zeros(size + 1, np.int8)
    step[starts] += 1
    # A span may begin where the one before ends.
    np.subtract.at(step, ends, 1)
    return np.cumsum(step[:-1], dtype=np.int8).view(bool)


def groups(docs: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """64-bit keys that are equal for equal digests of one text, and sort by text; shape (spans,).

    48 bits of the digest remain: among the 4 million words of a 20 MB text, 0.03 false pairs are expected.
    """
    return (docs.astype(np.uint64) << np.uint64(48)) | (digests >> np.uint64(16))
