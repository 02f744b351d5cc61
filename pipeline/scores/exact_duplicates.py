"""Exact duplicates: rows whose normalised text is the same, across all shards. The cheapest criterion, and the safest.

Normalised is: Unicode NFC, lower case, every run of white space one blank, none at the ends. What is compared is its
xxh3-128 digest, so two texts are taken for one with a probability of 1e-20 among a billion rows. Run it before anything
that costs more a row, and before `semantic_duplicates`, whose similarity is not identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from pipeline.hashing import KEY, row_keys
from pipeline.recipe import Column, Transform
from pipeline.scores._duplicates import Duplicates

if TYPE_CHECKING:
    from pipeline.run import Run

NORMALISED = "normalised-text"
FIELDS = pa.schema([("key", KEY)])


class ExactDuplicates(Duplicates):
    """0 for one row of every normalised text, -1 for the others."""

    claim = "the only row, or the chosen one, with its normalised text"
    cost = "a pass over the text and 36 bytes a row regrouped"
    source = "usual practice; e.g. Lee et al. 2022, arXiv 2107.06499"
    kind: Literal["exact_duplicates"] = "exact_duplicates"

    def support(self, run: Run) -> Sequence[Column]:
        return (Column(NORMALISED, ("text",), FIELDS, _open, "NFC, lower case, one blank; xxh3-128; 1"),)

    def fill(self, run: Run) -> None:
        self.settle(run, f"{NORMALISED}.key")


def _open() -> Transform:
    return lambda batch: pa.record_batch([row_keys(normalise(batch.column("text")))], schema=FIELDS)


def normalise(texts: pa.Array) -> pa.Array:
    """Texts as they are compared; the same for what is normalised already."""
    import polars as pl

    words = pl.Series(texts).str.normalize("NFC").str.to_lowercase().str.replace_all(r"\s+", " ")
    return words.str.strip_chars().to_arrow().cast(pa.large_string())
