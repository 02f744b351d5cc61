"""A batch of texts as one array of code points, and the spans that rules look at: chunks, lines, paragraphs.

All texts stand in a row, each followed by one newline. A piece of text is a span [start, end) of that array, so a rule
is arithmetic on starts and ends, whatever the number and the size of the texts. Two spans hold the same text where
their 64-bit digests agree: a polynomial hash whose prefix sums are kept, so the digest of any span is one subtraction.
It does not depend on where the span lies. Memory: 16 bytes a character, and about as much again while words are cut.
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
_PAGE_BITS = 14
_PAGE = 1 << _PAGE_BITS


def mix(x: np.ndarray) -> np.ndarray:
    """Finaliser of a 64-bit hash: every input bit reaches the high bits. Overwrites `x`."""
    x ^= x >> np.uint64(32)
    x *= np.uint64(0xD6E8FEB86659FD93)
    x ^= x >> np.uint64(32)
    return x


class _Powers:
    """base**i modulo 2**64 for i below `count`, from two short tables: of single steps and of whole pages."""

    def __init__(self, base: int, count: int) -> None:
        self.step = np.full(_PAGE, base, np.uint64)
        self.page = np.full(count // _PAGE + 1, pow(base, _PAGE, 2**64), np.uint64)
        for table in (self.step, self.page):
            table[0] = 1
            np.cumprod(table, out=table)

    def __getitem__(self, at: np.ndarray) -> np.ndarray:
        values: np.ndarray = self.step[at & (_PAGE - 1)] * self.page[at >> _PAGE_BITS]
        return values


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
        lengths: np.ndarray = self.ends - self.starts
        return lengths

    def count(self, positions: np.ndarray) -> np.ndarray:
        """How many of the sorted positions lie in every span."""
        return np.searchsorted(positions, self.ends) - np.searchsorted(positions, self.starts)


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
        docs = cls(chars, np.append(0, ends[:-1] + 1)[: len(ends)], ends, np.zeros(len(ends), bool))
        if segment and len(docs.having(kinds.UNSPACED)):
            unspaced, letters = (docs.texts.count(docs.having(kind)) for kind in (kinds.UNSPACED, kinds.LETTER))
            docs.unspaced[:] = 2 * unspaced > letters
        return docs

    def __len__(self) -> int:
        return len(self.starts)

    @cached_property
    def flags(self) -> np.ndarray:
        """The bits of `kinds` of every code point; uint32."""
        return kinds.table().take(self.chars)

    def having(self, bit: int) -> np.ndarray:
        """Positions of the characters that have a bit."""
        return np.flatnonzero((self.flags & np.uint32(bit)) != 0)

    @property
    def lengths(self) -> np.ndarray:
        lengths: np.ndarray = self.ends - self.starts
        return lengths

    @property
    def texts(self) -> Spans:
        return Spans(self.starts, self.ends, np.arange(len(self)))

    def tally(self, owners: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Number (or sum of the weights) of the spans that every text owns; shape (texts,)."""
        return np.bincount(owners, weights, minlength=len(self))

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
        return self._lines(np.append(0, ends[:-1] + 1), ends)

    @cached_property
    def screen_lines(self) -> Spans:
        """What `text.splitlines()` gives: also broken at \\r, \\r\\n, form feeds and Unicode's separators."""
        ends = self.having(kinds.LINE_BREAK)
        starts = np.append(0, ends[:-1] + 1)
        empty = starts == ends
        inside_crlf = empty & (self.chars[ends] == NEWLINE) & (self.chars[starts - 1] == RETURN)
        after_last_break = empty & np.isin(ends, self.ends)
        kept = ~(inside_crlf | after_last_break)
        return self._lines(starts[kept], ends[kept])

    @cached_property
    def paragraphs(self) -> Spans:
        """What `re.split(r"\\n{2,}", text.strip())` gives."""
        low, high = self.strip(self.texts)
        lines = self.lines
        starts, ends = np.maximum(lines.starts, low[lines.docs]), np.minimum(lines.ends, high[lines.docs])
        lines = Spans(starts, ends, lines.docs)[starts < ends]
        first = np.ones(len(lines), bool)
        first[1:] = (lines.starts[1:] > lines.ends[:-1] + 1) | (lines.docs[1:] != lines.docs[:-1])
        return Spans(lines.starts[first], lines.ends[np.roll(first, -1)], lines.docs[first])

    def _lines(self, starts: np.ndarray, ends: np.ndarray) -> Spans:
        return Spans(starts, ends, np.searchsorted(self.ends, starts))

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
        sums, powers = np.zeros(len(self.chars) + 1, np.uint64), _Powers(_BASE, len(self.chars))
        for page, factor in enumerate(powers.page):
            part = slice(page * _PAGE, (page + 1) * _PAGE)
            chars = self.chars[part]
            np.multiply(powers.step[: len(chars)] * factor, chars, out=sums[1:][part])
        np.cumsum(sums, out=sums)
        return sums, _Powers(pow(_BASE, -1, 2**64), len(self.chars))

    def digests(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """64-bit hash of the code points of every span; the same text, the same digest, in any `Docs`."""
        sums, inverse = self._sums
        digests: np.ndarray = sums[ends]
        digests -= sums[starts]
        digests *= inverse[starts]
        return mix(digests)

    # Editing

    def select(self, which: np.ndarray) -> Docs:
        """The texts where a mask is true."""
        return self if which.all() else self.keep(self.texts[which])

    def keep(self, spans: Spans, removed: Spans | None = None) -> Docs:
        """The texts that own spans: those, joined by newlines, without the spans `removed` from inside of them.

        The spans are sorted, and there is white space behind each.
        """
        if not len(spans):
            nothing = np.empty(0, np.int64)
            return Docs(self.chars[:0], nothing, nothing, self.unspaced[:0])
        kept = _mask(len(self.chars), spans.starts, spans.ends + 1)
        lengths = spans.lengths
        if removed is not None and len(removed):
            owner = np.searchsorted(spans.starts, removed.starts, "right") - 1
            inside = (owner >= 0) & (removed.ends <= spans.ends[owner])
            lengths = lengths - np.bincount(owner[inside], removed.lengths[inside], len(spans)).astype(np.int64)
            kept &= ~_mask(len(self.chars), removed.starts, removed.ends)
        chars = np.compress(kept, self.chars)  # four times as fast as chars[kept]
        ends = np.cumsum(lengths + 1) - 1
        chars[ends] = NEWLINE
        last = np.append(spans.docs[1:] != spans.docs[:-1], True)[: len(spans)]
        ends = ends[last]
        return Docs(chars, np.append(0, ends[:-1] + 1)[: len(ends)], ends, self.unspaced[spans.docs[last]])


def _mask(size: int, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """True inside of spans that are not empty and do not overlap; shape (size,)."""
    step = np.zeros(size + 1, np.int8)
    step[starts] += 1
    step[ends] -= 1
    return np.cumsum(step[:-1], dtype=np.int8).view(bool)


def groups(docs: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """64-bit keys that are equal for equal digests of one text, and sort by text; shape (spans,).

    48 bits of the digest remain: among the 4 million words of a 20 MB text, 0.03 false pairs are expected.
    """
    keys = docs.astype(np.uint64)
    keys <<= np.uint64(48)
    keys |= digests >> np.uint64(16)
    return keys
