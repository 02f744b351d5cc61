"""Vectors from the text tower of an OpenCLIP model, in the space that its images share.

A text is cut to the model's context (77 tokens for most). float32 on CPUs, bfloat16 on GPUs (`engine.gpus`). Weights
are safetensors, or a checkpoint that torch reads with `weights_only`. Nothing is downloaded unless the user names a
model of the hub (`hf://org/name`) or a pretrained tag; then it is fetched once, into the run's artifacts.
"""

from __future__ import annotations

import difflib
import json
import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from pipeline.embed.base import Embed
from pipeline.engine import threads
from pipeline.errors import ConfigError, TamisError
from pipeline.models.files import check_installed, content_digest, existing, folder_digest, folder_of, is_hub, source_of
from pipeline.recipe import Column, Resources, Transform, fingerprint
from pipeline.vectors import unit_vectors, vector_schema

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.run import Run

CONFIG = "open_clip_config.json"
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


class OpenClip(Embed):
    """Radford et al. 2021, in the implementation of Ilharco et al. (open_clip)."""

    kind: Literal["open_clip"] = "open_clip"
    model: str = Field(
        description="an architecture (ViT-B-32), a folder with open_clip_config.json and weights, or hf://org/name"
    )
    pretrained: str | None = Field(
        None, description="weights of an architecture: a checkpoint file, or a tag to download"
    )
    batch_texts: int = Field(256, ge=1, description="texts run at once; changes speed and memory only")

    @model_validator(mode="after")
    def _there(self) -> Self:
        check_installed("embed.kind open_clip", "vision", "torch", "open_clip")
        if self._is_architecture:
            _check_self_contained(_architecture(self.model), self.model, tokenizer_here=False)
            if self.pretrained is None:
                raise ValueError(
                    f"{self.model} needs weights: set `pretrained` to a checkpoint file or to a tag to download"
                )
            if Path(self.pretrained).suffix and not Path(self.pretrained).expanduser().is_file():
                raise ValueError(f"there is no checkpoint {self.pretrained!r}")
        elif self.pretrained is not None:
            raise ValueError(
                "`pretrained` belongs to an architecture; a folder and a model of the hub bring their weights"
            )
        elif not is_hub(self.model):
            _check_self_contained(_folder_config(existing(self.model, CONFIG)), self.model, tokenizer_here=True)
        return self

    @property
    def _is_architecture(self) -> bool:
        return not (is_hub(self.model) or "/" in self.model or Path(self.model).is_dir())

    def fit(self, run: Run) -> None:
        self._weights(run)

    def column(self, run: Run) -> Column:
        engine = run.config.engine
        weights = self._weights(run)
        here = folder_of(weights)
        config = _architecture(self.model) if self._is_architecture else _folder_config(here)
        _check_self_contained(config, self.model, tokenizer_here=not self._is_architecture)
        precision = "bfloat16" if engine.gpus else "float32"
        digest = content_digest(here) if here.is_file() else folder_digest(here)
        identity = fingerprint(type(self).__name__, self.version, config, precision, digest)
        resources = Resources(cpus=engine.cpus, gpus=engine.gpus)
        return Column(
            "embed",
            ("text",),
            vector_schema(config["embed_dim"]),
            partial(self._open, weights, precision),
            identity,
            resources,
        )

    def _weights(self, run: Run) -> Artifact | Path:
        """A folder with configuration and weights; for an architecture a checkpoint, or the artifact that holds it."""
        if not self._is_architecture:
            return source_of(run, self.model, "encoder")
        assert self.pretrained is not None  # checked at the door
        file = Path(self.pretrained).expanduser()
        if file.is_file():
            return file.absolute()
        identity = fingerprint("open_clip tag", self.model, self.pretrained)
        return run.artifact("encoder", identity, partial(_fetch_tag, self.model, self.pretrained))

    def _open(self, weights: Artifact | Path, precision: str) -> Transform:
        import open_clip
        import torch

        torch.set_num_threads(threads.cpus())
        here = folder_of(weights)
        name = self.model if self._is_architecture else f"local-dir:{here}"
        checkpoint = None
        if self._is_architecture:
            checkpoint = str(here if here.is_file() else next(p for pattern in WEIGHTS for p in here.glob(pattern)))
        tower = open_clip.create_model(name, pretrained=checkpoint, require_pretrained=True, weights_only=True)
        del tower.visual  # images are not embedded here: the memory of the larger tower goes back
        device = torch.device("cuda" if precision == "bfloat16" else "cpu")
        tower = tower.to(device, getattr(torch, precision)).eval()
        tokenizer = open_clip.get_tokenizer(name)

        def embed(batch: pa.RecordBatch) -> pa.RecordBatch:
            texts = batch.column("text").to_pylist()
            with torch.inference_mode():
                groups = [tokenizer(texts[i : i + self.batch_texts]) for i in range(0, len(texts), self.batch_texts)]
                vectors = [tower.encode_text(tokens.to(device)).float().cpu().numpy() for tokens in groups]
            return unit_vectors(np.concatenate(vectors))

        return embed


def _architecture(name: str) -> dict[str, Any]:
    """Configuration of a built-in architecture, read without importing torch. Raises ValueError where there is none."""
    spec = find_spec("open_clip")
    folders = list(spec.submodule_search_locations or []) if spec else []
    known = {p.stem: p for folder in folders for p in (Path(folder) / "model_configs").glob("*.json")}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0)
        raise ValueError(
            f"open_clip knows no architecture {name!r}, and there is no such folder; near it are {', '.join(near)}"
        )
    config: dict[str, Any] = json.loads(known[name].read_text())
    return config


def _folder_config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / CONFIG).read_text()).get("model_cfg")
    if not isinstance(config, dict) or "embed_dim" not in config:
        raise ValueError(f"{folder / CONFIG} has no model_cfg with an embed_dim")
    return config


def _check_self_contained(config: dict[str, Any], name: str, tokenizer_here: bool) -> None:
    """Raises ValueError where open_clip would fetch parts from the hub on its own account."""
    text = config.get("text_cfg", {})
    if "hf_model_name" in text:
        raise ValueError(
            f"{name}: its text tower is another model of the hub ({text['hf_model_name']}), which is not supported"
        )
    if "hf_tokenizer_name" in text and not tokenizer_here:
        raise ValueError(
            f"{name}: its tokenizer is not part of open_clip; give a folder or hf://org/name, which bring it along"
        )


def _fetch_tag(architecture: str, tag: str, directory: Path) -> None:
    import open_clip

    known = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in known:
        raise ConfigError(
            f"embed.pretrained: {architecture} has no tag {tag!r}, only {', '.join(known) or 'none'}; or give a file"
        )
    try:
        file = Path(
            open_clip.download_pretrained(
                open_clip.get_pretrained_cfg(architecture, tag), cache_dir=str(directory / "cache")
            )
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise TamisError(
            f"cannot fetch {architecture} {tag}: {error}; fetch it yourself and give the file as `pretrained`"
        ) from error
    shutil.copyfile(file, directory / f"weights{file.suffix}")  # the cache may hold it as a link
    shutil.rmtree(directory / "cache")
