"""Rules for captions: long enough, in the right language, and not the caption of everything else, too.

A row scores 1.0 where it passes and 0.0 where a rule fires; `rule` names the first that did and is empty where none
did, so `floors: {caption_rules: 1}` makes them hard. The defaults are DataComp's "basic" filter (Gadre et al. 2023,
arXiv 2304.14108; it also asks images for 200 pixels on the shorter side and an aspect of 3 at the most, which is
`image_size`): more than 2 words and more than 5 characters; in English only with a `language_model`, fastText's
lid.176. Its image-based filter has `min_words: 2`. Words are what white space separates, as fastText splits, so
captions in Chinese or Thai need `min_words: null`.

`max_shared` drops captions that more than so many rows share, such as the title of a series or "thumbnail": ALIGN (Jia
et al. 2021, arXiv 2102.05918) drops what more than 10 images share (from memory, unverified). Captions are compared as
`exact_duplicates` compares texts; that keeps one row of each, this none. It costs 36 bytes a row regrouped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline.corpus.storage import resolve
from pipeline.engine.regroup import ROW, SHARD
from pipeline.errors import ConfigError
from pipeline.recipe import Column, Transform, fingerprint
from pipeline.scores._duplicates import filled
from pipeline.scores._seeds import identify, locate
from pipeline.scores.base import Score
from pipeline.scores.exact_duplicates import NORMALISED, ExactDuplicates

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.run import Run

FIELDS = pa.schema([("score", pa.float32()), ("rule", pa.string())])
SHARED = pa.schema([("rows", pa.int64())])
KEY = f"{NORMALISED}.key"
MODEL, LABEL = "model.bin", "__label__"
LINE_BREAKS = "[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]"


class CaptionRules(Score):
    """1.0 where a caption passes every rule, 0.0 where one fires. Any limit may be null: that rule is off."""

    claim = "a caption that says something, in the right language, about this image"
    cost = "a pass over the text; 36 bytes a row regrouped for max_shared"
    source = "Gadre et al. 2023 (DataComp), arXiv 2304.14108; Jia et al. 2021 (ALIGN), arXiv 2102.05918"
    kind: Literal["caption_rules"] = "caption_rules"
    min_words: int | None = Field(3, ge=1)
    max_words: int | None = Field(None, ge=1)
    min_chars: int | None = Field(6, ge=1)
    max_chars: int | None = Field(None, ge=1)
    language: str = Field("en", description="code of the language, as the labels of `language_model` have it")
    language_model: str | None = Field(None, description="fastText model that names languages, such as lid.176.ftz")
    min_confidence: float = Field(0, ge=0, le=1, description="least probability of the language; it is always the best")
    max_shared: int | None = Field(None, ge=1, description="rows that may have the same caption")

    @property
    def compares_rows(self) -> bool:
        return self.max_shared is not None

    def fit(self, run: Run) -> None:
        self._languages(run)

    def support(self, run: Run) -> Sequence[Column]:
        return ExactDuplicates().support(run) if self.compares_rows else ()

    def column(self, run: Run) -> Column:
        languages = self._languages(run)
        asked = self.model_dump(exclude={"name", "language_model"})
        identity = fingerprint("caption rules", 1, asked, languages.fingerprint if languages else None)
        inputs = ("text", f"{self._shared.name}.rows") if self.compares_rows else ("text",)
        return Column(self.column_name, inputs, FIELDS, partial(self._open, languages), identity)

    def fill(self, run: Run) -> None:
        if self.compares_rows:
            run.regroup(self._shared, KEY, count_rows)
        run.materialize([self.column(run)])

    @property
    def _shared(self) -> Column:
        return filled(f"{self.column_name}-shared", (), SHARED, fingerprint("rows of a caption", 1))

    def _languages(self, run: Run) -> Artifact | None:
        if self.language_model is None:
            return None
        (uri,) = locate([self.language_model], "caption_rules.language_model")[:1]
        identity = fingerprint("language model", self.language, identify([uri]))
        return run.artifact(f"{self.column_name}-language", identity, partial(_adopt, uri, self.language), None)

    def _open(self, languages: Artifact | None) -> Transform:
        likely = _speaker(languages, self.language, self.min_confidence) if languages else None

        def judge(batch: pa.RecordBatch) -> pa.RecordBatch:
            texts = batch.column(0)
            words = pc.list_value_length(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(texts)))
            rule = pa.array([""] * len(texts))
            for name, values, least, most in (
                ("words", words, self.min_words, self.max_words),
                ("characters", pc.utf8_length(texts), self.min_chars, self.max_chars),
                ("shared", batch.column(1) if self.compares_rows else words, None, self.max_shared),
            ):
                if least is not None:
                    rule = _fired(rule, pc.less(values, least), f"too_few_{name}")
                if most is not None:
                    rule = _fired(rule, pc.greater(values, most), "shared" if name == "shared" else f"too_many_{name}")
            if likely is not None:
                rule = _fired(rule, pa.array(~likely(texts)), "language")
            return pa.record_batch([pc.equal(rule, "").cast(pa.float32()), rule], schema=FIELDS)

        return judge


def count_rows(table: pa.Table) -> pa.Table:
    """Reduce of `Run.regroup` by a caption's key: how many rows have it."""
    keys = table[KEY].combine_chunks()
    number = np.zeros(len(keys), np.int64)
    number[1:] = np.cumsum(pc.not_equal(keys.slice(1), keys.slice(0, max(len(keys) - 1, 0))))
    return pa.table({SHARD: table[SHARD], ROW: table[ROW], "rows": pa.array(np.bincount(number)[number])})


def _fired(rule: pa.Array, where: pa.Array, name: str) -> pa.Array:
    """The rules that fired so far, with one more for rows where none had."""
    return pc.if_else(pc.and_(where, pc.equal(rule, "")), name, rule)


def _adopt(uri: str, language: str, directory: Path) -> None:
    """Copy a language model into an artifact. Raises ConfigError where it is none, or does not know the language."""
    import fasttext

    filesystem, path = resolve(uri)
    with filesystem.open_input_file(path) as source, open(directory / MODEL, "wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 24)
    try:
        labels = fasttext.load_model(str(directory / MODEL)).get_labels()
    except (ValueError, RuntimeError, MemoryError) as error:
        raise ConfigError(f"caption_rules.language_model: {uri!r} is not a fastText model: {error}") from error
    if LABEL + language not in labels:
        known = ", ".join(sorted(label.removeprefix(LABEL) for label in labels)[:20])
        raise ConfigError(f"caption_rules.language: {uri!r} has no {language!r}; it has {known} ...")


def _speaker(languages: Artifact, language: str, confidence: float) -> Callable[[pa.Array], np.ndarray]:
    """From n texts to whether each is in the language, (n,) bool."""
    import fasttext

    model = fasttext.load_model(str(languages.local() / MODEL))

    def speaks(texts: pa.Array) -> np.ndarray:
        lines = pc.replace_substring_regex(texts, LINE_BREAKS, " ").to_pylist()
        found, sure = model.f.multilinePredict([line + "\n" for line in lines], 1, 0.0, "strict")
        same = [bool(f) and f[0] == LABEL + language and s[0] >= confidence for f, s in zip(found, sure, strict=True)]
        return np.array(same)

    return speaks
