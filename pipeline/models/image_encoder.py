"""Vectors of images from any vision model of transformers: DINOv2, ViT, MobileNet, all of timm through its wrapper.

A model that gives tokens is pooled to its class token (`cls`) or to the mean over its patches, class and register
tokens left out (`mean`); one that gives a map of features (convolutions) to the mean over places. Preprocessing is what
the folder says, see `Preprocess.of_folder`. Weights are read from safetensors; code in a folder is never run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.errors import TamisError
from pipeline.models.images import Preprocess

if TYPE_CHECKING:
    import torch

Pooling = Literal["cls", "mean"]


def check_pooling(folder: Path, pooling: Pooling | None) -> tuple[Pooling, int]:
    """How a model is pooled (by default its class token where it has one) and how long its vectors are.

    Found by one pass of shapes alone, without weights. Raises TamisError where the folder holds no vision model, and
    where `cls` is asked of a model without a class token.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    size = Preprocess.of_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModel.from_config(config)
            hidden = _hidden(model.eval(), torch.empty(1, 3, size.height, size.width))
    except (OSError, ValueError, TypeError) as error:
        raise TamisError(f"{folder} cannot be read as a vision model: {error}") from error
    has_class = hidden.ndim == 3 and _prefix(config, hidden, size) > 0
    if pooling == "cls" and not has_class:
        raise TamisError(f"the model {folder} has no class token: set `pooling` to mean")
    return pooling or ("cls" if has_class else "mean"), int(hidden.shape[1] if hidden.ndim == 4 else hidden.shape[2])


class ImageEncoder:
    """A loaded model."""

    def __init__(self, folder: Path, pooling: Pooling, precision: str) -> None:
        import torch
        from transformers import AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()  # the engine shows its own
        self.preprocess = Preprocess.of_folder(folder)
        self.pooling = pooling
        self.device = torch.device("cuda" if precision == "bfloat16" else "cpu")
        self.dtype = getattr(torch, precision)
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        self.model = model.to(self.device, self.dtype).eval()

    def images(self, pixels: np.ndarray) -> np.ndarray:
        """(n, height, width, 3) uint8, as `preprocess` makes them, to (n, dims) float32, not normalised."""
        import torch

        with torch.inference_mode():
            hidden = _hidden(self.model, self.preprocess.normalise(pixels, self.device, self.dtype)).float()
            if hidden.ndim == 4:
                pooled = hidden.mean((2, 3))
            elif self.pooling == "cls":
                pooled = hidden[:, 0]
            else:
                pooled = hidden[:, _prefix(self.model.config, hidden, self.preprocess) :].mean(1)
            out: np.ndarray = pooled.cpu().numpy()
        return out


def _hidden(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """(n, tokens, dims) or (n, dims, height, width)."""
    hidden: torch.Tensor = model(pixel_values=pixels).last_hidden_state
    return hidden


def _prefix(config: Any, hidden: torch.Tensor, size: Preprocess) -> int:
    """Tokens before those of the patches: one of the class, and registers."""
    patch = getattr(config, "patch_size", None)
    return int(hidden.shape[1] - (size.height // patch) * (size.width // patch)) if isinstance(patch, int) else 0
