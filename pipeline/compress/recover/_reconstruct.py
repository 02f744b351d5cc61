"""Blocks of a sparse model that learn, each by itself, to put out what the dense model's do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pipeline.compress.architecture import anatomy
from pipeline.compress.documents import read_tensor
from pipeline.compress.recover._features import normalised_feature_loss
from pipeline.compress.recover._masked import MaskedSession
from pipeline.compress.recover._session import freeze
from pipeline.compress.sparse._sequential import capture
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.compress.recover.base import Setup


class ReconstructSession(MaskedSession):
    """Sum over blocks of ||F_t - F_s||^2 / ||F_t||^2, F being what teacher's and student's block make of the teacher's
    states; times the positions that count, which the loop divides by."""

    def __init__(
        self, setup: Setup, masks: dict[str, torch.Tensor], adapter: str | None, rank: int, scale: float
    ) -> None:
        super().__init__(setup.student, masks, adapter, rank, scale)
        assert setup.teacher is not None  # the loop sees to it
        self.teacher = setup.teacher.eval()
        freeze(self.teacher)
        bodies = anatomy(self.model), anatomy(self.teacher)
        ours, theirs = ((len(body.layers), body.hidden) for body in bodies)
        if ours != theirs:
            raise ConfigError(
                f"recover: perp: reconstruct: the student has {ours} (blocks, channels), the teacher {theirs}: its "
                "blocks are taught by the teacher's, so only weights may have gone"
            )
        self.ours, self.theirs = (bodies[i].modules[bodies[i].blocks] for i in (0, 1))
        self.known = None if setup.vocabulary is None else torch.from_numpy(setup.vocabulary).long()

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        read = read_tensor(ids)
        read = read if self.known is None else self.known.to(ids.device)[read]
        wanted: list[torch.Tensor] = []
        given: list[torch.Tensor] = []
        with torch.no_grad():
            stream = capture(self.teacher, self.theirs, {"input_ids": read})
        for i, (ours, theirs) in enumerate(zip(self.ours, self.theirs, strict=True)):
            given.append(stream.forward(ours, i))
            with torch.no_grad():
                stream.hidden = stream.forward(theirs, i)
            wanted.append(stream.hidden)
        return normalised_feature_loss(wanted, given, squared=True) * (ids[:, 1:] >= 0).sum()
