"""The model to begin with: a folder, one of the hub, or a small one trained here."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from pipeline.compress.config import Small
from pipeline.compress.data import pack_blocks, parquet, set_apart
from pipeline.corpus.content import Content
from pipeline.errors import TamisError
from pipeline.models.files import existing, fetch, is_hub
from pipeline.models.training import END, new_lm, save_lm, train_lm, train_tokenizer
from pipeline.recipe import fingerprint


def parent_folder(model: str | Small, directory: Path, held_out: float, seed: int) -> Path:
    """Folder of the parent: the one that is named, or below `directory` what was fetched or trained there.

    What is measured on later (`set_apart` with the same share and seed) is not trained on. Raises ConfigError and
    TamisError.
    """
    if isinstance(model, Small):
        return _trained(model, directory, held_out, seed)
    if not is_hub(model):
        return existing(model, "config.json", "*.safetensors").absolute()
    folder = directory / fingerprint("hub", model)[:12]
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        fetch(model, folder)
    return folder


def _trained(small: Small, directory: Path, held_out: float, seed: int) -> Path:
    paths = [small.train_on] if isinstance(small.train_on, str) else small.train_on
    source = parquet(paths, Content(text=small.text))
    folder = directory / fingerprint("small", 1, small.model_dump(mode="json"), source.fingerprint, held_out, seed)[:12]
    if (folder / "config.json").exists():
        return folder
    _, texts = set_apart(source.documents(), held_out, seed)
    shape = small.shape
    tokenizer = train_tokenizer(iter(texts.to_pylist()), shape.vocab)
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    blocks = pack_blocks(texts, fast, shape.context, small.steps * small.batch * shape.context, small.seed)
    model = new_lm(shape, small.seed)
    losses = train_lm(model, blocks, small.steps, small.batch, small.lr, small.seed)
    if not np.isfinite(losses).all():
        raise TamisError("the loss of the small model is not finite: lower model.lr")
    incoming = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(incoming, ignore_errors=True)
    save_lm(model, tokenizer, incoming)
    incoming.rename(folder)
    return folder
