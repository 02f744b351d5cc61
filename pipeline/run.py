"""The run: one directory that holds everything derived from a corpus, and the three verbs that fill it.

    <run>/manifest.json     what was asked, what was done, what failed; a person can read it
    <run>/corpus/           the cached listing
    <run>/columns/<name>/   one Parquet part a shard
    <run>/artifacts/<name>/ things fitted on the whole corpus, with their fingerprint in artifact.json
    <run>/quarantine/       rows that could not be used, with address and reason
    <run>/curated/ ...      what the main job writes

Resume, caching and lineage are one thing: the fingerprint. It is made of a recipe's parameters and version and of the
fingerprints of its inputs, and stands in every part and artifact. What carries the expected one is done; anything else
is computed again. So a crash, a changed parameter and an added file need no special case.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import __version__
from pipeline.artifact import Artifact, BuildTask
from pipeline.corpus.chat import TYPES
from pipeline.corpus.listing import File, list_corpus, read_footers
from pipeline.corpus.roles import checked_schema, wanted_columns
from pipeline.corpus.shards import MIB, Shard, default_shard_bytes, plan_shards
from pipeline.corpus.storage import Store
from pipeline.corpus.tar import index_place, is_tar
from pipeline.engine.aggregate import FAN_IN, MANY_SHARDS, FoldTask, MergeTask, load_state, state_name
from pipeline.engine.components import PAIR_BYTES, check_keys, connect_components
from pipeline.engine.connection import Connection
from pipeline.engine.materialize import Filling, MaterializeTask, Plan, stored_fields
from pipeline.engine.parts import part_name, survey
from pipeline.engine.pool import InlinePool, Outcome, Pool, Task
from pipeline.engine.progress import Progress
from pipeline.engine.reading import Layout
from pipeline.engine.regroup import (
    PARTITION_BYTES,
    GatherTask,
    Reduce,
    Regroup,
    ScatterTask,
    SplitTask,
    blocks_of,
    check_key,
)
from pipeline.errors import ConfigError, CorpusError, DiskFull, NoShardLeft, TamisError, TooManyBadRows
from pipeline.lock import RunLock
from pipeline.recipe import Column, Resources, State, Statistic, fingerprint

if TYPE_CHECKING:
    from pipeline.config import Config

__all__ = ["Artifact", "Run"]

LIGHT_BYTES = 256 << 20
"""A pass over stored columns of less than this is done in the driver while Ray is down, which takes longer to start."""
RECUT = 4
"""Shards are cut anew when the size that they should have is so many times off the size that they have."""


@dataclass
class _FooterTask:
    """Read the footers of some files into a table in the run's scratch."""

    store: Store

    def __call__(self, unit: tuple[int, list[File]], attempt: int) -> dict[str, Any]:
        index, files = unit
        with self.store.sink("scratch", "listing", part_name(index)) as sink:
            pq.write_table(read_footers(files, self.store), sink)
        return {"rows": 0, "bytes": 0}


@dataclass
class Run:
    """A run directory in use. Open it with `with Run(config, connect) as run:`; only one process may."""

    config: Config
    connect: Callable[[], Pool]
    quiet: bool = False
    plans: dict[str, Plan] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    """Shards that were given up in this run, with the reason; they take no part in what follows."""

    def __post_init__(self) -> None:
        self.store = Store(self.config.run)
        self.seed = self.config.seed
        self.manifest: dict[str, Any] = {}
        self._engine = Connection(self.connect)
        self._lock = RunLock(self.store)

    # ---- opening and closing

    def __enter__(self) -> Self:
        try:
            self._lock.acquire()
        except (OSError, ValueError) as error:
            raise ConfigError(f"run: cannot write to {self.store.uri}: {error}") from error
        try:
            self._open()
        except BaseException:
            self._engine.close()
            self._lock.release()
            raise
        return self

    def _open(self) -> None:
        with contextlib.suppress(FileNotFoundError, ValueError):
            self.manifest = json.loads(self.store.read("manifest.json"))
        if self.manifest.get("status") in ("running", "failed"):
            self.store.remove_temporaries()
        described = self.config.model_dump(mode="json")
        self.manifest |= {"tamis": __version__, "config": described, "status": "running", "passes": []}
        self._list()
        self.save()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._engine.close()
            if error is not None:
                self.manifest |= {"status": "failed", "error": str(error) or type(error).__name__}
                with contextlib.suppress(OSError):  # a full disk must not hide what went wrong
                    self.save()
        finally:
            self._lock.release()

    def finish(self) -> None:
        """Say that the run is complete, and let go of scratch files."""
        self.store.remove("scratch")
        self.manifest["status"] = "finished with failed shards" if self.failures else "done"
        self.manifest.pop("error", None)
        self.save()

    def save(self) -> None:
        """Write the manifest."""
        self.manifest["failed"] = self.failures
        self.store.write(json.dumps(self.manifest, indent=2, default=str).encode(), "manifest.json")

    @property
    def failures(self) -> list[dict[str, str]]:
        """Everything of the corpus that is not in the result, with the reason: unreadable files and given-up shards."""
        reasons = pc.coalesce(self.listing["error"], self.listing["cut"])
        bad = pa.table({"file": self.listing["uri"], "reason": reasons})
        files: list[dict[str, str]] = bad.filter(
            pc.and_(reasons.is_valid(), pc.invert(self.listing["gone"]))
        ).to_pylist()
        for index, why in sorted(self.failed.items()):
            for piece in self.shards[index].pieces:
                groups = f"{piece.first_group}..{piece.first_group + len(piece.rows) - 1}"
                files.append({"file": piece.uri, "row_groups": groups, "reason": why})
        return files

    # ---- the corpus

    def _list(self) -> None:
        corpus = self.config.corpus
        self.listing = list_corpus(corpus.paths, self.store, wanted_columns(corpus), corpus.refresh, self._read_chunks)
        self.schema = checked_schema(corpus, self.listing)
        self._has_tars = any(map(is_tar, self.listing["uri"].to_pylist()))
        chat = corpus.chat("corpus")
        self.manifest.pop("chat", None)
        if chat is not None:
            chat.check(self.schema)
            self.manifest["chat"] = asdict(chat)
        self.shards = plan_shards(self.listing, self._shard_bytes(), self.store, corpus.max_image_bytes)
        if not self.rows:
            raise CorpusError(f"corpus.path: the corpus has no rows in {len(self.listing)} files")
        self.layout = Layout(self.store, corpus.text, corpus.id, chat, corpus.image_column)
        files, identity = pc.sum(pc.invert(self.listing["gone"])).as_py(), self._live_fingerprint()
        if self.manifest.get("corpus", {}).get("identity", identity) != identity:
            self._sweep()
        self.manifest["corpus"] = {"files": files, "shards": len(self.live), "rows": self.rows, "identity": identity}

    def _sweep(self) -> None:
        """Remove the parts of shards that are no more, and the indexes of tars that are not listed."""
        there = {part_name(s.index) for s in self.live}
        for room in ("columns", "quarantine"):
            for path in self.store.files(room, recursive=True):
                *directory, name = path.split("/")
                if name not in there:
                    self.store.remove(room, *directory, name)
        files = zip(*(self.listing[c].to_pylist() for c in ("uri", "size", "mtime")), strict=True)
        for name in self.store.files("corpus", "tar").keys() - {index_place(*file)[-1] for file in files}:
            self.store.remove("corpus", "tar", name)

    def _shard_bytes(self) -> int:
        """Compressed bytes a shard: as configured, or as before unless the corpus has become quite another."""
        if self.config.corpus.shard_mb:
            size = int(self.config.corpus.shard_mb * MIB)
        else:
            size = default_shard_bytes(self.listing)
            before = self.manifest.get("shard_bytes", size)
            if size / RECUT <= before <= size * RECUT:
                size = before
        self.manifest["shard_bytes"] = size
        return int(size)

    def _read_chunks(self, chunks: list[list[File]]) -> Iterable[pa.Table]:
        if len(chunks) == 1:
            return [read_footers(chunks[0], self.store)]
        self._all("list", _FooterTask(self.store), list(enumerate(chunks)))
        names = [("scratch", "listing", part_name(i)) for i in range(len(chunks))]
        tables = [pq.read_table(pa.BufferReader(self.store.read(*name))) for name in names]
        self.store.remove("scratch", "listing")
        return tables

    @property
    def live(self) -> list[Shard]:
        """Shards that still take part."""
        live = [s for s in self.shards if s.pieces and s.index not in self.failed]
        if not live:
            raise NoShardLeft(f"every shard failed; the first: {next(iter(self.failed.values()))}")
        return live

    @cached_property
    def rows(self) -> int:
        """Rows of the corpus, those of failed shards included."""
        return sum(s.rows for s in self.shards)

    @property
    def tokens_named(self) -> str:
        if not self.config.corpus.has_text:
            return "one an image"
        return self.config.corpus.tokenizer or "bytes/4"

    @property
    def content(self) -> str:
        """What `row.bytes` counts, for people."""
        return "text" if self.config.corpus.has_text else "images"

    # ---- fingerprints

    def identity(self, *references: str) -> str:
        """Fingerprint of the values behind references over the live shards."""
        return fingerprint([self._reference(r) for r in references], self._live_fingerprint())

    def _live_fingerprint(self) -> str:
        known, value = getattr(self, "_live_known", (-1, ""))
        if known != len(self.failed):  # shards only ever drop out
            value = fingerprint([(s.index, s.fingerprint) for s in self.live])
            self._live_known = (len(self.failed), value)
        return value

    def _reference(self, reference: str) -> str:
        sources = self.layout.source_columns(reference)
        column, _, name = reference.partition(".")
        if missing := next((s for s in sources if s not in self.schema.names), None):
            raise ConfigError(f"a recipe reads column {missing!r}; the corpus has {', '.join(self.schema.names)}")
        if sources:
            chat = self.layout.chat if reference in TYPES else None
            value = f"chat:{chat.identity}:{reference}" if chat else f"source:{sources[0]}"
            return value + self._limits(sources[0])
        if column == "address":
            return reference
        if column not in self.plans:
            raise TamisError(f"{reference!r} is read before column {column!r} is planned")
        return f"{self.plans[column].fingerprint}:{name}"

    def _limits(self, source: str) -> str:
        """What of the configuration decides whether a value of the source is usable."""
        corpus = self.config.corpus
        if source == corpus.image:
            return f":{corpus.max_image_bytes}:{corpus.image_roots}"
        return f":{corpus.max_image_bytes}" if self._has_tars else ""

    def plan(self, column: Column) -> Plan:
        """Fix what a column's values depend on; later columns and statistics can then refer to it."""
        inputs = [self._reference(r) for r in column.inputs]
        plan = Plan(column, fingerprint(column.name, column.identity, str(column.fields), inputs))
        self.plans[column.name] = plan
        return plan

    # ---- the verbs

    def materialize(self, columns: Sequence[Column]) -> None:
        """Compute what is missing or stale of some columns; those that need the same actor share one read.

        A column may read those before it, whatever actors they need. Raises TooManyBadRows, NoShardLeft, DiskFull.
        """
        plans = [self.plan(c) for c in columns]
        shapes = [self._resources(p.column.resources) for p in plans]
        passes: list[tuple[Resources, list[Plan]]] = []
        filled_by: dict[str, int] = {}
        for plan, shape in zip(plans, shapes, strict=True):
            earliest = max((filled_by.get(r.partition(".")[0], 0) for r in plan.column.inputs), default=0)
            at = next((i for i in range(earliest, len(passes)) if passes[i][0] == shape), len(passes))
            if at == len(passes):
                passes.append((shape, []))
            passes[at][1].append(plan)
            filled_by[plan.column.name] = at
        for shape, members in passes:
            self._materialize(members, shape)

    def _materialize(self, plans: list[Plan], resources: Resources) -> None:
        todo: dict[int, list[str]] = {}
        bad: dict[str, int] = {}
        for plan in plans:
            stale, bad[plan.column.name] = self._survey(plan)
            for index in stale:
                todo.setdefault(index, []).append(plan.column.name)
        self._check_space(plans, todo)
        outdated = {p.column.name: self.store.files("quarantine", p.column.name) for p in plans} if todo else {}
        units = [
            Filling(self.shards[i], tuple(names), tuple(n for n in names if part_name(i) in outdated[n]))
            for i, names in sorted(todo.items())
        ]
        label = "+".join(p.column.name for p in plans)
        light = self._is_light([r for p in plans for r in p.column.inputs])
        for outcome in self.map(label, MaterializeTask(self.layout, tuple(plans)), units, resources, light):
            if outcome.error:
                self.failed[units[outcome.index].shard.index] = f"{label}: {outcome.error}"
            for name, count in outcome.result.get("bad", {}).items():
                bad[name] += count
            self._check_bad(bad)
        self._check_bad(bad)
        for plan in plans:
            self._note_column(plan, sum(plan.column.name in names for names in todo.values()), bad[plan.column.name])
        self.save()

    def stale(self, column: Column) -> bool:
        """Plan a column; whether some of it is to be computed."""
        return bool(self._survey(self.plan(column))[0])

    def _survey(self, plan: Plan) -> tuple[list[int], int]:
        """Shards whose part is missing or not true, and the rows that the others have in quarantine."""
        wanted = {s.index: (plan.part(s), s.rows) for s in self.live}
        return survey(self.store, ("columns", plan.column.name), wanted)

    def _note_column(self, plan: Plan, computed: int, bad: int) -> None:
        entry = {"fingerprint": plan.fingerprint, "parts": len(self.live), "computed": computed, "quarantined": bad}
        self.manifest.setdefault("columns", {})[plan.column.name] = entry

    def _check_space(self, plans: list[Plan], todo: dict[int, list[str]]) -> None:
        """Say before any work when what will be written cannot fit on the disk."""
        if not self.store.local:
            return
        need = 0
        for plan in plans:
            rows = sum(self.shards[i].rows for i, names in todo.items() if plan.column.name in names)
            width = sum(_bits(f.type) for f in stored_fields(plan.column)) // 8
            need += max(0, rows * width - sum(self.store.files("columns", plan.column.name).values()))
        free = shutil.disk_usage(self.store.path).free
        if need > free:
            names = ", ".join(p.column.name for p in plans)
            raise DiskFull(
                f"{names}: at least {need / 1e9:.1f} GB will be written to {self.store.uri}, where {free / 1e9:.1f} GB "
                "are free; make room, or give the run another directory with --run"
            )

    def _check_bad(self, bad: dict[str, int]) -> None:
        limit = self.config.engine.max_bad_fraction
        for name, count in bad.items():
            if count > limit * self.rows:
                raise TooManyBadRows(
                    f"{count:,} of {self.rows:,} rows are in quarantine for {name!r}, more than "
                    f"engine.max_bad_fraction = {limit:g} allows; see {self.store.locate('quarantine', name)}, "
                    "mend the corpus or raise the limit"
                )

    def aggregate(self, statistic: Statistic, label: str = "") -> State:
        """Fold a statistic over the live shards and merge it as a tree. Returns `{}` where no row was usable.

        A shard that cannot be read is given up, and the others are folded again without it. Raises NoShardLeft.
        """
        directory = ("scratch", f"{type(statistic).__name__}-{uuid.uuid4().hex[:8]}")
        label = label or type(statistic).__name__.lower()
        light = self._is_light(statistic.inputs)
        for reference in statistic.inputs:
            self._reference(reference)
        try:
            count = self._fold(statistic, directory, label, light)
            level = 0
            while count > 1:
                units = [(level, i, count) for i in range(-(-count // FAN_IN))]
                self._all(label, MergeTask(self.store, statistic, directory), units, light, noted=False)
                level, count = level + 1, len(units)
            return load_state(self.store, *directory, state_name(level, 0))
        finally:
            with contextlib.suppress(OSError):
                self.store.remove(*directory)

    def _fold(self, statistic: Statistic, directory: tuple[str, ...], label: str, light: bool) -> int:
        """Fold until every live shard is in; returns how many states there are."""
        thin = not any(self.layout.source_columns(r) for r in statistic.inputs)
        while True:
            live = self.live
            step = FAN_IN if thin and len(live) >= MANY_SHARDS else 1
            groups = [(i // step, tuple(live[i : i + step])) for i in range(0, len(live), step)]
            for outcome in self.map(label, FoldTask(self.layout, statistic, directory), groups, light=light):
                if outcome.error:
                    self.failed |= {s.index: f"{label}: {outcome.error}" for s in groups[outcome.index][1]}
            if len(self.live) == len(live):
                return len(groups)

    def regroup(self, column: Column, key: str, reduce: Reduce) -> None:
        """Bring rows with the same key together and fill a column with what `reduce` finds about them.

        `column.inputs` are the thin values that travel beside the key (integers or `row.key`); its `open` is not used.
        What is found depends on the whole corpus, so a changed shard makes all of it stale. Rows that `reduce` does not
        return are null.
        """
        check_key(key, self._type(key))
        row_bytes = 12 + sum(_bits(self._type(r)) for r in {*column.inputs, key}) // 8

        def rounds(job: Regroup, plan: Plan, stale: set[int], light: bool) -> None:
            split = [job.blocks[i] for i in job.unfinished("split", len(job.blocks))]
            self._all(f"{column.name} split", SplitTask(self.layout, job), split, light)
            gather = job.unfinished("gather", job.partitions)
            self._all(f"{column.name} gather", GatherTask(job, reduce), gather, light)
            scatter = [b for b in job.blocks if any(s.index in stale for s in b[1])]
            self._all(f"{column.name} scatter", ScatterTask(job, plan), scatter, light)

        self._together(column, key, row_bytes, rounds)

    def connect_rows(self, column: Column, keys: str) -> None:
        """Fill a column of one int64 field with the connected component of every row; see `pipeline.engine.components`.

        Rows that share one of their `keys`, a reference to fixed-size lists of integers, are connected. Raises
        TamisError for keys of another type.
        """
        check_keys(keys, kind := self._type(keys))

        def rounds(job: Regroup, plan: Plan, stale: set[int], light: bool) -> None:
            connect_components(partial(self._all, light=light), self.layout, job, plan)

        self._together(column, keys, kind.list_size * PAIR_BYTES, rounds)

    def _together(
        self, column: Column, key: str, row_bytes: int, rounds: Callable[[Regroup, Plan, set[int], bool], None]
    ) -> None:
        """Fill a column whose values depend on all rows: `rounds` writes its parts where one is stale."""
        everything = fingerprint(self.plan(column).fingerprint, self._reference(key), self._live_fingerprint())
        plan = self.plans[column.name] = Plan(column, everything)
        stale = set(self._survey(plan)[0])
        if stale:
            partitions = max(1, -(-sum(s.rows for s in self.live) * row_bytes // PARTITION_BYTES))
            blocks = blocks_of(self.live, row_bytes)
            job = Regroup(self.store, column.name, column.inputs, key, partitions, blocks, everything)
            rounds(job, plan, stale, self._is_light((*column.inputs, key)))
            self.store.remove("scratch", "regroup", column.name)
        self._note_column(plan, len(stale), 0)
        self.save()

    def _type(self, reference: str) -> pa.DataType:
        """Arrow type of the values behind a reference."""
        if self.layout.chat is not None and reference in TYPES:
            return TYPES[reference]
        if reference == "image":
            return pa.binary()
        if sources := self.layout.source_columns(reference):
            return self.schema.field(sources[0]).type
        column, _, name = reference.partition(".")
        return pa.int64() if column == "address" else self.plans[column].column.fields.field(name).type

    def artifact(
        self, name: str, identity: str, build: Callable[[Path], None], resources: Resources | None = Resources()
    ) -> Artifact:
        """The artifact of a name, built if the stored one is of another identity.

        `build` writes files into the directory that it is given; it runs in one worker with the given resources, or in
        the driver where these are None (for what takes no time).
        """
        artifact = Artifact(name, identity, self.store.child("artifacts", name))
        if not artifact.stored():
            light = resources is None
            self._all(f"fit {name}", BuildTask(artifact, build), [None], light, resources or Resources())
        self.manifest.setdefault("artifacts", {})[name] = identity
        return artifact

    # ---- the engine

    def map(
        self,
        label: str,
        task: Task,
        units: Sequence[Any],
        resources: Resources = Resources(),
        light: bool = False,
        noted: bool = True,
    ) -> Iterator[Outcome]:
        """Run a task over units with progress, and note the pass in the manifest.

        `light`: not worth starting Ray for; done in the driver unless Ray is up already. `noted`: worth telling people.
        """
        if not units:
            return
        pool: Pool = InlinePool(self.config.engine.retries) if light and not self._engine.up else self._engine.pool()
        lost, started = pool.lost, time.monotonic()
        with Progress(label, len(units), self.quiet or not noted) as progress:
            for outcome in pool.map(task, units, self._resources(resources)):
                self._lock.check()
                progress.add(outcome.result.get("rows", 0), outcome.result.get("bytes", 0), outcome.error is not None)
                yield outcome
        entry = {
            "pass": label,
            "units": len(units),
            "failed": progress.failed,
            "rows": progress.rows,
            "bytes": progress.bytes,
            "seconds": round(time.monotonic() - started, 3),
            "workers_lost": pool.lost - lost,
        }
        self.manifest["passes"] += [entry] if noted else []

    def _all(
        self,
        label: str,
        task: Task,
        units: Sequence[Any],
        light: bool = False,
        resources: Resources = Resources(),
        noted: bool = True,
    ) -> int:
        """Run units none of which may fail, because their results depend on one another.

        Returns the sum of what they count as `changed`.
        """
        changed = 0
        for outcome in self.map(label, task, units, resources, light, noted):
            if outcome.error:
                raise TamisError(f"{label} failed: {outcome.error}")
            changed += outcome.result.get("changed", 0)
        return changed

    def _resources(self, wish: Resources) -> Resources:
        """What an actor reserves: what its recipe wishes, or what the configuration gives where it wishes nothing."""
        engine = self.config.engine
        memory = wish.memory or int(engine.memory_gb * (1 << 30))
        return replace(wish, cpus=engine.cpus if wish == Resources() else wish.cpus, memory=memory)

    def warm_up(self) -> None:
        """Begin to connect, while the driver fits and plans."""
        self._engine.begin()

    def release(self) -> None:
        """Let go of the engine, in the background: what is left to do is light. A heavy pass would connect again."""
        self._engine.release()

    def _is_light(self, references: Sequence[str]) -> bool:
        """Whether a pass reads so little that the driver had better do it."""
        if self._engine.up or any(self.layout.source_columns(r) for r in references):
            return False
        columns = {r.partition(".")[0] for r in references} - {"address"}
        return sum(sum(self.store.files("columns", column).values()) for column in columns) <= LIGHT_BYTES


def _bits(kind: pa.DataType) -> int:
    """Bits that a value takes in a part at the least; 0 for what varies."""
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size) * _bits(kind.value_type)
    try:
        return int(kind.bit_width)
    except ValueError:
        return 0
