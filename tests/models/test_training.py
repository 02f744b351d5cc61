"""Tokenizer, packing, loop and files of the small models."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from tiny_lm import TINY, sentences

from pipeline.models.causal import load_causal
from pipeline.models.training import END, Shape, lm_loss, new_lm, pack, rate, save_lm, train_lm, train_tokenizer


@given(st.lists(st.lists(st.integers(1, 99), max_size=9), min_size=1, max_size=6), st.integers(2, 8))
def test_packing_loses_no_token(rows: list[list[int]], length: int) -> None:
    blocks = pack(rows, length, 0)
    stream = [token for row in rows for token in (*row, 0)]
    assert blocks.dtype == np.int32
    assert blocks.shape == (math.ceil(len(stream) / length), length)
    assert blocks.ravel()[: len(stream)].tolist() == stream
    assert blocks.ravel()[len(stream) :].tolist() == (stream * length)[: blocks.size - len(stream)]


def test_packing_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no document"):
        pack([], 8, 0)


def test_the_tokenizer_is_determined_by_the_texts_and_reads_any_text_back() -> None:
    texts = sentences(200)
    first, second = (train_tokenizer(texts, 300) for _ in range(2))
    assert first.to_str() == second.to_str()
    assert first.get_vocab_size() == 300
    strange = f"alder naïve \x00 {END} 木 \U0001f332"
    ids = first.encode(strange).ids
    assert 0 not in ids  # what looks like the end of a text is none
    assert first.decode(ids, skip_special_tokens=False) == strange


def test_training_lowers_the_loss_and_is_reproducible() -> None:
    texts = sentences(200)
    tokenizer = train_tokenizer(texts, TINY.vocab)
    blocks = pack([e.ids for e in tokenizer.encode_batch(texts)], 32, 0)
    model, again = new_lm(TINY, 3), new_lm(TINY, 3)
    untrained = lm_loss(model, blocks)
    assert untrained == pytest.approx(math.log(TINY.vocab), abs=0.1)
    losses = train_lm(model, blocks, 40, 4, 3e-3, 5)
    assert losses.shape == (40,)
    assert losses.dtype == np.float32
    assert lm_loss(model, blocks) < 0.6 * untrained
    assert not model.training
    np.testing.assert_array_equal(losses, train_lm(again, blocks, 40, 4, 3e-3, 5))
    assert lm_loss(model, blocks, batch=3) == pytest.approx(lm_loss(model, blocks, batch=16), abs=1e-5)


def test_training_stops_when_it_is_told_to() -> None:
    asked: list[int] = []

    def stop(step: int) -> bool:
        asked.append(step)
        return step == 3

    blocks = np.ones((2, 8), np.int32)
    assert len(train_lm(new_lm(TINY, 0), blocks, 10, 2, 1e-3, 0, stop=stop)) == 3
    assert asked == [1, 2, 3]


def test_the_rate_rises_over_the_warm_up_and_falls_to_a_tenth() -> None:
    rates = [rate(step, 100, 10) for step in range(100)]
    assert rates[:11] == pytest.approx([*np.arange(1, 11) / 10, 1])
    assert rates[-1] == pytest.approx(0.1)
    assert (np.diff(rates[10:]) <= 0).all()


def test_the_seed_draws_the_weights_and_leaves_the_global_generator_alone() -> None:
    import torch

    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, second, other = new_lm(TINY, 0), new_lm(TINY, 0), new_lm(TINY, 1)
    assert torch.rand(1) == expected
    weights = [m.model.embed_tokens.weight for m in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_what_is_saved_loads_as_it_was(tmp_path: Path) -> None:
    import torch

    tokenizer, model = train_tokenizer(sentences(50), TINY.vocab), new_lm(TINY, 0).eval()
    save_lm(model, tokenizer, tmp_path)
    assert not [p.name for p in tmp_path.iterdir() if p.suffix not in (".json", ".safetensors")]
    loaded, fast = load_causal(tmp_path)
    assert fast.eos_token_id == 0
    assert fast.model_max_length == TINY.context
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"hidden": 100, "heads": 3}, "multiple of twice the heads"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"layers": 0}, "positive"),
        ({"vocab": 100}, "at least 257"),
        ({"depth": 3}, "depth"),
    ],
)
def test_a_shape_that_no_model_has(fields: dict[str, int], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        TypeAdapter(Shape).validate_python(fields)
