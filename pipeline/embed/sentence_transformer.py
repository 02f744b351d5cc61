"""Vectors from a transformer encoder: any text encoder of the transformers library, pooled as its folder says.

Rows are tokenised together and cut into windows of the encoder's length; the windows of a batch are sorted by length
and run in groups of at most `batch_tokens` tokens, padded to one of few lengths (16, 24, 32, 48, 64, 96 ...). A row of
several windows is the mean of their vectors weighted by tokens; with mean pooling that is the mean over all its tokens.
float32 on CPUs, bfloat16 on GPUs (`engine.gpus`). What runs beside a row changes its vector by float noise only.

Weights are read from safetensors; code in a model's folder is never run. Nothing is downloaded unless the model is
named `hf://org/name`.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from pipeline.embed.base import Embed
from pipeline.engine import threads
from pipeline.errors import ConfigError, TamisError
from pipeline.models.files import check_installed, existing, folder_digest, folder_of, is_hub, source_of
from pipeline.recipe import Column, Resources, Transform, fingerprint
from pipeline.vectors import unit_vectors, vector_schema

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.run import Run

WIDTHS = ("hidden_size", "d_model", "dim")
"""How configurations name the width of the last layer."""


class SentenceTransformer(Embed):
    """Reimers and Gurevych 2019; without a pooling module in the folder, the mean over tokens."""

    kind: Literal["sentence_transformer"] = "sentence_transformer"
    model: str = Field(description="folder with config.json, tokenizer and safetensors, or hf://org/name[@revision]")
    pooling: Literal["mean", "cls"] | None = Field(
        None, description="how tokens become a vector (default: as the folder says)"
    )
    max_tokens: int | None = Field(
        None, ge=8, description="window, special tokens included (default: as the folder says)"
    )
    max_windows: int = Field(64, ge=1, description="windows of a row that are looked at; what lies behind them is not")
    prefix: str = Field("", description="put before every text, such as `passage: ` for E5")
    batch_tokens: int = Field(
        16384, ge=1, description="tokens run at once, padding included; changes speed and memory only"
    )

    @model_validator(mode="after")
    def _there(self) -> Self:
        check_installed("embed.kind sentence_transformer", "models", "torch", "transformers", "safetensors")
        if not is_hub(self.model):
            pooling_of(existing(self.model, "config.json", "*.safetensors"), self.pooling)
        return self

    def fit(self, run: Run) -> None:
        source_of(run, self.model, "encoder")

    def column(self, run: Run) -> Column:
        engine = run.config.engine
        source = source_of(run, self.model, "encoder")
        folder = folder_of(source)
        config = json.loads((folder / "config.json").read_text())
        dims = next((config[name] for name in WIDTHS if name in config), None)
        if dims is None:
            raise ConfigError(
                f"embed.model: {folder / 'config.json'} has none of {', '.join(WIDTHS)}: this is no text encoder"
            )
        pooling = pooling_of(folder, self.pooling)
        precision = "bfloat16" if engine.gpus else "float32"
        asked = self.model_dump(mode="json", exclude={"model", "batch_tokens", "pooling"})
        identity = fingerprint(type(self).__name__, self.version, asked, pooling, precision, folder_digest(folder))
        resources = Resources(cpus=engine.cpus, gpus=engine.gpus)
        return Column(
            "embed",
            ("text",),
            vector_schema(dims),
            partial(self._open, source, pooling, precision),
            identity,
            resources,
        )

    def _open(self, source: Artifact | Path, pooling: str, precision: str) -> Transform:
        import torch

        torch.set_num_threads(threads.cpus())
        encoder = Encoder(folder_of(source), pooling, precision, self.max_tokens)

        def embed(batch: pa.RecordBatch) -> pa.RecordBatch:
            texts = [self.prefix + text for text in batch.column("text").to_pylist()]
            return unit_vectors(encoder(texts, self.max_windows, self.batch_tokens))

        return embed


def pooling_of(folder: Path, override: str | None) -> str:
    """`mean` or `cls`, as the folder's modules say. Raises ValueError where they ask for something else."""
    if not (folder / "modules.json").is_file():
        return override or "mean"
    modules = {m["type"].rpartition(".")[2]: m["path"] for m in json.loads((folder / "modules.json").read_text())}
    if unknown := modules.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise ValueError(
            f"{folder}: module {', '.join(sorted(unknown))} is not supported; Transformer, Pooling and Normalize are"
        )
    if override or "Pooling" not in modules:
        return override or "mean"
    config = json.loads((folder / modules["Pooling"] / "config.json").read_text())
    modes = [
        name.removeprefix("pooling_mode_")
        for name, value in config.items()
        if name.startswith("pooling_mode_") and value
    ]
    modes = modes or [config.get("pooling_mode", "mean")]
    known = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}
    if len(modes) != 1 or modes[0] not in known:
        raise ValueError(
            f"{folder}: its pooling, {' and '.join(modes)}, is not supported; set `pooling` to mean or cls instead"
        )
    return known[modes[0]]


class Encoder:
    """A loaded model: texts to (n, dims) float32, not normalised."""

    def __init__(self, folder: Path, pooling: str, precision: str, max_tokens: int | None) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # the engine shows its own
        self.pooling = pooling
        self.device = torch.device("cuda" if precision == "bfloat16" else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if not self.tokenizer.is_fast:
            raise TamisError(f"{folder} has no fast tokenizer (tokenizer.json)")
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        self.model = model.to(self.device, getattr(torch, precision)).eval()
        self.window = max_tokens or _window(folder, self.tokenizer, model.config)
        self.pad = self.tokenizer.pad_token_id or 0

    def __call__(self, texts: list[str], max_windows: int, batch_tokens: int) -> np.ndarray:
        cut = self.tokenizer(
            texts,
            truncation=True,
            max_length=self.window,
            return_overflowing_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        row = np.asarray(cut["overflow_to_sample_mapping"])
        first = np.searchsorted(row, np.arange(len(texts)))
        looked_at = np.flatnonzero(np.arange(len(row)) - first[row] < max_windows)
        windows, row = [cut["input_ids"][i] for i in looked_at], row[looked_at]
        lengths = np.array([len(w) for w in windows])
        vectors = self._windows(windows, lengths, batch_tokens)
        rows: np.ndarray = np.add.reduceat(vectors * lengths[:, None], np.searchsorted(row, np.arange(len(texts))))
        return rows

    def _windows(self, windows: list[list[int]], lengths: np.ndarray, batch_tokens: int) -> np.ndarray:
        """One vector a window, (m, dims) float32."""
        padded = padded_lengths(lengths)
        vectors: np.ndarray | None = None
        for width in np.unique(padded):
            members = np.flatnonzero(padded == width)
            step = max(1, batch_tokens // int(width))
            for start in range(0, len(members), step):
                group = members[start : start + step]
                ids = np.full((len(group), width), self.pad)
                mask = np.arange(width) < lengths[group, None]
                ids[mask] = np.concatenate([windows[i] for i in group])
                out = self._forward(ids, mask)
                vectors = np.empty((len(windows), out.shape[1]), np.float32) if vectors is None else vectors
                vectors[group] = out
        assert vectors is not None  # a batch has rows, and each has a window
        return vectors

    def _forward(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            attention = torch.from_numpy(mask.astype(np.int64)).to(self.device)
            hidden = self.model(
                input_ids=torch.from_numpy(ids).to(self.device), attention_mask=attention
            ).last_hidden_state.float()
            pooled = (
                hidden[:, 0]
                if self.pooling == "cls"
                else (hidden * attention[..., None]).sum(1) / attention.sum(1, keepdim=True)
            )
            out: np.ndarray = pooled.cpu().numpy()
        return out


def padded_lengths(lengths: np.ndarray) -> np.ndarray:
    """The next of 16, 24, 32, 48, 64, 96, 128 ...: at most half as much again, and two shapes an octave."""
    octave = 2 ** np.ceil(np.log2(np.maximum(lengths, 16))).astype(np.int64)
    between = octave * 3 // 4
    return np.asarray(np.where((lengths <= between) & (octave > 16), between, octave))


def _window(folder: Path, tokenizer: Any, config: Any) -> int:
    """Tokens that the encoder takes at once: what the folder says, within what its positions allow."""
    path = folder / "sentence_bert_config.json"
    said = json.loads(path.read_text()).get("max_seq_length") if path.is_file() else None
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 512)
    return int(min(said or longest, longest))
