"""Vectors that the corpus already holds, scaled to unit length: a list column of float16, float32 or float64.

A vector that is NaN, infinite, zero or of another length than the rest is quarantined with the reason; a null one is
left out, as a null input always is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ConfigDict, Field

from pipeline.embed.base import Embed
from pipeline.errors import ConfigError, CorpusError
from pipeline.recipe import Column, State, Transform, fingerprint
from pipeline.sample import needs_fit
from pipeline.vectors import unit_vectors, vector_schema

if TYPE_CHECKING:
    from pipeline.run import Run

LENGTH = "length.json"


class Precomputed(Embed):
    """A vector column of the source; in YAML `{kind: precomputed, column: NAME}`."""

    model_config = ConfigDict(serialize_by_alias=True)

    kind: Literal["precomputed"] = "precomputed"
    source: str = Field(alias="column", description="source column that holds the vectors")
    dims: int | None = Field(
        None, ge=1, description="length of a vector (default: the type's, or the most common length)"
    )

    def fit(self, run: Run) -> None:
        self._length(run)

    def column(self, run: Run) -> Column:
        dims = self._length(run)
        reference = f"corpus.{self.source}"
        return Column(
            "embed", (reference,), vector_schema(dims), partial(_open, reference, dims), self.identity(str(dims))
        )

    def _length(self, run: Run) -> int:
        """Length of a vector. Raises ConfigError where the column is missing, holds no floats or has another length."""
        if self.source not in run.schema.names:
            raise ConfigError(
                f"embed.column: the corpus has no column {self.source!r}; it has {', '.join(run.schema.names)}"
            )
        kind = run.schema.field(self.source).type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not is_list or not pa.types.is_floating(kind.value_type):
            raise ConfigError(f"embed.column: {self.source!r} is {kind}, not a list of float16, float32 or float64")
        if pa.types.is_fixed_size_list(kind):
            if self.dims not in (None, kind.list_size):
                raise ConfigError(
                    f"embed.dims is {self.dims}, but {self.source!r} holds vectors of {kind.list_size}: leave dims out"
                )
            return int(kind.list_size)
        return self.dims or self._most_common_length(run)

    def _most_common_length(self, run: Run) -> int:
        reference = f"corpus.{self.source}"
        identity = fingerprint("most common length", run.identity(reference))
        lengths = run.aggregate(Lengths(reference)) if needs_fit(run, "vector-length", identity) else {}
        artifact = run.artifact("vector-length", identity, partial(_write_length, lengths), resources=None)
        return int(json.loads((artifact.local() / LENGTH).read_text())["most_common"])


@dataclass(frozen=True)
class Lengths:
    """Statistic: how many lists have which length. State: `length` (m,) ascending and `rows` (m,), int64."""

    reference: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.reference,)

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        length, rows = np.unique(pc.list_value_length(batch.column(self.reference)).to_numpy(), return_counts=True)
        counted = {"length": length.astype(np.int64), "rows": rows.astype(np.int64)}
        return self.merge([state, counted]) if state else counted

    def merge(self, states: Sequence[State]) -> State:
        length, place = np.unique(np.concatenate([s["length"] for s in states]), return_inverse=True)
        rows = np.zeros(len(length), np.int64)
        np.add.at(rows, place, np.concatenate([s["rows"] for s in states]))
        return {"length": length, "rows": rows}


def _write_length(lengths: State, directory: Path) -> None:
    if not lengths or not lengths["length"].any():
        raise CorpusError("embed.column: no row of the corpus holds a vector")
    rows = np.where(lengths["length"] > 0, lengths["rows"], 0)
    found = {
        "most_common": int(lengths["length"][rows.argmax()]),
        "rows": int(rows.max()),
        "of": int(lengths["rows"].sum()),
    }
    (directory / LENGTH).write_text(json.dumps(found, indent=2))


def _open(reference: str, dims: int) -> Transform:
    def embed(batch: pa.RecordBatch) -> pa.RecordBatch:
        values = batch.column(reference)
        lengths = pc.list_value_length(values).to_numpy()
        fits = lengths == dims
        flat = (values if fits.all() else values.filter(pa.array(fits))).flatten()
        flat = flat if pa.types.is_float64(flat.type) else flat.cast(pa.float32())
        x = np.zeros((len(values), dims), flat.type.to_pandas_dtype())
        x[fits] = flat.to_numpy(zero_copy_only=False).reshape(-1, dims)  # a null number in a list becomes NaN
        reasons = np.full(len(values), "", dtype=object)
        reasons[~fits] = [f"vector has {length} numbers instead of {dims}" for length in lengths[~fits]]
        return unit_vectors(x, reasons)

    return embed
