"""Regression: the grade that a linear head on the run's embedding gives a row, learnt from graded examples.

The FineWeb-Edu classifier: Penedo et al. 2024, "The FineWeb Datasets", arXiv 2406.17557 (code in
`huggingface/cosmopedia/classification`), where a large model grades some 460,000 pages (count from memory, unverified)
from 0 to 5 for their educational value and a linear head on a frozen encoder learns the grades by least squares. Here
the same head has its exact solution: ridge regression, with the penalty of least leave-one-out error out of
`penalties`, where the paper takes 20 epochs of SGD. So it is a function of the examples alone, and takes seconds.

The score is the head's output, not rounded and not clipped. FineWeb-Edu keeps what rounds to 3 or more, and rounding
half to even makes 2.5 a 2: `floors: {regression: 2.5}` keeps the same rows but for those at 2.5 exactly. Which grade is
worth a floor depends on the corpus; a budget does not.

What it trades away: the run's embedding decides how much of a row is seen and what can be told apart (FineWeb-Edu's
sees 512 tokens). `regression.json` says how far the head goes on a tenth of the examples that it was not fitted to:
error, correlation, F1 of "above the middle of the scale", macro-F1 of whole grades. A grade that few examples have is
hardly ever predicted.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from pipeline.errors import ConfigError
from pipeline.hashing import hash64, row_keys
from pipeline.recipe import Column, Transform, fingerprint
from pipeline.sample import needs_fit
from pipeline.scores._contamination import warn_contained
from pipeline.scores._seeds import identify, locate
from pipeline.scores._targets import embedded, listed, read_examples
from pipeline.scores.base import Score
from pipeline.scores.similarity import VECTOR, unit
from pipeline.vectors import matrix

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.run import Run

FIELDS = pa.schema([("score", pa.float32())])
HEAD, FACTS = "head.npz", "regression.json"
LABEL = "label"
FEWEST = 10
"""Examples, at the least; with a tenth held out one of them measures the head."""
ROLE = "regression.examples"


class Regression(Score):
    """The predicted grade, on the scale of the examples' grades."""

    needs: ClassVar[Literal["text", "vectors", "concepts"]] = "vectors"
    claim = "graded high by a head that learnt the grades of examples"
    cost = "2 d FLOPs beside the embedding"
    source = "Penedo et al. 2024 (FineWeb-Edu), arXiv 2406.17557"
    kind: Literal["regression"] = "regression"
    examples: str | list[str] | dict[float, str | list[str]] = Field(
        description="graded texts (Parquet, .jsonl), or files for each grade: {1: good.parquet, 0: bad.parquet}"
    )
    example_text: str = Field("text", description="column of the examples that holds the text")
    example_label: str | None = Field(None, description="column that holds the grade, a number (default: `label`)")
    holdout: float = Field(
        0.1, gt=0, le=0.5, description="share of the examples kept out of the fit to measure it with"
    )
    penalties: tuple[float, ...] = Field(
        (0.01, 0.1, 1.0, 10.0, 100.0), min_length=1, description="ridge penalties to choose from (ours)"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if isinstance(self.examples, dict) and self.example_label is not None:
            raise ValueError("`examples` gives each file its grade: remove `example_label`")
        if min(self.penalties) <= 0:
            raise ValueError(f"penalties must be above 0, not {min(self.penalties):g}")
        return self

    def fit(self, run: Run) -> None:
        self._head(run)

    def column(self, run: Run) -> Column:
        head = self._head(run)
        identity = fingerprint("regression", self.version, head.fingerprint)
        return Column(self.column_name, (VECTOR,), FIELDS, partial(_open, head), identity)

    def _head(self, run: Run) -> Artifact:
        """Artifact with `head.npz`: `weights` (d,) and `intercept` (1,), float32."""
        embed = run.plans["embed"].column
        graded = self.examples if isinstance(self.examples, dict) else {None: self.examples}
        files = {grade: locate(listed(paths), ROLE) for grade, paths in graded.items()}
        prints = [[grade, identify(uris)] for grade, uris in files.items()]
        asked = [self.example_text, self.example_label, self.holdout, self.penalties]
        identity = fingerprint("head", self.version, asked, prints, embed.identity, run.identity("text"))
        examples, contained = pa.table({}), 0
        if needs_fit(run, self.column_name, identity):
            examples = self._read(files, embed)
            contained = warn_contained(run, examples["text"].combine_chunks(), ROLE).rows
        build = partial(_fit, examples, embed, self.holdout, self.penalties, contained)
        return run.artifact(self.column_name, identity, build, embed.resources)

    def _read(self, files: dict[float | None, list[str]], embed: Column) -> pa.Table:
        """Distinct examples in the order of their hashes, `label` float64 among them. Raises ConfigError."""
        found = []
        for grade, uris in files.items():
            column = self.example_label or LABEL
            table = read_examples(uris, self.example_text, ROLE, [column] if grade is None else [], embed)
            labels = table[column] if grade is None else pa.array([grade] * len(table))
            try:
                labels = labels.cast(pa.float64())
            except pa.ArrowException as error:
                raise ConfigError(f"{ROLE}: column {column!r} is {labels.type}, not numbers: {error}") from error
            found.append(table.drop_columns([column] if grade is None else []).append_column(LABEL, labels))
        table = pa.concat_tables(found, promote_options="permissive").combine_chunks()
        _, first = np.unique(hash64(row_keys(table["text"].combine_chunks()), 0), return_index=True)
        table = table.take(pa.array(first))
        grades = table[LABEL].to_numpy()
        if not np.isfinite(grades).all():
            raise ConfigError(f"{ROLE}: a grade is not a finite number: remove it")
        if len(table) < FEWEST or len(np.unique(grades)) < 2:
            there = f"{len(table)} distinct texts with the grades {', '.join(f'{g:g}' for g in np.unique(grades)[:5])}"
            raise ConfigError(f"{ROLE}: at least {FEWEST} texts of two grades are needed; there are {there}")
        return table


def _fit(
    examples: pa.Table, embed: Column, holdout: float, penalties: tuple[float, ...], contained: int, directory: Path
) -> None:
    from sklearn.linear_model import RidgeCV

    vectors, taken = embedded(embed, examples, ROLE)
    x, grades = unit(vectors).astype(np.float64), examples[LABEL].to_numpy()[taken]
    held = np.arange(len(grades)) < max(1, int(holdout * len(grades)))  # their order is random: it is by hash
    head = RidgeCV(list(penalties)).fit(x[~held], grades[~held])
    np.savez(directory / HEAD, weights=head.coef_.astype(np.float32), intercept=np.array([head.intercept_], np.float32))
    facts = {
        "trained_on": int((~held).sum()),
        "without_vector": len(examples) - len(taken),
        "contained_rows": contained,
        "penalty": float(head.alpha_),
        "held_out": measure(head.predict(x[held]), grades[held]),
    }
    (directory / FACTS).write_text(json.dumps(facts, indent=2))


def measure(predicted: np.ndarray, grades: np.ndarray) -> dict[str, Any]:
    """Error, correlation, and F1 of "above the middle of the scale" and of whole grades (macro); null where the
    held-out examples cannot tell."""
    from sklearn.metrics import f1_score

    low, high = grades.min(), grades.max()
    varies = high > low and predicted.std() > 0
    middle = (low + high) / 2
    return {
        "rows": len(grades),
        "root_mean_square_error": float(np.sqrt(np.mean((predicted - grades) ** 2))),
        "correlation": float(np.corrcoef(predicted, grades)[0, 1]) if varies else None,
        "f1_above_middle": float(f1_score(grades > middle, predicted > middle)) if varies else None,
        "macro_f1": float(f1_score(np.rint(grades), rounded(predicted, low, high), average="macro"))
        if varies
        else None,
    }


def rounded(grades: np.ndarray, low: float, high: float) -> np.ndarray:
    """Whole grades as FineWeb-Edu has them: clipped to the scale, half to even."""
    return np.asarray(np.rint(np.clip(grades, low, high)))


def _open(head: Artifact) -> Transform:
    with np.load(head.local() / HEAD, allow_pickle=False) as arrays:
        weights, intercept = arrays["weights"], arrays["intercept"]

    def score(batch: pa.RecordBatch) -> pa.RecordBatch:
        return pa.record_batch(
            [pa.array(np.vecdot(unit(matrix(batch.column(VECTOR))), weights) + intercept)], schema=FIELDS
        )

    return score
