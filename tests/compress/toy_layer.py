"""A model that is one linear layer, so that a criterion's arithmetic can be checked by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pipeline.compress.architecture import Anatomy, named
from pipeline.compress.calibration import Calibration
from pipeline.compress.units import Kind, Member, Units


class ToyLayer(nn.Module):
    """`x` (rows, length, in) through `consumer`, a linear layer with these weights (out, in)."""

    def __init__(self, weight: Sequence[Sequence[float]]) -> None:
        super().__init__()
        w = torch.tensor(weight)
        self.consumer = nn.Linear(w.shape[1], w.shape[0], bias=False)
        self.consumer.weight.data = w

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        found: torch.Tensor = self.consumer(x)
        return found


def toy(
    weight: Sequence[Sequence[float]], x: Any, width: int = 1, kind: Kind = "neuron", groups: int = 1
) -> tuple[Anatomy, list[Units], Calibration]:
    """Its anatomy, units of `width` entries each, calibration on rows x (rows, length, in) or one row (length, in)."""
    model = ToyLayer(weight)
    values = torch.as_tensor(x, dtype=torch.float32)
    values = values[None] if values.ndim == 2 else values
    body = Anatomy("toy", "", (), 0, (), (), False, "", "", named(model))
    count, cost = model.consumer.in_features // width, float(width * len(weight))
    member = Member("consumer", "in", width)
    units = Units(f"0.{kind}", 0, count, cost, kind, (member,), "consumer", width, groups)
    return body, [units], Calibration(model, [{"x": values}])
