"""A session under DistributedDataParallel: gradients are averaged while the backward pass runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from pipeline.compress.recover._session import Session


class SessionLoss(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """What a session trains, and its loss as the forward pass."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.model = session.model
        self.beside = nn.ModuleDict(session.beside)
        self.session = session

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.session.loss(ids)


def wrap(session: Session, device: str) -> DistributedDataParallel:
    """Starts all workers from the first one's weights; raises where shapes differ between them."""
    devices = [torch.device(device)] if device.startswith("cuda") else None
    return DistributedDataParallel(SessionLoss(session), device_ids=devices, broadcast_buffers=False)
