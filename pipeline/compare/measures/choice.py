"""Multiple choice by log-likelihood, from local files with the fields that lm-evaluation-harness's tasks read.

Each option is scored after the question; `acc` takes the one with the highest log-likelihood, `acc_norm` the highest
per character, ties to the first: lm-eval's two metrics, under its prompt of ARC unless `prompt` says another. Checked
against lm-eval 0.4.13, which runs offline on the same file: log-likelihoods of SmolLM2-135M-Instruct alike to 3e-5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.compare.measures.base import Axis, Measured, continued
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from pipeline.compare.measures.base import Tokenizer

PROMPT = "Question: {question}\nAnswer:"
FIELDS = {
    "question": ("question", "query", "goal", "ctx", "question_stem", "sentence"),
    "choices": ("choices", "endings", "options"),
    "answer": ("answer_index", "gold", "label", "answerKey", "answer"),
}
"""Names under which a question, its options and the right one are found; the first that is there counts. Options are a
list, or `{"text": [...], "label": [...]}` (ARC), or `sol1` and `sol2` (PIQA). The answer is an index from 0, one of the
labels, a letter, or the option itself."""


@dataclass(frozen=True)
class Choice:
    """A question, what can be answered, and the index of what is right."""

    id: str
    question: str
    options: tuple[str, ...]
    answer: int


def read_choices(path: Path, where: Mapping[str, str] | None = None) -> list[Choice]:
    """Questions of a file, in its order; those without options to choose from (free answers) are left out.

    `where`: fields that must have a value, such as `{"benchmark": "arc_easy"}`. Raises ConfigError.
    """
    found = []
    for number, record in enumerate(_records(path), 1):
        if all(str(record.get(name)) == value for name, value in (where or {}).items()):
            choice = _choice(record, f"{path}:{number}")
            found += [choice] if choice else []
    if not found:
        raise ConfigError(f"choices: {path} has no question with options" + (f" where {where}" if where else ""))
    return found


def multiple_choice(
    model: nn.Module,
    tokenizer: Tokenizer,
    items: Sequence[Choice],
    name: str,
    axis: Axis = "knowledge",
    prompt: str = PROMPT,
) -> list[Measured]:
    """Measures `<name>.acc` and `<name>.acc_norm`, 1 or 0 an item."""
    pairs = [(prompt.format(question=c.question), f" {option}") for c in items for option in c.options]
    logp = continued(model, tokenizer, pairs).logp
    bounds = np.cumsum([len(c.options) for c in items])[:-1]
    scores = np.split(logp, bounds)
    plain = [float(s.argmax() == c.answer) for s, c in zip(scores, items, strict=True)]
    lengths = [np.array([len(o) for o in c.options]) for c in items]
    normed = [float((s / n).argmax() == c.answer) for s, n, c in zip(scores, lengths, items, strict=True)]
    return [
        Measured(f"{name}.acc", axis, np.array(plain), True),
        Measured(f"{name}.acc_norm", axis, np.array(normed), True),
    ]


def _records(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            return list(pq.read_table(path).to_pylist())
        except (OSError, ValueError) as error:
            raise ConfigError(f"choices: cannot read {path}: {error}") from error
    records = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"choices: cannot read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            raise ConfigError(f"choices: {path}:{number} is no JSON: {error}") from error
        if record is not None and not isinstance(record, dict):
            raise ConfigError(f"choices: {path}:{number} is no object")
        records += [record] if record is not None else []
    return records


def _choice(record: dict[str, Any], place: str) -> Choice | None:
    given = {
        role: next((record[n] for n in names if record.get(n) is not None), None) for role, names in FIELDS.items()
    }
    options: Any = given["choices"]
    labels: Any = None
    if options is None and "sol1" in record:
        options = [record["sol1"], record.get("sol2")]
    if isinstance(options, dict):
        options, labels = options.get("text"), options.get("label")
    if given["question"] is None or given["answer"] is None or not isinstance(options, list):
        there = ", ".join(sorted(map(str, record)))
        raise ConfigError(f"choices: {place} has no question, options and answer that are known; it has {there}")
    if not options or given["answer"] == -1:
        return None
    texts = [str(o) for o in options]
    answer = _index(given["answer"], texts, labels)
    if answer is None or not all(texts):
        raise ConfigError(f"choices: {place}: {given['answer']!r} is none of {len(texts)} options, or one is empty")
    return Choice(str(record.get("id", place)), str(given["question"]), tuple(texts), answer)


def _index(answer: Any, options: list[str], labels: Any) -> int | None:
    if isinstance(labels, list) and answer in labels:
        return labels.index(answer)
    if isinstance(answer, str) and answer in options:
        return options.index(answer)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        answer = letters.index(answer)
    try:
        index = int(answer)
    except (TypeError, ValueError):
        return None
    return index if 0 <= index < len(options) else None
