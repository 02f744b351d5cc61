"""Facts, retrieval, formats and arithmetic: how items are made, and that a model that can is told from others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compare.measures import arithmetic as sums
from pipeline.compare.measures import base, formats, retrieval
from pipeline.compare.measures.cloze import LEAD, PASSAGE, cloze, facts
from pipeline.errors import ConfigError
from tests.tiny_lm import TREES

torch = pytest.importorskip("torch")

LIGHTHOUSE = (
    "The keeper lived alone. In the spring of 1887 a storm broke the lamp, and the keeper wrote to Anna Berg, "
    "who sent a new one from Bergen. Anna Berg came herself in the autumn."
)


def test_facts_are_names_and_numbers_that_stand_once_inside_a_sentence() -> None:
    found = {facts([LIGHTHOUSE], 1, seed)[0] for seed in range(20)}
    assert {f.answer for f in found} == {"1887", "Bergen"}  # Anna Berg stands twice, The and In begin sentences
    by_answer = {f.answer: f for f in found}
    assert by_answer["1887"].prompt == "In the spring of"
    assert by_answer["Bergen"].prompt.endswith("who sent a new one from")
    assert all(f.passage == LIGHTHOUSE for f in found)


def test_facts_do_not_depend_on_order_or_copies() -> None:
    texts = [f"{LIGHTHOUSE} It took {n} days to mend all of the {n + 50} broken panes." for n in range(100, 130)]
    chosen = facts(texts, 10, seed=1)
    assert len({f.prompt for f in chosen}) == len(chosen) == 10
    assert facts(texts[::-1] + texts, 10, seed=1) == chosen != facts(texts, 10, seed=2)


def test_long_texts_end_at_a_sentence() -> None:
    with pytest.raises(ConfigError, match="no text has a name or a number"):
        facts([f"{LIGHTHOUSE} " * 9 + "It happened in the winter of 1901 again."], 1)  # beyond the passage
    body = "word " * 30 + "end. "
    fact = facts([f"We met the old doctor Brandt there. {body * 9}"], 1)[0]
    assert (fact.answer, fact.passage[-4:]) == ("Brandt", "end.")
    assert len(fact.passage) <= PASSAGE


@settings(max_examples=60)
@given(st.lists(st.text(max_size=200), max_size=6), st.integers(0, 9))
def test_facts_of_any_text(texts: list[str], seed: int) -> None:
    sure = "We met the old doctor Brandt there."
    for fact in facts([*texts, sure], 3, seed):
        assert fact.passage.count(fact.answer) == 1
        assert fact.answer.strip() == fact.answer != ""
        assert len(fact.prompt.split()) >= LEAD
        assert f"{fact.prompt} {fact.answer}" in fact.passage


def test_a_model_that_knows_is_told_from_one_that_only_reads(lm: tuple[Any, Any]) -> None:
    """A model that learnt six facts by heart gives the answers without their passage; before it did not."""
    from copy import deepcopy

    from pipeline.models.training import pack, train_lm

    names = ["Adler", "Bruun", "Calvo", "Dietz", "Evans", "Frick"]
    texts = [f"deep down under the {tree} {name} slept." for tree, name in zip(TREES, names, strict=False)]
    items = facts(texts, 10)
    assert sorted(f.answer for f in items) == names
    before = {m.name: m for m in cloze(*lm, items)}
    model = deepcopy(lm[0])
    train_lm(model, pack(base.encode(lm[1], texts), 32, 0), 120, 8, 1e-2, 0)
    after = {m.name: m for m in cloze(model, lm[1], items)}
    assert after["cloze.closed"].mean < 0.2 * before["cloze.closed"].mean
    assert before["cloze.closed.exact"].mean == 0
    assert after["cloze.closed.exact"].mean >= 0.5
    gap = after["cloze.gap"].values
    np.testing.assert_allclose(gap, after["cloze.closed"].values - after["cloze.open"].values)
    assert [m.axis for m in after.values()] == ["knowledge", "retrieval", "knowledge", "knowledge", "retrieval"]


def test_made_up_items_can_be_answered_from_the_prompt_alone() -> None:
    for prompt, answer in retrieval.key_value_items(20, 8, seed=3):
        *lines, _, asked = prompt.split("\n")
        known = dict(line.split(": ") for line in lines)
        assert len(known) == len(set(known.values())) == 8
        assert known[asked.rstrip(":")] == answer.strip()
    for context, rest in retrieval.copy_items(5, 16, seed=3):
        words = (context + rest).split()
        assert words[:16] == words[16:]
        assert len(set(words)) == 16
    assert retrieval.key_value_items(3, seed=1) == retrieval.key_value_items(3, seed=1) != retrieval.key_value_items(3)


class Copier(torch.nn.Module):
    """Predicts what came after the last time that the current token was there: induction, by hand."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        from transformers import LlamaConfig

        self.config = LlamaConfig(vocab_size=vocab, max_position_embeddings=4096, eos_token_id=None)
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Any, **given: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutput

        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            after: dict[tuple[int, ...], int] = {}
            for i in range(len(ids)):
                for n in range(1, 7):
                    if i >= n:
                        after[tuple(ids[i - n : i])] = ids[i]
                for n in range(1, 7):
                    if (follower := after.get(tuple(ids[i + 1 - n : i + 1]))) is not None:
                        logits[row, i, follower] = 10.0 * n
        return CausalLMOutput(logits=logits)


def test_a_model_that_copies_retrieves_and_one_that_was_never_trained_to_does_not(lm: tuple[Any, Any]) -> None:
    model, tokenizer = lm
    able = {m.name: m for m in retrieval.retrieval(Copier(320), tokenizer, 12)}
    unable = {m.name: m for m in retrieval.retrieval(model, tokenizer, 12)}
    assert able["copy"].mean > 0.95
    assert unable["copy"].mean < 0.3
    assert able["key_value"].mean > 0.5 > unable["key_value"].mean == 0
    assert able["key_value.bits"].mean < unable["key_value.bits"].mean
    assert {m.axis for m in able.values()} == {"retrieval"}


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("upper", "BEES MAKE HONEY, 2 KINDS.", "Bees"),
        ("lower", "bees make honey.", "Bees"),
        ("comma", "bees make honey\nand wax", "bees, wax"),
        ("bullets", "* a\n* b\n* c", "* a\n* b"),
        ("json", '{"answer": "honey"}', '{"answer": "honey"} is it'),
        ("quotes", ' "honey" ', 'they say "honey"'),
        ("end", "Honey.\nThat is all.", "That is all. Honey."),
        ("number", "1,234.", "8 legs"),
    ],
)
def test_forms(name: str, good: str, bad: str) -> None:
    (constraint,) = [c for c in formats.CONSTRAINTS if c.name == name]
    assert constraint.holds(good)
    assert not constraint.holds(bad)
    assert not constraint.holds("")


def test_every_form_is_asked_for_of_every_subject() -> None:
    items = formats.requests(1000)
    assert len({instruction for instruction, _ in items}) == len(items) == 64
    assert [c.name for _, c in items[:8]] == [c.name for c in formats.CONSTRAINTS]


def test_formats_and_arithmetic_are_graded_on_what_is_written(
    lm: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (held,) = formats.formats(*lm, 16)
    assert (held.name, held.axis, held.graded, len(held.values)) == ("formats", "instruction", True, 16)
    asked = {f"{sums.SHOTS}{expression} =": value for expression, value in sums.problems(30, seed=2)}
    written = {prompt: f" {value}" for prompt, value in asked.items()}

    def answer(model: Any, tokenizer: Any, prompts: list[str], *given: Any, **more: Any) -> list[str]:
        return [f"{written[p]} and" if i % 2 else " none" for i, p in enumerate(prompts)]

    (none,) = sums.arithmetic(*lm, 30, seed=2)
    assert (none.axis, none.mean) == ("reasoning", 0)
    monkeypatch.setattr(sums, "generate", answer)
    (half,) = sums.arithmetic(*lm, 30, seed=2)
    assert half.values.tolist() == [0, 1] * 15


def test_problems_come_out_right() -> None:
    items = sums.problems(300, seed=1)
    for expression, value in items:
        a, operation, b = expression.split()
        assert value == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operation] >= 0
    assert sums.problems(300, seed=1) == items != sums.problems(300)
