"""Data filtering network: keep the pairs that a small image-text model, trained on clean pairs alone, scores highest.

Source: Fang et al. 2023, "Data Filtering Networks", arXiv 2309.17425. The score is the cosine of image and caption, in
[-1, 1]; theirs keeps the top 15 % (`budget: {fraction: 0.15}`). What makes a good network is not its own accuracy but
the purity of what it learned from: a model 30 points worse on ImageNet filters as well, and a few per cent of wrong
pairs in its training spoil it.

Two ways to one. `model` is a network that was trained as a filter, such as hf://apple/DFN2B-CLIP-ViT-B-16, and is used
as it is. `trusted` pairs train one here, on an image and a text encoder that stay as they are
(pipeline/models/dual_encoder.py): features once, then two linear heads in seconds. The artifact `<name>` is then a
folder that `embed: {kind: dual_encoder}` takes, with `dfn.json` beside: on a held-out tenth of the trusted captions how
well matched are told from shuffled pairs (AUC), and how often the right partner is found (recall).

What it trades away: theirs is a whole CLIP ViT-B/32, initialised from OpenAI's weights (+.012 on 38 tasks), trained on
billions of samples with augmentation, fine-tuned (+.010) and averaged; heads on locked encoders learn what their
features hold. They also forgive more than the paper's networks do: with 0, 10 and 30 % of shuffled captions among 1,500
planted pairs, 94, 94 and 92 % of what they kept of a pool of which 30 % match did match, while the right partner came
first in 66, 60 and 37 % of cases (tests/models/test_dual_encoder.py). One worker does the training, and the features of
all trusted pairs have to fit its memory (4 bytes a number). Scores of two networks do not compare.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from pipeline.corpus.images import ImageColumn, is_image
from pipeline.corpus.storage import resolve
from pipeline.corpus.text import clean_text, is_text
from pipeline.engine import threads
from pipeline.errors import ConfigError
from pipeline.hashing import row_keys, uniform
from pipeline.models import dual_encoder as dual
from pipeline.models.files import check_installed, existing, folder_digest, folder_of, is_hub, source_of
from pipeline.models.image_encoder import ImageEncoder
from pipeline.models.image_text import BATCH_ROWS, encode_images, vector_column
from pipeline.recipe import Column, Resources, fingerprint
from pipeline.scores._pairs import Model, check_pairs, cosine_column
from pipeline.scores._seeds import identify, locate
from pipeline.scores._targets import listed
from pipeline.scores.base import Score

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.run import Run

FACTS = "dfn.json"
RANKS = (1, 10)
BLOCK = 4096
ROLE = "dfn.trusted"
TRAINING = ("image_encoder", "text_encoder", "trusted")


class Dfn(Model, Score):
    """Cosine of image and text by the filtering network, in [-1, 1]."""

    claim = "image and caption belong together, says a network that saw clean pairs only"
    cost = "a forward pass of both towers"
    source = "Fang et al. 2023 (DFN), arXiv 2309.17425"
    kind: Literal["dfn"] = "dfn"
    trusted: str | list[str] | None = Field(None, description="Parquet files of clean pairs to train a network on")
    trusted_image: str = Field("image", description="column of the trusted pairs that holds the images")
    trusted_text: str = Field("text", description="column of the trusted pairs that holds the captions")
    image_encoder: str | None = Field(None, description="vision model of transformers: folder or hf://org/name")
    text_encoder: str | None = Field(None, description="text encoder of transformers: folder or hf://org/name")
    train: dual.HeadTraining = Field(dual.HeadTraining(), description="how the heads are trained")
    max_tokens: int = Field(128, ge=8, description="tokens of a caption that the text encoder sees")
    holdout: float = Field(0.1, gt=0, le=0.5, description="share of the trusted captions kept out to measure with")

    @model_validator(mode="after")
    def _one_network(self) -> Self:
        given = [name for name in TRAINING if getattr(self, name) is not None]
        if self.model is not None:
            if given:
                raise ValueError(f"`model` is trained already: remove {', '.join(given)}")
            self.check_model("scores.dfn")
            return self
        if missing := [name for name in TRAINING if name not in given]:
            raise ValueError(f"give either `model` or all of {', '.join(TRAINING)}; missing: {', '.join(missing)}")
        check_installed("scores.dfn", "models", "torch", "transformers", "safetensors", "PIL")
        for encoder in (self.image_encoder, self.text_encoder):
            if encoder is not None and not is_hub(encoder):
                existing(encoder, "config.json", "*.safetensors")
        return self

    def fit(self, run: Run) -> None:
        check_pairs(run, self.column_name)
        if self.model is None:
            self._network(run)

    def support(self, run: Run) -> Sequence[Column]:
        if self.model is not None:
            return [self.pair_column(run, self.column_name)]
        return [vector_column(run, self._network(run), "both", batch_images=self.batch_images)]

    def column(self, run: Run) -> Column:
        return cosine_column(self.column_name, self.support(run)[0].name)

    def _network(self, run: Run) -> Artifact:
        """The artifact with a dual encoder's folder and `dfn.json`, trained once."""
        assert self.image_encoder is not None  # checked at the door
        assert self.text_encoder is not None
        engine, seed = run.config.engine, run.seed
        image = source_of(run, self.image_encoder, f"{self.column_name}-image")
        text = source_of(run, self.text_encoder, f"{self.column_name}-text")
        uris = locate(listed(self.trusted), ROLE)
        asked = [self.trusted_image, self.trusted_text, self.train.model_dump(), self.max_tokens, self.holdout, seed]
        encoders = [folder_digest(folder_of(source)) for source in (image, text)]
        precision = "bfloat16" if engine.gpus else "float32"
        identity = fingerprint("dfn", self.version, asked, encoders, precision, identify(uris))
        build = partial(_train, self, image, text, uris, precision, seed)
        return run.artifact(self.column_name, identity, build, Resources(cpus=engine.cpus, gpus=engine.gpus))


def _train(
    recipe: Dfn, image: Artifact | Path, text: Artifact | Path, uris: list[str], precision: str, seed: int, folder: Path
) -> None:
    """Features of all trusted pairs, heads on nine tenths of them, measures on the rest."""
    import torch

    torch.set_num_threads(threads.cpus())
    settings = dual.describe(folder_of(image), folder_of(text), recipe.max_tokens)
    encoder = ImageEncoder(folder_of(image), settings["image"]["pooling"], precision)
    reader = dual.text_encoder(folder_of(text), settings["text"], precision)
    x, y, held, refused = list[np.ndarray](), list[np.ndarray](), list[np.ndarray](), 0
    for batch in read_pairs(uris, recipe.trusted_image, recipe.trusted_text):
        features, reasons = encode_images(encoder, batch["image"], recipe.batch_images)
        good = reasons == ""
        refused += int((~good).sum())
        if good.any():
            captions = batch["text"].filter(pa.array(good))
            x.append(features[good])
            y.append(reader(captions.to_pylist(), 1, dual.BATCH_TOKENS))
            held.append(uniform(row_keys(captions), seed) < recipe.holdout)  # a caption is on one side, however often
    if not x:
        raise ConfigError(f"{ROLE}: no pair of an image that can be decoded and a caption in {', '.join(uris)}")
    images, texts, unseen = np.concatenate(x), np.concatenate(y), np.concatenate(held)
    try:
        heads = dual.train_heads(images[~unseen], texts[~unseen], recipe.train, seed)
    except ValueError as error:
        raise ConfigError(f"{ROLE}: {error}") from error
    dual.write_dual_encoder(folder_of(image), folder_of(text), heads, settings, folder)
    facts = {"trusted": int((~unseen).sum()), "undecodable": refused, "settings": recipe.train.model_dump()}
    facts["held_out"] = measure(heads.images(images[unseen]), heads.texts(texts[unseen]), seed)
    (folder / FACTS).write_text(json.dumps(facts, indent=2))


def read_pairs(uris: Sequence[str], image: str, text: str) -> Iterator[pa.RecordBatch]:
    """Usable pairs of Parquet files as batches of `image` (binary) and `text`. Raises ConfigError."""
    import pyarrow.parquet as pq

    for uri in uris:
        filesystem, path = resolve(uri)
        try:
            with filesystem.open_input_file(path) as source:
                file = pq.ParquetFile(source)
                for column, fits in ((image, is_image), (text, is_text)):
                    if column not in file.schema_arrow.names:
                        there = ", ".join(file.schema_arrow.names)
                        raise ConfigError(f"{ROLE}: {uri!r} has no column {column!r}; it has {there}")
                    if not fits(kind := file.schema_arrow.field(column).type):
                        raise ConfigError(f"{ROLE}: column {column!r} of {uri!r} is {kind}")
                for batch in file.iter_batches(BATCH_ROWS, columns=[image, text]):
                    for piece in ImageColumn(image, 1 << 30).load(batch, uri, 1 << 26):
                        captions = clean_text(piece[text])[0]
                        usable = pc.and_(captions.is_valid(), piece[image].is_valid())
                        if pc.any(usable).as_py():
                            yield pa.record_batch([piece[image], captions], ["image", "text"]).filter(usable)
        except pa.ArrowException as error:
            raise ConfigError(f"{ROLE}: cannot read {uri!r}: {error}; trusted pairs are Parquet files") from error


def measure(x: np.ndarray, y: np.ndarray, seed: int) -> dict[str, Any]:
    """How well (n, dims) vectors of images and texts find each other; null where there are too few.

    `auc`: chance that a matched pair scores above one with a caption of another row. `recall`: share of images and of
    texts whose partner is among the 1 and the 10 nearest of the other side.
    """
    from sklearn.metrics import roc_auc_score

    if len(x) < 2:
        return {"pairs": len(x), "auc": None, "recall": None}
    x, y = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (x, y))
    order = np.random.default_rng(seed).permutation(len(x))
    shuffled = np.empty_like(order)
    shuffled[order] = np.roll(order, 1)  # everybody gets the caption of another
    scores = np.concatenate([np.vecdot(x, y), np.vecdot(x, y[shuffled])])
    ahead = {"image": _ahead(x, y), "text": _ahead(y, x)}
    recall = {f"{way}@{k}": float((places < k).mean()) for way, places in ahead.items() for k in RANKS}
    return {"pairs": len(x), "auc": float(roc_auc_score(np.repeat([1, 0], len(x)), scores)), "recall": recall}


def _ahead(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of every row of x, how many rows of y are nearer than its own; (n,)."""
    found = []
    for start in range(0, len(x), BLOCK):
        products = x[start : start + BLOCK] @ y.T
        own = np.diagonal(products, offset=start)  # of the same product, for another would round otherwise
        found.append((products > own[:, None]).sum(axis=1))
    return np.concatenate(found)
