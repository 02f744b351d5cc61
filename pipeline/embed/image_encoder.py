"""Vectors from an image encoder: any vision model of the transformers library, such as DINOv2 or a ViT.

Images are decoded and prepared as the folder says (`pipeline/models/images.py`), in threads beside the forward pass.
DBP's best vectors are those of a distilled DINOv2 ViT-L/14 (Abbas et al. 2024, arXiv 2401.04578). float32 on CPUs,
bfloat16 on GPUs (`engine.gpus`). Weights are read from safetensors; code in a model's folder is never run. Nothing is
downloaded unless the model is named `hf://org/name`.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import pyarrow as pa
from pydantic import Field, model_validator

from pipeline.embed.base import Embed
from pipeline.engine import threads
from pipeline.models.files import check_installed, existing, folder_digest, folder_of, is_hub, source_of
from pipeline.models.image_encoder import ImageEncoder, Pooling, check_pooling
from pipeline.models.image_text import BATCH_ROWS, encode_images
from pipeline.models.images import Preprocess
from pipeline.recipe import Column, Resources, Transform, fingerprint
from pipeline.vectors import unit_vectors, vector_schema

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.run import Run

SHAPE = "shape.json"


class ImageEncoderEmbed(Embed):
    """The class token, or the mean over patches or places."""

    kind: Literal["image_encoder"] = "image_encoder"
    model: str = Field(description="folder with config.json, preprocessor and safetensors, or hf://org/name[@revision]")
    pooling: Pooling | None = Field(
        None, description="how tokens become a vector (default: the class token where there is one, else the mean)"
    )
    batch_images: int = Field(64, ge=1, description="images run at once; changes speed and memory only")

    @model_validator(mode="after")
    def _there(self) -> Self:
        check_installed("embed.kind image_encoder", "models", "torch", "transformers", "safetensors", "PIL")
        if not is_hub(self.model):
            Preprocess.of_folder(existing(self.model, "config.json", "*.safetensors"))
        return self

    def fit(self, run: Run) -> None:
        self._shape(run, source_of(run, self.model, "encoder"))

    def column(self, run: Run) -> Column:
        engine = run.config.engine
        source = source_of(run, self.model, "encoder")
        shape = self._shape(run, source)
        precision = "bfloat16" if engine.gpus else "float32"
        identity = fingerprint(type(self).__name__, self.version, shape, precision, folder_digest(folder_of(source)))
        return Column(
            "embed",
            ("image",),
            vector_schema(shape["dims"]),
            partial(_open, source, shape["pooling"], precision, self.batch_images),
            identity,
            Resources(cpus=engine.cpus, gpus=engine.gpus),
            batch_rows=BATCH_ROWS,
        )

    def _shape(self, run: Run, source: Artifact | Path) -> dict[str, Any]:
        """`pooling` and `dims`, found once by a worker: vision models name their width in too many ways."""
        identity = fingerprint("image encoder", self.pooling, folder_digest(folder_of(source)))
        found = run.artifact("encoder-shape", identity, partial(_measure, source, self.pooling))
        shape: dict[str, Any] = json.loads((found.local() / SHAPE).read_text())
        return shape


def _measure(source: Artifact | Path, pooling: Pooling | None, directory: Path) -> None:
    pooled, dims = check_pooling(folder_of(source), pooling)
    (directory / SHAPE).write_text(json.dumps({"pooling": pooled, "dims": dims}))


def _open(source: Artifact | Path, pooling: Pooling, precision: str, batch_images: int) -> Transform:
    import torch

    torch.set_num_threads(threads.cpus())
    encoder = ImageEncoder(folder_of(source), pooling, precision)

    def embed(batch: pa.RecordBatch) -> pa.RecordBatch:
        return unit_vectors(*encode_images(encoder, batch.column("image"), batch_images, precision == "bfloat16"))

    return embed
