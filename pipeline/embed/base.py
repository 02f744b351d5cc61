"""The contract of an embedding: rows in, one unit-norm float16 vector a row out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.recipe import Column, Recipe

if TYPE_CHECKING:
    from pipeline.run import Run


class Embed(Recipe):
    """An embedding. Subclasses live in `pipeline/embed/<kind>.py` and fix `kind` to the module's name."""

    kind: str

    def fit(self, run: Run) -> None:
        """Fit artifacts on the whole corpus (most encoders come fitted)."""

    def column(self, run: Run) -> Column:
        """Column `embed` with the field `vector`: FixedSizeList<float16>[d], unit norm."""
        raise NotImplementedError(f"{type(self).__name__} has no column()")
