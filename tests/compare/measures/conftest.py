"""Models to measure: one that knows a small language, its tokenizer, and texts that it was not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.models.causal import load_causal
from pipeline.models.training import Shape, save_lm, train_tokenizer
from tests.tiny_lm import TREES, sentences, trained

torch = pytest.importorskip("torch")

SHAPE = Shape(hidden=32, layers=2, heads=4, kv_heads=2, mlp=64, vocab=320, context=64)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows the language of `tests.tiny_lm.sentences`."""
    return trained(tmp_path_factory.mktemp("trained"), sentences(400), SHAPE, 80)


@pytest.fixture(scope="session")
def lm(folder: Path) -> tuple[Any, Any]:
    """The trained model and its tokenizer."""
    return load_causal(folder)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """An untrained GPT-2 with random biases and a context of 48 tokens, and a tokenizer of all bytes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=300, n_positions=48, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    target = tmp_path_factory.mktemp("gpt2")
    model.config.max_position_embeddings = 48
    save_lm(model, train_tokenizer(sentences(50), 300), target)
    return load_causal(target)


@pytest.fixture(scope="session")
def held_out() -> list[str]:
    return sentences(40, seed=9)


@pytest.fixture(scope="session")
def noise() -> list[str]:
    """The same words in no order."""
    import numpy as np

    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(TREES, int(n))) for n in rng.integers(2, 60, 40)]
