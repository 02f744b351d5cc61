"""`materialize`: fill columns, one task a shard, all columns of one pass from one read.

A worker loads the models once, walks its shard batch by batch and writes one part a column. Rows with a null input
are skipped and stay null; rows that a transform refuses, that end without a score, or that alone exhaust the memory or
kill the worker, go to `<run>/quarantine/<column>/` with their address and reason, in a file written before the part
that lacks them. What the engine itself adds to reading and writing is measured in bench/materialize.py.
"""

from __future__ import annotations

import gc
import sys
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
from pipeline.engine.suspects import Suspects
from pipeline.errors import ConfigError, MissingExtra, TamisError
from pipeline.recipe import QUARANTINE, Column, Transform, fingerprint

ROW = "row"
"""The base column: the one that records what of the source is unusable."""


@dataclass(frozen=True)
class Plan:
    """A column and the fingerprint of its values, inputs included; a part's own adds the shard."""

    column: Column
    fingerprint: str

    def part(self, shard: Shard) -> str:
        # Where a shard stands counts for those alone that ask.
        place = [shard.index] if "address.shard" in self.column.inputs else []
        return fingerprint(self.fingerprint, shard.fingerprint, *place)


@dataclass(frozen=True)
class Filling:
    """Unit of work: the columns (by name) to fill for a shard, and those with a quarantine file of an earlier time."""

    shard: Shard
    columns: tuple[str, ...]
    outdated: tuple[str, ...] = ()


@dataclass
class MaterializeTask:
    layout: Layout
    plans: tuple[Plan, ...]
    _opened: dict[str, Transform] = field(default_factory=dict, repr=False)

    def __call__(self, unit: Filling, attempt: int) -> dict[str, Any]:
        """Fill the columns of one shard. Returns rows, bytes and the number of rows quarantined by column."""
        shard = unit.shard
        plans = [p for p in self.plans if p.column.name in unit.columns]
        for plan in plans:
            self._open(plan.column)
        suspects = None
        if attempt:
            suspects = Suspects(self.layout.store, fingerprint([p.part(shard) for p in plans], shard.index))
        # A column may read one that this very pass computes before it: its values are handed on, not read back.
        made = {f"{p.column.name}.{name}" for p in plans for name in stored_fields(p.column).names}
        wanted = dict.fromkeys(r for p in plans for r in p.column.inputs)
        references = [r for r in wanted if r not in made]
        refused: dict[str, list[pa.Table]] = {p.column.name: [] for p in plans}
        read = size = 0
        with ExitStack() as sinks:
            writers = {p.column.name: self._writer(sinks, p, shard) for p in plans}
            for batch in read_shard(self.layout, shard, references, self._rows(plans, attempt)):
                size += batch.nbytes
                for plan in plans:
                    name = plan.column.name
                    values, bad = self._fill(plan.column, batch, read, suspects)
                    writers[name].write(values)
                    refused[name] += bad
                    for field_name in values.schema.names:
                        if (reference := f"{name}.{field_name}") in wanted:
                            batch = batch.append_column(reference, values.column(field_name))
                read += batch.num_rows
            for plan in plans:
                name = plan.column.name
                writers[name].quarantined = self._write_quarantine(plan, unit, refused[name])
        if suspects:
            suspects.forget()
        return {"rows": read, "bytes": size, "bad": {name: w.quarantined for name, w in writers.items()}}

    def _open(self, column: Column) -> None:
        if column.name not in self._opened:
            try:
                self._opened[column.name] = column.open()
            except (ConfigError, MissingExtra):
                raise
            except Exception as error:
                # No shard is to blame, and every one would fail alike: this ends the run.
                raise ConfigError(f"column {column.name!r} cannot start: {type(error).__name__}: {error}") from error

    @staticmethod
    def _rows(plans: Sequence[Plan], attempt: int) -> int:
        """Rows to read at a time: smaller ones only from the third attempt on, when reading itself may be too much."""
        return max(1, max(p.column.batch_rows for p in plans) >> 2 * max(0, attempt - 1))

    def _writer(self, sinks: ExitStack, plan: Plan, shard: Shard) -> PartWriter:
        sink = sinks.enter_context(self.layout.store.sink("columns", plan.column.name, part_name(shard.index)))
        return sinks.enter_context(PartWriter(sink, stored_fields(plan.column), plan.part(shard)))

    def _fill(
        self, column: Column, batch: pa.RecordBatch, start: int, suspects: Suspects | None
    ) -> tuple[pa.RecordBatch, list[pa.Table]]:
        """Values of a batch that begins at row `start` of its shard, null where there are none; the rows refused."""
        refused = _refusals(unusable_rows(column, batch), start + np.arange(batch.num_rows))
        usable = valid_rows(batch, column.inputs)
        inputs = batch.select(list(column.inputs))
        fields = stored_fields(column)
        positions = np.arange(batch.num_rows)
        if usable is not None:
            positions = positions[usable]
            inputs = inputs.take(pa.array(positions))
        if not inputs.num_rows:
            nulls = [pa.nulls(batch.num_rows, f.type) for f in fields]
            return pa.RecordBatch.from_arrays(nulls, schema=fields), refused
        values = self._transform(column, inputs, start + positions, suspects)
        refused += _refusals(values.column(QUARANTINE), start + positions)
        values = values.select(fields.names)
        if usable is not None:
            home = np.cumsum(usable) - 1
            values = values.take(pa.array(home, mask=~usable))
        return values, refused

    def _transform(
        self, column: Column, inputs: pa.RecordBatch, rows: np.ndarray, suspects: Suspects | None
    ) -> pa.RecordBatch:
        """Values and reasons of n >= 1 rows, `rows` in the shard; in steps of the column's own batches."""
        step = 1 if suspects and suspects.near(column.name, rows) else column.batch_rows
        outputs: list[pa.RecordBatch] = []
        for at in range(0, inputs.num_rows, step):
            piece, where = inputs.slice(at, step), rows[at : at + step]
            if not suspects:
                outputs += self._guarded(column, piece)
            elif step == 1 and suspects.guilty(column.name, where[0]):
                outputs.append(_refused_row(column, "its worker died on this row"))
            else:
                with suspects.watching(column.name, where):
                    outputs += self._guarded(column, piece)
        return pa.concat_batches(outputs) if len(outputs) > 1 else outputs[0]

    def _guarded(self, column: Column, batch: pa.RecordBatch) -> list[pa.RecordBatch]:
        """Apply the transform; halve the batch when memory runs out, and refuse a row that needs too much alone."""
        try:
            return [checked(column, batch, self._opened[column.name](batch))]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if batch.num_rows == 1:
                return [_refused_row(column, "out of memory")]
        _free_memory()
        half = batch.num_rows // 2
        return [*self._guarded(column, batch.slice(0, half)), *self._guarded(column, batch.slice(half))]

    def _write_quarantine(self, plan: Plan, unit: Filling, tables: list[pa.Table]) -> int:
        """Write the rows refused, with their addresses; returns how many."""
        names = ("quarantine", plan.column.name, part_name(unit.shard.index))
        if not tables:
            if plan.column.name in unit.outdated:
                self.layout.store.remove(*names)
            return 0
        table = pa.concat_tables(tables)
        where = unit.shard.locate(table["row"].to_numpy())
        described = where.append_column("reason", table["reason"]).append_column("shard_row", table["row"])
        write_part(self.layout.store, names, described, plan.part(unit.shard))
        return int(table.num_rows)


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


def unusable_rows(column: Column, batch: pa.RecordBatch) -> pa.Array | None:
    """Why rows of the source are of no use to a column: n reasons, null where a row is; None where all rows are.

    Unusable texts and ids are recorded once, by the base column; nulls of other source columns by whoever reads them.
    """
    if column.name == ROW:
        return batch.column(REASON) if REASON in batch.schema.names else None
    reasons = None
    for reference in column.inputs:
        if reference.startswith("corpus.") and batch.column(reference).null_count:
            here = pc.if_else(batch.column(reference).is_null(), f"{reference} is null", None)
            reasons = here if reasons is None else pc.coalesce(reasons, here)
    if reasons is not None and REASON in batch.schema.names:
        reasons = pc.if_else(batch.column(REASON).is_null(), reasons, None)
    return reasons


def checked(column: Column, batch: pa.RecordBatch, out: pa.RecordBatch) -> pa.RecordBatch:
    """Hold a transform to its contract, and make its scores canonical: no NaN, no negative zero, a reason for a null.

    Returns the stored fields and, last, the reasons (null where a row has its value).
    """
    if out.num_rows != batch.num_rows:
        raise TamisError(f"column {column.name!r} gave {out.num_rows} rows for {batch.num_rows}")
    names = [f.name for f in column.fields]
    if [n for n in out.schema.names if n != QUARANTINE] != [n for n in names if n != QUARANTINE]:
        raise TamisError(f"column {column.name!r} gave fields {out.schema.names}, its schema says {names}")
    fields = stored_fields(column)
    values = [out.column(f.name).cast(f.type) for f in fields]
    why = pa.nulls(out.num_rows, pa.string())
    if QUARANTINE in out.schema.names:
        why = out.column(QUARANTINE).cast(pa.string())
    if "score" in fields.names:
        at = fields.get_field_index("score")
        values[at] = pc.add(values[at], pa.scalar(0.0, values[at].type))  # -0.0 becomes 0.0
        broken = pc.fill_null(pc.is_nan(values[at]), False)
        if pc.any(broken).as_py():
            why = pc.if_else(broken, "score is NaN", why)
            rows = pa.array(np.arange(len(batch)), mask=broken.to_numpy(zero_copy_only=False))
            values = [v.take(rows) for v in values]
        if values[at].null_count:
            why = pc.if_else(values[at].is_null(), pc.coalesce(why, pa.scalar("no score")), why)
    return pa.RecordBatch.from_arrays([*values, why], [*fields.names, QUARANTINE])


def _refused_row(column: Column, reason: str) -> pa.RecordBatch:
    fields = stored_fields(column)
    values = [*(pa.nulls(1, f.type) for f in fields), pa.array([reason])]
    return pa.RecordBatch.from_arrays(values, [*fields.names, QUARANTINE])


def _refusals(reasons: pa.Array | None, rows: np.ndarray) -> list[pa.Table]:
    """Row in the shard and reason, of the rows that have one."""
    if reasons is None or reasons.null_count == len(reasons):
        return []
    return [pa.table({"row": pa.array(rows, pa.int64()), "reason": reasons}).filter(reasons.is_valid())]


def is_out_of_memory(error: BaseException) -> bool:
    # torch is not imported here to ask: its error is known by name
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _free_memory() -> None:
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()
