"""Log-probabilities and greedy answers: whatever runs beside them, padded, cut, with special tokens in the text."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest

from pipeline.compare.measures.base import (
    Measured,
    batches,
    context_length,
    continued,
    encode,
    generate,
    instruct,
    token_values,
)
from pipeline.errors import ConfigError, TamisError
from pipeline.models.training import END

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("which", ["lm", "gpt2"])
def test_rows_are_scored_as_if_alone(which: str, request: pytest.FixtureRequest) -> None:
    model, _ = request.getfixturevalue(which)
    rng = np.random.default_rng(0)
    limit = context_length(model)
    rows = [rng.integers(1, 300, n).tolist() for n in (2, 3, limit, limit - 1, 9, 2, 17)]
    found = token_values(model, rows)
    for row, (logp, best) in zip(rows, found, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
        alone = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0]
        np.testing.assert_allclose(logp, alone.numpy(), atol=1e-5)
        assert (best == (logits[:-1].argmax(-1) == torch.tensor(row[1:])).numpy()).all()
    with pytest.raises(ValueError, match="nothing to predict"):
        list(batches(model, [[1]]))


def test_continuations_split_where_the_context_ends(lm: tuple[Any, Any]) -> None:
    model, tokenizer = lm
    found = continued(model, tokenizer, [("alder birch ", "cedar"), ("alder birch", " cedar"), ("", "alder")])
    assert found.logp[0] == pytest.approx(found.logp[1], abs=1e-5)
    assert found.size.tolist() == [5, 6, 5]
    ids = encode(tokenizer, ["alder birch cedar", "alder birch", "alder"])
    logp = token_values(model, [ids[0], [0, *ids[2]]])
    assert found.logp[1] == pytest.approx(logp[0][0][len(ids[1]) - 1 :].sum(), abs=1e-5)
    assert found.logp[2] == pytest.approx(logp[1][0].sum(), abs=1e-5)
    assert found.bits_per_byte[2] == pytest.approx(-found.logp[2] / 5 / np.log(2))
    likely = continued(model, tokenizer, [("alder birch", " cedar"), ("alder birch", " oak")])
    assert likely.logp[0] > likely.logp[1]
    with pytest.raises(ValueError, match="empty continuation"):
        continued(model, tokenizer, [("a", "")])
    with pytest.raises(TamisError, match="nothing to score"):
        continued(model, tokenizer, [])


def test_what_does_not_fit_is_cut_from_the_left(lm: tuple[Any, Any]) -> None:
    model, tokenizer = lm
    long = "oak " * 200
    found = continued(model, tokenizer, [(long + "alder birch", " cedar"), ("a", " " + long)])
    assert np.isfinite(found.logp).all()
    assert len(generate(model, tokenizer, [long], 4)[0]) > 0
    with pytest.raises(ConfigError, match="no room"):
        generate(model, tokenizer, ["x"], 64)


def test_special_tokens_in_a_text_are_text(lm: tuple[Any, Any]) -> None:
    _, tokenizer = lm
    assert 0 not in encode(tokenizer, [f"oak{END}"])[0]
    assert encode(tokenizer, [f"oak{END}"], special=True)[0][-1] == 0
    assert 0 not in encode(tokenizer, [f"oak{END}"])[0]  # what was set is set back


@pytest.mark.parametrize("which", ["lm", "gpt2"])
def test_greedy_answers_are_those_of_transformers(which: str, request: pytest.FixtureRequest) -> None:
    model, tokenizer = request.getfixturevalue(which)
    prompts = ["alder birch", "oak", "maple pine", "", "fir hazel larch maple"]
    written = generate(model, tokenizer, prompts, 12)
    for prompt, text in zip(prompts, written, strict=True):
        ids = torch.tensor([encode(tokenizer, [prompt])[0] or [0]])
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        new = theirs[0, ids.shape[1] :].tolist()
        assert text == tokenizer.decode(new[: new.index(0)] if 0 in new else new)
    assert generate(model, tokenizer, prompts, 12) == written
    stop = written[0][3]
    assert generate(model, tokenizer, ["alder birch"], 12, stop=stop) == [written[0].split(stop)[0]]


def test_cut_models_answer_as_they_would_without_a_cache(lm: tuple[Any, Any]) -> None:
    """Ragged widths, and a first layer without attention, whose cache stays empty."""
    from pipeline.compress.architecture import anatomy
    from pipeline.compress.surgery import cut, remove_branches

    model, tokenizer = deepcopy(lm[0]), lm[1]
    groups = anatomy(model).units("kv_group", "neuron")
    cut(model, groups, {"1.kv_group": np.array([0]), "0.neuron": np.arange(9)})
    remove_branches(model, [(0, "attention")])
    prompts = ["alder birch", "oak", "fir hazel larch maple"]
    for prompt, text in zip(prompts, generate(model, tokenizer, prompts, 10), strict=True):
        ids = encode(tokenizer, [prompt])[0]
        start = len(ids)
        while len(ids) < start + 10 and (len(ids) == start or ids[-1] != 0):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert text == tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_the_mode_of_a_model_stays_as_it_was(lm: tuple[Any, Any]) -> None:
    model, _ = lm
    model.train()
    token_values(model, [[1, 2]])
    assert model.training
    model.eval()


def test_measured_trusts_no_empty_and_no_infinite_values() -> None:
    good = Measured("x", "language", np.array([1, 0, 1]), True)
    assert (good.mean, good.graded, good.quantile(0.5)) == (pytest.approx(2 / 3), True, 1)
    assert not Measured("x", "language", np.array([0.5]), True).graded
    with pytest.raises(TamisError, match="nothing to measure on"):
        Measured("x", "language", np.array([]), True)
    with pytest.raises(TamisError, match="first of item 1"):
        Measured("x", "language", np.array([0, np.nan]), True)


def test_a_chat_template_is_used_where_there_is_one(lm: tuple[Any, Any]) -> None:
    _, tokenizer = lm
    assert instruct(tokenizer, "Say oak.") == ("Instruction: Say oak.\nAnswer:", False)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    try:
        assert instruct(tokenizer, "Say oak.") == ("<user>Say oak.<assistant>", True)
    finally:
        tokenizer.chat_template = None
