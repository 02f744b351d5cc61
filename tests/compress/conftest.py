"""Small models of every architecture that surgery knows, untrained and trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.tiny_lm import sentences
from tests.tiny_run import make_run

torch = pytest.importorskip("torch")


@dataclass(frozen=True)
class Tiny:
    """A model with random weights and biases, and a batch that it takes."""

    model: Any
    batch: dict[str, Any]

    def output(self, model: Any = None) -> Any:
        """Logits, or the last hidden state where the model makes no logits; of another model on this batch."""
        model = self.model if model is None else model
        with torch.no_grad():
            given = model.eval()(**self.batch)
        return given.logits if "logits" in given else given.last_hidden_state


def _llama_like(config: Any, model: Any, **more: Any) -> Callable[[], Any]:
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "vocab_size": 96, "max_position_embeddings": 64,
    }  # fmt: skip
    return lambda: model(config(**sizes | more))


def _makers() -> dict[str, Callable[[], Any]]:
    import transformers as t

    return {
        "llama": _llama_like(t.LlamaConfig, t.LlamaForCausalLM, tie_word_embeddings=True),
        "qwen2": _llama_like(t.Qwen2Config, t.Qwen2ForCausalLM),
        "qwen3": _llama_like(t.Qwen3Config, t.Qwen3ForCausalLM, head_dim=8),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(
                vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
            )),
        "bert": lambda: t.BertForMaskedLM(
            t.BertConfig(
                vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                max_position_embeddings=64,
            )
        ),
        "vit": lambda: t.ViTForImageClassification(
            t.ViTConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16,
                patch_size=8, num_labels=5,
            )
        ),
    }  # fmt: skip


def make_tiny(name: str, **config: Any) -> Tiny:
    """A fresh model, the same every time. Biases and norms are random too, so that forgetting one shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _makers()[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                else:
                    parameter.copy_(0.15 * torch.randn_like(parameter))
        if name == "vit":
            return Tiny(model.eval(), {"pixel_values": torch.randn(3, 3, 16, 16)})
        return Tiny(model.eval(), {"input_ids": torch.randint(1, 96, (3, 12))})


@pytest.fixture
def tiny_models() -> dict[str, Tiny]:
    """Of each architecture a fresh model: `.model`, `.batch`, `.output(model)`."""
    return {name: make_tiny(name) for name in _makers()}


@pytest.fixture(scope="session")
def _trained() -> tuple[Any, Any, np.ndarray]:
    from pipeline.models.training import Shape, new_lm, pack, train_lm, train_tokenizer

    texts = sentences(400)
    tokenizer = train_tokenizer(texts, 300)
    model = new_lm(Shape(hidden=32, layers=3, heads=4, kv_heads=2, mlp=64, vocab=300, context=64), 0)
    train_lm(model, pack([e.ids for e in tokenizer.encode_batch(texts)], 64, 0), 100, 8, 5e-3, 0)
    held_out = pack([e.ids for e in tokenizer.encode_batch(sentences(60, seed=1))], 64, 0)
    return model, tokenizer, held_out


@pytest.fixture
def tiny_trained(_trained: tuple[Any, Any, np.ndarray]) -> tuple[Any, Any, np.ndarray]:
    """A Llama of three layers that knows the language of `tests.tiny_lm.sentences` (a copy: change it as you like), its
    tokenizer, and blocks (n, 64) of text that it was not trained on."""
    from copy import deepcopy

    model, tokenizer, blocks = _trained
    return deepcopy(model), tokenizer, blocks


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a curated run: the longer 200 of 400 texts of `tests.tiny_lm.sentences`, of two sources."""
    return make_run(tmp_path_factory.mktemp("tiny_run"))
