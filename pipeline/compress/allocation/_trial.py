"""Trying out what pruning a part does: its lowest pieces at zero for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from pipeline.compress.allocation._blocks import outward, parameters_of
from pipeline.compress.surgery import zero
from pipeline.compress.units import Part, Units, lowest
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from pipeline.compress.allocation.base import Evidence
    from pipeline.compress.architecture import Anatomy


def scores_of(evidence: Evidence, part: Part, index: int) -> np.ndarray:
    """A part's scores; magnitudes of a matrix that has none. Raises ConfigError for units that have none."""
    if evidence.scores is not None:
        return np.asarray(evidence.scores[index])
    if isinstance(part, Units):
        raise ConfigError("allocation: units go by their scores, and there are none: name an importance")
    found: np.ndarray = outward(evidence.body, part.name).abs().flatten().cpu().numpy()
    return found


@contextmanager
def without(model: nn.Module, body: Anatomy, part: Part, scores: np.ndarray, removed: int) -> Iterator[None]:
    """A model with the lowest pieces of one part at zero while the context lasts."""
    import torch

    held = parameters_of(body, part)
    before = [p.detach().clone() for p in held]
    try:
        if isinstance(part, Units):
            zero(model, [part], {part.name: lowest(scores, part.count - removed, part.groups)})
        else:
            mask = torch.zeros(part.count, dtype=torch.bool)
            mask[torch.from_numpy(lowest(scores, part.count - removed))] = True
            held[0].masked_fill_(mask.view(held[0].shape).to(held[0].device), 0)
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(held, before, strict=True):
                p.copy_(old)
