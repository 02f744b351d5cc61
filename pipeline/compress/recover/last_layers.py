"""Only the last blocks and the head learn: after blocks were removed, they can heal more than LoRA everywhere does.

arXiv 2411.15558 reports so for the last two or three. f + 2 f_top FLOPs a token, f_top being the forward pass of what
is trained. A head that is tied to the embedding stays as it is: training it would move the embedding below frozen
blocks. The rate is `full`'s (our default).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pipeline.compress.architecture import anatomy
from pipeline.compress.recover.base import Cost, Recovery, Setup
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from pipeline.compress.recover._session import Session


class LastLayers(Recovery):
    """The last `layers` blocks, the last norm, and the head where it is a matrix of its own."""

    source: ClassVar[str] = "arXiv 2411.15558"
    kind: Literal["last_layers"] = "last_layers"
    layers: int = Field(3, ge=1)
    head: bool = True

    def begin(self, setup: Setup) -> Session:
        from pipeline.compress.recover._session import Session, freeze

        student, body = setup.student, anatomy(setup.student)
        if self.layers > len(body.layers):
            raise ConfigError(f"recover: last_layers: {self.layers} of {len(body.layers)} layers: use full")
        freeze(student)
        for block in list(student.get_submodule(body.blocks))[-self.layers :]:
            block.requires_grad_(True)
        for norm in (name for name in body.norms if not name.startswith(f"{body.blocks}.")):
            student.get_submodule(norm).requires_grad_(True)
        head = student.get_output_embeddings()
        if self.head and head.weight is not student.get_input_embeddings().weight:
            head.requires_grad_(True)
        return Session(student, setup.masks)

    def cost(self, student: nn.Module, teacher: nn.Module | None = None) -> Cost:
        return Cost("last", layers=self.layers)
