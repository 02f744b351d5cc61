"""Sentences: drop the sentences or lines of a text that score low. They tile the text, so what stays is verbatim.

The unit's score is that of any criterion that reads one text at a time, such as the probability of a fastText
classifier (`quality`), or 0 for a line that published rules drop and 1 for one that they keep:

- `c4` (Raffel et al. 2020, arXiv 1910.10683, section 2.2): a line has to end in one of . ? ! " ' and not in an
  ellipsis, to have three words, and to hold neither `javascript` nor a phrase of a privacy policy. The numbers and
  phrases are those of `kind: heuristics`.
- `refinedweb` (Penedo et al. 2023, arXiv 2306.01116, appendix G.2): a line is dropped that is mainly upper case, only
  digits, a counter ("3 likes"), or a single word; and one of at most 10 words that begins, ends or holds what only a
  page around a text does. The paper gives one example of each pattern and no list: the patterns are ours, and so is
  "mainly" as more than half of the letters.

Provence (Chirkova et al. 2025, arXiv 2501.16214) drops sentences by a classifier of tokens that is conditioned on a
query. Its weights may not be shipped (CC-BY-NC-ND) and a corpus has no query; what is taken over is the unit, the
threshold (0.1 is its careful one, 0.5 its aggressive one) and that spans tile the text.

A sentence ends at . ! ? or … before white space, at the full stops of Chinese and Japanese, and at a line break; not
behind an abbreviation or an initial, nor before a small letter. Fenced code and tables of | are one unit each.

Trades: a classifier trained on documents is noisy on a sentence, and a sentence that carries a negation can go without
the one that it negates. Look at `tamis.removed` before a text is trained on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, SerializeAsAny, WithJsonSchema, model_validator

from pipeline.config import recipe_in
from pipeline.errors import ConfigError
from pipeline.recipe import Transform
from pipeline.rewrite.base import Pieces, Prune, Rewrite, above, strings
from pipeline.scores.base import Score

if TYPE_CHECKING:
    from pipeline.run import Run

_WHOLE = r"(?P<whole>^```.*?(?:^```[^\n]*(?:\n|\Z)|\Z)|(?:^[ \t]*\|[^\n]*(?:\n|\Z))+)"
_CLOSERS = r"[\"'”’»)\]]*+"
_STOP = (
    rf"(?<![.!?…。！？])(?:(?P<stop>[.!?…]++{_CLOSERS}[^\S\n]++)(?=\S)|[.!?…。！？]++{_CLOSERS}[^\S\n]*+\n\s*)"
    r"|[。！？]+[”’」』）]*"
)
"""Only the first of several stops is looked at, and nothing is looked at twice: a line of a million dots costs one."""
SENTENCE = re.compile(rf"{_WHOLE}|{_STOP}|\n\s*", re.MULTILINE | re.DOTALL)
LINE = re.compile(rf"{_WHOLE}|\n", re.MULTILINE | re.DOTALL)
ABBREVIATIONS = (
    " mr mrs ms dr prof st jr sr vs etc no nos vol vols pp p ed eds al fig figs eq eqs cf e.g i.e eg ie approx inc ltd "
    "corp co dept est gen col sgt capt lt rev hon jan feb mar apr jun jul aug sep sept oct nov dec bzw usw nr ca "
)

POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
COUNTER = r"(?i)^\W*[\d.,]+\s*[km]?\s*(likes?|shares?|comments?|views?|replies|retweets?|followers?|votes?|points?)\W*$"
FURNITURE = (
    r"(?i)^\W*(sign[ -]?in|sign[ -]?up|log[ -]?in|register|subscribe|share this|follow us|click here|skip to)\b",
    r"(?i)\b(read more|see more|learn more|continue reading|show more|view all)\W*$",
    r"(?i)\b(items? in (your )?cart|add to cart|all rights reserved|powered by)\b",
)
SHORT_WORDS = 10
RuleSet = Literal["c4", "refinedweb"]
ANY_SCORE = WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object", "required": ["kind"]}]})
"""The schema of `scores` tells the fields of every criterion; here it is enough that there is one."""


class Sentences(Rewrite):
    """Keep the sentences, or lines, whose score reaches a threshold."""

    claim = "what stays reads like what the unit's score looks for"
    cost = "a look-up a word with a fastText classifier; a few passes over the characters with rules"
    source = "after Chirkova et al. 2025 (Provence), arXiv 2501.16214; rules of C4 and RefinedWeb"
    kind: Literal["sentences"] = "sentences"
    unit: Literal["sentence", "line"] = Field("sentence", description="what is kept or dropped as a whole")
    score: SerializeAsAny[Annotated[Score, recipe_in("pipeline.scores", Score), ANY_SCORE]] | None = Field(
        None, description="criterion that scores a unit, such as {kind: quality, model: FILE.bin}"
    )
    rules: tuple[RuleSet, ...] = Field((), description="published rules that score a line 0 or 1; for `unit: line`")
    threshold: float = Field(0.1, allow_inf_nan=False, description="a unit with a lower score is dropped")

    @model_validator(mode="after")
    def _one_signal(self) -> Self:
        if (self.score is None) == (not self.rules):
            raise ValueError("give either `score` (a criterion) or `rules` (c4, refinedweb)")
        if self.rules and self.unit != "line":
            raise ValueError("the rules of C4 and RefinedWeb judge lines: add `unit: line`")
        if self.score is not None and (self.score.needs != "text" or self.score.compares_rows):
            raise ValueError(f"score: {self.score.kind!r} does not judge a text by itself: use one such as `quality`")
        return self

    def fit(self, run: Run) -> None:
        if self.score is not None:
            self._scorer(self.score).fit(run)

    def prune(self, run: Run) -> tuple[Callable[[], Prune], str]:
        split = SENTENCE if self.unit == "sentence" else LINE
        if self.score is None:
            return partial(_open, split, partial(_by_rules, self.rules), self.threshold), ""
        column = self._scorer(self.score).column(run)
        if column.inputs != ("text",):
            raise ConfigError(
                f"output.rewrite.score: {self.score.kind!r} reads {', '.join(column.inputs)}, not the text alone"
            )
        return partial(_open, split, column.open, self.threshold), column.identity

    def _scorer(self, score: Score) -> Score:
        """The criterion under a name of its own, so that its artifacts are not those of a score of the selection."""
        return score.model_copy(update={"name": f"rewrite-{score.column_name}"})


def _open(split: re.Pattern[str], open_score: Callable[[], Transform], threshold: float) -> Prune:
    score = open_score()

    def prune(batch: pa.RecordBatch) -> Pieces:
        texts = batch.column("text").cast(pa.large_string())
        units = Pieces.between([edges(text, split) for text in texts.to_pylist()])
        found = score(pa.record_batch([strings(texts, units)], ["text"])).column("score")
        values = pc.fill_null(found, -np.inf).to_numpy(zero_copy_only=False)  # what a criterion refuses goes first
        return units.keep(above(units, values, threshold))

    return prune


def edges(text: str, split: re.Pattern[str] = SENTENCE) -> list[int]:
    """Where the units of a text begin, and its length: characters, ascending; the first is 0."""
    found = [0]
    for match in split.finditer(text):
        if match["whole"] is not None:
            found.append(match.start())
        elif split is SENTENCE and match["stop"] is not None and _goes_on(text, match):
            continue
        found.append(match.end())
    found.append(len(text))
    return found


def _goes_on(text: str, match: re.Match[str]) -> bool:
    """Whether a sentence goes on behind its dot: a small letter follows, or an abbreviation or initial stands there."""
    if text[match.end()].islower():
        return True
    if not match["stop"].startswith(".") or match["stop"].startswith(".."):
        return False
    word = re.split(r"[\s(\[\"'“‘]", text[max(0, match.start() - 12) : match.start()])[-1]
    return f" {word.lower()} " in ABBREVIATIONS or (len(word) == 1 and word.isalpha() and word.isupper())


def _by_rules(rules: tuple[RuleSet, ...]) -> Transform:
    def judge(batch: pa.RecordBatch) -> pa.RecordBatch:
        lines = pc.utf8_trim_whitespace(batch.column("text"))
        kept = np.ones(len(lines), bool)
        for rule in rules:
            kept &= {"c4": _c4, "refinedweb": _refinedweb}[rule](lines).to_numpy(zero_copy_only=False)
        return pa.record_batch([pa.array(kept).cast(pa.float32())], ["score"])

    return judge


def _words(lines: pa.Array) -> pa.Array:
    return pc.count_substring_regex(lines, r"\S+")


def _c4(lines: pa.Array) -> pa.Array:
    ends = pc.match_substring_regex(lines, r"[.?!\"']$")
    trails = pc.match_substring_regex(lines, r"(\.\.\.|…)$")
    phrases = "|".join(re.escape(p) for p in ("javascript", *POLICY))
    told = pc.match_substring_regex(lines, phrases, ignore_case=True)
    return pc.and_(pc.and_not(ends, pc.or_(trails, told)), pc.greater_equal(_words(lines), 3))


def _refinedweb(lines: pa.Array) -> pa.Array:
    upper, letters = (pc.count_substring_regex(lines, p) for p in (r"\p{Lu}", r"\p{L}"))
    words = _words(lines)
    bad = pc.greater(pc.multiply(upper, 2), letters)
    bad = pc.or_(bad, pc.match_substring_regex(lines, r"^[\d\s.,]+$"))
    bad = pc.or_(bad, pc.match_substring_regex(lines, COUNTER))
    bad = pc.or_(bad, pc.equal(words, 1))
    short = pc.less_equal(words, SHORT_WORDS)
    for pattern in FURNITURE:
        bad = pc.or_(bad, pc.and_(short, pc.match_substring_regex(lines, pattern)))
    return pc.invert(bad)
