"""The size and shape of an image: 1 where it passes every rule, 0 where one fires, which `rule` then names.

The limits are those of DataComp's basic filter: the smaller side has at least 200 pixels and the larger one is at most
3 times as long (Gadre et al. 2023, arXiv 2304.14108; the filter's rules for captions are rules of text). The limits of
pixels are ours: DataComp has none. An image of one pixel, which Open-Qwen2VL skips by a rule of its own (Wang et al.
2025, arXiv 2504.00595), is below any of these. Sides count as stored; turning an image by its EXIF orientation changes
neither rule.

Read from the header (`image_info`), without decoding. What has no readable header, or more pixels than `max_pixels`,
which may be a decompression bomb, goes to quarantine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from pipeline.recipe import Column, Transform
from pipeline.scores._image_info import MAX_PIXELS, MOST_PIXELS, image_info
from pipeline.scores.base import Score

if TYPE_CHECKING:
    from pipeline.run import Run

FIELDS = pa.schema([("score", pa.float32()), ("rule", pa.string())])
RULES = ("", "short_side", "aspect", "few_pixels", "animated")
"""What a verdict names, in the order in which rules are tried; the first is that of an image that passes."""


class ImageSize(Score):
    """Sides in pixels. A limit that is null is off."""

    claim = "an image neither tiny nor a strip, by DataComp's basic filter"
    cost = "a header"
    source = "Gadre et al. 2023, arXiv 2304.14108"
    kind: Literal["image_size"] = "image_size"
    min_side: int | None = Field(200, ge=1, description="pixels of the smaller side at least")
    max_aspect: float | None = Field(3.0, ge=1, description="how many times as long the larger side may be")
    min_pixels: int | None = Field(None, ge=1, description="width times height at least")
    max_pixels: int = Field(
        MAX_PIXELS, ge=1, le=MOST_PIXELS, description="width times height at most; what has more goes to quarantine"
    )
    animations: bool = Field(True, description="false: an image of several frames fails, too")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        least = max(self.min_pixels or 0, (self.min_side or 0) ** 2)
        if least > self.max_pixels:
            raise ValueError(f"no image passes: it needs {least:,} pixels, and max_pixels allows {self.max_pixels:,}")
        return self

    def support(self, run: Run) -> Sequence[Column]:
        return (image_info(self.max_pixels),)

    def column(self, run: Run) -> Column:
        info = image_info(self.max_pixels).name
        inputs = tuple(f"{info}.{name}" for name in ("width", "height", "frames"))
        return Column(self.column_name, inputs, FIELDS, self._open, self.identity())

    def _open(self) -> Transform:
        def judge(batch: pa.RecordBatch) -> pa.RecordBatch:
            width, height, frames = (c.to_numpy().astype(np.int64) for c in batch.columns)
            short, long = np.minimum(width, height), np.maximum(width, height)
            fired = [
                short < (self.min_side or 0),
                long > np.inf if self.max_aspect is None else long > self.max_aspect * short,
                width * height < (self.min_pixels or 0),
                (frames > 1) & (not self.animations),
            ]
            verdict = np.select(fired, range(1, len(RULES)), 0)
            rules = pa.array(RULES).take(pa.array(verdict))
            return pa.record_batch([pa.array((verdict == 0).astype(np.float32)), rules], schema=FIELDS)

        return judge
