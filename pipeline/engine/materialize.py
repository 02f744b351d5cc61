"""`materialize`: fill columns, one task a shard, all columns of one pass from one read.

A worker loads the models once, walks its shard batch by batch and writes one part a column. Rows with a null input
are skipped and stay null; rows that a transform refuses, that hold a NaN score, or that alone exhaust the memory, go
to `<run>/quarantine/<column>/` with their address and reason, in a file written before the part that lacks them.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.corpus.shards import Shard
from pipeline.engine.parts import PartWriter, part_name, write_part
from pipeline.engine.reading import REASON, Layout, read_shard
from pipeline.errors import TamisError
from pipeline.recipe import QUARANTINE, Column, Transform, fingerprint

ROW = "row"
"""The base column: the one that records what of the source is unusable."""

SINGLE_ROWS_FROM = 2
"""From this attempt on, rows go through one by one, so that the one which kills its worker is found."""


@dataclass(frozen=True)
class Plan:
    """A column and the fingerprint of its values, inputs included; a part's own adds the shard."""

    column: Column
    fingerprint: str

    def part(self, shard: Shard) -> str:
        return fingerprint(self.fingerprint, shard.fingerprint)


@dataclass
class MaterializeTask:
    layout: Layout
    plans: tuple[Plan, ...]
    _opened: dict[str, Transform] = field(default_factory=dict, repr=False)

    def __call__(self, unit: tuple[Shard, tuple[str, ...]], attempt: int) -> dict[str, Any]:
        """Fill the named columns of one shard. Returns rows, bytes and the number of rows quarantined."""
        shard, names = unit
        plans = [p for p in self.plans if p.column.name in names]
        for plan in plans:
            if plan.column.name not in self._opened:
                self._opened[plan.column.name] = plan.column.open()
        # A column may read one that this very pass computes before it: its values are handed on, not read back.
        made = {f"{p.column.name}.{f.name}" for p in plans for f in stored_fields(p.column)}
        references = list(dict.fromkeys(r for p in plans for r in p.column.inputs if r not in made))
        rows = max(1, max(p.column.batch_rows for p in plans) >> attempt)
        bad: dict[str, list[pa.Table]] = {p.column.name: [] for p in plans}
        read = size = 0
        with ExitStack() as sinks:
            writers = {p.column.name: self._writer(sinks, p, shard) for p in plans}
            for batch in read_shard(self.layout, shard, references, rows):
                size += batch.nbytes
                for plan in plans:
                    out, refused = self._compute(plan, shard, batch, read, attempt)
                    writers[plan.column.name].write(out)
                    bad[plan.column.name] += refused
                    for field in out.schema:
                        batch = batch.append_column(f"{plan.column.name}.{field.name}", out.column(field.name))
                read += batch.num_rows
            for plan in plans:
                self._write_quarantine(plan, shard, bad[plan.column.name])
        self._forget_suspects(shard, plans, attempt)
        return {"rows": read, "bytes": size, "bad": {name: sum(t.num_rows for t in tables) for name, tables in bad.items()}}

    def _writer(self, sinks: ExitStack, plan: Plan, shard: Shard) -> PartWriter:
        sink = sinks.enter_context(self.layout.store.sink("columns", plan.column.name, part_name(shard.index)))
        return sinks.enter_context(PartWriter(sink, stored_fields(plan.column), plan.part(shard)))

    def _compute(
        self, plan: Plan, shard: Shard, batch: pa.RecordBatch, start: int, attempt: int
    ) -> tuple[pa.RecordBatch, list[pa.Table]]:
        """Values of one batch, null where there are none, and the rows refused (row in the shard, reason)."""
        column = plan.column
        refused = []
        if column.name == ROW and REASON in batch.schema.names:
            reasons = batch.column(REASON)
            if reasons.null_count < len(reasons):
                at = np.flatnonzero(reasons.is_valid().to_numpy(zero_copy_only=False))
                refused.append(_refusal(at + start, reasons.take(pa.array(at))))
        usable = valid_rows(batch, column.inputs)
        inputs = batch.select(list(column.inputs))
        positions = None
        if usable is not None:
            positions = np.flatnonzero(usable)
            inputs = inputs.take(pa.array(positions))
        if inputs.num_rows == 0:
            fields = stored_fields(column)
            return pa.RecordBatch.from_arrays([pa.nulls(batch.num_rows, f.type) for f in fields], schema=fields), refused
        outputs, at = [], 0
        step = 1 if attempt >= SINGLE_ROWS_FROM else column.batch_rows
        while at < inputs.num_rows:
            piece = inputs.slice(at, step)
            first = int(positions[at]) if positions is not None else at
            outputs += self._guarded(plan, shard, piece, start + first, attempt)
            at += piece.num_rows
        table = pa.Table.from_batches(outputs).combine_chunks()
        out = table.to_batches()[0]
        local = positions if positions is not None else np.arange(inputs.num_rows)
        reasons = out.column(QUARANTINE)
        if reasons.null_count < len(reasons):
            at_bad = np.flatnonzero(reasons.is_valid().to_numpy(zero_copy_only=False))
            refused.append(_refusal(local[at_bad] + start, reasons.take(pa.array(at_bad))))
        out = out.select(stored_fields(column).names)
        if positions is not None:
            scatter = np.full(batch.num_rows, -1)
            scatter[positions] = np.arange(len(positions))
            out = out.take(pa.array(scatter, mask=scatter < 0))
        return out, refused

    def _guarded(self, plan: Plan, shard: Shard, batch: pa.RecordBatch, row: int, attempt: int) -> list[pa.RecordBatch]:
        """Apply the transform; halve the batch when memory runs out, and give up a row that needs too much alone."""
        column = plan.column
        suspect = ("scratch", "suspects", f"{plan.part(shard)}.txt")
        if attempt >= SINGLE_ROWS_FROM:
            store = self.layout.store
            if store.exists(*suspect) and int(store.read(*suspect)) == row:
                return [_refused_row(column, "its worker died on this row")]
            store.write(str(row).encode(), *suspect)
        try:
            return [checked(column, batch, self._opened[column.name](batch))]
        except Exception as error:
            if not _out_of_memory(error):
                raise
            if batch.num_rows == 1:
                return [_refused_row(column, "out of memory")]
        gc.collect()
        half = batch.num_rows // 2
        return self._guarded(plan, shard, batch.slice(0, half), row, 0) + self._guarded(plan, shard, batch.slice(half), row + half, 0)

    def _write_quarantine(self, plan: Plan, shard: Shard, tables: list[pa.Table]) -> None:
        names = ("quarantine", plan.column.name, part_name(shard.index))
        if not tables:
            self.layout.store.remove(*names)
            return
        table = pa.concat_tables(tables)
        where = shard.locate(table["row"].to_numpy())
        described = where.append_column("reason", table["reason"].cast(pa.string()))
        write_part(self.layout.store, names, described.append_column("shard_row", table["row"]), plan.part(shard))

    def _forget_suspects(self, shard: Shard, plans: list[Plan], attempt: int) -> None:
        if attempt >= SINGLE_ROWS_FROM:
            for plan in plans:
                self.layout.store.remove("scratch", "suspects", f"{plan.part(shard)}.txt")


def stored_fields(column: Column) -> pa.Schema:
    """What a part holds: the column's fields without the reasons."""
    return pa.schema([f for f in column.fields if f.name != QUARANTINE])


def valid_rows(batch: pa.RecordBatch, references: Sequence[str]) -> np.ndarray | None:
    """Boolean mask of the rows that have all inputs; None where all rows do."""
    valid = None
    for reference in references:
        values = batch.column(reference)
        if values.null_count:
            here = values.is_valid().to_numpy(zero_copy_only=False)
            valid = here if valid is None else valid & here
    return valid


def checked(column: Column, batch: pa.RecordBatch, out: pa.RecordBatch) -> pa.RecordBatch:
    """Hold a transform to its contract, and make its scores canonical: no NaN, no negative zero.

    Returns the stored fields and, last, the reasons (null where a row has its value).
    """
    if out.num_rows != batch.num_rows:
        raise TamisError(f"column {column.name!r} gave {out.num_rows} rows for {batch.num_rows}")
    names = [f.name for f in column.fields]
    if [n for n in out.schema.names if n != QUARANTINE] != [n for n in names if n != QUARANTINE]:
        raise TamisError(f"column {column.name!r} gave fields {out.schema.names}, its schema says {names}")
    fields = stored_fields(column)
    values = [out.column(f.name) if out.column(f.name).type == f.type else out.column(f.name).cast(f.type) for f in fields]
    why = out.column(QUARANTINE) if QUARANTINE in out.schema.names else pa.nulls(out.num_rows, pa.string())
    if "score" in fields.names:
        at = fields.get_field_index("score")
        values[at] = pc.add(values[at], pa.scalar(0.0, values[at].type))  # -0.0 becomes 0.0
        broken = pc.fill_null(pc.is_nan(values[at]), False)
        if pc.any(broken).as_py():
            why = pc.if_else(broken, "score is NaN", why)
            values = [v.take(pa.array(np.arange(len(v)), mask=broken.to_numpy(zero_copy_only=False))) for v in values]
    return pa.RecordBatch.from_arrays([*values, why], [*fields.names, QUARANTINE])


def _refused_row(column: Column, reason: str) -> pa.RecordBatch:
    fields = stored_fields(column)
    values = [*(pa.nulls(1, f.type) for f in fields), pa.array([reason])]
    return pa.RecordBatch.from_arrays(values, [*fields.names, QUARANTINE])


def _refusal(rows: np.ndarray, reasons: pa.Array) -> pa.Table:
    return pa.table({"row": pa.array(rows, pa.int64()), "reason": reasons.cast(pa.string())})


def _out_of_memory(error: Exception) -> bool:
    # torch is not imported here to ask: its error is known by name
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
