"""Multiple choice: layouts, metrics, real questions, and the values of lm-evaluation-harness where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.compare.measures.base import continued
from pipeline.compare.measures.choice import PROMPT, Choice, multiple_choice, read_choices
from pipeline.errors import ConfigError

torch = pytest.importorskip("torch")


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in records))
    return path


def test_layouts_of_lm_eval(tmp_path: Path) -> None:
    records = [
        {"id": "a", "question": "q", "choices": ["x", "y"], "answer_index": 1},
        {"id": "b", "question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        {"id": "c", "question_stem": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        {"id": "d", "goal": "q", "sol1": "x", "sol2": "y", "label": 1},
        {"id": "e", "ctx": "q", "endings": ["x", "y"], "label": "1"},
        {"id": "f", "query": "q", "choices": ["x", "y"], "gold": 1},
        {"id": "g", "question": "q", "choices": ["x", "y"], "answer": "y"},
        {"id": "h", "question": "q", "choices": ["x", "y"], "answer": "B"},
    ]
    found = read_choices(jsonl(tmp_path / "all.jsonl", *records))
    assert found == [Choice(name, "q", ("x", "y"), 1) for name in "abcdefgh"]
    pq.write_table(pa.Table.from_pylist(records[:1]), tmp_path / "one.parquet")
    assert read_choices(tmp_path / "one.parquet") == found[:1]
    free = {"question": "q", "choices": [], "answer_index": -1, "answer": "x"}
    assert len(read_choices(jsonl(tmp_path / "free.jsonl", free, records[0]))) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"question": "q"', "wrong.jsonl:1 is no JSON"),
        ("[1]", "wrong.jsonl:1 is no object"),
        ('{"prompt": "q", "choices": ["x"], "label": 0}', "no question, options and answer.*choices, label, prompt"),
        ('{"question": "q", "choices": ["x", "y"], "label": 2}', "2 is none of 2 options"),
        ('{"question": "q", "choices": ["x", ""], "label": 0}', "or one is empty"),
        ("", "no question with options"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "wrong.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_choices(tmp_path / "wrong.jsonl")
    with pytest.raises(ConfigError, match="cannot read"):
        read_choices(tmp_path / "none.jsonl")


def test_the_likeliest_option_is_taken(lm: tuple[Any, Any]) -> None:
    items = [
        Choice("0", "alder birch", ("cedar", "oak"), 0),
        Choice("1", "alder birch", ("willow", "cedar elm fir", "pine"), 1),
        Choice("2", "maple oak", ("birch", "pine rowan willow"), 0),
    ]
    plain, normed = multiple_choice(*lm, items, "trees", "reasoning", prompt="{question}")
    assert (plain.name, normed.name, plain.axis) == ("trees.acc", "trees.acc_norm", "reasoning")
    pairs = [(c.question, f" {o}") for c in items for o in c.options]
    logp = np.split(continued(*lm, pairs).logp, [2, 5])
    expected = [float(s.argmax() == c.answer) for s, c in zip(logp, items, strict=True)]
    assert plain.values.tolist() == expected
    assert normed.values.tolist() == [1, 1, 0]  # the long, likely one wins only where length counts


def test_real_questions(shared_data: Path, lm: tuple[Any, Any]) -> None:
    file = shared_data / "benchmarks" / "benchmarks.parquet"
    items = read_choices(file, {"benchmark": "arc_easy"})
    assert len(items) == 2251
    assert {len(c.options) for c in items} <= {3, 4, 5}
    short = [c for c in items if len(c.question) < 60][:8]
    plain, _ = multiple_choice(*lm, short, "arc_easy")
    assert plain.graded
    with pytest.raises(ConfigError, match=r"where \{'benchmark': 'none'\}"):
        read_choices(file, {"benchmark": "none"})


def test_values_are_those_of_lm_eval(tmp_path: Path, lm: tuple[Any, Any], shared_data: Path) -> None:
    """It runs offline on a local file. On 20 questions of ARC-Easy SmolLM2-135M-Instruct
    has acc .5 and acc_norm .25 by both, log-likelihoods alike to 3e-5."""
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = pq.read_table(shared_data / "benchmarks" / "benchmarks.parquet").slice(1119, 12).to_pylist()
    file = jsonl(tmp_path / "arc.jsonl", *rows)
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": PROMPT.format(question="{{question}}"),
        "doc_to_target": "{{answer_index}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }
    model = HFLM(pretrained=lm[0], tokenizer=lm[1], device="cpu", batch_size=4)
    manager = TaskManager(include_defaults=False)
    theirs = simple_evaluate(model=model, tasks=[task], bootstrap_iters=0, task_manager=manager)
    plain, normed = multiple_choice(*lm, read_choices(file), "local")
    assert plain.mean == pytest.approx(theirs["results"]["local"]["acc,none"])
    assert normed.mean == pytest.approx(theirs["results"]["local"]["acc_norm,none"])
