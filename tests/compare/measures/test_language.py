"""Bits per byte and divergence: by hand, over windows, over vocabularies."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest

from pipeline.compare.measures.base import encode
from pipeline.compare.measures.language import bits_per_byte, divergence, kl
from pipeline.errors import ConfigError, TamisError

torch = pytest.importorskip("torch")


def test_a_trained_model_spends_fewer_bits_on_its_language(
    lm: tuple[Any, Any], held_out: list[str], noise: list[str]
) -> None:
    known, unknown = (bits_per_byte(*lm, texts, "x")[0] for texts in (held_out, noise))
    assert known.name == "bits_per_byte.x"
    assert (known.axis, known.higher_is_better, known.values.shape) == ("language", False, (40,))
    assert known.mean < 0.8 * unknown.mean


def test_a_uniform_model_spends_the_bits_of_its_vocabulary(lm: tuple[Any, Any], held_out: list[str]) -> None:
    model, tokenizer = deepcopy(lm[0]), lm[1]
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    texts = [*held_out, " ".join(held_out[:5]), "ä €"]
    found = bits_per_byte(model, tokenizer, texts, "x")[0].values
    tokens = np.array([len(ids) for ids in encode(tokenizer, texts)])
    size = np.array([len(t.encode()) for t in texts])
    assert tokens.max() > 2 * model.config.max_position_embeddings  # in windows
    assert size[-1] == 6
    np.testing.assert_allclose(found, tokens * np.log2(model.config.vocab_size) / size, rtol=1e-5)


def test_order_and_neighbours_change_nothing(lm: tuple[Any, Any], held_out: list[str]) -> None:
    one = bits_per_byte(*lm, held_out, "x")[0].values
    other = bits_per_byte(*lm, held_out[::-1], "x")[0].values[::-1]
    np.testing.assert_allclose(one, other, rtol=1e-5)
    assert (bits_per_byte(*lm, held_out, "x")[0].values == one).all()


def test_divergence_by_hand() -> None:
    p = torch.tensor([[2.0, 1.0, 0.0]]).double()  # softmax (.665, .245, .090)
    assert float(kl(p, torch.zeros_like(p))) == pytest.approx(0.266217, abs=1e-6)
    assert float(kl(p, p)) == 0


def test_divergence_from_the_dense_model(lm: tuple[Any, Any], held_out: list[str]) -> None:
    model, tokenizer = lm
    assert divergence(model, model, tokenizer, held_out).values == pytest.approx(np.zeros(40), abs=1e-7)
    pruned = deepcopy(model)
    with torch.no_grad():
        pruned.model.layers[0].mlp.down_proj.weight.zero_()
    found = divergence(model, pruned, tokenizer, held_out)
    assert (found.values > 0).all()
    alone = divergence(model, pruned, tokenizer, held_out[3:4])
    assert found.values[3] == pytest.approx(alone.values[0], rel=1e-4)


def test_what_cannot_be_measured(lm: tuple[Any, Any], gpt2: tuple[Any, Any]) -> None:
    model, tokenizer = lm
    with pytest.raises(ConfigError, match="vocabularies of 320 and 300"):
        divergence(model, gpt2[0], tokenizer, ["oak"])
    with pytest.raises(TamisError, match="is empty"):
        bits_per_byte(model, tokenizer, ["oak", ""], "x")
    with pytest.raises(TamisError, match="there is none"):
        bits_per_byte(model, tokenizer, [], "x")


def test_a_tokenizer_that_cannot_spell_a_text_is_refused(lm: tuple[Any, Any]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "oak": 1, "elm": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="oak")
    assert bits_per_byte(lm[0], tokenizer, ["oak elm"], "x")[0].values[0] > 0
    with pytest.raises(ConfigError, match="cannot spell text 1"):
        bits_per_byte(lm[0], tokenizer, ["oak elm", "oak ash"], "x")
    bare = PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(ConfigError, match="neither a beginning nor an end"):
        bits_per_byte(lm[0], bare, ["oak elm"], "x")
