"""The contract of an order: in which sequence a trainer reads the curated rows, and how often each.

An order is stored, `<run>/order/<name>/`, by default under its kind, so several stand side by side:

    order.json          what it is (below)
    part-00000.parquet  addresses in order, part after part: the order is the concatenation of the parts

| column of a part | type | meaning |
| --- | --- | --- |
| file | int32 | number of the curated file in `order.json`'s `files` |
| row | int64 | row in that file, from 0 |
| pass | int32 | how often the order has read this row before: 0 but for repeats |
| group | int64 | rows that belong together and follow one another (a context, a stage of a curriculum); else 0 |

`order.json`: `format` ("tamis-order-1"), `name`, `kind`, `recipe` (its fields), `seed`, `fingerprint`, `curated` (the
fingerprint of the curated set that the addresses point into, `CuratedSet.fingerprint`; where it is no longer that of
the run, the order is void and readers refuse it), `rows` (addresses in all), `files` ([{file, rows}], the curated files
by number, relative to the curated directory), `parts` ([{file, rows}]) and `about` (what the recipe has to say).

Where somebody reads the rows one after the other (`tamis pack`, `tamis export`, `tamis feed`), they also lie there,
`rows/part-00000.parquet` for every part: the curated rows, all columns, in the order of the part's addresses.

The footers of both carry fingerprints that follow from that of the order (`addresses_mark`, `rows_mark`). Readers
refuse a part that has another one, such as what a crash leaves of an order that was being made anew.

The validation file of the nanochat layout is in no order.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, Field

from pipeline.corpus.storage import Store
from pipeline.engine.parts import FINGERPRINT, part_info, part_name, survey, write_part
from pipeline.engine.reading import Layout
from pipeline.engine.regroup import Block, Regroup, read_block, read_group, write_groups
from pipeline.errors import ConfigError, CorpusError, TamisError
from pipeline.hashing import mix64
from pipeline.output.feeding import ORDINAL, CuratedSet, FedRun
from pipeline.recipe import Recipe, State, fingerprint

FORMAT = "tamis-order-1"
ROWS = "rows"
"""Directory, beside the parts, of the curated rows themselves in this order, where somebody had need of them."""
PART_BYTES = 64 << 20
"""Compressed bytes of curated rows that a part aims at: a worker holds the rows of one, decoded, to arrange them."""
PART_ROWS = 1 << 20
SAMPLED_KEYS = 1 << 16
"""Keys that the cuts between parts are taken from; parts differ by about sqrt(parts / SAMPLED_KEYS)."""

PLACES = pa.schema(
    [("key", pa.uint64()), ("ordinal", pa.int64()), ("minor", pa.int64()), ("pass", pa.int32()), ("group", pa.int64())]
)
ADDRESSES = pa.schema([("file", pa.int32()), ("row", pa.int64()), ("pass", pa.int32()), ("group", pa.int64())])


@dataclass(frozen=True)
class Places:
    """Where the rows of a batch stand: n places, arrays of shape (n,). A row that is read often has several."""

    row: np.ndarray
    """int64: index in the batch."""
    key: np.ndarray
    """uint64: the order ascends by it. Places of one key are in one part."""
    minor: np.ndarray | int = 0
    """int64: the order among places of one key; what ties there, too, comes as it lies in the curated files."""
    times: np.ndarray | int = 0
    """int32: how often the row was read before."""
    group: np.ndarray | int = 0
    """int64."""

    def table(self, ordinals: np.ndarray) -> pa.Table:
        """Columns of `PLACES`. `ordinals`: those of the batch's rows."""
        values = (self.key, ordinals[self.row], self.minor, self.times, self.group)
        columns = [np.broadcast_to(v, self.key.shape) for v in values]
        return pa.table([pa.array(v, f.type) for v, f in zip(columns, PLACES, strict=True)], schema=PLACES)


@dataclass(frozen=True)
class Placing:
    """How an order places rows: a function from a batch of `inputs` (and of `curated.ordinal`); it must pickle."""

    inputs: tuple[str, ...]
    place: Callable[[pa.RecordBatch], Places]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def references(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([ORDINAL, *self.inputs]))


def checked_name(value: str) -> str:
    """A name that can be that of a directory. Raises ValueError."""
    if not value.replace("-", "").replace("_", "").replace(".", "").isalnum() or value[0] == ".":
        raise ValueError(f"{value!r} cannot name a directory: use letters, digits, `-`, `_` and `.`")
    return value


Name = Annotated[str, AfterValidator(checked_name)]


class Order(Recipe, ABC):
    """An order. Subclasses live in `pipeline/output/order/<kind>.py` and fix `kind` to the module's name."""

    kind: str
    name: Name | None = Field(None, description="what it is stored as below <run>/order (default: its kind)")
    seed: int | None = Field(None, description="seed of what is drawn (default: the run's)")

    @property
    def stored_as(self) -> str:
        return self.name or self.kind

    @abstractmethod
    def placing(self, run: FedRun, seed: int) -> Placing:
        """Fit what is needed, and say how rows are placed."""


def drawn(ordinals: np.ndarray, seed: int, stream: int = 0) -> np.ndarray:
    """uint64 of every curated row, (n,): uniform, another for every seed and stream.

    It is the row's place that is hashed, not its content: copies of a text would otherwise stand side by side.
    """
    with np.errstate(over="ignore"):
        salt = mix64(mix64(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64)) + np.uint64(2 * stream + 1))
        return mix64(mix64(ordinals.astype(np.uint64) + salt) ^ salt)


@dataclass(frozen=True)
class StoredOrder:
    """An order as it lies in a run."""

    store: Store
    described: dict[str, Any]

    @classmethod
    def at(cls, run: str, name: str, curated: CuratedSet) -> StoredOrder:
        """Raises ConfigError where there is no such order, or it is that of another curated set."""
        store = Store(run).child("order", name)
        try:
            described = json.loads(store.read("order.json"))
        except FileNotFoundError:
            there = sorted({f.partition("/")[0] for f in Store(run).files("order", recursive=True)})
            raise ConfigError(
                f"{run} has no order {name!r}{', only ' + ', '.join(there) if there else ''}: make it with "
                f"`tamis order {run} --kind {name}`"
            ) from None
        if described["curated"] != curated.fingerprint:
            raise ConfigError(
                f"the order {name!r} of {run} is that of another curated set, which has since changed: run "
                f"`tamis order` again"
            )
        return cls(store, described)

    @property
    def name(self) -> str:
        return str(self.described["name"])

    @property
    def fingerprint(self) -> str:
        return str(self.described["fingerprint"])

    @property
    def rows(self) -> int:
        return int(self.described["rows"])

    @cached_property
    def parts(self) -> list[str]:
        return [p["file"] for p in self.described["parts"]]

    def addresses(self, part: int) -> pa.Table:
        """Addresses of one part, in order. Raises CorpusError for a part of another order."""
        with self.store.filesystem.open_input_file(self.store.at(self.parts[part])) as source:
            table = pq.read_table(source, use_threads=False)
        self.check_mark(table.schema, addresses_mark(self.fingerprint, part, len(self.parts)), self.parts[part])
        return table.replace_schema_metadata(None)

    def rows_mark(self, part: int) -> str:
        """Fingerprint in the footer of a part of the curated rows, where they lie in this order."""
        return fingerprint("arranged", 1, self.fingerprint, part)

    def check_mark(self, schema: pa.Schema, mark: str, *names: str) -> None:
        """Raise CorpusError for a file whose fingerprint is not this one."""
        found = (schema.metadata or {}).get(FINGERPRINT, b"").decode()
        if found != mark:
            raise CorpusError(
                f"{self.store.locate(*names)} is not of the order that order.json describes: it has fingerprint "
                f"{found or 'none'}, not {mark}: run `tamis order` again"
            )


def addresses_mark(order: str, part: int, parts: int) -> str:
    """Fingerprint in the footer of a part of an order's addresses. `order`: that of the order."""
    return fingerprint(order, part, parts)


def write_order(run: FedRun, order: Order) -> StoredOrder:
    """Make an order, or find it made. Raises ConfigError and TamisError.

    A distributed sort of thin rows: a sample of all keys gives the cuts, every worker splits the rows of some shards at
    them, and every part is gathered and sorted by one worker. The driver holds the sample and the list of parts.
    """
    seed = run.seed if order.seed is None else order.seed
    run.number()
    placing = order.placing(run, seed)
    curated = run.curated
    identity = fingerprint(
        FORMAT, order.identity(), seed, curated.fingerprint, run.identity(*placing.references), PART_BYTES, PART_ROWS
    )
    store = run.store.child("order", order.stored_as)
    if found := _stored(store, identity):
        return StoredOrder(store, found)
    state = run.aggregate(KeySample(placing), label=f"order {order.stored_as}")
    fed = int(state["rows"][0]) if state else 0
    if fed != curated.rows:
        raise TamisError(
            f"{order.kind}: {curated.rows - fed:,} of {curated.rows:,} curated rows have no value of "
            f"{', '.join(placing.inputs)}, so they have no place in the order"
        )
    places = int(state["places"][0])
    cuts = _cuts(state["key"], places, curated)
    job = Regroup(run.store, f"order-{order.stored_as}", (), "", len(cuts) + 1, run.blocks(), identity)
    split = [job.blocks[i] for i in job.unfinished("split", len(job.blocks))]
    run.each("order split", SplitTask(run.layout, job, placing, cuts), split)
    units = list(range(job.partitions))
    rows = run.each("order sort", SortTask(job, store, identity, curated.edges), units)
    parts = [{"file": part_name(i), "rows": r["rows"]} for i, r in enumerate(rows)]
    if sum(p["rows"] for p in parts) != places:
        raise TamisError(f"{order.kind}: {places:,} places were counted, {sum(p['rows'] for p in parts):,} written")
    described = {
        "format": FORMAT,
        "name": order.stored_as,
        "kind": order.kind,
        "recipe": order.model_dump(mode="json"),
        "seed": seed,
        "fingerprint": identity,
        "curated": curated.fingerprint,
        "rows": places,
        "files": [{"file": f.name, "rows": f.rows} for f in curated.files],
        "parts": parts,
        "about": placing.about,
    }
    _sweep(store, parts)
    store.write(json.dumps(described, indent=2).encode(), "order.json")
    run.store.remove("scratch", "regroup", job.name)
    return StoredOrder(store, described)


def _stored(store: Store, identity: str) -> dict[str, Any] | None:
    try:
        described: dict[str, Any] = json.loads(store.read("order.json"))
    except FileNotFoundError:
        return None
    if described["fingerprint"] != identity:
        return None
    parts = described["parts"]
    wanted = {i: (addresses_mark(identity, i, len(parts)), p["rows"]) for i, p in enumerate(parts)}
    return None if survey(store, (), wanted)[0] else described


def _sweep(store: Store, parts: Sequence[dict[str, Any]]) -> None:
    """Remove what an earlier order of the name left: parts beyond these, and rows arranged by it."""
    for name in set(store.files()) - {p["file"] for p in parts} - {"order.json"}:
        store.remove(name)
    store.remove(ROWS)


def _cuts(keys: np.ndarray, places: int, curated: CuratedSet) -> np.ndarray:
    """Keys at which parts begin, the first excepted; uint64, ascending, distinct."""
    size = curated.bytes * places // max(curated.rows, 1)
    parts = max(1, -(-places // PART_ROWS), -(-size // PART_BYTES))
    at = np.sort(keys)
    return np.unique(at[np.arange(1, parts) * len(at) // parts])


@dataclass(frozen=True)
class KeySample:
    """Statistic: keys of the places whose hashes are smallest. State: `hash` and `key` (m,) uint64, by hash ascending,
    m <= SAMPLED_KEYS, and (1,) int64 each `places` and `rows` (those that are placed at least once)."""

    placing: Placing

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.placing.references

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        places = self.placing.place(batch)
        ordinals = batch.column(ORDINAL).to_numpy()[places.row]
        times = np.broadcast_to(places.times, places.key.shape)
        new = {
            "hash": mix64(drawn(ordinals, 0) ^ times.astype(np.uint64)),
            "key": places.key,
            "places": np.array([len(places.key)]),
            "rows": np.array([int((times == 0).sum())]),
        }
        return self.merge([state, new] if state else [new])

    def merge(self, states: Sequence[State]) -> State:
        hashes, keys = (np.concatenate([s[name] for s in states]) for name in ("hash", "key"))
        first = np.lexsort((keys, hashes))[:SAMPLED_KEYS]
        totals = {name: np.sum([s[name] for s in states], axis=0) for name in ("places", "rows")}
        return {"hash": hashes[first], "key": keys[first], **totals}


@dataclass
class SplitTask:
    """Places of the rows of some shards, split by the part in which they come."""

    layout: Layout
    job: Regroup
    placing: Placing
    cuts: np.ndarray

    def __call__(self, block: Block, attempt: int) -> dict[str, Any]:
        number, shards = block
        rows = read_block(self.layout, shards, self.placing.references)
        batch = one_batch(rows)
        places = self.placing.place(batch)
        table = places.table(batch.column(ORDINAL).to_numpy())
        parts = np.searchsorted(self.cuts, places.key, side="right")
        write_groups(self.job, "split", number, table, parts, self.job.partitions)
        return {"rows": table.num_rows, "bytes": table.nbytes}


@dataclass
class SortTask:
    """Write one part of the order. `edges`: ordinals at which curated files begin."""

    job: Regroup
    store: Store
    fingerprint: str
    edges: np.ndarray

    def __call__(self, part: int, attempt: int) -> dict[str, Any]:
        mark = addresses_mark(self.fingerprint, part, self.job.partitions)
        done = part_info(self.store, part_name(part))
        if done is not None and done.fingerprint == mark:
            return {"rows": done.rows, "bytes": 0}
        batches = [read_group(self.job, "split", number, part) for number, _ in self.job.blocks]
        table = pa.Table.from_batches(batches).combine_chunks()
        ordinals = table["ordinal"].to_numpy()
        order = np.lexsort([table[name].to_numpy() for name in ("pass", "ordinal", "minor", "key")])
        ordinals = ordinals[order]
        files = np.searchsorted(self.edges, ordinals, side="right") - 1
        rows = pa.array(order)
        columns = [
            files.astype(np.int32),
            ordinals - self.edges[files],
            table["pass"].take(rows),
            table["group"].take(rows),
        ]
        addresses = pa.table(columns, schema=ADDRESSES)
        write_part(self.store, (part_name(part),), addresses, mark)
        return {"rows": addresses.num_rows, "bytes": addresses.nbytes}


def one_batch(table: pa.Table) -> pa.RecordBatch:
    """A table that is in one chunk, or empty, as a batch."""
    batches = table.to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
