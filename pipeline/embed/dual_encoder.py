"""Vectors from two encoders that were trained apart and two linear heads that bring them into one space.

For who has no CLIP: an image and a text encoder from transformers, and pairs to train the heads on in seconds. The
format of the folder and the training are described in `pipeline/models/dual_encoder.py`; `scores: dfn` writes one.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.embed._image_text import ImageTextEmbed
from pipeline.models.image_text import Source


class DualEncoder(ImageTextEmbed):
    """Locked encoders with trained heads, as LiT (Zhai et al. 2022) locks its image tower."""

    kind: Literal["dual_encoder"] = "dual_encoder"
    model: str = Field(description="a folder with dual_encoder.json, heads.safetensors, image/ and text/")

    @property
    def source(self) -> Source:
        return Source(self.model)
