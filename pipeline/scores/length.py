"""Length of a text, with a band: `score >= 0` exactly when `min <= length <= max`, so a floor of 0 makes the band hard.

Inside the band the score is how far the text is above `min` (`prefer: long`) or below `max` (`prefer: short`), outside
it is minus the distance to the nearer edge, all in octaves (log2): -1 is half the minimum or twice the maximum, and
averages with other scores are not ruled by a few giants. A band that is soft ranks what lies outside below what lies
inside, the farther the lower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from pipeline.recipe import Column, Transform
from pipeline.scores.base import Score

if TYPE_CHECKING:
    from pipeline.run import Run

FIELDS = pa.schema([("score", pa.float32()), ("length", pa.int64())])
INPUTS = {"tokens": "row.tokens", "bytes": "row.bytes", "chars": "text", "words": "text"}
LONGEST = 2**40
"""Stands for `max` where there is none: longer than any text."""


class Length(Score):
    """Tokens, bytes (UTF-8), characters (code points) or words (as `str.split` finds them) of a text.

    Scripts that are written without spaces have few words: prefer `chars` or `tokens` for them.
    """

    claim = "longer, or nearer to a wanted length"
    cost = "nothing beside reading"
    source = "baseline"
    kind: Literal["length"] = "length"
    unit: Literal["tokens", "bytes", "chars", "words"] = "tokens"
    prefer: Literal["long", "short"] | None = Field(
        "long", description="what ranks first inside the band; null: all alike"
    )
    min: int = Field(1, ge=1, description="shortest length inside the band")
    max: int | None = Field(None, ge=1, description="longest length inside the band (default: no limit)")

    @model_validator(mode="after")
    def _band(self) -> Self:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min}): no text fits the band")
        return self

    def column(self, run: Run) -> Column:
        return Column(self.column_name, (INPUTS[self.unit],), FIELDS, self._open, self.identity())

    def _open(self) -> Transform:
        def measure(batch: pa.RecordBatch) -> pa.RecordBatch:
            length = _length(batch[0], self.unit)
            return pa.record_batch([pa.array(self._score(length).astype(np.float32)), pa.array(length)], schema=FIELDS)

        return measure

    def _score(self, length: np.ndarray) -> np.ndarray:
        octave = np.log2(np.maximum(length, 0.5))  # a length of 0 lies below any band
        low, high = np.log2(self.min), np.log2(self.max or LONGEST)
        inside = {"long": octave - low, "short": high - octave, None: np.zeros_like(octave)}[self.prefer]
        scores: np.ndarray = np.where(length < self.min, octave - low, np.where(octave > high, high - octave, inside))
        return scores


def _length(values: pa.Array, unit: str) -> np.ndarray:
    """int64 lengths of n texts, or the n counts of the `row` column as they are."""
    if unit == "words":
        values = pc.list_value_length(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(values)))
    elif unit == "chars":
        values = pc.utf8_length(values)
    lengths: np.ndarray = values.cast(pa.int64()).to_numpy()
    return lengths
