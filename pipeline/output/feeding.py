"""A curated run opened again to feed from it: the curated set as it lies, and the engine over the columns behind it.

Nothing of the curation is computed again or written: columns are taken as they are stored, and the corpus itself is not
read, so it may be gone by now. What is added is the column `curated`, which gives every row that is fed its `ordinal`,
its place over the curated files from 0 on. A row that was not kept has none, so it takes no part in any verb that reads
`curated.ordinal`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import Config, CorpusConfig, EngineConfig
from pipeline.corpus.chat import Chat
from pipeline.corpus.shards import Shard, plan_shards
from pipeline.corpus.storage import Store
from pipeline.engine.materialize import Plan
from pipeline.engine.parts import FINGERPRINT, part_name, write_part
from pipeline.engine.pool import Pool, Task
from pipeline.engine.reading import Layout, read_shard
from pipeline.engine.regroup import Block, blocks_of, unopened
from pipeline.errors import ConfigError, CorpusError, TamisError
from pipeline.output.curated import VALIDATION
from pipeline.output.write import CountKept
from pipeline.recipe import Column, Resources, fingerprint
from pipeline.run import Run

ORDINAL = "curated.ordinal"
NUMBERED = pa.schema([("ordinal", pa.int64())])
FLAG_ROWS = 1 << 16
ROW_BYTES = 64
"""What a row takes where rows are numbered or put in order: so many shards share a task."""


@dataclass(frozen=True)
class CuratedFile:
    name: str
    rows: int
    fingerprint: str


@dataclass(frozen=True)
class CuratedSet:
    """The files that a curated run feeds, in their order; that of nanochat's validation is none of them."""

    directory: Store
    files: tuple[CuratedFile, ...]
    text: str | None
    """The text column; None where texts are made of conversations, or there are none."""
    chat: Chat | None
    validated: bool
    """Whether some kept rows were set apart to validate with."""

    @classmethod
    def at(cls, uri: str) -> CuratedSet:
        """The set of a run directory. Raises ConfigError where there is no finished curation."""
        try:
            manifest = json.loads(Store(uri).read("manifest.json"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{uri} is not a curated run: run `tamis curate` first ({error})") from error
        return cls.of(uri, manifest)

    @classmethod
    def of(cls, uri: str, manifest: dict[str, Any]) -> CuratedSet:
        status = manifest.get("status")
        if "curated" not in manifest or status not in ("done", "finished with failed shards"):
            raise ConfigError(f"{uri} is not a finished curation (it is {status!r}): run `tamis curate` again")
        config, curated = manifest["config"], manifest["curated"]
        validated = config["output"]["layout"] == "nanochat"
        files = [CuratedFile(f["file"], f["rows"], f["fingerprint"]) for f in curated["files"]]
        own = config["output"].get("path") is None  # then the files are where the run is, even if that was moved
        directory = Store(uri).child("curated") if own else Store(curated["path"])
        chat = Chat.stored(manifest["chat"]) if manifest.get("chat") else None
        fed = tuple(files[:-1] if validated else files)
        return cls(directory, fed, config["corpus"].get("text"), chat, validated)

    @property
    def fingerprint(self) -> str:
        """Changes with the rows and with the files that they lie in."""
        return fingerprint([[f.name, f.rows, f.fingerprint] for f in self.files])

    @property
    def rows(self) -> int:
        return sum(f.rows for f in self.files)

    @cached_property
    def edges(self) -> np.ndarray:
        """Ordinal of the first row of every file, and of what would come after the last; int64 (files + 1,)."""
        return np.cumsum([0, *(f.rows for f in self.files)], dtype=np.int64)

    @cached_property
    def schema(self) -> pa.Schema:
        with self._open(0) as file:
            return file.schema_arrow.remove_metadata()

    @cached_property
    def bytes(self) -> int:
        """Compressed bytes of the files."""
        there = self.directory.files()
        return sum(there.get(f.name, 0) for f in self.files)

    def batches(self, number: int, columns: Sequence[str] | None = None, rows: int = 4096) -> Iterator[pa.RecordBatch]:
        """The rows of one file, in order. Raises CorpusError for a file that is not the one of the manifest."""
        with self._open(number) as file:
            yield from file.iter_batches(rows, columns=columns, use_threads=False)

    def _open(self, number: int) -> pq.ParquetFile:
        wanted = self.files[number]
        where = self.directory.locate(wanted.name)
        try:
            file = pq.ParquetFile(
                self.directory.filesystem.open_input_file(self.directory.at(wanted.name)),
                pre_buffer=not self.directory.local,
            )
        except (pa.ArrowException, OSError) as error:
            raise CorpusError(f"{where}: {error}; run `tamis curate` again") from error
        mark = (file.metadata.metadata or {}).get(FINGERPRINT, b"").decode()
        if (mark, file.metadata.num_rows) != (wanted.fingerprint, wanted.rows):
            file.close(force=True)
            raise CorpusError(f"{where} has changed since the run was curated: run `tamis curate` again")
        return file


@dataclass
class FedRun(Run):
    """A curated run to feed from; `with feeding(uri) as run:`. Columns are named by `adopt` before they are read."""

    def _open(self) -> None:
        self.manifest = json.loads(self.store.read("manifest.json")) | {"passes": []}
        self.curated = CuratedSet.of(self.store.uri, self.manifest)
        self._list()

    def save(self) -> None:
        """The manifest is the curation's and stays as it is; what is fed says what it is in files of its own."""

    def _list(self) -> None:
        self.listing = pq.read_table(pa.BufferReader(self.store.read("corpus", "files.parquet")))
        self.shards = plan_shards(self.listing, self.manifest["shard_bytes"])
        self.layout = Layout(self.store, self.config.corpus.text, self.config.corpus.id)
        with np.load(io.BytesIO(self.store.read("artifacts", "selection", "shards.npz")), allow_pickle=False) as arrays:
            taken = set(arrays["shard"].tolist())
        self.failed = {s.index: "was given up" for s in self.shards if s.pieces and s.index not in taken}

    def adopt(self, name: str) -> Column:
        """Make a stored column known, so that its fields can be referred to. Raises ConfigError where there is none."""
        if name not in self.plans:
            stored = self.manifest.get("columns", {})
            if name not in stored:
                there = ", ".join(sorted(stored))
                raise ConfigError(f"{self.store.uri} has no column {name!r}; it has {there}")
            try:
                path = self.store.at("columns", name, part_name(self.live[0].index))
                fields = pq.read_schema(self.store.filesystem.open_input_file(path)).remove_metadata()
            except (OSError, pa.ArrowException) as error:
                raise ConfigError(f"{name!r} of {self.store.uri} is not complete ({error}): curate again") from error
            self.plans[name] = Plan(Column(name, (), fields, unopened, ""), stored[name]["fingerprint"])
        return self.plans[name].column

    def each(self, label: str, task: Task, units: Sequence[Any], resources: Resources = Resources()) -> list[Any]:
        """Results of a task over units none of which may fail, in their order. Raises TamisError."""
        results: list[Any] = [None] * len(units)
        for outcome in self.map(label, task, units, resources, light=self._light):
            if outcome.error:
                raise TamisError(f"{label} failed: {outcome.error}")
            results[outcome.index] = outcome.result
        return results

    @property
    def _light(self) -> bool:
        """Whether so little is fed that it is not worth starting Ray for."""
        return self.curated.bytes <= LIGHT_BYTES

    def blocks(self) -> tuple[Block, ...]:
        """Shards, so many to a task as thin rows allow."""
        return blocks_of(self.live, ROW_BYTES)

    def number(self) -> None:
        """Fill the column `curated`: `ordinal` (int64) of every row that is fed."""
        if "curated" in self.plans:
            return
        flags = ["select", *([VALIDATION] if self.curated.validated else [])]
        for name in flags:
            self.adopt(name)
        references = tuple(f"{name}.keep" for name in flags)
        column = Column("curated", references, NUMBERED, unopened, fingerprint("curated", 1))
        counted = self.aggregate(CountKept((*references, "address.shard")), label="count")
        kept = np.zeros(len(self.shards), np.int64)
        kept[counted["shard"]] = counted["rows"]
        if kept.sum() != self.curated.rows:
            raise TamisError(
                f"{self.store.uri}: {kept.sum():,} rows are marked as kept, {self.curated.rows:,} lie in the curated "
                "files: run `tamis curate` again"
            )
        first = np.concatenate([[0], np.cumsum(kept)])
        # Where a row comes depends on the rows before it, so one changed shard makes all parts stale.
        plan = Plan(column, fingerprint(self.plan(column).fingerprint, self._live_fingerprint()))
        stale = set(self._survey(plan)[0])
        units = [[(s, int(first[s.index])) for s in shards if s.index in stale] for _, shards in self.blocks()]
        self.each("number", NumberTask(self.layout, references, plan), [u for u in units if u])
        self.plans["curated"] = plan


LIGHT_BYTES = 8 << 20


@dataclass
class NumberTask:
    """Write the ordinals of some shards, each given with that of its first row."""

    layout: Layout
    flags: tuple[str, ...]
    plan: Plan

    def __call__(self, unit: list[tuple[Shard, int]], attempt: int) -> dict[str, Any]:
        rows = 0
        for shard, first in unit:
            keep = []
            for batch in read_shard(self.layout, shard, self.flags, FLAG_ROWS):
                kept = pc.fill_null(batch.column(0), False)
                for other in range(1, len(self.flags)):
                    kept = pc.and_not(kept, pc.fill_null(batch.column(other), False))
                keep.append(kept)
            flags = pa.concat_arrays(keep).to_numpy(zero_copy_only=False)
            ordinals = pa.array(first - 1 + np.cumsum(flags), pa.int64(), mask=~flags)
            table = pa.Table.from_arrays([ordinals], schema=NUMBERED)
            write_part(self.layout.store, ("columns", "curated", part_name(shard.index)), table, self.plan.part(shard))
            rows += shard.rows
        return {"rows": rows, "bytes": 8 * rows}


def feeding(
    uri: str, pool: Callable[[EngineConfig], Pool], engine: dict[str, Any] | None = None, quiet: bool = False
) -> FedRun:
    """The curated run of a directory, to be opened with `with`. `engine` replaces keys of the run's engine.

    Raises ConfigError where there is no finished curation.
    """
    CuratedSet.at(uri)  # before a lock is taken, which would make the directory
    described = json.loads(Store(uri).read("manifest.json"))["config"]
    corpus = CorpusConfig.model_construct(**described["corpus"])
    wanted = EngineConfig.model_validate(described["engine"] | (engine or {}))
    fields: dict[str, Any] = {"corpus": corpus, "engine": wanted, "run": uri, "seed": described["seed"]}
    config = Config.model_construct(**fields)  # nothing of the criteria is needed, which may be a user's own
    return FedRun(config, lambda: pool(wanted), quiet)
