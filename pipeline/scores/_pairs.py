"""The cosine of image and text that `clip_score` and `dfn` rank by, from one pass that an embedding may share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
from pydantic import Field

from pipeline.embed._image_text import ImageTextEmbed
from pipeline.errors import ConfigError
from pipeline.models.image_text import Source, vector_column
from pipeline.recipe import Column, Recipe, Transform, fingerprint

if TYPE_CHECKING:
    from pipeline.run import Run

FIELDS = pa.schema([("score", pa.float32())])


class Model(Recipe):
    """Which image-text model; the embedding's where it names one and this does not."""

    model: str | None = Field(
        None,
        description="folder of an open_clip model or a dual encoder, an architecture, hf://org/name (default: embed's)",
    )
    pretrained: str | None = Field(
        None, description="weights of an architecture: a checkpoint file, or a tag to download"
    )
    batch_images: int = Field(64, ge=1, description="images run at once; changes speed and memory only")

    def check_model(self, feature: str) -> None:
        """Raises ValueError, for a validator."""
        if self.model is not None:
            Source(self.model, self.pretrained).check(feature)
        elif self.pretrained is not None:
            raise ValueError("`pretrained` belongs to an architecture: name it in `model`")

    def pair_column(self, run: Run, name: str) -> Column:
        """The column with `vector`, `text_vector` and `cosine`: `embed` itself where it is of the same model.

        Raises ConfigError where no model is named, and for a corpus that has no pairs.
        """
        check_pairs(run, name)
        embed = run.config.embed
        source = Source(self.model, self.pretrained) if self.model is not None else None
        if isinstance(embed, ImageTextEmbed):
            source = source or embed.source
            if source == embed.source and embed.towers(run) == "both":
                return embed.column(run)
        if source is None:
            raise ConfigError(f"scores.{name}: name an image-text `model`, here or in `embed`")
        files = source.files(run, f"{name}-model")
        return vector_column(run, files, "both", "", source.architecture, self.batch_images)


def check_pairs(run: Run, name: str) -> None:
    """Raises ConfigError for a corpus without images or without texts."""
    corpus = run.config.corpus
    if not (corpus.image and corpus.has_text):
        missing = "image" if corpus.has_text else "text"
        raise ConfigError(f"scores.{name} compares images with texts: corpus.{missing} names no column")


def cosine_column(name: str, pairs: str) -> Column:
    """The column of a score that is the cosine of another column."""
    return Column(name, (f"{pairs}.cosine",), FIELDS, _open, fingerprint("cosine", 1))


def _open() -> Transform:
    def score(batch: pa.RecordBatch) -> pa.RecordBatch:
        return pa.record_batch([batch.column(0)], schema=FIELDS)

    return score
