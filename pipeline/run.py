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

import json
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import __version__
from pipeline.corpus.listing import list_corpus, read_footers, reference_schema
from pipeline.corpus.shards import MIB, Shard, default_shard_bytes, plan_shards
from pipeline.corpus.storage import Store
from pipeline.corpus.text import is_text
from pipeline.engine.aggregate import FAN_IN, FoldTask, MergeTask, load_state, merge
from pipeline.engine.materialize import MaterializeTask, Plan
from pipeline.engine.parts import part_name, stale
from pipeline.engine.pool import InlinePool, Outcome, Pool, Task
from pipeline.engine.progress import Progress
from pipeline.engine.reading import Layout
from pipeline.engine.regroup import PARTITION_BYTES, GatherTask, Reduce, Regroup, ScatterTask, SplitTask, missing_parts
from pipeline.errors import ConfigError, CorpusError, NoShardLeft, RunLocked, TamisError, TooManyBadRows
from pipeline.recipe import Column, Resources, State, Statistic, fingerprint

if TYPE_CHECKING:
    from pipeline.config import Config

MARKER = "artifact.json"
LIGHT_BYTES = 256 << 20
"""A pass that reads less than this from stored columns runs in the driver when Ray is not up: starting it costs more."""
HEARTBEAT_S = 15.0
STALE_S = 120.0


@dataclass(frozen=True)
class Artifact:
    """A directory of files fitted on the whole corpus; pickles, and opens in any worker."""

    name: str
    fingerprint: str
    store: Store

    def local(self) -> Path:
        """The directory on this machine; a remote one is fetched once a machine."""
        if self.store.local:
            return Path(self.store.path)
        cache = Path(tempfile.gettempdir()) / f"tamis-artifacts-{os.getuid()}" / f"{self.name}-{self.fingerprint}"
        if not (cache / MARKER).exists():
            incoming = cache.with_name(f"{cache.name}.{uuid.uuid4().hex[:8]}.tmp")
            for name in self.store.files(recursive=True):
                (incoming / name).parent.mkdir(parents=True, exist_ok=True)
                (incoming / name).write_bytes(self.store.read(*name.split("/")))
            try:
                incoming.rename(cache)
            except OSError:  # another worker of this machine was first
                shutil.rmtree(incoming)
        return cache


@dataclass
class _BuildTask:
    """Fit an artifact in one worker and publish its files; the marker comes last and makes it count."""

    store: Store
    build: Callable[[Path], None]

    def __call__(self, identity: str, attempt: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="tamis-build-") as directory:
            self.build(Path(directory))
            self.store.remove()
            for file in sorted(p for p in Path(directory).rglob("*") if p.is_file()):
                self.store.write(file.read_bytes(), *file.relative_to(directory).parts)
        self.store.write(json.dumps({"fingerprint": identity}).encode(), MARKER)
        return {"rows": 0, "bytes": 0}


@dataclass
class _FooterTask:
    store: Store

    def __call__(self, unit: tuple[int, list[tuple[str, int, int]]], attempt: int) -> dict[str, Any]:
        index, files = unit
        table = read_footers(files)
        with self.store.sink("scratch", "listing", part_name(index)) as sink:
            pq.write_table(table, sink)
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
        self._pool: Pool | None = None
        self._stop = threading.Event()
        self._session = uuid.uuid4().hex

    # ---- opening and closing

    def __enter__(self) -> Run:
        self._lock()
        try:
            if self.store.exists("manifest.json"):
                self.manifest = json.loads(self.store.read("manifest.json"))
            described = self.config.model_dump(mode="json")
            self.manifest |= {
                "tamis": __version__,
                "config": described,
                "status": "running",
                "passes": [],
                "failed": {},
            }
            self._list()
            self.save()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.manifest |= {"status": "failed", "error": str(error) or kind.__name__ if kind else ""}
            self.save()
        if self._pool is not None:
            self._pool.close()
        self._unlock()

    def finish(self) -> None:
        """Say that the run is complete, and let go of scratch files."""
        self.store.remove("scratch")
        self.manifest |= {"status": "finished with failed shards" if self.failures else "done"}
        self.manifest.pop("error", None)
        self.save()

    @property
    def failures(self) -> list[dict[str, str]]:
        """Everything of the corpus that is not in the result, with the reason: unreadable files and given-up shards."""
        bad = self.listing.filter(self.listing["error"].is_valid())
        files = [
            {"file": u, "reason": e} for u, e in zip(bad["uri"].to_pylist(), bad["error"].to_pylist(), strict=True)
        ]
        return files + [
            {
                "file": piece.uri,
                "row_groups": f"{piece.first_group}..{piece.first_group + len(piece.rows) - 1}",
                "reason": why,
            }
            for index, why in sorted(self.failed.items())
            for piece in self.shards[index].pieces
        ]

    def save(self) -> None:
        self.manifest["failed"] = self.failures if hasattr(self, "listing") else []
        self.store.write(json.dumps(self.manifest, indent=2, default=str).encode(), "manifest.json")

    def _lock(self) -> None:
        """Take the directory, or say who has it. A lock whose process is gone, or silent for two minutes, is void."""
        me = {"host": socket.gethostname(), "pid": os.getpid(), "session": self._session, "since": time.time()}
        if self.store.exists("lock.json"):
            owner = json.loads(self.store.read("lock.json"))
            here = owner["host"] == me["host"]
            alive = _alive(owner["pid"]) if here else time.time() - owner["beat"] < STALE_S
            if alive:
                since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["since"]))
                raise RunLocked(
                    f"another run works in {self.store.uri}: process {owner['pid']} on {owner['host']} since {since}. "
                    "Wait for it, stop it, or give this run another directory with --run"
                )

        def beat() -> None:
            self.store.write(json.dumps(me | {"beat": time.time()}).encode(), "lock.json")

        def keep_beating() -> None:
            while not self._stop.wait(HEARTBEAT_S):
                beat()

        beat()
        if json.loads(self.store.read("lock.json"))["session"] != self._session:
            raise RunLocked(f"another run has just started in {self.store.uri}")
        threading.Thread(target=keep_beating, daemon=True).start()

    def _unlock(self) -> None:
        self._stop.set()
        self.store.remove("lock.json")

    # ---- the corpus

    def _list(self) -> None:
        corpus = self.config.corpus
        wanted = (
            None
            if corpus.columns is None
            else list(dict.fromkeys([*corpus.columns, corpus.text, *([corpus.id] if corpus.id else [])]))
        )
        self.listing = list_corpus(corpus.paths, self.store, wanted, corpus.refresh, self._read_chunks)
        self.schema = reference_schema(self.listing)
        for role, name in (("text", corpus.text), ("id", corpus.id), ("source", corpus.source)):
            if name is not None and name not in self.schema.names:
                raise ConfigError(
                    f"corpus.{role}: the corpus has no column {name!r}; it has {', '.join(self.schema.names)}"
                )
        if not is_text(self.schema.field(corpus.text).type):
            raise ConfigError(f"corpus.text: column {corpus.text!r} is {self.schema.field(corpus.text).type}, not text")
        target = (
            int(corpus.shard_mb * MIB)
            if corpus.shard_mb
            else self.manifest.get("shard_bytes") or default_shard_bytes(self.listing)
        )
        self.manifest["shard_bytes"] = target
        self.shards = plan_shards(self.listing, target)
        if not self.shards:
            raise CorpusError(f"corpus.path: the corpus has no rows in {len(self.listing)} files")
        self.layout = Layout(self.store, corpus.text, corpus.id)
        self.manifest["corpus"] = {"files": len(self.listing), "shards": len(self.shards), "rows": self.rows}

    def _read_chunks(self, chunks: list[list[tuple[str, int, int]]]) -> Iterable[pa.Table]:
        if len(chunks) < 2:
            return [read_footers(chunk) for chunk in chunks]
        self._all("list", _FooterTask(self.store), list(enumerate(chunks)), light=False)
        parts = [
            pq.read_table(pa.BufferReader(self.store.read("scratch", "listing", part_name(i))))
            for i in range(len(chunks))
        ]
        self.store.remove("scratch", "listing")
        return parts

    @property
    def live(self) -> list[Shard]:
        """Shards that still take part."""
        return [s for s in self.shards if s.index not in self.failed]

    @cached_property
    def rows(self) -> int:
        return sum(s.rows for s in self.shards)

    @property
    def text(self) -> str:
        return "text"

    @property
    def tokens_named(self) -> str:
        return self.config.corpus.tokenizer or "bytes/4"

    # ---- fingerprints

    def identity(self, *references: str) -> str:
        """Fingerprint of the values behind references over the live shards."""
        return fingerprint([self._reference(r) for r in references], self._live_fingerprint())

    def _live_fingerprint(self) -> str:
        key = len(self.failed)
        if getattr(self, "_live_known", (None, ""))[0] != key:
            self._live_known = (key, fingerprint([s.fingerprint for s in self.live]))
        return self._live_known[1]

    def _reference(self, reference: str) -> str:
        source = self.layout.source_column(reference)
        if source is not None:
            return f"source:{source}"
        column, _, name = reference.partition(".")
        if column == "address":
            return reference
        if column not in self.plans:
            raise TamisError(f"{reference!r} is read before column {column!r} is planned")
        return f"{self.plans[column].fingerprint}:{name}"

    def plan(self, column: Column) -> Plan:
        """Fix what a column's values depend on; later columns and statistics can then refer to it."""
        inputs = [self._reference(r) for r in column.inputs]
        plan = Plan(column, fingerprint(column.name, column.identity, str(column.fields), inputs))
        self.plans[column.name] = plan
        return plan

    # ---- the verbs

    def materialize(self, columns: Sequence[Column]) -> None:
        """Compute what is missing or stale of some columns; those that need the same actor share one read."""
        plans = [self.plan(c) for c in columns]
        for resources in dict.fromkeys(p.column.resources for p in plans):
            self._materialize([p for p in plans if p.column.resources == resources], resources)

    def _materialize(self, plans: list[Plan], resources: Resources) -> None:
        todo: dict[int, list[str]] = {}
        for plan in plans:
            wanted = {s.index: plan.part(s) for s in self.live}
            for index in stale(self.store, ("columns", plan.column.name), wanted):
                todo.setdefault(index, []).append(plan.column.name)
        bad = {p.column.name: self._quarantined(p, skip=set(todo)) for p in plans}
        units = [(self.shards[i], tuple(names)) for i, names in sorted(todo.items())]
        label = "+".join(p.column.name for p in plans)
        light = self._is_light([r for p in plans for r in p.column.inputs])
        for outcome in self.map(label, MaterializeTask(self.layout, tuple(plans)), units, resources, light):
            if outcome.error:
                self.failed[units[outcome.index][0].index] = f"{label}: {outcome.error}"
                continue
            for name, count in outcome.result["bad"].items():
                bad[name] += count
            self._check_bad(bad)
        self._check_bad(bad)
        if not self.live:
            raise NoShardLeft(f"every shard failed; the first: {next(iter(self.failed.values()))}")
        for plan in plans:
            self.manifest.setdefault("columns", {})[plan.column.name] = {
                "fingerprint": plan.fingerprint,
                "computed": sum(plan.column.name in names for names in todo.values()),
                "quarantined": bad[plan.column.name],
            }
        self.save()

    def _quarantined(self, plan: Plan, skip: set[int]) -> int:
        """Rows that earlier runs put in quarantine for this column, over shards that are not computed again."""
        there = self.store.files("quarantine", plan.column.name)
        count = 0
        for shard in self.live:
            if part_name(shard.index) in there and shard.index not in skip:
                with self.store.filesystem.open_input_file(
                    self.store.at("quarantine", plan.column.name, part_name(shard.index))
                ) as source:
                    count += pq.read_metadata(source).num_rows
        return count

    def _check_bad(self, bad: dict[str, int]) -> None:
        limit = self.config.engine.max_bad_fraction
        for name, count in bad.items():
            if count > limit * self.rows:
                raise TooManyBadRows(
                    f"{count:,} of {self.rows:,} rows are in quarantine for {name!r}, more than engine.max_bad_fraction = {limit:g} allows; "
                    f"see {self.store.locate('quarantine', name)}, mend the corpus or raise the limit"
                )

    def aggregate(self, statistic: Statistic, label: str = "") -> State:
        """Fold a statistic over the live shards and merge it as a tree. Returns `{}` where no row was usable."""
        directory = ("scratch", f"{type(statistic).__name__}-{uuid.uuid4().hex[:8]}")
        label = label or type(statistic).__name__.lower()
        thin = not any(self.layout.source_column(r) for r in statistic.inputs)
        step = FAN_IN if thin else 1
        light = self._is_light(statistic.inputs)
        try:
            count = self._fold(statistic, directory, step, label, light)
            level = 0
            while count > FAN_IN:
                units = [(level, i, count) for i in range(-(-count // FAN_IN))]
                self._all(f"{label} merge", MergeTask(self.store, statistic, directory), units, light)
                level, count = level + 1, len(units)
            states = [load_state(self.store, *directory, f"{level}-{i:05d}.npz") for i in range(count)]
            return merge(statistic, states)
        finally:
            self.store.remove(*directory)

    def _fold(self, statistic: Statistic, directory: tuple[str, ...], step: int, label: str, light: bool) -> int:
        """Fold until every live shard is in; a shard that fails takes no further part and the fold is made again."""
        while True:
            live = self.live
            if not live:
                raise NoShardLeft(f"every shard failed; the first: {next(iter(self.failed.values()))}")
            groups = [(i // step, tuple(live[i : i + step])) for i in range(0, len(live), step)]
            lost = False
            for outcome in self.map(label, FoldTask(self.layout, statistic, directory), groups, light=light):
                if outcome.error:
                    lost = True
                    for shard in groups[outcome.index][1]:
                        self.failed[shard.index] = f"{label}: {outcome.error}"
            if not lost:
                return len(groups)

    def regroup(self, column: Column, key: str, reduce: Reduce) -> None:
        """Bring rows with the same key together and fill a column with what `reduce` finds about them.

        `column.inputs` are the thin values that travel beside the key; its `open` is not used. What is found depends on
        the whole corpus, so a changed shard makes all of it stale. Rows that `reduce` does not return are null.
        """
        plan = self.plan(column)
        everything = fingerprint(plan.fingerprint, self._live_fingerprint())
        plan = self.plans[column.name] = Plan(column, everything)
        live = {s.index: s for s in self.live}
        if not stale(self.store, ("columns", column.name), {i: plan.part(s) for i, s in live.items()}):
            return
        columns = {r.partition(".")[0] for r in (*column.inputs, key)}
        size = sum(sum(self.store.files("columns", c).values()) for c in columns)
        job = Regroup(
            self.store, column.name, column.inputs, key, reduce, max(1, -(-size // PARTITION_BYTES)), everything
        )
        light = self._is_light((*column.inputs, key))
        split = missing_parts(job, "split", {i: everything + s.fingerprint for i, s in live.items()})
        self._all(f"{column.name} split", SplitTask(self.layout, job), [live[i] for i in split], light)
        gather = missing_parts(job, "gather", dict.fromkeys(range(job.partitions), everything))
        self._all(f"{column.name} gather", GatherTask(job, tuple(live)), gather, light)
        self._all(f"{column.name} scatter", ScatterTask(job, plan), list(live.values()), light)
        self.store.remove("scratch", "regroup", column.name)

    def _all(self, label: str, task: Task, units: Sequence[Any], light: bool) -> None:
        """Run units none of which may fail, because their results depend on one another."""
        for outcome in self.map(label, task, units, light=light):
            if outcome.error:
                raise TamisError(f"{label} failed: {outcome.error}")

    def artifact(
        self, name: str, identity: str, build: Callable[[Path], None], resources: Resources | None = Resources()
    ) -> Artifact:
        """The artifact of a name, built if the stored one is of another identity.

        `build` writes files into the directory that it is given; it runs in one worker with the given resources, or in
        the driver where these are None (for what takes no time).
        """
        artifact = Artifact(name, identity, self.store.child("artifacts", name))
        if artifact.store.exists(MARKER) and json.loads(artifact.store.read(MARKER))["fingerprint"] == identity:
            return artifact
        task = _BuildTask(artifact.store, build)
        for outcome in self.map(f"fit {name}", task, [identity], resources or Resources(), light=resources is None):
            if outcome.error:
                raise TamisError(f"fitting {name!r} failed: {outcome.error}")
        self.manifest.setdefault("artifacts", {})[name] = identity
        return artifact

    def map(
        self, label: str, task: Task, units: Sequence[Any], resources: Resources = Resources(), light: bool = False
    ) -> Iterable[Outcome]:
        """Run a task over units with progress, and note the pass in the manifest."""
        if not units:
            return
        pool = InlinePool(resources.cpus) if light and self._pool is None else self._started()
        lost = getattr(pool, "lost", 0)
        started = time.monotonic()
        with Progress(label, len(units), self.quiet) as progress:
            for outcome in pool.map(task, units, resources):
                progress.add(outcome.result.get("rows", 0), outcome.result.get("bytes", 0), outcome.error is not None)
                yield outcome
        entry = {
            "pass": label,
            "units": len(units),
            "failed": progress.failed,
            "rows": progress.rows,
            "bytes": progress.bytes,
        }
        entry |= {"seconds": round(time.monotonic() - started, 3), "workers_lost": getattr(pool, "lost", 0) - lost}
        self.manifest["passes"].append(entry)

    def _started(self) -> Pool:
        if self._pool is None:
            self._pool = self.connect()
        return self._pool

    def _is_light(self, references: Sequence[str]) -> bool:
        columns = {r.partition(".")[0] for r in references if self.layout.source_column(r) is None} - {"address"}
        if any(self.layout.source_column(r) is not None for r in references):
            return False
        total = 0
        for column in columns:
            total += sum(self.store.files("columns", column).values())
        return total <= LIGHT_BYTES


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
