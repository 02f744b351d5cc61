"""The contract of a criterion: one file, one class, one score column in which greater always means keep."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pipeline.recipe import Column, Recipe

if TYPE_CHECKING:
    from pipeline.run import Run


class Score(Recipe):
    """A criterion. Subclasses live in `pipeline/scores/<kind>.py` and fix `kind` to the module's name."""

    needs: ClassVar[Literal["text", "vectors", "concepts"]] = "text"
    """What must be there before `fit` and `column` are called."""

    kind: str
    name: str = Field("", pattern=r"^[A-Za-z0-9_-]*$")
    """Column name; the kind where it is empty. Two scores of one kind need names of their own."""

    @property
    def column_name(self) -> str:
        return self.name or self.kind

    def fit(self, run: Run) -> None:
        """Fit artifacts on the whole corpus. Most criteria have nothing to fit."""

    def column(self, run: Run) -> Column:
        """The column to materialize: `score` (float32, greater means keep) first, then any other fields.

        A field `rule` (string) names what a low score is due to and becomes the reason of rows below a floor; it is ""
        where nothing fired, never null, because a row with a null input reaches no later step.
        """
        raise NotImplementedError(f"{type(self).__name__} has no column()")
