"""Vectors from the towers of an image-text model: what the kinds `open_clip` and `dual_encoder` share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from pipeline.embed.base import Embed
from pipeline.errors import ConfigError
from pipeline.models.image_text import Source, Tower, vector_column
from pipeline.recipe import Column

if TYPE_CHECKING:
    from pipeline.run import Run


class ImageTextEmbed(Embed, ABC):
    """With both towers `vector` is the image's, and `text_vector` and `cosine` (the CLIP score) come from the same
    pass; criteria that ask for the same model read them there."""

    tower: Tower | None = Field(
        None, description="what is embedded: image, text, or both at once (default: all that the corpus has)"
    )
    batch_images: int = Field(64, ge=1, description="images run at once; changes speed and memory only")

    @property
    @abstractmethod
    def source(self) -> Source:
        """Which model."""

    @model_validator(mode="after")
    def _there(self) -> Self:
        self.source.check(f"embed.kind {self.kind}")
        return self

    def fit(self, run: Run) -> None:
        self.source.files(run, "encoder")

    def column(self, run: Run) -> Column:
        files = self.source.files(run, "encoder")
        return vector_column(run, files, self.towers(run), "embed", self.source.architecture, self.batch_images)

    def towers(self, run: Run) -> Tower:
        """The towers that run. Raises ConfigError where the corpus lacks what one of them takes."""
        corpus = run.config.corpus
        has: Tower = "both" if corpus.image and corpus.has_text else "image" if corpus.image else "text"
        tower = self.tower or has
        if has not in ("both", tower):
            missing = "corpus.image" if has == "text" else "corpus.text"
            raise ConfigError(f"embed.tower: {tower} needs {missing}, which names no column")
        return tower
