"""What a pruner of weights is: it sees one matrix at a time, with sums of what the matrix reads, and returns a mask.

Matrices are (out, in), float32, whatever the model stores (GPT-2's Conv1D is turned and turned back). How much of one
stays is decided elsewhere (`pipeline.compress.allocation`) and arrives as a `Quota`, which is met exactly: by rank,
never by a threshold. Of equal scores the lower index goes first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import ConfigDict

from pipeline.recipe import Recipe

if TYPE_CHECKING:
    import torch

Needs = Literal["none", "moments", "gram", "gradients"]
Scope = Literal["row", "matrix", "global"]


@dataclass(frozen=True)
class Pattern:
    """Of every `of` consecutive weights along a row (the input dimension) `keep` stay: 2 of 4, 4 of 8."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.of:
            raise ValueError(f"pattern {self.keep} of {self.of}: keep at least 1 and fewer than all")


@dataclass(frozen=True)
class Quota:
    """How many weights of a matrix stay: `keep` in all or, where there is a pattern, as that says."""

    keep: int
    pattern: Pattern | None = None


@dataclass(frozen=True)
class Matrix:
    """A weight (out, in) and what was seen of it, float64 sums over `tokens`.

    `seen`: `square` and `abs` (in,), `gram` (in, in) = X^T X as far as the pruner needs them, and `gradient` (out, in),
    the root of the sum over sequences of squared gradients.
    """

    name: str
    weight: torch.Tensor
    tokens: float = 0.0
    seen: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def norms(self) -> torch.Tensor:
        """L2 norm of every input over all tokens, (in,) float32."""
        return self.seen["square"].sqrt().float()


@dataclass
class Pruned:
    """What stays of a matrix: `mask` (out, in) bool, True where kept, and `weight` (out, in), 0 elsewhere.

    `note`: where something else was done than asked. `left` (out / b, b, b) and `right` (in / b, b, b): block-diagonal
    matrices to multiply the weight with, where the method has them.
    """

    mask: torch.Tensor
    weight: torch.Tensor
    note: str = ""
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None


class Pruner(Recipe, ABC):
    """Prunes one matrix. One file and one class a method; the module's name is its `kind`."""

    kind: str
    needs: ClassVar[Needs] = "none"
    """What has to be seen of a matrix; each of the first three holds those before it."""
    source: ClassVar[str] = ""
    """Paper and equation, in a line."""

    def fits(self, shape: tuple[int, int], pattern: Pattern | None) -> str:
        """Why a matrix (out, in) cannot be pruned this way; empty where it can."""
        if pattern and shape[1] % pattern.of:
            return f"its {shape[1]} inputs are no multiple of {pattern.of}"
        return ""

    @abstractmethod
    def prune(self, matrix: Matrix, quota: Quota) -> Pruned:
        """What stays of a matrix. Raises ValueError where a score is not finite."""


class Criterion(Pruner):
    """A pruner that only scores: what stays is the highest of every row, of the matrix, or of all matrices."""

    scope: Scope = "matrix"

    @abstractmethod
    def scores(self, matrix: Matrix) -> torch.Tensor:
        """Of every weight, (out, in) float32 or float64, finite, greater is more important."""

    def prune(self, matrix: Matrix, quota: Quota) -> Pruned:
        from pipeline.compress.sparse._select import select

        mask = select(self.scores(matrix), quota, self.scope == "row")
        return Pruned(mask, matrix.weight.where(mask, matrix.weight.new_zeros(())))
