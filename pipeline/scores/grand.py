"""GraNd: norm of a row's gradient in a briefly trained classifier, averaged over several of them.

Source: Paul et al. 2021, "Deep Learning on a Data Diet", arXiv 2107.07075 (from memory, unverified): the expected norm
over initialisations, early in training; keep the largest. As in `el2n`, the model is a small head on `embed.vector`.
A layer's gradient is delta (a, 1)^T, so the norm over all layers costs a backward pass and no gradient: squared,
sum |delta|^2 (|a|^2 + 1). `layers: last` is |p - y| sqrt(|a|^2 + 1), which without a hidden layer is EL2N times
sqrt(2), because vectors have unit norm.

Wrong labels have the largest gradients: see `el2n`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
from pydantic import Field

from pipeline.scores._head import LabelledScore, Layers, gradient_norms


class Grand(LabelledScore):
    """Mean gradient norm of `models` heads after `epochs` epochs."""

    claim = "moves a classifier that was trained briefly the most"
    cost = "4 models hidden (d + classes) FLOPs"
    source = "Paul et al. 2021, arXiv 2107.07075"
    kind: Literal["grand"] = "grand"
    layers: Literal["all", "last"] = Field("all", description="whose gradient: all layers', or the last one's")

    def measure(self) -> Callable[[Layers, np.ndarray, np.ndarray], np.ndarray]:
        return partial(gradient_norms, only_last=self.layers == "last")
