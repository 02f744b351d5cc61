"""What a comparison measures, frozen in its configuration: the same items for every model.

Texts of a file are those whose hashes are lowest under the seed, cut at `max_chars`, so that neither the order of the
rows nor the model decides. Knowledge, reasoning, instruction, retrieval and language stay separate columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.compare.measures import overlap
from pipeline.compare.measures.arithmetic import arithmetic
from pipeline.compare.measures.base import Axis, Measured
from pipeline.compare.measures.choice import PROMPT, Choice, multiple_choice, read_choices
from pipeline.compare.measures.cloze import Fact, cloze, facts
from pipeline.compare.measures.formats import formats
from pipeline.compare.measures.geometry import robustness
from pipeline.compare.measures.language import bits_per_byte
from pipeline.compare.measures.latency import file_size, latency
from pipeline.compare.measures.retrieval import retrieval
from pipeline.compress.documents import shortened, text_of
from pipeline.errors import ConfigError
from pipeline.hashing import hash64, row_keys
from pipeline.scores._seeds import locate, read_columns, read_seeds

if TYPE_CHECKING:
    from torch import nn

    from pipeline.compare.measures.base import Tokenizer

CONVERSATION = "conversation"
"""Column of conversations (`pipeline.compress.documents`)."""
Made = Literal["retrieval", "formats", "arithmetic"]
"""Measures that need no files."""


class Choices(BaseModel):
    """A file of multiple-choice questions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    axis: Axis = "knowledge"
    where: dict[str, str] = Field({}, description="fields that must have a value, such as benchmark: arc_easy")
    prompt: str = PROMPT

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if "{question}" not in self.prompt:
            raise ValueError(f"prompt {self.prompt!r} does not hold {{question}}")
        return self


class Latency(BaseModel):
    """How speed is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batches: tuple[int, ...] = Field((1, 8), min_length=1)
    prompt: int = Field(128, ge=1)
    repeats: int = Field(30, ge=1)
    threads: int | None = Field(None, ge=1)


class Suite(BaseModel):
    """Which files, how many items, which seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    domains: dict[str, tuple[str, ...]] = Field({}, description="held-out texts by domain: .parquet, .jsonl or .txt")
    facts: tuple[str, ...] = Field(
        (), description="texts whose facts are asked for; training texts, if they were taught"
    )
    choices: dict[str, Choices] = {}
    made: tuple[Made, ...] = ("retrieval", "formats", "arithmetic")
    geometry: str | None = Field(None, description="domain whose texts are corrupted; none without")
    latency: Latency | None = None
    text: str = Field("text", description="column that holds the text")
    conversations: tuple[str, ...] = Field(
        (), description="domains of .parquet files with conversations that a comparison wrote: their responses count"
    )
    items: int = Field(
        64, ge=1, description="texts of a domain, facts, questions of a file, made-up items, at the most"
    )
    max_chars: int = Field(2000, ge=16, description="characters of a text that count")
    seed: int = 0

    @model_validator(mode="after")
    def _has_something(self) -> Self:
        if self.geometry is not None and self.geometry not in self.domains:
            raise ValueError(
                f"geometry: {self.geometry!r} is no domain; there are: {', '.join(self.domains) or 'none'}"
            )
        if not (self.domains or self.facts or self.choices or self.made or self.latency):
            raise ValueError("a suite without a measure: name domains, facts, choices, made or latency")
        return self

    def with_domains(self, domains: Mapping[str, str]) -> Self:
        """The same with further domains: their names and the file of their texts."""
        if twice := sorted(set(domains) & set(self.domains)):
            raise ConfigError(f"domains: {twice[0]!r} is there already: give one of the two another name")
        return self.model_copy(update={"domains": self.domains | {name: (f,) for name, f in domains.items()}})

    def texts(self, domain: str) -> list[str]:
        """Texts of a domain."""
        documents = self.documents(domain)
        return documents if isinstance(documents, list) else text_of(documents).to_pylist()

    def documents(self, domain: str) -> list[str] | pa.StructArray:
        """Texts of a domain, or its conversations."""
        paths, role = self.domains[domain], f"domains.{domain}"
        if domain not in self.conversations:
            return self._read(paths, role, self.items, self.max_chars)
        tables = [read_columns(uri, [CONVERSATION], role) for uri in locate(list(paths), role)]
        every = pa.concat_tables(tables)[CONVERSATION].combine_chunks()
        kept = shortened(every, self.max_chars)
        if not len(kept):
            raise ConfigError(f"{role}: no conversation has a response in its first {self.max_chars} characters")
        return kept.take(pa.array(self._lowest(text_of(kept), self.items)))

    def asked(self) -> list[Fact]:
        """Facts, where there are texts for them."""
        texts = self._read(self.facts, "facts", 16 * self.items, self.max_chars) if self.facts else []
        return facts(texts, self.items, self.seed) if texts else []

    def questions(self, name: str) -> list[Choice]:
        """Questions of a file."""
        given = self.choices[name]
        every = read_choices(Path(given.path), given.where)
        keys = row_keys(pa.array([f"{c.id} {c.question}" for c in every], pa.large_string()))
        return [every[i] for i in np.sort(np.argsort(hash64(keys, self.seed), kind="stable")[: self.items])]

    def evaluation(self) -> dict[str, str]:
        """What must not be trained on, by id: texts of all domains, questions with their options."""
        found = {f"{d}/{i}": text for d in self.domains for i, text in enumerate(self.texts(d))}
        for name in self.choices:
            found |= {f"{name}/{c.id}": " ".join([c.question, *c.options]) for c in self.questions(name)}
        return found

    def contamination(self, training: Iterable[pa.Array]) -> list[overlap.Overlap]:
        """Evaluation texts that share 13 words in a row with training texts (batches of them); warns of them."""
        return overlap.warn_overlaps(self.evaluation(), training)

    def _read(self, paths: Iterable[str], role: str, most: int, max_chars: int) -> list[str]:
        texts = read_seeds(locate(list(paths), role), self.text, role).unique()
        cut = (text[:max_chars].strip() for text in texts.take(pa.array(self._lowest(texts, most))).to_pylist())
        kept = list(dict.fromkeys(text for text in cut if text))
        if not kept:
            raise ConfigError(f"{role}: no text is left")
        return kept

    def _lowest(self, texts: pa.Array, most: int) -> np.ndarray:
        """Rows of the texts whose hashes are lowest."""
        return np.argsort(hash64(row_keys(texts), self.seed), kind="stable")[:most]


def measure_all(
    model: nn.Module, tokenizer: Tokenizer, suite: Suite, folder: Path | None = None
) -> dict[str, Measured]:
    """Every measure of a suite, by name. `folder`: where the model's files are, for their size."""
    found: list[Measured] = []
    for domain in suite.domains:
        found += bits_per_byte(model, tokenizer, suite.documents(domain), domain)
    if asked := suite.asked():
        found += cloze(model, tokenizer, asked)
    for name, given in suite.choices.items():
        found += multiple_choice(model, tokenizer, suite.questions(name), name, given.axis, given.prompt)
    if "retrieval" in suite.made:
        found += retrieval(model, tokenizer, suite.items, seed=suite.seed)
    if "formats" in suite.made:
        found += formats(model, tokenizer, suite.items)
    if "arithmetic" in suite.made:
        found += arithmetic(model, tokenizer, suite.items, suite.seed)
    if suite.geometry is not None:
        found += robustness(model, tokenizer, suite.texts(suite.geometry), seed=suite.seed)
    if suite.latency is not None:
        s = suite.latency
        found += latency(model, s.batches, s.prompt, s.repeats, s.threads)
    if folder is not None:
        found.append(file_size(folder))
    return {measured.name: measured for measured in found}
