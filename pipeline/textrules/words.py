"""Texts to words and sentences as spaCy's English tokenizer and sentence splitter cut them, with no loop over words.

That tokenizer's rules are local: a character begins a word because of what it is and what stands beside it. So the
cuts of a whole batch are a few masks over its code points:

1. a chunk between white space gives up affixes at both ends: quotes, brackets, full stops, 's, a unit behind a digit;
2. the rest is cut at hyphens, ellipses, symbols and the like, if the neighbours agree and it is no web address;
3. exceptions are joined again (Mr. e.g. :-) w/o) or cut (do|n't can|not 10|am).

In a text whose script writes no spaces between words, every letter is a word (`Docs.unspaced`).
On 3,000 real documents of 12 languages, 4 of 1.66 million words begin elsewhere than spaCy's (docs/heuristics.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.textrules import chars as kinds
from pipeline.textrules.chars import ALPHA, BEFORE_STOP, DIGIT, LOWER, QUOTE, SPACE, UPPER
from pipeline.textrules.docs import Docs, Spans
from pipeline.textrules.exceptions import CONTRACTIONS, JOINED, LONGEST_JOIN, UNITS

# Not cut further. spaCy's pattern without its exclusion of private networks and without upper bounds on lengths, which
# make RE2 spend 60 ms on compiling it.
_ADDRESS = (
    r"^(?:[\pL\pN_+.-]{2,}://)?(?:\S+@)?(?:[1-9]\d{0,2}(?:\.\d{1,3}){3}|"
    r"(?:[A-Za-z0-9\x{a1}-\x{ffff}][A-Za-z0-9\x{a1}-\x{ffff}_-]*\.)+[\p{Ll}\p{Lo}]{2,})(?::\d{2,5})?(?:[/?#]\S*)?$"
)
_MULTIPLES_OF_HYPHENS = ("--", "---", "——")


@dataclass(frozen=True)
class Words(Spans):
    """The words of every text, in order."""

    digests: np.ndarray
    kinds: np.ndarray
    """The bits of all characters of a word (`pipeline.textrules.chars`); uint32."""
    first: np.ndarray
    """Words of text i are first[i] ... first[i + 1] - 1; shape (texts + 1,)."""

    @property
    def counts(self) -> np.ndarray:
        return np.diff(self.first)


def split_words(docs: Docs) -> Words:
    """Cut every text into words (see the module)."""
    starts, ends, low, high = _cut(docs)
    starts, ends = _join(docs, starts, ends)
    starts, ends, digests = _cut_contractions(docs, starts, ends, low, high)
    first = np.append(np.searchsorted(starts, docs.starts), len(starts))
    owner = np.repeat(np.arange(len(docs), dtype=np.uint16), np.diff(first))
    bits = np.bitwise_or.reduceat(docs.flags, starts) if len(starts) else np.empty(0, np.uint32)
    return Words(starts, ends, owner, digests, bits, first)


def count_sentences(docs: Docs, words: Words, lines: Spans) -> np.ndarray:
    """Sentences of every line, at least 1. One begins behind a full stop and any quotes or brackets, at the next word
    or at white space of more than one blank."""
    line = np.searchsorted(lines.starts, words.starts, "right") - 1
    stop = (words.lengths == 1) & ((words.kinds & kinds.SENTENCE_END) != 0)
    telling = stop | ((words.kinds & kinds.NOT_PUNCTUATION) != 0)
    gap = words.starts[1:] - words.ends[:-1]
    wide = (line[1:] == line[:-1]) & ((gap > 1) | ((gap == 1) & (docs.chars[words.ends[:-1]] != ord(" "))))

    order = np.argsort(np.concatenate([words.starts[telling], words.ends[:-1][wide]]))
    stop = np.concatenate([stop[telling], np.zeros(np.count_nonzero(wide), bool)])[order]
    line = np.concatenate([line[telling], line[:-1][wide]])[order]
    begins = stop[:-1] & ~stop[1:] & (line[:-1] == line[1:])
    return 1 + np.bincount(line[1:][begins], minlength=len(lines))


class _Lookup:
    """Finds digests in a small table; a 64 Ki bitmap over their high bits answers for nearly all that are not there."""

    def __init__(self, texts: Sequence[str]) -> None:
        docs = Docs.of(texts)
        digests = docs.digests(docs.starts, docs.ends)
        self.order = np.argsort(digests)
        self.sorted = digests[self.order]
        self.bitmap = np.zeros(1 << 16, bool)
        self.bitmap[digests >> np.uint64(48)] = True

    def find(self, digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the digests that are in the table, and which text of the table each is."""
        maybe = np.flatnonzero(self.bitmap[digests >> np.uint64(48)])
        at = np.minimum(np.searchsorted(self.sorted, digests[maybe]), len(self.sorted) - 1)
        found = self.sorted[at] == digests[maybe]
        return maybe[found], self.order[at[found]]


@cache
def lookup(texts: tuple[str, ...]) -> _Lookup:
    """The table of some texts, made once a process."""
    return _Lookup(texts)


def _cut(docs: Docs) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Starts and ends of the words by the general rules, and of what every chunk is without its affixes."""
    # Index -1 is the newline behind the last text: white space, which is what stands before the first.
    chars, flags, chunks = docs.chars, docs.flags, docs.chunks
    dots = np.flatnonzero(chars == ord("."))
    doubled = dots[:-1][np.diff(dots) == 1]  # of an ellipsis, all dots but the last
    prefix, suffix = (flags & kinds.PREFIX) != 0, (flags & kinds.SUFFIX) != 0
    before, before_that = flags[dots - 1], flags[dots - 2]
    suffix[dots] = ((before & BEFORE_STOP) != 0) | ((before & before_that & UPPER) != 0)
    suffix[dots] |= (chars[dots - 2] == ord("°")) & np.isin(chars[dots - 1], _ord("cfkCFK"))
    for dot in (doubled, doubled + 1):
        prefix[dot] = suffix[dot] = True
    pluses = np.flatnonzero(chars == ord("+"))
    prefix[pluses] = (flags[pluses + 1] & DIGIT) == 0
    measures = docs.having(kinds.AFTER_DIGIT)
    suffix[measures] |= (flags[measures - 1] & DIGIT) != 0

    low, high = chunks.starts.copy(), chunks.ends.copy()  # what is left of every chunk
    affix = np.zeros(len(chars), bool)
    which = np.flatnonzero(prefix[low])
    low[which] = _run_ends(prefix, low[which])
    _mark(affix, chunks.starts[which], low[which])
    inner = _peel_dollars(docs, affix, prefix, low)
    _peel(affix, suffix, low, high, np.flatnonzero(suffix[high - 1] & (low < high)))
    possessive = _peel_possessive(docs, affix, suffix, low, high)
    cut = affix.copy()
    cut[possessive + 1] = cut[inner] = False
    cut[_peel_units(docs, affix, low, high)] = True
    cut[low[low < high]] = True
    _cut_inside(docs, cut, affix, dots, low, high)
    cut[doubled + 1] = False
    if docs.unspaced.any():
        _cut_letters(docs, cut)

    last = (flags & SPACE) == 0
    last[:-1] &= cut[1:] | ~last[1:]
    return np.flatnonzero(cut), np.flatnonzero(last) + 1, low, high


def _ord(characters: str) -> list[int]:
    return list(map(ord, characters))


def _run_ends(mask: np.ndarray, at: np.ndarray) -> np.ndarray:
    """End of the run of true values around every position; the last value of the mask is false."""
    ends = np.flatnonzero(mask[:-1] & ~mask[1:]) + 1
    return ends[np.searchsorted(ends, at, "right")]


def _run_starts(mask: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Start of the run of true values around every position."""
    starts = np.flatnonzero(mask[1:] & ~mask[:-1]) + 1
    starts = np.append(0, starts) if mask[0] else starts
    return starts[np.searchsorted(starts, at, "right") - 1]


def _mark(mask: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
    """Set the mask true inside of spans."""
    lengths = ends - starts
    mask[np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())] = True


def _peel(affix: np.ndarray, suffix: np.ndarray, low: np.ndarray, high: np.ndarray, which: np.ndarray) -> None:
    """Take the run of suffixes off the end of some chunks."""
    ends = high[which]
    high[which] = np.maximum(_run_starts(suffix, ends - 1), low[which])
    _mark(affix, high[which], ends)


def _peel_dollars(docs: Docs, affix: np.ndarray, prefix: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Take US$, A$ and C$ off the fronts, and the prefixes behind them. Returns their characters but the first."""
    chars = docs.chars
    signs = np.flatnonzero(chars == ord("$"))
    which = np.searchsorted(docs.chunks.starts, signs, "right") - 1
    size = signs - low[which]
    named = (size == 1) & np.isin(chars[signs - 1], _ord("AC"))
    named |= (size == 2) & (chars[signs - 2] == ord("U")) & (chars[signs - 1] == ord("S"))
    signs, which, size = signs[named], which[named], size[named]
    before = low[which]
    low[which] = _run_ends(prefix, signs)
    _mark(affix, before, low[which])
    return np.concatenate([signs, signs[size == 2] - 1])


def _peel_possessive(
    docs: Docs, affix: np.ndarray, suffix: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Take 's off the ends, and the suffixes before it. Returns where the apostrophes are."""
    chars = docs.chars
    marks: np.ndarray = np.flatnonzero((chars == ord("'")) | (chars == ord("’")))
    marks = marks[(chars[marks + 1] | 0x20) == ord("s")]
    which = np.minimum(np.searchsorted(high, marks + 2), len(high) - 1)
    here = (high[which] == marks + 2) & (low[which] <= marks)
    marks, which = marks[here], which[here]
    high[which] = marks
    affix[marks] = affix[marks + 1] = True
    _peel(affix, suffix, low, high, which[suffix[marks - 1] & (low[which] < marks)])
    return marks


def _peel_units(docs: Docs, affix: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Take a unit of measure off the ends, if a digit is before it. Returns where the units begin."""
    digit, solid = (docs.flags & DIGIT) != 0, (docs.flags & (DIGIT | SPACE)) == 0
    starts: np.ndarray = np.flatnonzero(digit[:-1] & solid[1:]) + 1
    which = np.minimum(np.searchsorted(high, starts, "right"), len(high) - 1)
    lengths = high[which] - starts
    here = (low[which] < starts) & (lengths > 0) & (lengths <= max(map(len, UNITS)))
    starts, which = starts[here], which[here]
    found, _ = lookup(UNITS).find(docs.digests(starts, high[which]))
    starts, which = starts[found], which[found]
    _mark(affix, starts, high[which])
    high[which] = starts
    return starts


def _cut_inside(
    docs: Docs, cut: np.ndarray, affix: np.ndarray, dots: np.ndarray, low: np.ndarray, high: np.ndarray
) -> None:
    """Cut what is left of the chunks at hyphens, ellipses, symbols, and marks between letters or digits."""
    chars, flags = docs.chars, docs.flags
    at = np.flatnonzero(((flags & kinds.INFIX) != 0) & ~affix)
    mark = chars[at]
    before, after = (np.where(affix[near], 0, flags[near]) for near in (at - 1, at + 1))
    letter_after = (after & ALPHA) != 0
    is_minus, is_comma, is_stop = mark == ord("-"), mark == ord(","), mark == ord(".")
    hyphen = np.isin(mark, _ord("-–—~:<>=/"))
    sign = is_minus | np.isin(mark, _ord("+*^"))
    splits = (flags[at] & kinds.ICON != 0) | (mark == ord("…"))
    splits |= hyphen & ((before & (ALPHA | DIGIT)) != 0) & letter_after
    splits |= is_comma & ((before & ALPHA) != 0) & letter_after
    splits |= is_stop & ((before & (LOWER | QUOTE)) != 0) & ((after & (UPPER | QUOTE)) != 0)
    splits |= sign & ((before & DIGIT) != 0) & (((after & DIGIT) != 0) | (chars[at + 1] == ord("-")))
    starts = [at[splits]]
    ends = [at[splits] + 1]

    # Two or three hyphens count as one; a digit before the first lets it stand alone (rule `sign`).
    for text in _MULTIPLES_OF_HYPHENS:
        one, size = ord(text[0]), len(text)
        first = at[(mark == one) & (chars[at - 1] != one) & (chars[at + 1] == one) & ((before & ALPHA) != 0)]
        run = first[chars[first + size - 1] == one]
        run = run[(flags[run + size] & ALPHA) != 0]
        starts.append(run)
        ends.append(run + size)
    inner = dots[~affix[dots]]
    new, old = np.diff(inner, prepend=-2) > 1, np.diff(inner, append=len(chars) + 1) > 1
    many = inner[new] < inner[old]
    starts.append(inner[new][many])
    ends.append(inner[old][many] + 1)

    where = np.concatenate(starts)
    outside = ~_in_address(docs, low, high, where)
    cut[where[outside]] = True
    cut[np.concatenate(ends)[outside]] = True


def _in_address(docs: Docs, low: np.ndarray, high: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Which of the cuts lie in a web address; bool, shape (cuts,)."""
    stops = np.flatnonzero(docs.chars == ord("."))
    stops = stops[
        (docs.flags[stops + 1] & docs.flags[np.minimum(stops + 2, len(docs.flags) - 1)] & LOWER) != 0
    ]  # a top-level domain may follow
    chunk = np.searchsorted(low, where, "right") - 1
    which = np.intersect1d(chunk, np.searchsorted(low, stops, "right") - 1)
    if not len(which):
        return np.zeros(len(where), bool)
    lengths = high[which] - low[which]
    inside = np.zeros(len(docs.chars), bool)
    _mark(inside, low[which], high[which])
    texts = docs.chars[inside].tobytes().decode("utf-32-le")
    bounds = np.append(0, np.cumsum(lengths))
    pieces = pa.array([texts[start:end] for start, end in pairwise(bounds)])
    matches = pc.match_substring_regex(pieces, _ADDRESS).to_numpy(zero_copy_only=False)
    return np.isin(chunk, which[matches])


def _cut_letters(docs: Docs, cut: np.ndarray) -> None:
    """Make every letter of a script without spaces a word, in the texts that are mostly written in one."""
    mine = np.zeros(len(docs.chars), bool)
    _mark(mine, docs.starts[docs.unspaced], docs.ends[docs.unspaced])
    letters = np.flatnonzero(mine & ((docs.flags & kinds.UNSPACED) != 0))
    cut[letters] = True
    behind = docs.flags[letters + 1]
    # A vowel sign or tone mark behind a letter stays with it.
    stays = ((behind & kinds.NOT_PUNCTUATION) != 0) & ((behind & (kinds.LETTER | kinds.DECIMAL)) == 0)
    cut[letters[~stays & ((behind & SPACE) == 0)] + 1] = True


def _join(docs: Docs, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Join exceptions that the general rules cut; the longest first, of two that overlap the one before."""
    table, longest = lookup(tuple(sorted(set(JOINED)))), max(map(len, JOINED))
    touching = starts[1:] == ends[:-1]
    first = np.isin(docs.chars[starts], _ord("".join({text[0] for text in JOINED})))
    last = np.isin(docs.chars[ends - 1], _ord("".join({text[-1] for text in JOINED})))
    joined = np.zeros(len(starts), bool)  # this word goes on with the one before
    used = np.zeros(len(starts), bool)
    for count in range(LONGEST_JOIN, 1, -1):
        together = first[: max(len(starts) - count + 1, 0)] & last[count - 1 :]
        for offset in range(count - 1):
            together &= touching[offset : offset + len(together)]
        at = np.flatnonzero(together)
        at = at[ends[at + count - 1] - starts[at] <= longest]
        found, _ = table.find(docs.digests(starts[at], ends[at + count - 1]))
        at = at[found]
        at = at[~(used[at] | used[at + count - 1])]
        chain = np.maximum.accumulate(np.where(np.diff(at, prepend=-count) >= count, at, 0))
        at = at[(at - chain) % count == 0]
        for offset in range(count):
            used[at + offset] = True
            joined[at[:, None] + np.arange(1, count)] = True
    return starts[~joined], ends[~np.append(joined[1:], False)[: len(joined)]]


def _cut_contractions(
    docs: Docs, starts: np.ndarray, ends: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut contractions that are all of a chunk but affixes. Returns starts, ends and digests of the words."""
    digests = docs.digests(starts, ends)
    at, which = lookup(tuple(CONTRACTIONS)).find(digests)
    chunk = np.minimum(np.searchsorted(low, starts[at]), len(low) - 1)
    whole = (low[chunk] == starts[at]) & (high[chunk] <= ends[at])
    at, which = at[whole], which[whole]
    if not len(at):
        return starts, ends, digests
    offsets = np.array([(*cuts, 0)[:2] for cuts in CONTRACTIONS.values()])[which]
    twice = offsets[:, 1] > 0
    cuts = np.sort(np.concatenate([starts[at] + offsets[:, 0], starts[at[twice]] + offsets[twice, 1]]))
    word = np.searchsorted(starts, cuts) - 1
    starts, ends = np.insert(starts, word + 1, cuts), np.insert(ends, word, cuts)
    digests = np.insert(digests, word + 1, 0)
    second = word + 1 + np.arange(len(word))
    for part in (second - 1, second):
        digests[part] = docs.digests(starts[part], ends[part])
    return starts, ends, digests
