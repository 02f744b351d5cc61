"""Full training: every weight learns to predict the next token. The reference for all other ways to heal.

AdamW with betas 0.9 and 0.95; the learning rate is that of a late phase of pretraining, an order below the usual peak
(our default). Above 100 M tokens it is to be preferred to LoRA. 3 f FLOPs a token, and 16 bytes a parameter. Weights
that a sparse method set to 0 stay exactly 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pipeline.compress.recover.base import Cost, Recovery, Setup

if TYPE_CHECKING:
    from torch import nn

    from pipeline.compress.recover._session import Session


class Full(Recovery):
    """All weights, cross-entropy."""

    kind: Literal["full"] = "full"

    def begin(self, setup: Setup) -> Session:
        from pipeline.compress.recover._session import Session

        setup.student.requires_grad_(True)
        return Session(setup.student, setup.masks)

    def cost(self, student: nn.Module, teacher: nn.Module | None = None) -> Cost:
        return Cost()
