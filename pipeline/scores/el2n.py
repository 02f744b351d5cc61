"""EL2N: how far a briefly trained classifier is from a row's label, |p - y|, averaged over several of them.

Source: Paul et al. 2021, "Deep Learning on a Data Diet", arXiv 2107.07075 (from memory, unverified): score early in
training, average over ten initialisations, keep the largest. Here the model is a small head on `embed.vector` rather
than the network that the data are for, trained on a sample of 20,000 rows; heads, epochs and width are ours.

Between 0 (certain and right) and sqrt(2) (certain and wrong). Wrong labels are the hardest rows of all: on noisy labels
use `keep: easy`, or drop the top first. A row whose label is not in the sample counts as one that the head gives no
chance. Rows with a null label are quarantined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from pipeline.scores._head import LabelledScore, Layers, error_norms


class El2n(LabelledScore):
    """Mean |p - y| of `models` heads after `epochs` epochs."""

    claim = "a classifier that was trained briefly gets its label wrong"
    cost = "2 models hidden (d + classes) FLOPs"
    source = "Paul et al. 2021, arXiv 2107.07075"
    kind: Literal["el2n"] = "el2n"

    def measure(self) -> Callable[[Layers, np.ndarray, np.ndarray], np.ndarray]:
        return error_norms
