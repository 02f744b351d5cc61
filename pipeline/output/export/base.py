"""The contract of an export: curated rows, in an order, in a trainer's own format, through that format's own library.

Every part of the fed rows becomes one shard, written by one worker into a directory of its own on its machine and then
copied to where it belongs, file by file, each of which appears whole. When all are there, `finish` writes what says how
many there are (an index, a card). The run remembers what it has exported where, `<run>/exports/<name>/`, so the same
command after a crash, or after a change of the curated set, writes what is missing or stale, and removes shards of its
own that are no more. Files that Tamis did not write are not overwritten.
"""

from __future__ import annotations

import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.corpus.storage import Store
from pipeline.engine.parts import part_name
from pipeline.errors import ConfigError
from pipeline.output.feeding import FedRun
from pipeline.output.order._arrange import FedPart, fed_parts
from pipeline.output.order.base import StoredOrder
from pipeline.output.write import TAMIS
from pipeline.recipe import Recipe, fingerprint

BATCH_ROWS = 1024


@dataclass(frozen=True)
class Shard:
    """One shard to write: which of how many, and its rows."""

    number: int
    shards: int
    part: FedPart
    columns: tuple[str, ...]
    text: str | None

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        for batch, _ in self.part.batches(list(columns or self.columns), BATCH_ROWS):
            yield batch


@dataclass(frozen=True)
class Exported:
    """What is known when all shards are there."""

    rows: int
    shards: int
    schema: pa.Schema
    run: str
    card: str
    """The card of the curated set, its README.md; empty where there is none."""
    files: tuple[str, ...]


class Export(Recipe, ABC):
    """A format. Subclasses live in `pipeline/output/export/<kind>.py` and fix `kind` to the module's name."""

    kind: str
    columns: tuple[str, ...] | None = None
    """Columns of the curated set that are exported (default: all but what Tamis says of them)."""

    def check(self, schema: pa.Schema) -> None:
        """Raise MissingExtra where the format's library is not there, ConfigError for columns that it cannot hold."""

    @abstractmethod
    def write(self, shard: Shard, directory: Path) -> dict[str, Any]:
        """Write one shard below a directory of its own; its files' names say which shard they are of.

        Returns notes (JSON) for `finish`. Rows come from `shard.batches()`.
        """

    def finish(self, exported: Exported, notes: Sequence[dict[str, Any]]) -> dict[str, bytes]:
        """Files that are written once all shards are there: name and content. `notes`: those of every shard."""
        return {}

    def chosen(self, run: FedRun) -> tuple[str, ...]:
        """Columns to export. Raises ConfigError."""
        there = run.curated.schema.names
        wanted = self.columns or tuple(n for n in there if n != TAMIS)
        if missing := next((c for c in wanted if c not in there), None):
            raise ConfigError(f"export: the curated set has no column {missing!r}; it has {', '.join(there)}")
        return wanted


def write_export(run: FedRun, export: Export, target: str, order: StoredOrder | None) -> dict[str, Any]:
    """Export the curated rows in an order (None: as they lie) to a directory. Returns what was written, and where.

    Raises ConfigError, MissingExtra and TamisError.
    """
    columns = export.chosen(run)
    schema = pa.schema([run.curated.schema.field(c) for c in columns])
    export.check(schema)
    parts = fed_parts(run, order)
    directory = Store(target)
    name = f"{export.kind}-{fingerprint(directory.uri)[:8]}"
    identity = fingerprint("export", export.identity(), directory.uri, columns, len(parts))
    memory = run.store.child("exports", name)
    remembered = _remembered(memory)
    there = directory.files(recursive=True)
    _check_foreign(directory, there, remembered)
    task = ExportTask(export, directory, memory, identity)
    shards = [Shard(i, len(parts), part, columns, run.curated.text) for i, part in enumerate(parts)]
    todo = [s for s in shards if not _done(memory, s, task.mark(s), there)]
    run.each(f"export {export.kind}", task, todo)
    notes = [json.loads(memory.read(_memo(s.number))) for s in shards]
    files = tuple(f for n in notes for f in n["files"])
    card = run.store.read("README.md").decode() if run.store.exists("README.md") else ""
    rows = sum(n["rows"] for n in notes)  # more than the curated ones where an order repeats some
    exported = Exported(rows, len(parts), schema, run.store.uri, card, files)
    closing = export.finish(exported, [n["notes"] for n in notes])
    for file, content in closing.items():
        directory.write(content, file)
    stale = remembered - set(files) - set(closing)
    for file in stale & there.keys():
        directory.remove(file)
    memos = {_memo(s.number) for s in shards} | {"export.json"}
    for memo in set(memory.files()) - memos:
        memory.remove(memo)
    described = {
        "format": export.kind,
        "target": directory.uri,
        "recipe": export.model_dump(mode="json"),
        "curated": run.curated.fingerprint,
        "order": order.name if order else None,
        "rows": rows,
        "files": [*files, *closing],
    }
    memory.write(json.dumps(described, indent=2).encode(), "export.json")
    return described


def _memo(number: int) -> str:
    return part_name(number).replace(".parquet", ".json")


def _remembered(memory: Store) -> set[str]:
    """Files that earlier exports of this run have written to the target."""
    found: set[str] = set()
    for name in memory.files():
        found |= set(json.loads(memory.read(name))["files"])
    return found


def _check_foreign(directory: Store, there: dict[str, int], remembered: set[str]) -> None:
    """Raise ConfigError for a target that holds what is not ours."""
    if foreign := sorted(set(there) - remembered):
        raise ConfigError(
            f"export: {directory.uri} holds {foreign[0]}, which this run has not written there: give an empty directory"
        )


def _done(memory: Store, shard: Shard, mark: str, there: dict[str, int]) -> bool:
    try:
        memo = json.loads(memory.read(_memo(shard.number)))
    except FileNotFoundError:
        return False
    return bool(memo["mark"] == mark and all(there.get(f) == size for f, size in memo["files"].items()))


@dataclass
class ExportTask:
    """Write one shard, copy its files to the target, remember them."""

    export: Export
    target: Store
    memory: Store
    identity: str

    def mark(self, shard: Shard) -> str:
        return fingerprint(self.identity, shard.part.fingerprint)

    def __call__(self, shard: Shard, attempt: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="tamis-export-") as name:
            directory = Path(name)
            notes = self.export.write(shard, directory)
            files = {}
            for path in sorted(p for p in directory.rglob("*") if p.is_file()):
                inside = path.relative_to(directory).as_posix()
                files[inside] = path.stat().st_size
            # What will be there is remembered before it is, so that the rest of a crash is known as ours.
            memo = {"mark": "", "rows": shard.part.rows, "files": files, "notes": notes}
            self.memory.write(json.dumps(memo).encode(), _memo(shard.number))
            for inside in files:
                self._copy(directory / inside, inside)
        self.memory.write(json.dumps(memo | {"mark": self.mark(shard)}).encode(), _memo(shard.number))
        return {"rows": shard.part.rows, "bytes": sum(files.values())}

    def _copy(self, source: Path, name: str) -> None:
        with self.target.sink(name) as sink, open(source, "rb") as stream:
            while block := stream.read(16 << 20):
                sink.write(block)
