"""Spatial relations: how many of a caption's phrases say where things are, after "Getting it Right".

Source: Chatterjee et al. 2024, "Getting it Right: Improving Spatial Consistency in Text-to-Image Models", arXiv
2404.01197. Its finding: image-text corpora hardly say where things are, and image generators trained on captions that
do (their SPRIGHT, 6 million images captioned anew) place things better, with 0.25 % of SPRIGHT already. They rewrite
captions with a model; here the captions that state relations of their own accord are preferred.

The score is the number of phrases found, each counted as often as it stands there, on a scale log2(1 + phrases): 0
states none, 1 one, 2 three. `phrases` has the number and `kinds` how many different ones. `floors:
{spatial_relations: 1}` keeps captions that state one at least. The list below is ours, of the relations that the paper
counts (left and right, above and below, in front and behind, near and far, between, on, under, in the middle ...; from
memory, unverified); words that mostly mean something else ("right now", "left the house", "on Monday") count only in
phrases that are spatial. English only.

What it trades away: a phrase is a phrase. Whether the image agrees is what `clip_score` asks, and image-text models are
weak at just that. Long captions have more phrases; `per_word: true` divides their number by that of the words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline.recipe import Column, Transform
from pipeline.scores.base import Score

if TYPE_CHECKING:
    from pipeline.run import Run

FIELDS = pa.schema([("score", pa.float32()), ("phrases", pa.int32()), ("kinds", pa.int32())])
_A = "(?:the|an?|its|his|her|their)"
_SIDE = f"(?:on|to|at|in|from) (?:{_A} )?(?:(?:far|bottom|top|upper|lower) )?%s|%s (?:side|of|corner|hand)"
_PLACE = "(?:top|bottom|side|edge|corner|surface|table|floor|ground|wall|shelf|bench|chair|roof|grass|street)"
RELATIONS = {
    "left": _SIDE.replace("%s", "left"),
    "right": _SIDE.replace("%s", "right"),
    "above": f"above|overhead|over {_A}",
    "below": f"below|beneath|underneath|under {_A}",
    "front": "in front of|foreground|at the front",
    "behind": "behind|in the background|at the back of|in back of",
    "near": "near|nearby|next to|beside|alongside|adjacent to|close to|side by side",
    "far": "far from|far away|in the distance|distant",
    "between": f"between|surrounded by|around {_A}",
    "inside": "inside|within|outside|in the middle of|in the cent(?:er|re) of",
    "on": f"on top of|atop|on {_A} {_PLACE}",
    "against": "leaning against|facing|opposite|across from|in the corner|at the (?:top|bottom|edge|corner)",
}
"""Regular expressions (RE2) by kind of relation; a caption is in lower case, with single blanks."""


class SpatialRelations(Score):
    """log2(1 + phrases that state a spatial relation), or those per word."""

    claim = "the caption says where things are"
    cost = "a dozen regular expressions over the text"
    source = "Chatterjee et al. 2024 (Getting it Right), arXiv 2404.01197"
    kind: Literal["spatial_relations"] = "spatial_relations"
    per_word: bool = Field(False, description="phrases per word of the caption, in [0, 1], instead of their logarithm")

    def column(self, run: Run) -> Column:
        return Column(self.column_name, ("text",), FIELDS, self._open, self.identity())

    def _open(self) -> Transform:
        def score(batch: pa.RecordBatch) -> pa.RecordBatch:
            texts = pc.replace_substring_regex(pc.utf8_lower(batch["text"]), r"\s+", " ")
            found = np.stack([pc.count_substring_regex(texts, rf"\b(?:{p})\b").to_numpy() for p in RELATIONS.values()])
            phrases = found.sum(axis=0)
            if self.per_word:
                words = pc.list_value_length(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(texts))).to_numpy()
                value = phrases / np.maximum(words, 1)
            else:
                value = np.log2(1 + phrases)
            return pa.record_batch([value, phrases, (found > 0).sum(axis=0)], names=FIELDS.names).cast(FIELDS)

        return score
