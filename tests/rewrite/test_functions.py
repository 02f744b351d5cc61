"""Source files to skeleton and functions: what may be cut, the knapsack, both signals, and what always parses."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import curate
from pipeline.rewrite.base import cut as cut_text
from pipeline.rewrite.functions import Functions, _open, _open_overlap, cut, greedy, helpfulness, knapsack, within

PYTHON = '''"""Reads river levels and writes a flood report."""
import csv

LIMIT = 3


# Level of one gauge.
@cached
def read_level(path):
    return [row for row in csv.reader(open(path))]


class Report:
    """A flood report."""

    def write_report(self, levels):
        return f"flood {max(levels)}"

    async def paint_kittens(self):
        pass


class Bare:
    def only(self): return "\\\\d"

    def other(self): return 2

def unrelated_kittens(colour): pass
'''


def texts_of(text: str) -> list[str]:
    return [text[a:b] for a, b, free in cut(text) if free]


def test_python_is_cut_at_functions_with_their_comments_and_decorators() -> None:
    found = texts_of(PYTHON)
    assert [f.strip().splitlines()[0] for f in found] == [
        "# Level of one gauge.",
        "def write_report(self, levels):",
        "async def paint_kittens(self):",
        "def other(self): return 2",
        "def unrelated_kittens(colour): pass",
    ]


@settings(max_examples=40)
@given(st.lists(st.booleans(), min_size=5, max_size=5), st.sampled_from(["\n", "\r\n", "\r"]))
def test_whatever_goes_the_rest_parses_and_the_pieces_tile(keep: list[bool], newline: str) -> None:
    text = PYTHON.replace("\n", newline)
    pieces = cut(text)
    assert "".join(text[a:b] for a, b, _ in pieces) == text
    stays = iter(keep)
    ast.parse("".join(text[a:b] for a, b, free in pieces if not free or next(stays)))


@pytest.mark.parametrize(
    "text",
    [
        "int a;\n\nint f() {\n  return 1;\n\n  x;\n}\n\nint g() {\n}\n",
        "def broken(:\n    pass\n\ndef g(): pass",
        "null\0byte\n\nsecond",
        "(" * 50_000,
        "-" * 50_000 + "1",
        "x\n\n" + "\n \n" * 50_000 + "  y",
    ],
)
def test_what_is_no_python_is_cut_at_blank_lines(text: str) -> None:
    pieces = cut(text)
    assert "".join(text[a:b] for a, b, _ in pieces) == text
    assert not pieces[0][2]
    if text.startswith("int"):
        assert texts_of(text) == ["int f() {\n  return 1;\n\n  x;\n}\n\n", "int g() {\n}\n"]


def test_the_knapsack_is_exact_where_greedy_is_not() -> None:
    weights, values = np.array([6, 5, 5]), np.array([10.0, 8.0, 8.0])
    assert values[knapsack(weights, values, 10)].sum() == 16
    assert values[greedy(weights, values, 10)].sum() == 10
    assert knapsack(np.array([0, 20]), np.array([0.0, 9.0]), 10).tolist() == [True, False]  # free, and too heavy


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 9)), min_size=1, max_size=8), st.integers(0, 20))
def test_the_knapsack_beats_every_subset(items: list[tuple[int, int]], capacity: int) -> None:
    weights, values = (np.array(column) for column in zip(*items, strict=True))
    subsets = np.array(np.meshgrid(*[[0, 1]] * len(items))).reshape(len(items), -1).T.astype(bool)
    best = max((values[s].sum() for s in subsets if weights[s].sum() <= capacity), default=0)
    for choose, exact in ((knapsack, True), (greedy, False)):
        chosen = choose(weights, values.astype(float), capacity)
        assert weights[chosen].sum() <= capacity
        assert values[chosen].sum() == best or not exact


def shortened(text: str, **options: object) -> str:
    recipe = Functions.model_validate(options)
    texts = pa.array([text], pa.large_string())
    kept = _open(recipe, _open_overlap)(pa.record_batch([texts], ["text"]))
    return str(cut_text(texts, kept)[0].as_py())


def test_what_is_near_the_skeleton_stays_within_the_budget() -> None:
    text = shortened(PYTHON, keep=0.65)
    assert len(text) <= 0.65 * len(PYTHON)
    assert "def write_report" in text
    assert "kittens" not in text
    assert shortened(PYTHON, keep=1.0) == PYTHON
    needed = sum(b - a for a, b, free in cut(PYTHON) if not free)
    assert len(shortened(PYTHON, keep=0.01)) == needed  # the skeleton stays even so
    for whole in ("x = 1\n", "def f(): pass\n\n\ndef g(): pass"):  # no functions; nothing to judge them by
        assert shortened(whole, keep=0.3) == whole


def test_one_function_stays_where_there_is_no_skeleton() -> None:
    text = "def f(): pass\ndef g(): return g\n"
    pieces = cut(text)
    assert within(pieces, np.array([0.0, 1.0]), 0.1) == [False, True]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model with random weights."""
    pytest.importorskip("torch")
    from pipeline.models.training import Shape, new_lm, save_lm, train_tokenizer

    tokenizer = train_tokenizer([PYTHON], 300)
    shape = Shape(hidden=32, layers=2, heads=2, kv_heads=1, mlp=64, vocab=tokenizer.get_vocab_size(), context=128)
    folder: Path = tmp_path_factory.mktemp("lm")
    save_lm(new_lm(shape, 0), tokenizer, folder)
    return folder


def test_with_a_model_the_value_is_the_drop_of_the_querys_perplexity(lm: Path) -> None:
    import torch

    from pipeline.models.causal import Scorer, load_causal

    model, tokenizer = load_causal(lm)

    def perplexity(context: str, query: str) -> float:
        before, asked = tokenizer(context)["input_ids"], tokenizer(query)["input_ids"]
        ids = torch.tensor([before + asked])
        with torch.no_grad():
            logp = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        return float(torch.exp(-logp[len(before) :].mean()))

    queries, functions = ["ban del fip gor", "x"], [["kan lel", "ban del fip gor"], ["man"]]
    found = helpfulness(Scorer(lm, 64), 64, queries, functions)
    for query, of_file, values in zip(queries, functions, found, strict=True):
        for function, value in zip(of_file, values, strict=True):
            if len(tokenizer(query)["input_ids"]) < 2:
                assert value == 0
            else:
                assert value == pytest.approx(perplexity("", query) - perplexity(function, query), rel=1e-3, abs=1e-3)


def test_curate_shortens_code_by_overlap_and_by_a_model(
    write_corpus: Callable[..., Path], tmp_path: Path, lm: Path
) -> None:
    corpus = write_corpus(
        files=1, rows=6, rows_of=lambda f, n: {"id": [str(i) for i in range(n)], "text": [PYTHON] * n}
    )
    for options in ({}, {"model": str(lm), "max_tokens": 64}):
        config = {
            "corpus": {"path": str(corpus), "id": "id"},
            "scores": ["random"],
            "select": {"budget": {"rows": 4}},
            "output": {"rewrite": {"kind": "functions", "keep": 0.75} | options},
            "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
            "engine": {"address": "inline"},
            "run": str(tmp_path / "run"),
        }
        texts = pq.read_table(curate(config, quiet=True).path)["text"].to_pylist()
        assert len(texts) == 4
        assert len(set(texts)) == 1
        assert len(texts[0]) <= 0.75 * len(PYTHON)
        ast.parse(texts[0])


def test_a_model_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        Functions.model_validate({"model": "nowhere"})
