"""Columns and statistics for tests of the engine. A module of its own, since actors have to import it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.recipe import Column, Resources, State, Transform, fingerprint

SCORE = pa.schema([("score", pa.float32())])


def column(
    name: str,
    open_: Callable[..., Transform],
    *args: Any,
    inputs: tuple[str, ...] = ("text",),
    fields: pa.Schema = SCORE,
    batch_rows: int = 8,
    resources: Resources = Resources(),
) -> Column:
    identity = fingerprint(open_.__name__, [str(a) for a in args])
    return Column(name, inputs, fields, partial(open_, *args), identity, resources, batch_rows)


def score(values: Any) -> pa.RecordBatch:
    return pa.record_batch([pa.array(values).cast(pa.float32())], schema=SCORE)


def length(factor: float = 1.0) -> Transform:
    """Bytes of the text, times a factor."""
    return lambda batch: score(np.asarray(pc.binary_length(batch.column("text"))) * factor)


def counted(log: Path) -> Transform:
    """`length` that appends the rows of every batch to a file."""

    def transform(batch: pa.RecordBatch) -> pa.RecordBatch:
        with open(log, "a") as file:
            file.write(f"{batch.num_rows}\n")
        return length()(batch)

    return transform


def double(reference: str) -> Transform:
    """Twice another score."""
    return lambda batch: score(pc.multiply(batch.column(reference), 2))


def refusing(word: str) -> Transform:
    """`length`, but a row whose text holds the word is refused."""

    def transform(batch: pa.RecordBatch) -> pa.RecordBatch:
        bad = pc.match_substring(batch.column("text"), word)
        values = pc.if_else(bad, None, pc.binary_length(batch.column("text"))).cast(pa.float32())
        reasons = pc.if_else(bad, f"holds {word}", None)
        return pa.record_batch([values, reasons], names=["score", "quarantine"])

    return transform


def nan_where(word: str) -> Transform:
    """0.0 as -0.0, NaN where the text holds the word."""
    return lambda batch: score(pc.if_else(pc.match_substring(batch.column("text"), word), float("nan"), -0.0))


def hungry(most: int, word: str, seen: Path) -> Transform:
    """Runs out of memory on more than so many rows, and on a row with the word alone."""

    def transform(batch: pa.RecordBatch) -> pa.RecordBatch:
        with open(seen, "a") as file:
            file.write(f"{batch.num_rows}\n")
        if batch.num_rows > most or (batch.num_rows == 1 and holds(batch, word)):
            raise MemoryError(f"{batch.num_rows} rows")
        if holds(batch, word):
            raise MemoryError("the big one")
        return length()(batch)

    return transform


def deadly(word: str, once: Path | None = None) -> Transform:
    """Kills its process at a row with the word; only the first time where a flag file is given."""

    def transform(batch: pa.RecordBatch) -> pa.RecordBatch:
        if holds(batch, word) and (once is None or not once.exists()):
            if once is not None:
                once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return length()(batch)

    return transform


def sticky(word: str, once: Path) -> Transform:
    """Never returns from a row with the word, holding the interpreter's lock; only the first time."""

    def transform(batch: pa.RecordBatch) -> pa.RecordBatch:
        if holds(batch, word) and not once.exists():
            once.touch()
            sum(range(10**12))
        return length()(batch)

    return transform


def failing(word: str) -> Transform:
    """Raises at a row with the word."""

    def transform(batch: pa.RecordBatch) -> pa.RecordBatch:
        if holds(batch, word):
            raise ValueError(f"cannot do {word}")
        return length()(batch)

    return transform


def slow(seconds: float) -> Transform:
    def transform(batch: pa.RecordBatch) -> pa.RecordBatch:
        time.sleep(seconds)
        return length()(batch)

    return transform


def absent() -> Transform:
    raise FileNotFoundError("model.bin")


def holds(batch: pa.RecordBatch, word: str) -> bool:
    return bool(pc.any(pc.match_substring(batch.column("text"), word)).as_py())


@dataclass(frozen=True)
class Total:
    """Statistic: rows, and the sum of a column as float64 (shape (1,)) and, so that order shows, as float32."""

    reference: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.reference,)

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        values = batch.column(0).to_numpy(zero_copy_only=False)
        new = {"rows": np.array([len(values)]), "sum": values.sum(keepdims=True, dtype=np.float32) / np.float32(3)}
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        merged = dict(states[0])
        for state in states[1:]:
            merged = {name: merged[name] + state[name] for name in merged}
        return merged


def groups(table: pa.Table) -> pa.Table:
    """For `regroup`: size of the row's group and the sum of `row.tokens` in it; groups of one row are left out."""
    from pipeline.engine.regroup import key_groups

    found = [
        group.select(["address.shard", "address.row"])
        .append_column("size", pa.array([len(group)] * len(group), pa.int32()))
        .append_column("tokens", pa.array([pc.sum(group["row.tokens"]).as_py()] * len(group), pa.int64()))
        for group in key_groups(table, "row.bytes")
        if len(group) > 1
    ]
    schema = pa.schema(
        [("address.shard", pa.int32()), ("address.row", pa.int64()), ("size", pa.int32()), ("tokens", pa.int64())]
    )
    return pa.concat_tables([schema.empty_table(), *found])
