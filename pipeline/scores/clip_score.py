"""CLIP score: the cosine of a pair's image and its caption, in the space of an image-text model.

    score = <f(image), g(text)> / (|f(image)| |g(text)|)   in [-1, 1]

in float32. Hessel et al. 2021, "CLIPScore", arXiv 2104.08718, report 2.5 max(score, 0), which ranks alike. As a filter:
LAION kept what scores at least .28 with ViT-B/32 (`floors: {clip_score: 0.28}`), DataComp (Gadre et al. 2023, arXiv
2304.14108) the best 30 % by ViT-L/14 (`budget: {fraction: 0.3}`; their own code keeps one row more, for it compares
with the score of the row behind the last).

The model is the embedding's, whose one pass over the images then gives vectors and scores, or one of its own. A caption
is cut to the model's context. Images that cannot be decoded, of one pixel or of one colour all over are in quarantine.

What it trades away: pictures of writing score high where the caption says what is written (T-MARS, arXiv 2307.03132);
clusters of spam share one score, so drop duplicates first; scores and limits of two models do not compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from pipeline.recipe import Column
from pipeline.scores._pairs import Model, cosine_column
from pipeline.scores.base import Score

if TYPE_CHECKING:
    from pipeline.run import Run


class ClipScore(Model, Score):
    """Cosine of image and text, in [-1, 1]."""

    claim = "the caption says what is in the image"
    cost = "both towers: 12 GFLOP with ViT-B/32 (from memory); nothing beside an embedding by the same model"
    source = "Hessel et al. 2021 (CLIPScore), arXiv 2104.08718; Gadre et al. 2023 (DataComp), arXiv 2304.14108"
    kind: Literal["clip_score"] = "clip_score"

    @model_validator(mode="after")
    def _there(self) -> Self:
        self.check_model("scores.clip_score")
        return self

    def support(self, run: Run) -> Sequence[Column]:
        return [self.pair_column(run, self.column_name)]

    def column(self, run: Run) -> Column:
        return cosine_column(self.column_name, self.pair_column(run, self.column_name).name)
