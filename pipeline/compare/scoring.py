"""What it cost to curate: FLOPs of the criteria over the pool that they chose from.

Rules, n-grams, fastText, hashes and what reads vectors of these count 2,000 FLOPs a token, the upper end of what such
filters take (evaluation.md, section 2), each. Criteria that ask language models count what their models do on every
token of the pool: a forward pass f for probabilities, 3 f for gradients; and what training these models took, where
Tamis trained them. A sentence encoder counts 2 FLOPs a parameter and token. Shapes are read from the models' own
configurations, those of the run and those that the recipes name; where layers differ, from their weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.compare.flops import FAST_FILTER, ModelShape, full
from pipeline.compress.folder import SHAPES, load
from pipeline.config import Config
from pipeline.corpus.storage import Store
from pipeline.errors import ConfigError
from pipeline.models.files import is_hub

PASSES = {"less": 3, "tracin": 3, "trak": 3, "dealrec": 3, "dealrec_sequences": 3}
"""Forward passes' worth of what a criterion does with each of its models a token: these take gradients."""
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gpt2")


@dataclass(frozen=True)
class Scored:
    """What scoring a pool cost: FLOPs by criterion, and the tokens of the pool."""

    flops: dict[str, float]
    pool_tokens: int

    @property
    def total(self) -> float:
        return sum(self.flops.values())


def scoring_cost(run: str, config: Config) -> Scored:
    """FLOPs that the criteria of a curated run took, at its whole pool. Raises ConfigError where it is not finished."""
    store = Store(run)
    try:
        manifest = json.loads(store.read("manifest.json"))
        selected = json.loads(store.read("artifacts", "selection", "selection.json"))
    except FileNotFoundError as error:
        raise ConfigError(f"{run} is not a finished run: run `tamis curate` on its configuration first") from error
    pool = int(selected["available"] * _in_tokens(selected))
    artifacts = {name: store.child("artifacts", name) for name in manifest.get("artifacts", {})}
    flops: dict[str, float] = {}
    for score in config.scores:
        own = [a for name, a in artifacts.items() if name.startswith(score.column_name)]
        forward = sum(shape.forward(length) for shape, length in _models(score, own))
        flops[score.column_name] = (PASSES.get(score.kind, 1) * forward or FAST_FILTER[1]) * pool
        flops[score.column_name] += sum(map(_training, own))
    if config.needs_vectors:
        encoder = getattr(config.embed, "model", None)
        local = Path(encoder) if isinstance(encoder, str) and not is_hub(encoder) else None
        flops["embed"] = (2 * _parameters(local) if local else FAST_FILTER[1]) * pool
    return Scored(flops, pool)


def _in_tokens(selected: dict[str, Any]) -> float:
    """Tokens a unit of the budget, as far as the kept rows tell."""
    unit = str(selected["unit"])
    return 1.0 if unit == "tokens" else float(selected["tokens"]) / max(1.0, float(selected[unit]))


def _models(score: Any, artifacts: list[Store]) -> Iterator[tuple[ModelShape, int]]:
    """Decoders that a criterion runs, and the tokens of a row that it gives them: those that it names as folders, and
    those that were trained or fetched for it."""
    from transformers import AutoConfig

    named = [v for v in score.model_dump().values() if isinstance(v, str) and not is_hub(v) and Path(v).is_dir()]
    for folder in [*map(Path, named), *(Path(a.path) for a in artifacts if a.local)]:
        if not (folder / "config.json").exists():
            continue
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.model_type in DECODERS:
            ragged = (folder / SHAPES).exists()  # the weights tell, the configuration does not
            shape = ModelShape.of(load(folder)[0]) if ragged else ModelShape.of_config(config)
            yield shape, int(getattr(score, "max_tokens", 512))


def _training(artifact: Store) -> float:
    """FLOPs of training a model that Tamis trained for a criterion, from what it noted then."""
    from transformers import AutoConfig

    try:
        facts = json.loads(artifact.read("training.json"))
    except FileNotFoundError:
        return 0.0
    config = AutoConfig.from_pretrained(artifact.path, local_files_only=True)
    length = int(config.max_position_embeddings)
    return full(ModelShape.of_config(config), length) * float(facts["epochs"]) * float(facts["tokens"])


def _parameters(folder: Path) -> int:
    """Entries of all tensors in a folder's safetensors."""
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118  # no dict
    return total
