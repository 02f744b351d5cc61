"""A suite reads, measures and times; overlap with training texts is found."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.compare.measures.latency import file_size, latency
from pipeline.compare.measures.overlap import Overlap, overlaps
from pipeline.compare.measures.suite import Choices, Latency, Suite, measure_all
from pipeline.errors import ConfigError
from tests.tiny_lm import BIRDS, TREES, sentences

torch = pytest.importorskip("torch")


@pytest.fixture
def suite(tmp_path: Path, held_out: list[str]) -> Suite:
    """Every measure there is, on a few items."""
    (tmp_path / "trees.txt").write_text("\n".join(held_out))
    (tmp_path / "birds.txt").write_text("\n".join(sentences(20, words=BIRDS)))
    names = ("Anna", "Berta", "Clara", "Dora", "Emma")
    facts = [f"under the old {tree} tree {name} found a nest." for tree, name in zip(TREES, names, strict=False)]
    (tmp_path / "facts.txt").write_text("\n".join(facts))
    records = [{"id": str(i), "question": "alder birch", "choices": ["cedar", "oak"], "gold": 0} for i in range(9)]
    (tmp_path / "trees.jsonl").write_text("\n".join(map(json.dumps, records)))
    return Suite(
        domains={name: (str(tmp_path / f"{name}.txt"),) for name in ("trees", "birds")},
        facts=(str(tmp_path / "facts.txt"),),
        choices={"next": Choices(path=str(tmp_path / "trees.jsonl"), axis="reasoning", prompt="{question}")},
        geometry="birds",
        latency=Latency(prompt=16, repeats=3, threads=1),
        items=8,
    )


def test_everything_at_once_and_twice_the_same(lm: tuple[Any, Any], folder: Path, suite: Suite) -> None:
    found = measure_all(*lm, suite, folder)
    assert {m.axis for m in found.values()} == {
        "knowledge", "reasoning", "instruction", "retrieval", "language", "geometry", "cost"
    }  # fmt: skip
    assert {"bits_per_byte.trees", "cloze.gap", "next.acc", "key_value", "formats", "arithmetic"} < set(found)
    assert {"geometry.typos-3%.margin", "prefill@8", "decode@1", "peak_memory", "file_size"} < set(found)
    assert found["bits_per_byte.trees"].mean < found["bits_per_byte.birds"].mean
    assert {len(m.values) for n, m in found.items() if m.axis != "cost"} == {5, 8}
    again = measure_all(*lm, suite)
    assert set(found) - set(again) == {"file_size"}
    for name, measured in again.items():
        if measured.axis != "cost":
            np.testing.assert_array_equal(measured.values, found[name].values)
    assert Suite.model_validate(suite.model_dump(mode="json")) == suite


def test_texts_do_not_depend_on_the_order_of_rows(tmp_path: Path, suite: Suite, held_out: list[str]) -> None:
    before = suite.texts("trees")
    assert len(before) == 8
    (tmp_path / "trees.txt").write_text("\n".join([*held_out[::-1], *held_out, "", "  "]))
    assert suite.texts("trees") == before
    assert suite.model_copy(update={"seed": 1}).texts("trees") != before
    assert max(map(len, suite.model_copy(update={"max_chars": 20}).texts("trees"))) <= 20
    more = suite.with_domains({"more": str(tmp_path / "birds.txt")})
    assert list(more.domains) == ["trees", "birds", "more"]
    assert more.texts("more") == suite.texts("birds")
    with pytest.raises(ConfigError, match="'birds' is there already"):
        suite.with_domains({"birds": "x"})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"made": []}, "without a measure"),
        ({"geometry": "trees"}, "'trees' is no domain; there are: none"),
        ({"choices": {"x": {"path": "x", "prompt": "Q:"}}}, "does not hold {question}"),
        ({"items": 0}, "greater than or equal to 1"),
        ({"domain": {}}, "Extra inputs"),
    ],
)
def test_errors_at_the_door(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Suite.model_validate(given)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    suite = Suite(domains={"x": (str(tmp_path / "none.txt"),)})
    with pytest.raises(ConfigError, match=r"domains.x: no such file"):
        suite.texts("x")
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(ConfigError, match=r"domains.x: the seed set is empty"):
        Suite(domains={"x": (str(tmp_path / "blank.txt"),)}).texts("x")


def test_speed_is_measured_of_what_runs(lm: tuple[Any, Any]) -> None:
    """A model that sleeps 10 ms a pass takes that much longer; threads are given back."""
    model, _ = lm
    before = torch.get_num_threads()
    threads = []
    plain = {m.name: m for m in latency(model, (1, 2), prompt=8, repeats=5, threads=1, warm_up=1)}

    def sleep(*given: Any) -> None:
        threads.append(torch.get_num_threads())
        time.sleep(0.01)

    hook = model.register_forward_pre_hook(sleep)
    slow = {m.name: m for m in latency(model, (1, 2), prompt=8, repeats=5, threads=1, warm_up=1)}
    hook.remove()
    assert set(threads) == {1}
    assert torch.get_num_threads() == before
    assert slow["decode@1"].quantile(0.1) > max(10, plain["decode@1"].quantile(0.1))
    assert slow["prefill@2"].quantile(0.9) < min(2 * 8 / 0.01, plain["prefill@2"].quantile(0.9))
    assert all(len(m.values) == 5 for n, m in slow.items() if "@" in n)
    assert len(threads) == 2 * (6 + 1 + 6)
    assert plain["peak_memory"].mean > 10


def test_peak_memory_counts_what_was_there_only_for_a_while(lm: tuple[Any, Any]) -> None:
    model, _ = lm

    def fill(*given: Any) -> None:
        np.ones(100_000_000, np.uint8)  # beyond what malloc keeps

    hook = model.register_forward_pre_hook(fill)
    high = latency(model, (1,), prompt=8, repeats=1, warm_up=0)[-1]
    hook.remove()
    low = latency(model, (1,), prompt=8, repeats=1, warm_up=0)[-1]
    assert high.mean > low.mean + 80


def test_size_of_files(folder: Path, tmp_path: Path) -> None:
    assert file_size(folder).mean == pytest.approx((folder / "model.safetensors").stat().st_size / 1e6)
    with pytest.raises(ConfigError, match="no safetensors"):
        file_size(tmp_path)


def test_thirteen_words_in_a_row_are_found(suite: Suite, caplog: pytest.LogCaptureFixture) -> None:
    words = [f"w{i}" for i in range(40)]
    evaluation = {"clean": " ".join(words[::-1]), "part": " ".join(words), "short": "w0 w1 w2"}
    quote = "Before: " + ", ".join(words[5:18]).upper() + "! After."
    batches = [pa.array(["nothing", " ".join(words[5:17])]), pa.array([" ".join(words[20:32]), quote, quote])]
    assert overlaps(evaluation, batches) == [Overlap("part", 1 / 28, 3)]
    assert overlaps(evaluation, []) == overlaps({}, batches) == overlaps({"x": "one two"}, batches) == []
    trees = suite.texts("trees")
    long = next(t for t in trees if len(t.split()) > 20)
    with caplog.at_level(logging.WARNING):
        found = suite.contamination([pa.array([f"it said {long} there"])])
    assert f"trees/{trees.index(long)}" in {o.id for o in found}
    assert "share 13 words in a row with the training data" in caplog.text


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.sampled_from("ab"), max_size=12), max_size=5),
    st.lists(st.lists(st.sampled_from("ab"), max_size=12), max_size=5),
)
def test_overlaps_by_force(evaluation: list[list[str]], training: list[list[str]]) -> None:
    def grams(words: list[str]) -> list[tuple[str, ...]]:
        return [tuple(words[i : i + 3]) for i in range(len(words) - 2)]

    known = {str(i): " ".join(words) for i, words in enumerate(evaluation)}
    expected = []
    for i, words in enumerate(evaluation):
        rows = [j for g in grams(words) for j, t in enumerate(training) if g in grams(t)]
        hits = [any(g in grams(t) for t in training) for g in grams(words)]
        if rows:
            expected.append(Overlap(str(i), float(np.mean(hits)), min(rows)))
    texts = [" ".join(words) for words in training]
    parts = [pa.array(texts[:2], pa.large_string()), pa.array(texts[2:], pa.large_string())]
    assert overlaps(known, parts, n=3) == expected
