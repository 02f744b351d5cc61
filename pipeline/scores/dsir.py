"""DSIR: how much likelier a row is under the target than under the corpus, by hashed words and word pairs.

Source: Xie et al. 2023, "Data selection for language models via importance resampling", arXiv 2302.03169, and their
code, `p-lambda/dsir`. Words and runs of punctuation, lower-cased, and pairs of neighbours fall into `buckets` by their
hash. With the share p of each bucket among those of the target and of the corpus,

    score = sum over the n-grams of a row of  ln(p_target + 1e-8) - ln(p_corpus + 1e-8),

the logarithm of the importance weight. `select.temperature: 1` draws rows without replacement by these weights, as the
paper does (it adds the same Gumbel noise); without it the greatest are kept.

What it trades away:
- The sum is as the paper has it: long rows have extreme weights, and noise hardly matters to them. `per_token: true`
  takes the mean over n-grams.
- A bucket that the target never shows costs about 9 nats an occurrence; with few target rows most are such. `cap`
  bounds what one n-gram can say in either direction (ours).
- A hash of ours takes the place of SHA-256: buckets are others than those of `p-lambda/dsir`, not better or worse.
  Counts of the corpus are of all its rows, where their code samples.
- `min_tokens: 100` is that of their code: shorter rows get -inf and come last, which `combine: zscore` does not take.
- Only the first 1,000,000 characters of a row are looked at.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.errors import CorpusError
from pipeline.hashing import mix64
from pipeline.recipe import Column, State, Transform, fingerprint
from pipeline.sample import needs_fit
from pipeline.scores._contamination import warn_contained
from pipeline.scores._seeds import identify, locate
from pipeline.scores._targets import listed, read_targets
from pipeline.scores.base import Score
from pipeline.words import WORD, hashed_words

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.run import Run

FIELDS = pa.schema([("score", pa.float32())])
TOKEN = rf"{WORD}|[^\w\s]+"
MAX_CHARS = 1_000_000
SMOOTHING = 1e-8
WEIGHTS, FACTS = "weights.npy", "dsir.json"


class Dsir(Score):
    """Log importance weight in nats, a row or (`per_token`) an n-gram."""

    claim = "likelier under the target's words and word pairs than under the corpus's"
    cost = "a hash and a look-up a word and pair: 21 MB of text a core and second"
    source = "Xie et al. 2023, arXiv 2302.03169"
    kind: Literal["dsir"] = "dsir"
    targets: str | list[str] = Field(description="texts to be like: Parquet, .jsonl or .txt files")
    target_text: str = Field("text", description="column of the targets that holds the text")
    buckets: int = Field(10_000, ge=2, description="buckets that n-grams are hashed to")
    ngrams: int = Field(2, ge=1, le=4, description="longest n-gram, in words")
    per_token: bool = Field(False, description="the mean over a row's n-grams instead of their sum")
    cap: float | None = Field(None, gt=0, description="most nats that one n-gram adds or takes")
    min_tokens: int = Field(100, ge=0, description="rows of fewer words and punctuation marks come last")

    def fit(self, run: Run) -> None:
        self._weights(run)

    def column(self, run: Run) -> Column:
        weights = self._weights(run)
        asked = self.model_dump(include={"per_token", "cap", "min_tokens", "ngrams"})
        identity = fingerprint("dsir", self.version, asked, weights.fingerprint)
        return Column(self.column_name, ("text",), FIELDS, partial(self._open, weights), identity)

    def _weights(self, run: Run) -> Artifact:
        """Artifact with `weights.npy`, (buckets,) float64 nats an occurrence, and `dsir.json`."""
        uris = locate(listed(self.targets), "dsir.targets")
        asked = [self.target_text, self.buckets, self.ngrams]
        identity = fingerprint("dsir weights", self.version, asked, identify(uris), run.identity("text"))
        target, corpus = np.zeros(self.buckets, np.int64), State()
        facts: dict[str, object] = {}
        if needs_fit(run, self.column_name, identity):
            texts = read_targets(uris, self.target_text, "dsir.targets")["text"].combine_chunks()
            contained = warn_contained(run, texts, "dsir.targets")
            target = np.bincount(ngrams(texts, self.ngrams, self.buckets)[0], minlength=self.buckets)
            corpus = run.aggregate(NgramCounts(self.ngrams, self.buckets), "dsir counts")
            facts = {"targets": len(texts), "contained_rows": contained.rows, "contained_ids": contained.ids}
        build = partial(_write, target, corpus, facts)
        return run.artifact(self.column_name, identity, build, resources=None)

    def _open(self, weights: Artifact) -> Transform:
        value = np.load(weights.local() / WEIGHTS)
        if self.cap is not None:
            value = np.clip(value, -self.cap, self.cap)

        def score(batch: pa.RecordBatch) -> pa.RecordBatch:
            buckets, rows, tokens = ngrams(batch.column("text"), self.ngrams, len(value))
            total: np.ndarray = np.bincount(rows, value[buckets], minlength=len(tokens))
            if self.per_token:
                total = total / np.maximum(np.bincount(rows, minlength=len(tokens)), 1)
            total[tokens < self.min_tokens] = -np.inf
            return pa.record_batch([pa.array(total.astype(np.float32))], schema=FIELDS)

        return score


@dataclass(frozen=True)
class NgramCounts:
    """Statistic: how often each bucket is hit by the n-grams of all texts. State: `count` (buckets,) int64."""

    longest: int
    buckets: int

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("text",)

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        hits = ngrams(batch.column("text"), self.longest, self.buckets)[0]
        new = {"count": np.bincount(hits, minlength=self.buckets)}
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        return {"count": np.sum([s["count"] for s in states], axis=0)}


def ngrams(texts: pa.Array, longest: int, buckets: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Buckets of all n-grams of m texts, n = 1 to `longest`, none across two texts; of which text each is, both int64.

    Also returns the tokens of each text, (m,).
    """
    words, offsets = hashed_words(texts, 2**31 - 1, MAX_CHARS, TOKEN)
    tokens = np.diff(offsets)
    row = np.repeat(np.arange(len(tokens)), tokens)
    word = mix64(words.astype(np.uint64) + np.uint64(1))
    grams, found, rows = word, [word], [row]
    for n in range(2, longest + 1):
        with np.errstate(over="ignore"):  # arithmetic is modulo 2**64
            grams = mix64(grams[:-1] * np.uint64(3) + word[n - 1 :])
        whole = row[: len(grams)] == row[n - 1 :]
        found.append(grams[whole])
        rows.append(row[n - 1 :][whole])
    return (np.concatenate(found) % np.uint64(buckets)).astype(np.int64), np.concatenate(rows), tokens


def log_ratio(target: np.ndarray, corpus: np.ndarray) -> np.ndarray:
    """ln(p_target + 1e-8) - ln(p_corpus + 1e-8) of counts, or of shares; (buckets,) float64."""
    return np.asarray(np.log(target / target.sum() + SMOOTHING) - np.log(corpus / corpus.sum() + SMOOTHING))


def _write(target: np.ndarray, corpus: State, facts: dict[str, object], directory: Path) -> None:
    if not corpus:
        raise CorpusError("dsir: the corpus has no usable text; see quarantine/row for the reasons")
    weights = log_ratio(target, corpus["count"])
    np.save(directory / WEIGHTS, weights)
    share = target / target.sum()
    facts = facts | {
        "target_ngrams": int(target.sum()),
        "corpus_ngrams": int(corpus["count"].sum()),
        "kl_target_from_corpus_nats": float(share @ weights),
        "buckets_never_in_target": int((target == 0).sum()),
    }
    (directory / FACTS).write_text(json.dumps(facts, indent=2))
