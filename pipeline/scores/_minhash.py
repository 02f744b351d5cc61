"""Texts to MinHash bands: word n-grams, hashed without a loop over words, and one 64-bit key a band.

Normalisation is that of FineWeb (`simplify_text` of huggingface/datatrove) as one table over code points: lower case,
accents and other marks dropped, a run of digits is "0", and whatever is neither letter nor digit separates words.
Three things differ. The published code cuts words with a tokenizer a language; here a word is what stands between
separators, and a character of a script that writes no spaces is a word of its own. A decimal number is two words. A
syllable of Hangul stays whole, so decomposed Korean text does not match composed text.

A text of fewer than n words has no n-gram: all its words are one, and a text with no word at all is compared as it
stands. Otherwise every short text would share the empty signature.

Minima are those of `rensa` (Rust): 0.07 ns a hash function and n-gram, where NumPy takes 0.6 on the same core; its
digests keep 32 bits of a 64-bit permutation, and a band joins several.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.hashing import mix64
from pipeline.textrules.docs import Docs
from pipeline.words import SPACELESS

SEPARATOR, DROPPED, DIGIT = 0, 1, ord("0")
ALONE, START = 1 << 31, 1 << 7
"""Bits of a character that is a word of its own, and of the first character of a word."""
CHUNK = 1 << 20
"""Digests that are Python integers at one time, between rensa and NumPy."""
_BASE = np.uint64(0x9E3779B97F4A7C15)


@cache
def fold_table() -> np.ndarray:
    """What every code point becomes: SEPARATOR, DROPPED, an ASCII character, or 256 times another one, so that the bit
    START is free; shape (0x110000,), uint32. Built once a process (0.1 s)."""
    table = np.full(0x110000, SEPARATOR, np.uint32)
    for point in range(0x20000):
        character = chr(point)
        category = unicodedata.category(character)
        if category in ("Mn", "Me", "Cf"):
            table[point] = DROPPED
        elif category == "Nd":
            table[point] = DIGIT
        elif category[0] in "LNM":
            lower = character.lower()
            if len(lower) > 1 or unicodedata.decomposition(lower):
                parts = unicodedata.normalize("NFD", lower)
                bare = "".join(c for c in parts if unicodedata.category(c) != "Mn")
                lower = bare if len(bare) == 1 else character
            table[point] = ord(lower)
    table[0x20000:0x40000] = np.arange(0x20000, 0x40000)  # ideographs; beyond are tags, selectors and private use
    table[0xE0000:0xE1000] = DROPPED
    spaceless = re.compile(f"[{SPACELESS}]+").finditer("".join(map(chr, range(0x40000))))
    for run in spaceless:
        here = table[run.start() : run.end()]
        here[here > DROPPED] |= np.uint32(ALONE >> 8)
    table[table > 127] <<= np.uint32(8)
    return table


@cache
def _ascii_table() -> bytes:
    return fold_table()[:256].astype(np.uint8).tobytes()


def shingles(texts: pa.Array, n: int) -> tuple[np.ndarray, np.ndarray]:
    """64-bit hashes of the word n-grams of some texts, end to end (uint64), and the len(texts) + 1 offsets (uint64)
    between which each text's lie: at least one, repeated ones not removed."""
    joined = "\n".join([*texts.to_pylist(), ""])
    if joined.isascii():  # four times less to move
        content = joined.encode()
        chars, folded = (np.frombuffer(c, np.uint8) for c in (content, content.translate(_ascii_table())))
    else:
        chars = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
        folded = fold_table().take(chars)
    ends = np.cumsum(pc.utf8_length(texts).to_numpy(zero_copy_only=False).astype(np.int64) + 1) - 1
    raw = Docs(chars, np.append(0, ends + 1)[:-1], ends, np.zeros(len(ends), bool))

    dropped = np.flatnonzero(folded == DROPPED)
    bounds = raw.starts - np.searchsorted(dropped, raw.starts)
    if len(dropped):
        folded = np.compress(folded != DROPPED, folded)
    word, digit = folded != SEPARATOR, folded == DIGIT
    begins = word.copy()
    begins[1:] &= ~word[:-1]
    if folded.dtype != np.uint8:
        alone = folded >= ALONE
        begins[1:] |= word[1:] & (alone[1:] | alone[:-1])
    first = np.append(np.searchsorted(np.flatnonzero(begins), bounds), np.count_nonzero(begins))

    # The words of all texts without anything between them: their first characters tell where they begin.
    word[1:] &= ~(digit[1:] & digit[:-1])
    marked = folded + begins * folded.dtype.type(START)
    start = np.append(np.flatnonzero(np.compress(word, begins)), np.count_nonzero(word))
    words = Docs(np.compress(word, marked), start[:0], start[:0], raw.unspaced[:0])

    grams = np.maximum(np.diff(first) - n + 1, 1)
    offsets = np.concatenate([[0], np.cumsum(grams)])
    gram = np.arange(offsets[-1]) + np.repeat(first[:-1] - offsets[:-1], grams)
    hashes = words.digests(start[gram], start[np.minimum(gram + n, np.repeat(first[1:], grams))])
    if len(none := np.flatnonzero(first[:-1] == first[1:])):
        hashes[offsets[none]] = raw.digests(raw.starts[none], raw.ends[none])
    return hashes, offsets.astype(np.uint64)


def band_keys(hashes: np.ndarray, offsets: np.ndarray, bands: int, rows: int, seed: int) -> np.ndarray:
    """One key for every text and band, over the minima of `rows` hash functions; uint64 (texts, bands).

    Two texts share the key of a band with probability s**rows at a Jaccard similarity s of their n-gram sets; keys of
    different bands never agree but by chance.
    """
    from rensa import RMinHash

    hashed = bands * rows
    step = max(1, CHUNK // hashed)
    keys = np.empty((len(offsets) - 1, bands), np.uint64)
    for at in range(0, len(keys), step):
        part = offsets[at : at + step + 1]
        own = np.ascontiguousarray(hashes[int(part[0]) : int(part[-1])])
        minima = RMinHash.digest_matrix_from_flat_token_hashes(own, part - part[0], hashed, seed)
        keys[at : at + step] = _join(np.array(minima.to_rows(), np.uint64).reshape(-1, bands, rows))
    return keys


def _join(minima: np.ndarray) -> np.ndarray:
    """(texts, bands, rows) to (texts, bands): a hash over the rows, another one in every band."""
    keys = np.broadcast_to(mix64(np.arange(1, minima.shape[1] + 1, dtype=np.uint64)), minima.shape[:2]).copy()
    for row in range(minima.shape[2]):
        keys = mix64(keys ^ minima[:, :, row]) + _BASE
    return keys


def jaccard(hashes: np.ndarray, offsets: np.ndarray, one: int, other: int) -> float:
    """Exact Jaccard similarity of the n-gram sets of two texts."""
    a, b = (np.unique(hashes[int(offsets[i]) : int(offsets[i + 1])]) for i in (one, other))
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)
