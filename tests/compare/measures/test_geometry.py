"""Geometry by hand and by force, corruptions that are what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compare.measures.corruption import CHANGES, Kind, corrupt
from pipeline.compare.measures.geometry import POSITIONS, feature_geometry, geometry, robustness
from pipeline.compare.measures.retrieval import words
from pipeline.errors import TamisError

torch = pytest.importorskip("torch")


def test_the_toy_of_the_specification() -> None:
    found = geometry(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([1]))
    assert found[0].tolist() == pytest.approx([36.87, 5, 2.236], abs=1e-3)
    wrong = geometry(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0]))
    assert wrong[0, 2] == pytest.approx(-np.sqrt(5))


def test_the_margin_is_the_distance_to_the_nearest_boundary() -> None:
    generator = torch.Generator().manual_seed(0)
    f, w, b = (torch.randn(*s, generator=generator).double() for s in ((20, 3), (6, 3), (6,)))
    w[5] = w[2]  # a row that is there twice has no boundary with itself
    y = torch.arange(20) % 6
    margin = geometry(f, w, y, b)[:, 2]
    expected = [
        min(
            float((w[t] - w[c]) @ x + b[t] - b[c]) / float((w[t] - w[c]).norm())
            for c in range(6)
            if not torch.equal(w[t], w[c])
        )
        for x, t in zip(f, y.tolist(), strict=True)
    ]
    np.testing.assert_allclose(margin, expected, rtol=1e-6)
    logits = f @ w.T
    right = geometry(f, w, y)[:, 2] >= 0
    assert (right == (logits.gather(1, y[:, None])[:, 0] >= logits.max(1).values - 1e-12)).all()


@pytest.mark.parametrize("which", ["lm", "gpt2"])
def test_of_a_model(which: str, request: pytest.FixtureRequest, held_out: list[str], noise: list[str]) -> None:
    model, tokenizer = request.getfixturevalue(which)
    angle, length, margin = feature_geometry(model, tokenizer, held_out, "x")
    assert [m.name for m in (angle, length, margin)] == [f"geometry.x.{u}" for u in ("angle", "length", "margin")]
    ids = torch.tensor([[0, *tokenizer.backend_tokenizer.encode(held_out[7]).ids][: min(POSITIONS + 1, 48)]])
    with torch.no_grad():
        states = model(input_ids=ids[:, :-1], output_hidden_states=True).hidden_states[-1][0]
    assert length.values[7] == pytest.approx(float(states.norm(dim=1).mean()), rel=1e-4)
    if which == "lm":
        unknown = feature_geometry(model, tokenizer, noise, "y")
        assert margin.mean > unknown[2].mean
    with pytest.raises(TamisError, match="is empty"):
        feature_geometry(model, tokenizer, [], "x")


def test_errors_in_texts_make_predictions_worse(lm: tuple[Any, Any], held_out: list[str]) -> None:
    found = {m.name: m for m in robustness(*lm, held_out[:20])}
    assert len(found) == 3 * 7
    margins = [found[f"geometry.{name}.margin"].mean for name in ("clean", "typos-1%", "typos-3%", "typos-5%")]
    assert margins == sorted(margins, reverse=True)
    assert {m.axis for m in found.values()} == {"geometry"}


@pytest.mark.parametrize("kind", list(CHANGES))
@pytest.mark.parametrize("rate", [0.01, 0.03, 0.05])
def test_the_rate_of_errors(kind: Kind, rate: float) -> None:
    from difflib import SequenceMatcher

    text = " ".join(words(np.random.default_rng(0), 500))
    changed = corrupt(text, kind, rate, seed=1)
    codes = SequenceMatcher(None, text, changed, autojunk=False).get_opcodes()
    wrong = sum(max(b - a, d - c, 1) for tag, a, b, c, d in codes if tag != "equal")
    expected = rate * sum(CHANGES[kind][0](c) for c in text)
    lost = expected / 3 if kind == "typos" else 0  # two letters that are swapped are two edits, or none
    assert wrong == pytest.approx(expected, abs=4 * np.sqrt(expected) + lost)


def test_kinds_of_errors_by_sight() -> None:
    assert corrupt("Hello", "case", 1.0) == "hELLO"
    assert corrupt("ill memo", "ocr", 1.0) == "j11 rncrn0"
    assert set(corrupt("a  b", "space", 1.0)) == {"a", "b", " "}
    assert corrupt("4 + 5!", "typos", 1.0) == "4 + 5!"


@settings(max_examples=60)
@given(st.text(min_size=1, max_size=60), st.sampled_from(sorted(CHANGES)), st.floats(0, 1), st.integers(0, 99))
def test_errors_are_determined_and_never_leave_nothing(text: str, kind: Kind, rate: float, seed: int) -> None:
    changed = corrupt(text, kind, rate, seed)
    assert changed == corrupt(text, kind, rate, seed) != ""
    assert corrupt(text, kind, 0.0, seed) == text
    if kind == "space":
        assert "".join(changed.split()) == "".join(text.split()) or not text.split()
    with pytest.raises(ValueError, match="between 0 and 1"):
        corrupt(text, kind, 1.5)
