"""A model whose linear layers PEFT has given low-rank corrections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.compress.recover._session import Session

if TYPE_CHECKING:
    from torch import nn


class LoraSession(Session):
    """The corrections are trained, nothing else; `merge` adds them to the weights."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        from peft import LoraModel

        self.tuner = LoraModel(model, config, "default")  # replaces the linear layers in place
        super().__init__(model)

    def merge(self) -> nn.Module:
        self.model = self.tuner.merge_and_unload()
        return super().merge()
