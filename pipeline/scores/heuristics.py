"""Rules of thumb for web text: Gopher repetition, Gopher quality, C4 and FineWeb, with datatrove's limits and verdicts.

A row scores 1.0 where it passes every rule and 0.0 where one fires; `rule` names the first that did, in the words of
datatrove's filters (`gopher_short_doc`, `top_2_gram`, `too_few_sentences`), and is empty where none did. C4 drops
lines before it counts sentences, and FineWeb judges what C4 left, as in FineWeb's pipeline; but this is a score: the
text itself is never rewritten.

A batch is judged whole, as arithmetic on the code points of all its texts (`pipeline.textrules`). Measured against
datatrove 0.10.1 in docs/heuristics.md.

Sources: Rae et al. 2021 (arXiv 2112.11446, table A1), Raffel et al. 2020 (arXiv 1910.10683), Penedo et al. 2024
(arXiv 2406.17557), huggingface/datatrove.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from pipeline.recipe import Column, Transform
from pipeline.scores.base import Score
from pipeline.textrules import chars as kinds
from pipeline.textrules.docs import MAX_DOCS, NEWLINE, Docs, Spans
from pipeline.textrules.repetition import duplicate_grams, duplicates, top_grams
from pipeline.textrules.words import Words, count_sentences, lookup, split_words

if TYPE_CHECKING:
    from pipeline.run import Run

RuleSet = Literal["gopher_repetition", "gopher_quality", "c4", "fineweb"]
Share = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Shares = dict[Annotated[int, Field(ge=1, le=64)], Share]

FIELDS = pa.schema([("score", pa.float32()), ("rule", pa.string())])
PASSED = ""
"""The rule of a text for which none fired. (Null would mean that it was not judged.)"""
PIECE_BYTES = 1 << 20
"""Text judged at once: its arrays stay in the processor's cache, and no row is larger than memory allows."""

_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_CITATIONS = ("edit", "citation needed")


class Heuristics(Score):
    """Which sets of rules apply, in which order, and their limits. Any limit may be null: that rule is off."""

    claim = "passes the rules of Gopher, C4 and FineWeb; `rule` names the first that fired"
    cost = "about 1,000 documents of 2.8 kB a core and second"
    source = "Rae et al. 2021, arXiv 2112.11446; Raffel et al. 2020, 1910.10683; Penedo et al. 2024, 2406.17557"
    kind: Literal["heuristics"] = "heuristics"
    rules: tuple[RuleSet, ...] = ("gopher_repetition", "gopher_quality", "c4", "fineweb")
    """Applied in this order; the first rule that fires is reported, and C4 drops lines for those behind it."""
    segment_unspaced: bool = True
    """Judge texts of scripts without spaces (Chinese, Japanese, Thai, ...) by their letters: each counts as a word,
    and the rules that compare words (mean length, stop words, n-grams) are left out. False: as if they were English,
    like datatrove's default; nearly all of them fail."""

    # Gopher repetition: shares of lines, paragraphs and characters.
    dup_para_frac: Share | None = 0.3
    dup_para_char_frac: Share | None = 0.2
    dup_line_frac: Share | None = 0.3
    dup_line_char_frac: Share | None = 0.2
    top_n_grams: Shares = Field({2: 0.2, 3: 0.18, 4: 0.16})
    dup_n_grams: Shares = Field({5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10})

    # Gopher quality.
    min_doc_words: Count | None = 50
    max_doc_words: Count | None = 100_000
    min_avg_word_length: Share | None = 3
    max_avg_word_length: Share | None = 10
    max_symbol_word_ratio: Share | None = 0.1
    max_bullet_lines_ratio: Share | None = 0.9
    max_ellipsis_lines_ratio: Share | None = 0.3
    min_alpha_words_ratio: Share | None = 0.8
    """datatrove calls this one max_non_alpha_words_ratio."""
    min_stop_words: Count | None = 2
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    """English; give others for another language, or set min_stop_words to null."""

    # C4. The first five say which lines are dropped and cleaned before the others judge.
    filter_no_terminal_punct: bool = True
    """Drop lines that end in none of . ? ! " '. FineWeb sets this to false."""
    min_words_per_line: Count | None = 3
    max_word_length: Count | None = 1000
    filter_javascript: bool = True
    filter_policy: bool = True
    remove_citations: bool = True
    filter_lorem_ipsum: bool = True
    filter_curly_bracket: bool = True
    min_num_sentences: Count | None = 5

    # FineWeb.
    line_punct_thr: Share | None = 0.12
    short_line_thr: Share | None = 0.67
    short_line_length: Count = 30
    char_duplicates_ratio: Share | None = 0.01
    new_line_ratio: Share | None = 0.3

    @field_validator("rules")
    @classmethod
    def _some_once(cls, rules: tuple[RuleSet, ...]) -> tuple[RuleSet, ...]:
        if not rules or len(set(rules)) < len(rules):
            raise ValueError("name at least one set of rules, each once")
        return rules

    def column(self, run: Run) -> Column:
        return Column(self.column_name, ("text",), FIELDS, self.open, self.identity())

    def open(self) -> Transform:
        kinds.table()
        return self.judge

    def judge(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Scores and rules of a batch with the column `text`."""
        texts = batch.column("text").cast(pa.large_string())
        rules = pa.concat_arrays([pa.array([], pa.string()), *map(self._judge_piece, _pieces(texts))])
        return pa.record_batch([pc.equal(rules, PASSED).cast(pa.float32()), rules], schema=FIELDS)

    def _judge_piece(self, texts: pa.Array) -> pa.Array:
        judge = _Judge(Docs.of(texts, self.segment_unspaced))
        apply = {
            "gopher_repetition": self._gopher_repetition,
            "gopher_quality": self._gopher_quality,
            "c4": self._c4,
            "fineweb": self._fineweb,
        }
        for rules in self.rules:
            if judge.open.any():
                apply[rules](judge)
        return judge.verdicts()

    def _gopher_repetition(self, judge: _Judge) -> None:
        docs = judge.docs
        repeats, chars = duplicates(docs, docs.paragraphs)
        judge.above("dup_para_frac", repeats, docs.tally(docs.paragraphs.docs), self.dup_para_frac)
        judge.above("dup_para_char_frac", chars, docs.lengths, self.dup_para_char_frac)

        # Newlines in a row separate two lines; before the first line and behind the last they make an empty one.
        lines = docs.lines[docs.lines.lengths > 0]
        at_start, at_end = (docs.chars[at] == NEWLINE for at in (docs.starts, docs.ends - 1))
        repeats, chars = duplicates(docs, lines)
        count = docs.tally(lines.docs) + at_start + at_end
        judge.above("dup_line_frac", repeats + (at_start & at_end), count, self.dup_line_frac)
        judge.above("dup_line_char_frac", chars, docs.lengths, self.dup_line_char_frac)

        for n, over in top_grams(docs, judge.words, self.top_n_grams, judge.open & ~docs.unspaced):
            judge.fail(f"top_{n}_gram", over)
        for n, over in duplicate_grams(docs, judge.words, self.dup_n_grams, judge.open & ~docs.unspaced):
            judge.fail(f"duplicated_{n}_n_grams", over)

    def _gopher_quality(self, judge: _Judge) -> None:
        docs, words = judge.docs, judge.words
        counted = (words.kinds & kinds.COUNTED) != 0
        count = docs.tally(words.docs[counted])
        judge.below("gopher_short_doc", count, 1, self.min_doc_words)
        judge.above("gopher_long_doc", count, 1, self.max_doc_words)
        letters = docs.tally(words.docs[counted], words.lengths[counted])
        spaced = ~docs.unspaced & (count > 0)
        judge.below("gopher_below_avg_threshold", letters, count, self.min_avg_word_length, spaced)
        judge.above("gopher_above_avg_threshold", letters, count, self.max_avg_word_length, spaced)

        hashes = docs.texts.count(np.flatnonzero(docs.chars == ord("#")))
        judge.above("gopher_too_many_hashes", hashes, words.counts, self.max_symbol_word_ratio)
        dots = _runs(docs, ".")
        ellipses = docs.tally(dots.docs, dots.lengths // 3) + docs.texts.count(np.flatnonzero(docs.chars == ord("…")))
        judge.above("gopher_too_many_ellipsis", ellipses, words.counts, self.max_symbol_word_ratio)

        lines = docs.screen_lines
        starts, ends = docs.strip(lines)
        filled = starts < ends
        first, last = docs.chars[starts], docs.chars[ends - 1]
        bullets = filled & ((first == ord("•")) | (first == ord("-")))
        trailing = _end_in_ellipsis(docs, starts, ends) | (filled & (last == ord("…")))
        count = docs.tally(lines.docs)
        judge.above("gopher_too_many_bullets", docs.tally(lines.docs[bullets]), count, self.max_bullet_lines_ratio)
        judge.above(
            "gopher_too_many_end_ellipsis", docs.tally(lines.docs[trailing]), count, self.max_ellipsis_lines_ratio
        )

        alpha = docs.tally(words.docs[(words.kinds & kinds.LETTER) != 0])
        judge.below("gopher_below_alpha_threshold", alpha, words.counts, self.min_alpha_words_ratio)
        if self.min_stop_words and self.stop_words:
            at, which = lookup(self.stop_words).find(words.digests)
            seen = np.zeros((len(docs), len(self.stop_words)), bool)
            seen[words.docs[at], which] = True
            judge.below("gopher_enough_stop_words", seen.sum(axis=1), 1, self.min_stop_words, ~docs.unspaced)

    def _c4(self, judge: _Judge) -> None:
        """Drops lines as C4 does, and leaves the judge with what remains of the texts."""
        for step in (self._c4_drop_by_words, self._c4_drop_by_content, self._c4_count_sentences):
            if judge.open.any():
                step(judge, "too_few_sentences" if self.min_num_sentences else "empty")

    def _c4_drop_by_words(self, judge: _Judge, gone: str) -> None:
        docs, lines = judge.docs, judge.docs.screen_lines
        first, stop = docs.chunks_in(lines)
        unspaced = docs.unspaced[lines.docs]
        words = stop - first + np.where(unspaced, lines.count(docs.having(kinds.UNSPACED)), 0)
        kept = words >= (self.min_words_per_line or 0)
        if self.max_word_length is not None:
            kept &= unspaced | (lines.count(docs.chunks.starts[docs.chunks.lengths > self.max_word_length]) == 0)
        stripped = Spans(*docs.strip(lines), lines.docs)
        judge.keep(stripped[kept], gone, _citations(docs) if self.remove_citations else None)

    def _c4_drop_by_content(self, judge: _Judge, gone: str) -> None:
        docs, lines = judge.docs, judge.docs.lines

        def lines_with(phrase: str) -> np.ndarray:
            return lines.count(docs.find(phrase)) > 0

        drop = np.zeros(len(lines), bool)
        if self.filter_no_terminal_punct:
            ends_well = (lines.lengths > 0) & np.isin(docs.chars[lines.ends - 1], list(map(ord, ".?!\"'")))
            drop = ~ends_well | _end_in_ellipsis(docs, lines.starts, lines.ends)
        lorem = np.zeros(len(lines), bool)
        if self.filter_lorem_ipsum:
            lorem = lines_with("lorem ipsum") & ~drop
        if self.filter_javascript:
            drop |= lines_with("javascript")
        curly = np.zeros(len(lines), bool)
        if self.filter_curly_bracket:
            curly = lines_with("{") & ~drop
        for phrase in _POLICY if self.filter_policy else ():
            drop |= lines_with(phrase)

        guilty = np.flatnonzero(lorem | curly)
        texts, first = np.unique(lines.docs[guilty], return_index=True)
        by_lorem = lorem[guilty[first]]
        for reason, which in (("lorem_ipsum", texts[by_lorem]), ("curly_bracket", texts[~by_lorem])):
            judge.fail(reason, np.isin(np.arange(len(docs)), which))
        judge.keep(lines[~drop], gone)

    def _c4_count_sentences(self, judge: _Judge, gone: str) -> None:
        docs = judge.docs
        if self.min_num_sentences:
            few = docs.tally(docs.lines.docs) < self.min_num_sentences  # a line is one sentence at least
            if few.any():
                short = docs.select(few)
                sentences = count_sentences(short, split_words(short), short.lines)
                few[few] = short.tally(short.lines.docs, sentences) < self.min_num_sentences
            judge.fail("too_few_sentences", few)
        judge.keep(Spans(*docs.strip(docs.texts), np.arange(len(docs))), gone)

    def _fineweb(self, judge: _Judge) -> None:
        docs = judge.docs
        first, stop = docs.chunks_in(docs.lines)
        lines = docs.lines[first < stop]
        count = docs.tally(lines.docs)
        judge.fail("empty", count == 0)
        prose = (docs.flags[lines.ends - 1] & kinds.LINE_END) != 0
        judge.below("line_punct_ratio", docs.tally(lines.docs[prose]), count, self.line_punct_thr)
        short = lines.lengths <= self.short_line_length
        judge.above("short_line_ratio", docs.tally(lines.docs[short]), count, self.short_line_thr)
        newlines = docs.tally(docs.lines.docs) - 1
        judge.above("char_dup_ratio", duplicates(docs, lines)[1], docs.lengths - newlines, self.char_duplicates_ratio)
        if self.new_line_ratio is not None:
            # A chunk is a word at least: few texts need their words counted.
            long = judge.open & (newlines > self.new_line_ratio * docs.tally(docs.chunks.docs))
            total = np.ones(len(docs), np.int64)
            if long.any():
                total[long] = split_words(docs.select(long)).counts
            judge.above("list_ratio", newlines, total, self.new_line_ratio, long)


class _Judge:
    """The texts of a piece, what is left of them, and which rule was the first to fire for each."""

    def __init__(self, docs: Docs) -> None:
        self.docs = docs
        self._rows = np.arange(len(docs))
        self._fired = np.zeros(len(docs), np.int32)
        self._names = [PASSED]
        self._words: Words | None = None

    @property
    def open(self) -> np.ndarray:
        """Which of `docs` passed every rule so far."""
        passed: np.ndarray = self._fired[self._rows] == 0
        return passed

    @property
    def words(self) -> Words:
        if self._words is None:
            self._words = split_words(self.docs)
        return self._words

    def fail(self, rule: str, which: np.ndarray) -> None:
        self._fired[self._rows[which & self.open]] = len(self._names)
        self._names.append(rule)

    def above(
        self, rule: str, part: np.ndarray, whole: np.ndarray | int, limit: float | None, among: np.ndarray | bool = True
    ) -> None:
        if limit is not None:
            self.fail(rule, (part / np.maximum(whole, 1) > limit) & among)

    def below(
        self, rule: str, part: np.ndarray, whole: np.ndarray | int, limit: float | None, among: np.ndarray | bool = True
    ) -> None:
        if limit is not None:
            self.fail(rule, (part / np.maximum(whole, 1) < limit) & among)

    def keep(self, spans: Spans, gone: str, removed: Spans | None = None) -> None:
        """Go on with these spans of the open texts. A text that has none left fails as `gone`."""
        self.fail(gone, self.docs.tally(spans.docs) == 0)
        spans = spans[self.open[spans.docs]]
        separated = (self.docs.chars[spans.ends] == NEWLINE).all()
        if removed is None and separated and (spans.lengths + 1).sum() == len(self.docs.chars):
            return  # that is all there is
        self._rows = self._rows[self.open]
        self.docs, self._words = self.docs.keep(spans, removed), None

    def verdicts(self) -> pa.Array:
        """Name of the first rule that fired for every text, or `PASSED`."""
        return pa.array(self._names, pa.string()).take(pa.array(self._fired))


def _pieces(texts: pa.Array) -> Iterator[pa.Array]:
    """The texts in slices of about `PIECE_BYTES`, or of one text that is larger."""
    sizes = pc.binary_length(texts).to_numpy(zero_copy_only=False).astype(np.int64)
    group, rows = (np.cumsum(sizes) - sizes) // PIECE_BYTES, np.arange(len(texts)) // (MAX_DOCS - 1)
    starts = [0, *(np.flatnonzero((np.diff(group) > 0) | (np.diff(rows) > 0)) + 1).tolist(), len(texts)]
    for start, stop in pairwise(starts):
        yield texts.slice(start, stop - start)


def _runs(docs: Docs, character: str) -> Spans:
    """Maximal runs of one character."""
    at = np.flatnonzero(docs.chars == ord(character))
    first = np.diff(at, prepend=-2) > 1
    starts, ends = at[first], at[np.append(first[1:], True)[: len(at)]] + 1
    return Spans(starts, ends, np.searchsorted(docs.ends, starts))


def _end_in_ellipsis(docs: Docs, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Which spans end in three dots."""
    dots: np.ndarray = ends - starts >= 3
    for back in (1, 2, 3):
        dots &= docs.chars[ends - back] == ord(".")
    return dots


def _citations(docs: Docs) -> Spans:
    """Marks like [12], [], [edit] and [citation needed]."""
    opening, closing = (np.flatnonzero(docs.chars == ord(bracket)) for bracket in "[]")
    which = np.searchsorted(closing, opening)
    opening, which = opening[which < len(closing)], which[which < len(closing)]
    inside = Spans(opening + 1, closing[which], which)
    cited = inside.count(docs.having(kinds.DECIMAL)) == inside.lengths
    found, _ = lookup(_CITATIONS).find(docs.digests(inside.starts, inside.ends))
    cited[found] = True
    return Spans(opening, closing[which] + 1, which)[cited]
