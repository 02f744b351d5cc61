"""What a method is made of: a recipe, the columns it fills, the statistics it asks for.

A recipe is a frozen pydantic model. Its fields are at once the YAML that a user writes, the documentation and
the identity of what it computes. It knows nothing of Ray, of files or of YAML. The engine (`pipeline.engine`)
knows those, and nothing of methods. They meet in the nouns of this module:

- `Column`: values derived per row. `open()` loads a model once an actor and returns the function from an Arrow
  batch of inputs to an Arrow batch of values.
- `Statistic`: a mergeable summary of the whole corpus.

Inputs are named by references:

| reference | values |
| --- | --- |
| `text` | the corpus's text column, valid UTF-8, never blank |
| `image` | the corpus's images as encoded bytes (binary), never empty, whatever the corpus stores |
| `id` | the corpus's id column (null type where it has none) |
| `corpus.NAME` | any other column of the source |
| `COLUMN.FIELD` | a field of a derived column, e.g. `concept.distance`, `row.tokens` |
| `address.shard`, `address.row` | where the row is: index of its shard (int32), row in the shard (int64) |

A row with a null in any input never reaches a column or a statistic: it is already in quarantine, and its value
stays null. So methods trust their inputs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

QUARANTINE = "quarantine"
"""Optional last field (string) of a transform's output: why this row has no value. Null where it has one."""

Transform = Callable[[pa.RecordBatch], pa.RecordBatch]
"""Inputs (columns named by their references) to outputs (same number of rows, fields of the column)."""

State = dict[str, np.ndarray]
"""What a statistic holds: plain NumPy arrays, no object dtype, so that it is saved without pickle."""


def fingerprint(*parts: Any) -> str:
    """32 hex digits that identify a JSON-able description: the same content, the same digits, on any machine."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Resources:
    """What one actor reserves: cores (also its thread count), GPUs, bytes of memory (0: not reserved)."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory: int = 0


@dataclass(frozen=True)
class Column:
    """Values derived per row, stored as `<run>/columns/<name>/part-00000.parquet`, one part a shard.

    `open` must pickle by reference: a module-level function, a method of a recipe, or `functools.partial` of one.
    The transform must not let a row's value depend on the rows beside it.
    """

    name: str
    inputs: tuple[str, ...]
    fields: pa.Schema
    open: Callable[[], Transform]
    identity: str
    """Fingerprint of the recipe and of the artifacts that it uses; the engine adds the inputs' own."""
    resources: Resources = field(default_factory=Resources)
    batch_rows: int = 1024


class Statistic(Protocol):
    """A mergeable summary. Implementations are frozen dataclasses that pickle.

    `update` folds a batch into the state of one shard (`{}` at first); `merge` joins states, given in the order of
    their shards. The engine always merges by the same tree, so floating-point sums do not depend on the workers.
    """

    @property
    def inputs(self) -> tuple[str, ...]: ...
    def update(self, state: State, batch: pa.RecordBatch) -> State: ...
    def merge(self, states: Sequence[State]) -> State: ...


class Recipe(BaseModel):
    """Base of every recipe: parameters that are checked, hashed and written to the manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: ClassVar[int] = 1
    """Raised when the same parameters begin to give other values."""

    def identity(self, *artifacts: str) -> str:
        """Fingerprint of this recipe and of the artifacts (by fingerprint) that its values depend on."""
        return fingerprint(type(self).__name__, self.version, self.model_dump(mode="json"), list(artifacts))
