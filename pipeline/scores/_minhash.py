"""Texts to MinHash bands: word n-grams, hashed without a loop over words, and one 64-bit key a band.

Normalisation is that of FineWeb (`simplify_text` of huggingface/datatrove) as one table over code points: lower case,
accents and other marks dropped, a run of digits is "0", and whatever is neither letter nor digit separates words.
Three things differ. The published code cuts words with a tokenizer a language; here a word is what stands between
separators, and a character of a script that writes no spaces is a word of its own. A decimal number is two words. A
syllable of Hangul stays whole, so decomposed Korean text does not match composed text.

A text of fewer than n words has no n-gram: all its words are one, and a text with no word at all is compared as it
stands. Otherwise every short text would share the empty signature.

Texts stay UTF-8. ASCII is folded by `bytes.translate`, the rest by a table where it stands: no character becomes
longer, and what is left over of it is DROPPED. A word is hashed from one load of 8 bytes, a longer one from several,
and an n-gram from the hashes of its words.

Minima are those of `rensa` (Rust): 0.05 ns a hash function and n-gram, where NumPy takes 0.6 on the same core; its
digests keep 32 bits of a 64-bit permutation, and a band joins several.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.hashing import mix64
from pipeline.textrules.docs import mix
from pipeline.words import SPACELESS

SEPARATOR, DROPPED, DIGIT = 0, 1, ord("0")
CHUNK = 1 << 15
"""Digests that are Python integers at one time, between rensa and NumPy; so few stay in a core's cache."""
_BASE = np.uint64(0x9E3779B97F4A7C15)
_ASCII = bytes(
    DIGIT if chr(b).isdigit() else ord(chr(b).lower()) if chr(b).isalpha() else SEPARATOR for b in range(128)
) + bytes(range(128, 256))
_LOW_BYTES = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)
_SIZES = ((2, 0xC0, 0xE0), (3, 0xE0, 0xF0), (4, 0xF0, 0xF8))
"""Of characters in UTF-8, with the range of their first byte."""


@cache
def fold_table() -> tuple[np.ndarray, np.ndarray]:
    """What the UTF-8 of every code point above ASCII becomes, as a little-endian integer of as many bytes, filled up
    with DROPPED (uint32); and which are words of their own (bool). Shapes (0x110000,). Built once a process (0.2 s)."""
    table, alone = np.zeros(0x110000, np.uint32), np.zeros(0x110000, bool)
    longer = {}
    for point in range(0x80, 0x20000):
        character = chr(point)
        category = unicodedata.category(character)
        if category in ("Mn", "Me", "Cf"):
            folded = ""
        elif category == "Nd":
            folded = "0"
        elif category[0] in "LNM":
            folded = character.lower()
            if len(folded) > 1 or unicodedata.decomposition(folded):
                bare = "".join(c for c in unicodedata.normalize("NFD", folded) if unicodedata.category(c) != "Mn")
                folded = bare if len(bare) == 1 else character
        else:
            continue
        if len(folded.encode()) > len(character.encode()):  # nine of them, in Unicode 14
            longer[folded], folded = character, character
        table[point] = _padded(folded, character)
    ideographs = "".join(map(chr, range(0x20000, 0x40000)))  # beyond are tags, selectors and private use
    table[0x20000:0x40000] = np.frombuffer(ideographs.encode(), "<u4")
    table[0xE0000:0xE1000] = _padded("", chr(0xE0000))
    for character, folded in longer.items():  # the other way round, so that they agree
        table[ord(character)] = _padded(folded, character)
    for run in re.finditer(f"[{SPACELESS}]+", "".join(map(chr, range(0x40000)))):
        alone[run.start() : run.end()] = (table[run.start() : run.end()] & 0x80) != 0
    return table, alone


def _padded(folded: str, character: str) -> int:
    return int.from_bytes(folded.encode().ljust(len(character.encode()), bytes([DROPPED])), "little")


def shingles(texts: pa.Array, n: int) -> tuple[np.ndarray, np.ndarray]:
    """64-bit hashes of the word n-grams of some texts, end to end (uint64), and the len(texts) + 1 offsets (uint64)
    between which each text's lie: at least one, and as many as words, so some are repeated."""
    texts = texts.cast(pa.large_string())
    nothing, newline = (pa.scalar(c, texts.type) for c in ("", "\n"))
    _, offsets, data = pc.binary_join_element_wise(texts, nothing, newline).buffers()
    bounds = np.frombuffer(offsets, np.int64)[: len(texts) + 1]
    content = np.frombuffer(data, np.uint8)[: bounds[-1]]

    folded, starts, ends, first = _words(content, bounds)
    words = _digests(folded, starts, ends - starts)
    hashes, count = np.zeros(len(words), np.uint64), np.diff(first)
    own = hashes[: max(len(words) - n + 1, 0)]
    for i in range(n if len(own) else 0):
        own *= _BASE
        own += words[i : len(own) + i]
    # The last n - 1 places of a text would reach into the next one: they repeat its last n-gram, or all its words.
    last = first[1:][count >= n] - n
    for i in range(1, n):
        hashes[last + i] = hashes[last]
    if (short := count < n).any():
        start, size = first[:-1][short], count[short]
        whole = np.zeros(len(start), np.uint64)
        for i in range(n - 1):
            there = i < size
            whole[there] = whole[there] * _BASE + words[start[there] + i]
        hashes[np.repeat(short, count)] = np.repeat(whole, size)
    mix(hashes)
    if len(none := np.flatnonzero(count == 0)):
        size = np.diff(bounds)[none]
        hashes = np.insert(hashes, first[none], _digests(content, bounds[none], size) ^ mix64(size.astype(np.uint64)))
        first = first + np.cumsum(np.append(0, count == 0))
    return hashes, first.astype(np.uint64)


def _words(content: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Texts, each ended by a newline, to folded bytes, the start and end of every word in them, and the offsets between
    which each text's words lie. `bounds` are those of the texts; shape (texts + 1,), as the offsets."""
    folded, alone = _fold(content)
    while True:  # twice where something dropped stands between two digits
        gone = folded == DIGIT
        gone[1:] &= gone[:-1].copy()  # all but the first of a run
        gone[0] = False
        gone |= folded == DROPPED
        if not len(at := np.flatnonzero(gone)):
            break
        folded = folded[~gone]
        bounds, alone = (places - np.searchsorted(at, places) for places in (bounds, alone))
    word = folded != SEPARATOR
    edge = word.copy()
    np.not_equal(word[1:], word[:-1], out=edge[1:])
    if len(alone):
        cut = np.zeros(len(word), bool)
        cut[alone] = True
        cut[alone + np.where(folded[alone] < _SIZES[2][1], 3, 4)] = True
        cut &= word & ~edge
        starts, ends = np.flatnonzero(edge & word | cut), np.flatnonzero(edge & ~word | cut)
    else:
        edges = np.flatnonzero(edge)
        starts, ends = edges[::2], edges[1::2]
    return folded, starts, ends, np.searchsorted(starts, bounds)


def _fold(content: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """UTF-8 folded where it stands, and where the characters begin that are words of their own."""
    folded = np.frombuffer(bytearray(content).translate(_ASCII), np.uint8)
    alone = [np.zeros(0, np.int64)]
    if len(lead := np.flatnonzero(content >= _SIZES[0][1])):
        table, single = fold_table()
        first = content[lead]
        for size, low, high in _SIZES:
            at = lead[(first >= low) & (first < high)]
            point = content[at].astype(np.int64) & (0x7F >> size)
            for i in range(1, size):
                point = point << 6 | content[at + i] & 0x3F
            becomes = table.take(point).view(np.uint8).reshape(-1, 4)
            for i in range(size):
                folded[at + i] = becomes[:, i]
            alone.append(at[single.take(point)])
    return folded, np.concatenate(alone)


def _digests(content: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """64-bit hashes of pieces of some bytes, for pieces of up to 8 bytes without a zero among them all different."""
    blocks = np.zeros(len(content) // 8 + 2, "<u8")
    blocks.view(np.uint8)[: len(content)] = content

    def load(at: np.ndarray, size: np.ndarray) -> np.ndarray:
        which, shift = at >> 3, ((at & 7) << 3).view(np.uint64)
        values = blocks.take(which) >> shift
        values |= (blocks[1:].take(which) << np.uint64(1)) << (np.uint64(63) - shift)
        values &= _LOW_BYTES.take(np.minimum(size, 8))
        return values

    digests = load(starts, sizes)
    if len(long := np.flatnonzero(sizes > 8)):
        more = (sizes[long] - 1) >> 3
        before = np.cumsum(more) - more
        behind = 8 * (np.arange(more.sum()) - np.repeat(before, more) + 1)
        rest = load(np.repeat(starts[long], more) + behind, np.repeat(sizes[long], more) - behind)
        digests[long] ^= np.add.reduceat(mix64(rest + behind.view(np.uint64) * _BASE), before)
    return mix(digests)


def band_keys(hashes: np.ndarray, offsets: np.ndarray, bands: int, rows: int, seed: int) -> np.ndarray:
    """One key for every text and band, over the minima of `rows` hash functions; uint64 (texts, bands).

    Two texts share the key of a band with probability s**rows at a Jaccard similarity s of their n-gram sets; keys of
    different bands never agree but by chance.
    """
    from rensa import RMinHash

    hashed = bands * rows
    step = max(1, CHUNK // hashed)
    minima = array("I")
    for at in range(0, len(offsets) - 1, step):
        part = offsets[at : at + step + 1]
        own = hashes[int(part[0]) : int(part[-1])]
        for digest in RMinHash.digest_matrix_from_flat_token_hashes(own, part - part[0], hashed, seed).to_rows():
            minima.fromlist(digest)
    # A hash over the rows, another one in every band.
    factors = mix64(np.arange(1, rows + 1, dtype=np.uint64)) | np.uint64(1)
    joined = np.frombuffer(minima, np.uint32).reshape(-1, bands, rows).astype(np.uint64) @ factors
    return mix64(joined + mix64(np.arange(1, bands + 1, dtype=np.uint64)))


def jaccard(hashes: np.ndarray, offsets: np.ndarray, one: int, other: int) -> float:
    """Exact Jaccard similarity of the n-gram sets of two texts."""
    a, b = (np.unique(hashes[int(offsets[i]) : int(offsets[i + 1])]) for i in (one, other))
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)
