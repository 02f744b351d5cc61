"""Adapt-Pruner: rounds of pruning a little and training on a part of the data, equal parts both.

Wang et al. 2025 (arXiv 2502.03460): about 20 rounds, of 5 % each, every one of which scores the model as it is by
first-order Taylor and takes more from layers that turn the residual stream less (`allocation: adapt`). Give `step` just
these: `{kind: width, ratio: 0.5, importance: taylor, allocation: adapt}`. Their training: rate 2e-5, `decay: wsd`, a
warm-up of 5 %, batches of 32; scores on 512 sequences of 64 tokens.

They report the quality of a model of the parent's size at 200 times fewer tokens. A round costs a gradient pass over
`rows` blocks; the training between them is the greater part. Moments are cut with the weights.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipeline.compress.schedule._stepped import Stepped


class AdaptPruner(Stepped):
    """Prune, train, prune, train: a step of kind `width` in equal parts over the whole budget."""

    source: ClassVar[str] = "Wang et al. 2025, arXiv 2502.03460"
    kind: Literal["adapt_pruner"] = "adapt_pruner"
    rounds: int = Field(20, ge=1)
    rows: int = Field(64, ge=1, description="training blocks that each round is measured on")

    def moments(self, ratio: float) -> list[tuple[float, float]]:
        return [(i / self.rounds, ratio * (i + 1) / self.rounds) for i in range(self.rounds)]
