"""Functions: from a source file to its skeleton and the functions that matter to it, within a share of its length.

After the coarse stage and the knapsack of LongCodeZip (Shi et al. 2025, arXiv 2510.00446). The file is cut at its
functions; each has a value, how much it helps to expect a query, and of all choices that fit the budget the one of
greatest summed value stays: exactly (0/1 knapsack by dynamic programming) up to 100 functions and 2,000 tokens, beyond
that greedily by value per token. Values are scaled to [0, 1] within a file, a token is four characters.

- With a `model` (a causal language model) the value is LongCodeZip's: PPL(q) - PPL(q | c), q the query, c the function.
- Without one it is `overlap_like`, a cheap signal of ours: the cosine of the word counts of function and query, words
  being the parts of identifiers.

A corpus has no query as retrieval has: it is a column of the source, or what the file itself says outside of its
functions (docstring, imports, constants). A file without any, or without functions, stays whole.

Python is cut by `ast` at the functions of modules and classes, each with the comments right above it; what is left
always parses. Anything else, and Python that does not parse, is cut at blank lines before a line that is not indented,
and only its first block is sure to stay.

The fine stage of LongCodeZip, blocks inside of a function, is left out, so no function is cut in two. It ends a block
where a line's perplexity rises above "mean + 0.2 deviations", in the code a bound on perplexities that is compared with
a difference of two; what a block is worth, and the rate that the functions left over from the coarse stage share, are
not said to the point that two readers would build the same. And it was made for prompts: of a function without some of
its lines a reader takes the sense, a corpus of such functions teaches code that does not run. Instruction prompts are
left out, too.

Trades: a call may outlive the function that it calls. The skeleton stays even where it is longer than the budget.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from pipeline.artifact import Artifact
from pipeline.models.causal import Scorer, check_model, context, model_source
from pipeline.models.files import folder_digest, folder_of
from pipeline.recipe import Resources, fingerprint
from pipeline.rewrite._overlap import PART, cosine, counts
from pipeline.rewrite.base import Pieces, Prune, Rewrite

if TYPE_CHECKING:
    from pipeline.run import Run

CHARS_A_TOKEN = 4
MAX_ITEMS, MAX_CAPACITY = 100, 2000
"""Up to here the knapsack is exact; LongCodeZip's numbers."""
NEWLINE = re.compile(r"\r\n|\r|\n")
PARAGRAPH = re.compile(r"(?:(?<=\n\n)|(?<=\n\r\n))(?=[^\s)\]}])")
"""Where a line that is not indented, and closes nothing, follows an empty one."""
Definition = (ast.FunctionDef, ast.AsyncFunctionDef)

Value = Callable[[Sequence[str], Sequence[Sequence[str]]], list[np.ndarray]]
"""From the queries of files and the texts of their functions to values: float64, one array a file."""


class Functions(Rewrite):
    """Keep the functions of a file that help most to expect its query, within a share of its length."""

    claim = "what stays is the skeleton of a file and the functions nearest to its query"
    cost = "word counts; with a model 2 FLOPs a weight and token of every function and, for each, of the query"
    source = "after Shi et al. 2025 (LongCodeZip), arXiv 2510.00446"
    kind: Literal["functions"] = "functions"
    keep: float = Field(0.5, gt=0, le=1, description="share of a file's characters to keep, skeleton included")
    query: str | None = Field(None, description="source column with a row's query (default: the file's skeleton)")
    model: str | None = Field(None, description="causal model for the value: folder or hf:// (default: overlap_like)")
    max_tokens: int = Field(1024, ge=32, description="tokens of function and query that the model reads")

    @field_validator("model")
    @classmethod
    def _there(cls, model: str | None) -> str | None:
        if model is not None:
            check_model("functions", model)
        return model

    def reads(self) -> tuple[str, ...]:
        return ("text", f"corpus.{self.query}") if self.query else ("text",)

    def resources(self, run: Run) -> Resources:
        engine = run.config.engine
        return Resources(engine.cpus, engine.gpus) if self.model else Resources()

    def prune(self, run: Run) -> tuple[Callable[[], Prune], str]:
        if self.model is None:
            return partial(_open, self, _open_overlap), ""
        source = model_source(run, self.model)
        precision = "bfloat16" if run.config.engine.gpus else "float32"
        read = partial(_open_model, source, self.max_tokens, precision)
        return partial(_open, self, read), fingerprint(folder_digest(folder_of(source)))


def _open(rewrite: Functions, open_value: Callable[[], Value]) -> Prune:
    value = open_value()

    def prune(batch: pa.RecordBatch) -> Pieces:
        texts = batch.column("text").to_pylist()
        files = [cut(text) for text in texts]
        queries = (
            batch.column(f"corpus.{rewrite.query}").to_pylist()
            if rewrite.query
            else [
                "".join(text[a:b] for a, b, free in file if not free) for text, file in zip(texts, files, strict=True)
            ]
        )
        judged = [i for i, file in enumerate(files) if queries[i].strip() and any(free for *_, free in file)]
        chosen = value(
            [queries[i] for i in judged], [[texts[i][a:b] for a, b, free in files[i] if free] for i in judged]
        )
        spans = {i: [(i, 0, len(text))] for i, text in enumerate(texts)}
        for i, values in zip(judged, chosen, strict=True):
            kept = within(files[i], values, rewrite.keep)
            spans[i] = [(i, a, b) for (a, b, _), stays in zip(files[i], kept, strict=True) if stays]
        found = Pieces(*np.array([s for file in spans.values() for s in file], np.int64).reshape(-1, 3).T)
        return found.keep(np.ones(len(found), bool))

    return prune


File = list[tuple[int, int, bool]]
"""Pieces that tile a text: start, end (characters) and whether it may be dropped."""


def cut(text: str) -> File:
    """A file into functions, which may be dropped, and what stands between them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the file's own odd escapes
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        edges = [0, *(match.end() for match in PARAGRAPH.finditer(text)), len(text)]
        return [(a, b, i > 0) for i, (a, b) in enumerate(pairwise(edges)) if a < b]
    lines = [0, *(match.end() for match in NEWLINE.finditer(text)), len(text)]
    pieces: File = []
    at = 0
    for node in _definitions(tree):
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        while first and lines[first - 1] >= at and text[lines[first - 1] : lines[first]].lstrip(" \t").startswith("#"):
            first -= 1
        end = min(lines[node.end_lineno or node.lineno], len(text))
        pieces += [(at, lines[first], False)] * (at < lines[first])
        pieces.append((lines[first], end, True))
        at = end
    return pieces + [(at, len(text), False)] * (at < len(text))


def _definitions(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions of a module and of its classes that may go; a class keeps one where it holds nothing else."""
    found: list[ast.FunctionDef | ast.AsyncFunctionDef] = []
    for node in tree.body:
        if isinstance(node, Definition):
            found.append(node)
        elif isinstance(node, ast.ClassDef):
            methods = [member for member in node.body if isinstance(member, Definition)]
            found += methods[len(methods) == len(node.body) :]
    return found


def _skeleton(text: str, file: File) -> str:
    return "".join(text[a:b] for a, b, free in file if not free)


def within(file: File, values: np.ndarray, keep: float) -> list[bool]:
    """Which pieces of a file stay: what must, and of the others the best choice that fits `keep` of the characters."""
    if keep == 1:
        return [True] * len(file)
    needed = sum(b - a for a, b, free in file if not free)
    capacity = int(max(keep * file[-1][1] - needed, 0) // CHARS_A_TOKEN)
    weights = np.array([-(-(b - a) // CHARS_A_TOKEN) for a, b, free in file if free])
    spread = float(np.ptp(values))
    scaled = (values - values.min()) / spread if spread else np.ones(len(values))
    taken = knapsack(weights, scaled, capacity)
    if not needed and not taken.any():
        taken[int(np.argmax(scaled))] = True
    stays = iter(taken.tolist())
    return [not free or next(stays) for *_, free in file]


def knapsack(weights: np.ndarray, values: np.ndarray, capacity: int) -> np.ndarray:
    """Mask of the items of greatest summed value whose summed weight is at most `capacity`; values are not negative.

    Exact for at most `MAX_ITEMS` items and `MAX_CAPACITY`, else greedy by value per weight, earlier ones first.
    """
    if len(weights) > MAX_ITEMS or capacity > MAX_CAPACITY:
        return greedy(weights, values, capacity)
    best = np.zeros(capacity + 1)
    took = np.zeros((len(weights), capacity + 1), bool)
    for i, (weight, value) in enumerate(zip(weights.tolist(), values.tolist(), strict=True)):
        if weight <= capacity:
            with_it = best[: capacity + 1 - weight] + value
            took[i, weight:] = with_it >= best[weight:]  # one without value still fills a budget that is there
            best[weight:] = np.maximum(best[weight:], with_it)
    chosen = np.zeros(len(weights), bool)
    for i in range(len(weights) - 1, -1, -1):
        if took[i, capacity]:
            chosen[i] = True
            capacity -= int(weights[i])
    return chosen


def greedy(weights: np.ndarray, values: np.ndarray, capacity: int) -> np.ndarray:
    """Mask of the items taken in order of value per weight, those that no longer fit passed over."""
    chosen = np.zeros(len(weights), bool)
    ratio = np.where(weights > 0, values / np.maximum(weights, 1), np.inf)
    for i in np.argsort(-ratio, kind="stable").tolist():
        if weights[i] <= capacity:
            chosen[i] = True
            capacity -= int(weights[i])
    return chosen


def _open_overlap() -> Value:
    def value(queries: Sequence[str], functions: Sequence[Sequence[str]]) -> list[np.ndarray]:
        return [
            np.array([cosine(asked, counts(function, PART)) for function in of_file])
            for asked, of_file in zip((counts(q, PART) for q in queries), functions, strict=True)
        ]

    return value


def _open_model(source: Artifact | Path, max_tokens: int, precision: str) -> Value:
    import torch

    from pipeline.engine import threads

    torch.set_num_threads(threads.cpus())
    folder = folder_of(source)
    max_tokens = min(max_tokens, context(folder))
    scorer = Scorer(folder, max_tokens, precision)
    return partial(helpfulness, scorer, max_tokens)


def helpfulness(
    scorer: Scorer, max_tokens: int, queries: Sequence[str], functions: Sequence[Sequence[str]]
) -> list[np.ndarray]:
    """PPL(q) - PPL(q | c) of every function c of every file with query q, over the tokens of q from its second on.

    A query is cut to a quarter of `max_tokens`, a function to what is left. One of fewer than two tokens has no
    perplexity: its functions are worth 0 each.
    """
    if not queries:
        return []
    owner = np.repeat(np.arange(len(queries)), [len(f) for f in functions])
    asked, bounds = scorer.tokenize(pa.array(queries, pa.large_string()))
    given, edges = scorer.tokenize(pa.array([c for f in functions for c in f], pa.large_string()))
    questions = [asked[a : min(b, a + max_tokens // 4)] for a, b in pairwise(bounds)]
    pairs = []
    for (a, b), i in zip(pairwise(edges), owner, strict=True):
        pairs.append(np.concatenate([given[a : min(b, a + max_tokens - len(questions[i]))], questions[i]]))
    sizes = np.array([len(q) for q in questions])
    alone, after = _perplexity(scorer, questions, sizes), _perplexity(scorer, pairs, sizes[owner])
    gain = np.where(sizes[owner] > 1, alone[owner] - after, 0.0)
    return np.split(gain, np.cumsum([len(f) for f in functions])[:-1])


def _perplexity(scorer: Scorer, rows: Sequence[np.ndarray], tail: np.ndarray) -> np.ndarray:
    """exp of the mean loss of the last `tail` - 1 tokens of every row; float64."""
    ends = np.cumsum([len(r) for r in rows])
    logp = scorer(np.concatenate(rows), np.append(0, ends)).astype(np.float64)
    sums = np.append(0, np.cumsum(np.nan_to_num(logp)))
    told = np.maximum(tail - 1, 0)
    return np.asarray(np.exp((sums[ends - told] - sums[ends]) / np.maximum(told, 1)))
