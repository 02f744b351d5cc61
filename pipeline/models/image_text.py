"""Image-text models: vectors of images and of texts in one space, whichever way the two towers came about.

`ImageText` is the interface, `Source` names a model and `open_model` loads it. Two kinds are told apart by what a
folder holds: `open_clip` (open_clip_config.json; also a built-in architecture with a checkpoint or a pretrained tag)
and `dual_encoder` (dual_encoder.json, see pipeline/models/dual_encoder.py).

`vector_column` is the one column from which embeddings and criteria take what they need, so that an image is decoded
and a tower is run once however many ask: `vector` (the image's, where both towers run), and for pairs `text_vector` and
`cosine` besides. Images are decoded and resized in threads beside the forward pass. A text is cut to the model's
context (77 tokens for most of open_clip's). float32 on CPUs, bfloat16 on GPUs (`engine.gpus`), where every batch of
images has the same shape, the last filled up, for in bfloat16 the shape shows in the third digit of a cosine; that is
taken in float32 from vectors that are not rounded yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from pipeline.engine import threads
from pipeline.errors import TamisError
from pipeline.models import _open_clip as clip
from pipeline.models import dual_encoder as dual
from pipeline.models.files import check_installed, content_digest, existing, folder_digest, folder_of, is_hub, source_of
from pipeline.models.images import Preprocess, stream
from pipeline.recipe import QUARANTINE, Column, Resources, Transform, fingerprint
from pipeline.vectors import unit_vectors, vector_schema

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.run import Run

Tower = Literal["image", "text", "both"]
BATCH_ROWS = 256
"""Rows of a batch: encoded images are large."""


class ImageText(Protocol):
    """A loaded model. Vectors are float32 and need not be of unit norm; their length is the same on both sides."""

    preprocess: Preprocess
    logit_scale: float
    """What cosines were multiplied by in training: softmax(logit_scale * cosines) are its probabilities."""

    def images(self, pixels: np.ndarray) -> np.ndarray:
        """(n, height, width, 3) uint8, as `preprocess` makes them, to (n, dims)."""
        ...

    def texts(self, texts: list[str]) -> np.ndarray:
        """n texts to (n, dims)."""
        ...


@dataclass(frozen=True)
class Source:
    """A model by name: a folder, `hf://org/name[@revision]`, or an architecture of open_clip with `pretrained`."""

    model: str
    pretrained: str | None = None

    def check(self, feature: str) -> None:
        """Raises ValueError, for a validator, for what can be seen to fail without loading anything."""
        if self.architecture is not None:
            check_installed(feature, "vision", "torch", "open_clip")
            clip.check_self_contained(clip.architecture(self.architecture), self.model, tokenizer_here=False)
            if self.pretrained is None:
                raise ValueError(
                    f"{self.model} needs weights: set `pretrained` to a checkpoint file or to a tag to download"
                )
            if Path(self.pretrained).suffix and not Path(self.pretrained).expanduser().is_file():
                raise ValueError(f"there is no checkpoint {self.pretrained!r}")
            return
        if self.pretrained is not None:
            raise ValueError(
                "`pretrained` belongs to an architecture; a folder and a model of the hub bring their weights"
            )
        if is_hub(self.model):
            check_installed(feature, "vision", "torch", "open_clip")
            return
        folder = existing(self.model)
        if (folder / dual.CONFIG).is_file():
            check_installed(feature, "models", "torch", "transformers", "safetensors", "PIL")
            existing(self.model, dual.HEADS, "image/config.json", "text/config.json")
            dual.read_config(folder)
            return
        check_installed(feature, "vision", "torch", "open_clip")
        config = clip.folder_config(existing(self.model, clip.CONFIG))
        clip.check_self_contained(config, self.model, tokenizer_here=True)

    @property
    def architecture(self) -> str | None:
        """Name of a built-in architecture; None for a folder and a model of the hub."""
        elsewhere = is_hub(self.model) or "/" in self.model or Path(self.model).is_dir()
        return None if elsewhere else self.model

    def files(self, run: Run, artifact: str) -> Artifact | Path:
        """The model's folder, for an architecture its checkpoint, or the artifact that holds what was fetched."""
        if self.architecture is None:
            return source_of(run, self.model, artifact)
        assert self.pretrained is not None  # checked at the door
        file = Path(self.pretrained).expanduser()
        if file.is_file():
            return file.absolute()
        identity = fingerprint("open_clip tag", self.architecture, self.pretrained, 2)
        return run.artifact(artifact, identity, partial(clip.fetch_tag, self.architecture, self.pretrained))


def open_model(
    architecture: str | None, place: Path, precision: str, towers: tuple[Literal["image", "text"], ...]
) -> ImageText:
    """Load a model from a folder or checkpoint, with the towers that are asked for."""
    if architecture is None and (place / dual.CONFIG).is_file():
        return dual.DualEncoder(place, precision, towers)
    return clip.OpenClip(architecture, place, precision, towers)


def vector_column(
    run: Run,
    files: Artifact | Path,
    tower: Tower,
    name: str = "",
    architecture: str | None = None,
    batch_images: int = 64,
) -> Column:
    """Column of a model's vectors: `vector`, for both towers `text_vector` and `cosine` as well.

    Without a name it is called `pairs-<12 hex digits>`, which say which model, so that criteria share it.
    """
    engine = run.config.engine
    place = folder_of(files)
    dims, described = _describe(place, architecture)
    precision = "bfloat16" if engine.gpus else "float32"
    model = fingerprint("image-text", 1, described, tower, precision)
    fields = vector_schema(dims)
    if tower == "both":
        pair = [pa.field("text_vector", fields.field("vector").type), pa.field("cosine", pa.float32())]
        fields = pa.schema([fields.field("vector"), *pair, fields.field(QUARANTINE)])
    inputs = {"image": ("image",), "text": ("text",), "both": ("image", "text")}[tower]
    return Column(
        name or f"pairs-{model[:12]}",
        inputs,
        fields,
        partial(_open, files, architecture, tower, precision, batch_images),
        model,
        Resources(cpus=engine.cpus, gpus=engine.gpus),
        batch_rows=1024 if tower == "text" else BATCH_ROWS,
    )


def _describe(place: Path, architecture: str | None) -> tuple[int, Any]:
    """Length of the vectors, and what they depend on."""
    if architecture is None and (place / dual.CONFIG).is_file():
        return dual.dims_of(place), [dual.read_config(place), folder_digest(place)]
    config = clip.folder_config(place) if architecture is None else clip.architecture(architecture)
    clip.check_self_contained(config, str(place), tokenizer_here=architecture is None)
    return config["embed_dim"], [config, content_digest(place) if place.is_file() else folder_digest(place)]


def _open(
    files: Artifact | Path, architecture: str | None, tower: Tower, precision: str, batch_images: int
) -> Transform:
    import torch

    torch.set_num_threads(threads.cpus())
    model = open_model(architecture, folder_of(files), precision, ("image", "text") if tower == "both" else (tower,))

    def embed(batch: pa.RecordBatch) -> pa.RecordBatch:
        if tower == "text":
            return unit_vectors(model.texts(batch.column("text").to_pylist()))
        x, reasons = encode_images(model, batch.column("image"), batch_images, fixed=precision == "bfloat16")
        if tower == "image":
            return unit_vectors(x, reasons)
        return pairs(x, model.texts(batch.column("text").to_pylist()), reasons)

    return embed


class Encodes(Protocol):
    """Half of an `ImageText`: what a lone image encoder is, too."""

    preprocess: Preprocess

    def images(self, pixels: np.ndarray) -> np.ndarray: ...


def encode_images(model: Encodes, images: pa.Array, group: int, fixed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(n, dims) float32 of n encoded images, and n reasons (str objects), "" where an image could be decoded.

    `fixed`: the model always sees `group` images, black ones behind the last.
    """
    reasons = np.full(len(images), "", dtype=object)
    x: np.ndarray | None = None
    for part in stream(images, model.preprocess, group, threads.cpus()):
        reasons[list(part.refused)] = list(part.refused.values())
        if len(part.rows):
            pixels = part.pixels
            if fixed and len(pixels) < group:
                pixels = np.concatenate([pixels, np.zeros((group - len(pixels), *pixels.shape[1:]), np.uint8)])
            found = model.images(pixels)[: len(part.rows)]
            x = np.zeros((len(images), found.shape[1]), np.float32) if x is None else x
            x[part.rows] = found
    if x is None:  # nothing could be decoded: one black image says how long a vector is
        side = model.preprocess
        dims = model.images(np.zeros((1, side.height, side.width, 3), np.uint8)).shape[1]
        x = np.zeros((len(images), dims), np.float32)
    return x, reasons


def pairs(x: np.ndarray, y: np.ndarray, reasons: np.ndarray) -> pa.RecordBatch:
    """`vector`, `text_vector`, `cosine` and `quarantine` of n image vectors x and text vectors y, (n, dims) floats.

    A pair of which one side is refused has no values. `reasons` as in `unit_vectors`.
    """
    for side in (x, y):
        reasons = unit_vectors(side, reasons)[QUARANTINE].fill_null("").to_numpy(zero_copy_only=False)
    image, text = unit_vectors(x, reasons), unit_vectors(y, reasons)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        cosine = np.vecdot(x, y) / np.sqrt(np.vecdot(x, x) * np.vecdot(y, y))
    values = pa.array(np.clip(cosine, -1, 1).astype(np.float32), mask=reasons != "")
    names = ["vector", "text_vector", "cosine", QUARANTINE]
    return pa.record_batch([image["vector"], text["vector"], values, image[QUARANTINE]], names)


def open_folder(folder: Path, towers: tuple[Literal["image", "text"], ...] = ("image", "text")) -> ImageText:
    """A model from its folder, on the CPU, for use outside of a run. Raises TamisError where there is none."""
    if not (folder / dual.CONFIG).is_file() and not (folder / clip.CONFIG).is_file():
        raise TamisError(f"{folder} holds neither {dual.CONFIG} nor {clip.CONFIG}")
    return open_model(None, folder, "float32", towers)
