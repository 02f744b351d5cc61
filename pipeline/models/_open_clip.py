"""OpenCLIP models from a folder, a checkpoint, a pretrained tag or the hub; nothing is fetched that was not asked for.

Weights are safetensors, or a checkpoint that torch reads with `weights_only`.
"""

from __future__ import annotations

import difflib
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.errors import ConfigError, TamisError
from pipeline.models.images import Preprocess

CONFIG = "open_clip_config.json"
TAG = "preprocess.json"
"""Beside the weights of a tag: how its images are prepared, which the architecture does not say."""
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
BATCH_TEXTS = 256


class OpenClip:
    """A loaded model; an `ImageText` (pipeline/models/image_text.py). `towers` that are not named are let go.

    `name`: an architecture, whose weights are the file at `place` or lie in the folder there; None: the folder there.
    """

    def __init__(
        self, name: str | None, place: Path, precision: str, towers: tuple[Literal["image", "text"], ...]
    ) -> None:
        import open_clip
        import torch

        checkpoint = None
        if name is not None:
            checkpoint = str(place if place.is_file() else next(p for w in WEIGHTS for p in place.glob(w)))
        name = name or f"local-dir:{place}"
        model = open_clip.create_model(name, pretrained=checkpoint, require_pretrained=True, weights_only=True)
        tag = place / TAG
        preprocess = model.visual.preprocess_cfg | (json.loads(tag.read_text()) if tag.is_file() else {})
        self.logit_scale = float(model.logit_scale.detach().exp())
        if "image" in towers:
            self.preprocess = Preprocess.of_open_clip(preprocess)
        else:
            del model.visual  # the memory of the larger tower goes back
        self.device = torch.device("cuda" if precision == "bfloat16" else "cpu")
        self.dtype = getattr(torch, precision)
        self.model = model.to(self.device, self.dtype).eval()
        self.tokenizer = open_clip.get_tokenizer(name)

    def images(self, pixels: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            found = self.model.encode_image(self.preprocess.normalise(pixels, self.device, self.dtype))
            out: np.ndarray = found.float().cpu().numpy()
        return out

    def texts(self, texts: list[str]) -> np.ndarray:
        import torch

        groups = [self.tokenizer(texts[i : i + BATCH_TEXTS]) for i in range(0, len(texts), BATCH_TEXTS)]
        with torch.inference_mode():
            found = [self.model.encode_text(tokens.to(self.device)).float().cpu().numpy() for tokens in groups]
        return np.concatenate(found)


def architecture(name: str) -> dict[str, Any]:
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


def folder_config(folder: Path) -> dict[str, Any]:
    """`model_cfg` of a folder. Raises ValueError where it has none."""
    config = json.loads((folder / CONFIG).read_text()).get("model_cfg")
    if not isinstance(config, dict) or "embed_dim" not in config:
        raise ValueError(f"{folder / CONFIG} has no model_cfg with an embed_dim")
    return config


def check_self_contained(config: dict[str, Any], name: str, tokenizer_here: bool) -> None:
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


def fetch_tag(architecture: str, tag: str, directory: Path) -> None:
    """The weights of a pretrained tag, and how its images are prepared. Raises ConfigError and TamisError."""
    import open_clip

    known = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in known:
        raise ConfigError(
            f"pretrained: {architecture} has no tag {tag!r}, only {', '.join(known) or 'none'}; or give a file"
        )
    config = open_clip.get_pretrained_cfg(architecture, tag)
    if config.get("quick_gelu", False) != open_clip.get_model_config(architecture).get("quick_gelu", False):
        quick = (
            architecture.removesuffix("-quickgelu")
            if architecture.endswith("-quickgelu")
            else f"{architecture}-quickgelu"
        )
        raise ConfigError(f"pretrained: {tag!r} was trained with another activation: set `model` to {quick}")
    try:
        file = Path(open_clip.download_pretrained(config, cache_dir=str(directory / "cache")))
    except (OSError, RuntimeError, ValueError) as error:
        raise TamisError(
            f"cannot fetch {architecture} {tag}: {error}; fetch it yourself and give the file as `pretrained`"
        ) from error
    shutil.copyfile(file, directory / f"weights{file.suffix}")  # the cache may hold it as a link
    shutil.rmtree(directory / "cache")
    asked = {k: config[k] for k in ("mean", "std", "interpolation", "resize_mode") if config.get(k) is not None}
    (directory / TAG).write_text(json.dumps(asked))
