"""The contract of a criterion: one file, one class, one score column in which greater always means keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from pipeline.recipe import Column, Recipe

if TYPE_CHECKING:
    from pipeline.run import Run


class Score(Recipe):
    """A criterion. Subclasses live in `pipeline/scores/<kind>.py` and fix `kind` to the module's name."""

    needs: ClassVar[Literal["text", "vectors", "concepts"]] = "text"
    """What must be there before `fit` and `column` are called."""
    quotas: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """`select.quotas` that the method brings with it, where the user gives none and this score ranks."""
    claim: ClassVar[str] = ""
    """What a high score claims of a row, in a line; `tamis criteria` prints it."""
    cost: ClassVar[str] = ""
    """What a row costs, in a line: FLOPs or measured rows a second."""
    source: ClassVar[str] = ""
    """The paper: authors, year, arXiv number."""

    kind: str
    name: str = Field("", pattern=r"^[A-Za-z0-9_-]*$")
    """Column name; the kind where it is empty. Two scores of one kind need names of their own."""

    @property
    def column_name(self) -> str:
        return self.name or self.kind

    def fit(self, run: Run) -> None:
        """Fit artifacts on the whole corpus. Most criteria have nothing to fit."""

    def support(self, run: Run) -> Sequence[Column]:
        """Columns of the text that this criterion reads and others may share, such as a model's log-probabilities.

        Filled in the one pass over the text, each once however many criteria ask for its name.
        """
        return ()

    def column(self, run: Run) -> Column:
        """The column to materialize: `score` (float32, greater means keep) first, then any other fields.

        A field `rule` (string) names what a low score is due to and becomes the reason of rows below a floor; it is ""
        where nothing fired, never null, because a row with a null input reaches no later step.
        """
        raise NotImplementedError(f"{type(self).__name__} has no column()")

    @property
    def compares_rows(self) -> bool:
        """Whether a row's score depends on other rows, so that `fill` does more than one pass."""
        return type(self).fill is not Score.fill

    @property
    def along(self) -> Mapping[str, str]:
        """Fields of the column that go along in `tamis` of the curated files beside the score, by their names there."""
        return {}

    def caveats(self, run: Run) -> Sequence[str]:
        """What a reader of the curated set has to know of this score, sentences for its card; once it is filled."""
        return ()

    def fill(self, run: Run) -> None:
        """Fill the column of a criterion that compares rows, once all it needs is stored: by `run.regroup` and such.

        What is a function of one row at a time leaves this as it is.
        """
        run.materialize([self.column(run)])
