"""Priming risk: how surprising the most surprising word of a row is to the model that is about to learn it.

    score = log10 p(keyword | what stands before it) <= 0

A model that learns a text with an improbable keyword goes on to use it where it does not belong; below about 1e-3 that
is to be expected (Sun et al. 2025, "How new data permeates LLM knowledge and how to dilute it", arXiv 2504.09522; one
threshold without an interval, twelve keywords). Rows of high risk are also those that say something new: report and
rewrite them rather than drop them. `floors: {priming: -3}` drops them all the same.

The paper gives the keyword. That one is chosen here is our extension: the word with the least probability, the product
over its tokens, among those that begin at token `min_position` or later, are letters only, have a space before them and
something behind them in the row, occur at least `min_count` times in the corpus (so typos, names of one page and code
are none) and make up at most `max_share` of its words (so "the" is none). Words are counted by hash in 2^20 buckets, a
fixed 8 MB, where a collision may let a rare word in or keep a common one out. Whether a word is a noun is not asked.

A row without such a word has no risk that can be seen: its score is 0, and its other fields are null. Scripts that
write no spaces have none. Of instructions only the words of the responses are learnt, so only they can be keywords. The
measurement is that of the model's column of token log-probabilities: free where perplexity or loss reduction asks for
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from pipeline.errors import ConfigError
from pipeline.models.causal import MAX_CHARS, as_mask, check_model, losses_of, model_source, token_column
from pipeline.models.files import folder_of
from pipeline.recipe import Column, State, Transform, fingerprint
from pipeline.sample import needs_fit
from pipeline.scores.base import Score
from pipeline.words import hashed_words

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.run import Run

FIELDS = pa.schema(
    [
        ("score", pa.float32()),
        ("keyword", pa.string()),
        ("keyword_pos", pa.int32()),
        ("min_key_logp", pa.float32()),
        ("mean_key_logp", pa.float32()),
    ]
)
BUCKETS = 1 << 20
COUNTS = "counts.npy"
LETTERS = r"^[\p{L}\p{M}]+$"
BYTE_SPACE, PIECE_SPACE = "Ġ", "▁"
"""How a vocabulary marks a piece that begins with a space: byte-level ones and SentencePiece's."""


class Priming(Score):
    """log10 of the probability of a row's least probable keyword, at most 0."""

    claim = "little to be surprised at: no keyword that a model would carry into other contexts"
    cost = "2 N FLOPs a token, a forward pass of N parameters; free beside perplexity of the same model"
    source = "Sun et al. 2025, arXiv 2504.09522; the choice of the keyword is ours"
    kind: Literal["priming"] = "priming"
    model: str = Field(description="folder of the causal model that is to be trained, or hf://org/name[@revision]")
    max_tokens: int = Field(1024, ge=2, description="tokens of a row that are looked at")
    min_position: int = Field(16, ge=1, description="first token, from 0, at which a keyword may begin")
    min_count: int = Field(100, ge=0, description="times that a keyword occurs in the corpus at least")
    max_share: float = Field(1e-3, gt=0, le=1, description="of all words that a keyword makes up at the most")

    @model_validator(mode="after")
    def _there(self) -> Self:
        check_model(self.kind, self.model)
        return self

    def fit(self, run: Run) -> None:
        self._counts(run)

    def support(self, run: Run) -> Sequence[Column]:
        return [token_column(run, self.model, self.max_tokens)]

    def column(self, run: Run) -> Column:
        (tokens,) = self.support(run)
        counts = self._counts(run)
        asked = self.model_dump(include={"min_position", "min_count", "max_share"})
        return Column(
            self.column_name,
            (f"{tokens.name}.ids", *losses_of(tokens)),
            FIELDS,
            partial(self._open, model_source(run, self.model), counts),
            fingerprint(type(self).__name__, self.version, asked, counts.fingerprint),
            tokens.resources,
        )

    def _counts(self, run: Run) -> Artifact:
        name, max_chars = f"{self.column_name}-words", MAX_CHARS * self.max_tokens
        identity = fingerprint("words", self.version, max_chars, run.identity("text"))
        state = run.aggregate(Words(max_chars)) if needs_fit(run, name, identity) else {}
        return run.artifact(name, identity, partial(_write_counts, state), resources=None)

    def _open(self, source: Artifact | Path, counts: Artifact) -> Transform:
        pieces = Pieces.of(folder_of(source))
        known = np.load(counts.local() / COUNTS, allow_pickle=False)
        allowed = (known >= self.min_count) & (known <= self.max_share * known.sum())

        def score(batch: pa.RecordBatch) -> pa.RecordBatch:
            ids, logp, *target = batch.columns
            return keywords(pieces, ids, logp, allowed, self.min_position, *map(as_mask, target))

        return score


@dataclass(frozen=True)
class Words:
    """Statistic: how often the words of the corpus occur, by hash. State: `count` (2^20,) int64."""

    max_chars: int

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("text",)

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        words, _ = hashed_words(batch.column("text"), BUCKETS, self.max_chars)
        new = {"count": np.bincount(words, minlength=BUCKETS)}
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        return {"count": np.sum([s["count"] for s in states], axis=0)}


def _write_counts(state: State, directory: Path) -> None:
    np.save(directory / COUNTS, state["count"] if state else np.zeros(BUCKETS, np.int64))


@dataclass(frozen=True)
class Pieces:
    """A vocabulary: the bytes of every piece without its leading space; whether it has one; whether it is letters only,
    or a lone space; whether it goes on with a word that stands before it. Any byte beyond ASCII counts as a letter, for
    pieces may cut a character."""

    content: pa.LargeBinaryArray
    starts: np.ndarray
    letters: np.ndarray
    joins: np.ndarray

    @classmethod
    def of(cls, folder: Path) -> Pieces:
        """Raises ConfigError for a vocabulary that does not say where words begin."""
        from tokenizers import Tokenizer

        vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
        marks = {mark: sum(piece.startswith(mark) for piece in vocabulary) for mark in (BYTE_SPACE, PIECE_SPACE)}
        mark = max(marks, key=lambda m: marks[m])
        if not marks[mark]:
            raise ConfigError(f"priming.model: the vocabulary of {folder} does not mark where words begin")
        content = [b""] * (max(vocabulary.values()) + 1)
        starts = np.zeros(len(content), bool)
        for piece, i in vocabulary.items():
            starts[i] = piece.startswith(mark)
            rest = piece.removeprefix(mark)
            content[i] = _bytes_of(rest) if mark == BYTE_SPACE else rest.encode()
        letters = np.array([all(map(_is_letter, c)) and (c != b"" or s) for c, s in zip(content, starts, strict=True)])
        joins = np.array([any(_is_letter(b) or chr(b) in "_0123456789" for b in c[:1]) for c in content]) & ~starts
        return cls(pa.array(content, pa.large_binary()), starts, letters, joins)


def _byte_alphabet() -> dict[str, int]:
    """Which byte a character of a byte-level vocabulary stands for (Radford et al. 2019): itself where it prints, else
    the next character from 256 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


BYTE_OF = _byte_alphabet()


def _bytes_of(piece: str) -> bytes:
    """An added token, which is written as it is, keeps its characters."""
    return bytes(BYTE_OF[c] for c in piece) if all(c in BYTE_OF for c in piece) else piece.encode()


def _is_letter(byte: int) -> bool:
    return byte >= 0x80 or chr(byte).isalpha()


def keywords(
    pieces: Pieces,
    ids: pa.ListArray,
    logp: pa.ListArray,
    allowed: np.ndarray,
    min_position: int,
    target: np.ndarray | None = None,
) -> pa.RecordBatch:
    """The column's values of n rows: `ids` of T tokens, `logp` of T - 1; `allowed` (2^20,) words by hash; and beside
    `logp`, end to end, where a keyword may begin (`target`, bool)."""
    lengths = ids.value_lengths().to_numpy().astype(np.int64)
    first = np.cumsum(lengths) - lengths
    tokens = ids.flatten().to_numpy()
    row = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(tokens)) - first[row]
    given = np.zeros(len(tokens))
    given[position > 0] = logp.flatten().to_numpy()

    # A word is a piece with a leading space and the pieces of letters behind it; what follows must not go on with it.
    letters, starts = pieces.letters[tokens], pieces.starts[tokens]
    begin = np.flatnonzero(~letters | starts | (position == 0))
    end = np.append(begin[1:], len(tokens))
    cut = np.append(pieces.joins[tokens], True)[end] | (end == (first + lengths)[row[begin]])
    word = (letters & starts)[begin] & (position[begin] >= min_position) & ~cut
    if target is not None:
        learnt = np.zeros(len(tokens), bool)
        learnt[position > 0] = target
        word &= learnt[begin]
    total = np.add.reduceat(given, begin) if len(begin) else given
    begin, end, total = begin[word], end[word], total[word]

    spelled = _spell(pieces, tokens, begin, end)
    good = _eligible(spelled, allowed)
    begin, end, total = begin[good], end[good], total[good]
    spelled = spelled.filter(pa.array(good))

    order = np.lexsort((begin, total, row[begin]))
    _, least = np.unique(row[begin][order], return_index=True)
    chosen = order[least]
    at = np.full(len(lengths), -1)
    at[row[begin[chosen]]] = chosen
    take = pa.array(at, mask=at < 0)
    log10 = pc.fill_null(pa.array(total / np.log(10)).take(take), 0.0)
    values = [
        log10,
        spelled.take(take),
        pa.array(position[begin]).take(take),
        pa.array(total).take(take),
        pa.array(total / (end - begin)).take(take),
    ]
    return pa.record_batch(values, names=FIELDS.names).cast(FIELDS)


def _spell(pieces: Pieces, tokens: np.ndarray, begin: np.ndarray, end: np.ndarray) -> pa.Array:
    """Words (large_string) from the tokens between begin and end; what is not UTF-8 shows U+FFFD."""
    inside = np.repeat(begin - np.append(0, np.cumsum(end - begin))[:-1], end - begin) + np.arange((end - begin).sum())
    bounds = np.append(0, np.cumsum(end - begin))
    content = pieces.content.take(pa.array(tokens[inside]))
    joined = pc.binary_join(pa.LargeListArray.from_arrays(pa.array(bounds), content), pa.scalar(b"", pa.large_binary()))
    distinct = joined.dictionary_encode()  # words repeat: each is read once
    read = pa.array([word.decode(errors="replace") for word in distinct.dictionary.to_pylist()], pa.large_string())
    return read.take(distinct.indices)


def _eligible(words: pa.Array, allowed: np.ndarray) -> np.ndarray:
    """Which words are letters only, one word as they are counted, and of an allowed frequency."""
    import polars as pl

    distinct = words.dictionary_encode()
    hashes, offsets = hashed_words(distinct.dictionary, BUCKETS, 1 << 20)
    one = np.diff(offsets) == 1
    good = pl.Series(distinct.dictionary).str.contains(LETTERS).to_numpy() & one
    good[one] &= allowed[hashes[offsets[:-1][one]]]
    return np.asarray(good[distinct.indices.to_numpy()], bool)
