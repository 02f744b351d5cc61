"""Where rows come from: the Parquet files of a curated set, of an arranged order or of a packed set, read by ordinal.

A row's ordinal is its place over the files, in their order. What the files are is fixed when a source is opened, by the
run's manifest and every file's footer: names, sizes, the lineage fingerprint that the footer carries, the row groups.
A file that is another when it is read is refused, so a set that is curated anew under a training is an error that names
both fingerprints, never a mixture.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.storage import Store, is_remote, resolve
from pipeline.engine.parts import FINGERPRINT, READERS
from pipeline.errors import ConfigError, CorpusError
from pipeline.output.write import TAMIS
from pipeline.recipe import fingerprint

SPARSE = 0.5
"""Where less of a row group is wanted, that is taken out before the groups of a window are joined."""


@dataclass(frozen=True)
class Part:
    """One file: what it was when the source was opened."""

    uri: str
    size: int
    mark: str
    """Fingerprint in its footer; empty where there is none."""
    groups: tuple[int, ...]
    """Rows of every row group."""

    @property
    def rows(self) -> int:
        return sum(self.groups)


@dataclass(frozen=True)
class RowSource:
    """Rows by ordinal. Pickles as what the footers said; files are opened where they are read."""

    name: str
    parts: tuple[Part, ...]
    schema: pa.Schema
    row_bytes: float
    """Decoded bytes a row, of all columns."""
    packed: bool = False
    ordered: bool = False
    """Whether the files' order is one to keep."""

    @cached_property
    def fingerprint(self) -> str:
        """Of the rows, the files that they lie in and their row groups."""
        return fingerprint([[p.uri.rpartition("/")[2], p.size, p.mark, p.groups] for p in self.parts])

    @cached_property
    def sizes(self) -> np.ndarray:
        """Rows of every row group, over all files; int64 (groups,)."""
        return np.array([n for p in self.parts for n in p.groups], np.int64)

    @cached_property
    def _groups(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Number of the file, number in the file and ordinal of the first row, of every row group."""
        counts = [len(p.groups) for p in self.parts]
        file = np.repeat(np.arange(len(counts)), counts)
        inside = np.concatenate([np.arange(n) for n in counts])
        return file, inside, np.cumsum(self.sizes) - self.sizes

    @property
    def remote(self) -> bool:
        return any(is_remote(p.uri) for p in self.parts)

    def read(self, ordinals: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Rows by ordinal, in the order asked for. Every row group is read once, whole.

        Raises CorpusError for a file that cannot be read or is no longer the one that was opened.
        """
        first = self._groups[2]
        group = np.searchsorted(first, ordinals, side="right") - 1
        local = ordinals - first[group]
        place = np.empty(len(ordinals), np.int64)  # of every row in what is read
        tables: list[pa.Table] = []
        have = 0
        for number in np.unique(group):
            here = np.flatnonzero(group == number)
            table = self._read_group(int(number), columns)
            wanted = local[here]
            if len(here) < SPARSE * table.num_rows:
                table = _take(table, wanted)
                wanted = np.arange(len(here))
            place[here] = have + wanted
            tables.append(table)
            have += table.num_rows
        return _take(pa.concat_tables(tables), place)

    def _read_group(self, number: int, columns: Sequence[str]) -> pa.Table:
        files, inside, _ = self._groups
        part = self.parts[files[number]]
        filesystem, path = resolve(part.uri)
        try:
            with filesystem.open_input_file(path) as source:
                size = source.size()
                file = pq.ParquetFile(source, pre_buffer=is_remote(part.uri))
                mark = _mark(file.metadata)
                if (size, mark) != (part.size, part.mark):
                    raise CorpusError(
                        f"{part.uri} has changed under the loader: it was {_described(part.mark, part.size)}, it is "
                        f"{_described(mark, size)}. Open a new loader on the new set, from its beginning"
                    )
                return file.read_row_group(int(inside[number]), columns=list(columns), use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise CorpusError(
                f"{part.uri}, which the loader opened as {_described(part.mark, part.size)}, cannot be read: {error}"
            ) from error


def _take(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Rows of a table by number; a slice where they follow one another."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
        return table.slice(int(rows[0]), len(rows))
    return table.combine_chunks().take(pa.array(rows))  # over chunks, Arrow's take is ten times as slow


def _described(mark: str, size: int) -> str:
    return f"fingerprint {mark or 'none'} of {size:,} bytes"


def _mark(footer: pq.FileMetaData) -> str:
    return str((footer.metadata or {}).get(FINGERPRINT, b""), "utf-8")


def open_curated(run: str, split: str = "train") -> RowSource:
    """The curated rows of a run. `split`: `validation` is the file that the nanochat layout sets apart.

    Raises ConfigError where the run is not curated, CorpusError where its files are not those of its manifest.
    """
    from pipeline.output.feeding import CuratedFile, CuratedSet

    curated = CuratedSet.at(run)
    files: Sequence[CuratedFile] = curated.files
    if split == "validation":
        if not curated.validated:
            raise ConfigError("split: only a run with output.layout nanochat has a validation set")
        last = _manifest(run)["curated"]["files"][-1]
        files = [CuratedFile(last["file"], last["rows"], last["fingerprint"])]
    expected = [(f.name, f.rows, f.fingerprint) for f in files]
    return _open("curated", curated.directory, expected, "run `tamis curate` again")


def open_order(run: str, name: str) -> RowSource:
    """Curated rows in a stored order, from the files that it was arranged in. Raises ConfigError, CorpusError."""
    from pipeline.output.order.base import StoredOrder

    store = Store(run).child("order", name)
    described = _described_by(run, store, "order.json", "order")
    if described["kind"] == "source":
        return replace(open_curated(run), name=f"order/{name}", ordered=True)
    rows = store.child("rows")
    if not rows.files():
        raise ConfigError(
            f"order: the rows of {name!r} do not lie in its order yet: run `tamis order {run} --kind "
            f"{described['kind']} --rows` first"
        )
    order = StoredOrder(store, described)
    expected = [(p["file"], p["rows"], order.rows_mark(i)) for i, p in enumerate(described["parts"])]
    return _open(f"order/{name}", rows, expected, "arrange the order again", ordered=True)


def open_packed(run: str, name: str) -> RowSource:
    """The sequences of a packed set, in their order where they were packed in one. Raises ConfigError, CorpusError."""
    from pipeline.output.pack.base import part_mark

    store = Store(run).child("packed", name)
    described = _described_by(run, store, "packed.json", "packed")
    mark = described["fingerprint"]
    expected = [(p["file"], p["rows"], part_mark(mark, i)) for i, p in enumerate(described["parts"])]
    ordered = bool(described.get("order"))
    return _open(f"packed/{name}", store, expected, "pack it again", packed=True, ordered=ordered)


def _manifest(run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Store(run).read("manifest.json"))
    return found


def _described_by(run: str, store: Store, file: str, key: str) -> dict[str, Any]:
    """What a set made of the curated rows says it is. Raises ConfigError where it was made of other rows."""
    from pipeline.output.feeding import CuratedSet

    room, _, name = store.uri.rstrip("/").rpartition("/")
    try:
        described: dict[str, Any] = json.loads(store.read(file))
    except (OSError, ValueError) as error:
        there = sorted({path.split("/")[0] for path in Store(room).files(recursive=True)})
        raise ConfigError(f"{key}: {room} has no {name!r}; it has {', '.join(there) or 'nothing'}") from error
    curated = CuratedSet.at(run).fingerprint
    if described["curated"] != curated:
        raise ConfigError(
            f"{key}: {name!r} was made of the curated set {described['curated']}, the run's is now {curated}: make it "
            "again"
        )
    return described


def _open(name: str, directory: Store, expected: Sequence[tuple[str, int, str]], mend: str, **facts: bool) -> RowSource:
    """Read the footers of files given as (name, rows, fingerprint)."""
    if not expected:
        raise ConfigError(f"{directory.uri} has no rows to load")
    there = directory.files()

    def look(file: tuple[str, int, str]) -> tuple[Part, pa.Schema, int]:
        base, rows, wanted = file
        uri = directory.locate(base)
        if base not in there:
            raise CorpusError(f"{uri} is missing, which should have fingerprint {wanted}: {mend}")
        try:
            with directory.filesystem.open_input_file(directory.at(base)) as source:
                footer = pq.read_metadata(source)
        except (pa.ArrowException, OSError) as error:
            raise CorpusError(f"{uri}: {error}: {mend}") from error
        mark = _mark(footer)
        if (footer.num_rows, mark) != (rows, wanted):
            raise CorpusError(
                f"{uri} is not the file that the run describes: it has fingerprint {mark or 'none'} and "
                f"{footer.num_rows:,} rows, the run says {wanted} and {rows:,} rows: {mend}"
            )
        groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
        part = Part(uri, there[base], mark, tuple(g.num_rows for g in groups))
        return part, footer.schema.to_arrow_schema().remove_metadata(), sum(g.total_byte_size for g in groups)

    with ThreadPoolExecutor(READERS) as threads:
        found = list(threads.map(look, expected))
    parts = tuple(part for part, _, _ in found)
    rows = sum(p.rows for p in parts)
    return RowSource(name, parts, found[0][1], sum(size for _, _, size in found) / max(1, rows), **facts)


def default_columns(source: RowSource) -> tuple[str, ...]:
    """What is read unless columns are named: of packed sequences what a model takes, else what the corpus has."""
    if source.packed:
        return ("input_ids", "position_ids", "loss_mask")
    return tuple(name for name in source.schema.names if name != TAMIS)
