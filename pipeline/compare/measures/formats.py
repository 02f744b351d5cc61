"""Whether a model keeps to a form that it is asked for, checked by regular expressions (after IFEval, Zhou et al.
2023).

What it says does not count, only how: pruning often raises this while it lowers knowledge, which is why the two are
never averaged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.compare.measures.base import Measured, generate, instruct

if TYPE_CHECKING:
    from torch import nn

    from pipeline.compare.measures.base import Tokenizer

MAX_NEW = 48


@dataclass(frozen=True)
class Constraint:
    """A form: the request for it, and what the whole answer, stripped, must match."""

    name: str
    request: str
    pattern: re.Pattern[str]

    def holds(self, answer: str) -> bool:
        return self.pattern.fullmatch(answer.strip()) is not None


CONSTRAINTS = tuple(
    Constraint(name, request, re.compile(pattern, re.DOTALL))
    for name, request, pattern in (
        ("upper", "Write only in capital letters.", r"(?=.*[A-Z])[^a-z]+"),
        ("lower", "Write only in small letters, without any capital.", r"(?=.*[a-z])[^A-Z]+"),
        ("comma", "Do not use any comma.", r"[^,]+"),
        ("bullets", "Give exactly three bullet points, on lines that start with '* '.", r"(\* [^\n]+\n+){2}\* [^\n]+"),
        ("json", 'Give a JSON object with one key, "answer".', r'(```(json)?\s*)?\{\s*"answer"\s*:[^{}]+\}(\s*```)?'),
        ("quotes", "Put the whole answer in double quotation marks.", r'"[^"]+"'),
        ("end", "End with the words: That is all.", r".*\bThat is all\."),
        ("number", "Answer with one number and nothing else.", r"-?\d+([.,]\d+)*\.?"),
    )
)
SUBJECTS = (
    "What does a bee do?",
    "Tell me about the sea.",
    "How is bread made?",
    "What is a forest?",
    "How many legs do two dogs have?",
    "Why do we sleep?",
    "What is snow?",
    "How far is the moon?",
)


def requests(count: int) -> list[tuple[str, Constraint]]:
    """Instructions and the form that each asks for: every form of one subject after the other, then the next
    subject."""
    every = [(f"{subject} {c.request}", c) for subject in SUBJECTS for c in CONSTRAINTS]
    return every[:count]


def formats(model: nn.Module, tokenizer: Tokenizer, count: int) -> list[Measured]:
    """Measure `formats`: 1 where an answer has the form; at most one item for each subject and form (64)."""
    items = requests(count)
    asked = [instruct(tokenizer, instruction) for instruction, _ in items]
    chat = any(special for _, special in asked)
    written = generate(
        model, tokenizer, [prompt for prompt, _ in asked], MAX_NEW, stop="" if chat else "\nInstruction:", special=chat
    )
    held = [constraint.holds(text) for text, (_, constraint) in zip(written, items, strict=True)]
    return [Measured("formats", "instruction", np.array(held, float), True)]
