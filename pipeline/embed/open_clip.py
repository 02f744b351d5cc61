"""Vectors from the towers of an OpenCLIP model, images and texts in one space.

A text is cut to the model's context (77 tokens for most). Images are decoded, resized and cut as the model's own
preprocessing says (`pipeline/models/images.py`), in threads beside the forward pass. float32 on CPUs, bfloat16 on GPUs
(`engine.gpus`). Weights are safetensors, or a checkpoint that torch reads with `weights_only`. Nothing is downloaded
unless the user names a model of the hub (`hf://org/name`) or a pretrained tag; then it is fetched once, into the run's
artifacts. bench/clip.py measures it beside the bare forward pass.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.embed._image_text import ImageTextEmbed
from pipeline.models.image_text import Source


class OpenClip(ImageTextEmbed):
    """Radford et al. 2021, in the implementation of Ilharco et al. (open_clip)."""

    kind: Literal["open_clip"] = "open_clip"
    model: str = Field(
        description="an architecture (ViT-B-32), a folder with open_clip_config.json and weights, or hf://org/name"
    )
    pretrained: str | None = Field(
        None, description="weights of an architecture: a checkpoint file, or a tag to download"
    )

    @property
    def source(self) -> Source:
        return Source(self.model, self.pretrained)
