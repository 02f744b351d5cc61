"""One ranking over all layers and kinds: where the unimportant units are, there the cut falls.

Scores of different layers and kinds must be comparable. `normalise` says how that comes about:

- `none`: scores share a unit (of loss: Taylor, OBS), and a piece ranks by score per parameter that it frees.
- `mean`: divided by the mean of the part, as Torch-Pruning does (`mean` of GroupTaylorImportance; from memory,
  unverified); a part whose mean is 0 counts as zeros.
- `zscore`: less the mean of the part, over its standard deviation (n - 1): "AL-AM" of FLAP (An et al. 2023, arXiv
  2312.11983, section 3.3). A part without spread counts as zeros. FLAP standardises the entries of a head before it
  averages them, where this standardises the heads' scores; an importance that has done the former wants `none` with
  `per_parameter: false`.

Standardised scores compare a piece with its peers, so they are not divided by parameters; what a piece costs counts in
the budget alone: a head of FLAP's costs 4 dh / 3 neurons (170.67 at dh = 128; its code says 170), a key/value group
(2 g + 2) dh / 3. Target's `cap` keeps a layer of small scores from vanishing.

Memory: 20 bytes a piece besides the scores, which tells where pieces are weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from pipeline.compress.allocation._fill import limits
from pipeline.compress.allocation._rank import pieces, take_lowest
from pipeline.compress.allocation.base import Allocation, Evidence, Target

if TYPE_CHECKING:
    from pipeline.compress.units import Part


class GlobalRank(Allocation):
    """The lowest pieces of all parts go, until the target is reached to within half a piece."""

    kind: Literal["global_rank"] = "global_rank"
    normalise: Literal["none", "mean", "zscore"] = "none"
    per_parameter: bool | None = None
    """Whether a piece ranks by its score over its parameters; by default where scores are not normalised."""
    source: ClassVar[str] = "An et al. 2023, arXiv 2312.11983 (AL-AM); conventions of score per parameter"

    def keep(self, parts: Sequence[Part], target: Target, evidence: Evidence) -> np.ndarray:
        bounds = limits(parts, target)
        divide = self.normalise == "none" if self.per_parameter is None else self.per_parameter
        values = [
            normalised(score, self.normalise) / (part.cost if divide else 1)
            for part, score in zip(parts, pieces(evidence.scores, parts, self.kind), strict=True)
        ]
        count = np.array([part.count for part in parts], np.int64)
        removed = take_lowest(parts, values, bounds, bounds.budget)
        return np.asarray(count - removed)


def normalised(scores: np.ndarray, how: Literal["none", "mean", "zscore"]) -> np.ndarray:
    """Scores of one part, (count,), made comparable with those of others."""
    if how == "mean":
        mean = float(scores.mean())
        return scores / mean if mean else np.zeros_like(scores)
    if how == "zscore":
        spread = float(scores.std(ddof=1)) if len(scores) > 1 else 0.0
        # what is constant has a deviation of rounding noise
        constant = spread <= 1e-12 * float(np.abs(scores).max(initial=0))
        return np.zeros_like(scores) if constant else (scores - scores.mean()) / spread
    return scores
