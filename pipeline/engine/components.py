"""Connected components of rows: those that share a key are one, and so is what chains of such rows join. Exact.

A row is a node: one integer, its address (`pack`). Keys become edges and edges become stars, in rounds of tasks through
files in the run's scratch, as in `pipeline.engine.regroup`:

1. `split` writes a pair (key, node) for every key of every row, partitioned by the key.
2. `edges` joins the nodes of a key to the least of them.
3. `contract` replaces the edges of a partition by stars: every node joined to the least node of its local component. It
   sends an edge to the partitions of both its ends, so the next round sees all edges of a node at one place. When no
   partition changes anything, every node hangs on the least node of its component: were a node joined to two others, or
   to one that has a lesser neighbour, its partition would have seen that.
4. `home` and `scatter` carry the least nodes to the blocks of their rows.

A round contracts whole local components: a path of a million nodes in random order over 64 partitions takes 12 rounds,
and near-duplicates, whose components are cliques and stars, take 1 or 2. It is the alternating star algorithm of
Kiveris et al. 2014 ("Connected components in MapReduce and beyond") with its two steps in one. The pairs of one key
meet in one worker, and so do the edges of one component: 16 bytes for each of its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.engine.materialize import Plan
from pipeline.engine.parts import part_name, write_part
from pipeline.engine.reading import Layout
from pipeline.engine.regroup import (
    ROW,
    SHARD,
    Block,
    Regroup,
    partition_of,
    read_block,
    read_group,
    write_groups,
)
from pipeline.errors import TamisError
from pipeline.vectors import matrix

PAIR_BYTES = 16
"""A key and a node."""
ROW_BITS = 32

Pass = Callable[..., int]
"""(label, task, units) to the sum of what the units changed; raises where one fails."""


def pack(shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Addresses as integers in the order of addresses: shard * 2**32 + row; int64 (n,)."""
    return np.asarray((shards.astype(np.int64) << ROW_BITS) | rows.astype(np.int64))


def check_keys(name: str, kind: pa.DataType) -> None:
    """Raise TamisError for a type by which rows cannot be connected."""
    if not (pa.types.is_fixed_size_list(kind) and pa.types.is_integer(kind.value_type)):
        raise TamisError(f"rows cannot be connected by {name}, which is {kind}: it takes fixed-size lists of integers")


def connect_components(run: Pass, layout: Layout, job: Regroup, plan: Plan) -> None:
    """Write the parts of a column of components; `job.key` names the keys of a row."""
    partitions, blocks = list(range(job.partitions)), job.blocks
    split = [blocks[i] for i in job.unfinished("split", len(blocks))]
    run(f"{job.name} split", PairTask(layout, job), split)
    edges = job.unfinished("edges-00", job.partitions)
    run(f"{job.name} edges", EdgeTask(job), edges)
    number, changed = 0, 1
    while changed:
        changed = run(f"{job.name} contract", ContractTask(job, number), partitions)
        if number:
            job.store.remove("scratch", "regroup", job.name, edges_of(number))
        number += 1
    run(f"{job.name} home", HomeTask(job, number), partitions)
    run(f"{job.name} scatter", ComponentTask(layout, job, plan), blocks)


def edges_of(number: int) -> str:
    return f"edges-{number:02d}"


def contract(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges low[i] - high[i] as stars: the least node of a component and every other one, sorted by the other one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    nodes, at = np.unique(np.concatenate([low, high]), return_inverse=True)
    n = len(nodes)
    graph = coo_array((np.ones(len(low), np.int8), (at[: len(low)], at[len(low) :])), (n, n))
    count, label = connected_components(graph, directed=False)
    least = np.empty(count, np.int64)
    least[label[::-1]] = np.arange(n)[::-1]  # the first of a label is written last
    center = least[label]
    others = np.flatnonzero(center != np.arange(n))
    return nodes[center[others]], nodes[others]


def distinct(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges without repetition, sorted by `high`, then `low`."""
    order = np.lexsort((low, high))
    low, high = low[order], high[order]
    new = np.append(True, (low[1:] != low[:-1]) | (high[1:] != high[:-1]))[: len(low)]
    return low[new], high[new]


def _edges(low: np.ndarray, high: np.ndarray) -> pa.Table:
    return pa.table({"low": pa.array(low, pa.int64()), "high": pa.array(high, pa.int64())})


def _send(job: Regroup, number: int, partition: int, low: np.ndarray, high: np.ndarray) -> None:
    """Write edges for the partitions of both ends."""
    ends = [partition_of(pa.array(nodes), job.partitions) for nodes in (low, high)]
    twice = ends[0] != ends[1]
    table = _edges(np.append(low, low[twice]), np.append(high, high[twice]))
    write_groups(job, edges_of(number), partition, table, np.append(ends[0], ends[1][twice]), job.partitions)


def _received(job: Regroup, round_: str, writers: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    table = pa.Table.from_batches([read_group(job, round_, number, group) for number in range(writers)])
    first, second = (column.to_numpy() for column in table.columns)
    return first, second


@dataclass
class PairTask:
    layout: Layout
    job: Regroup

    def __call__(self, block: Block, attempt: int) -> dict[str, Any]:
        number, shards = block
        table = read_block(self.layout, shards, [self.job.key, SHARD, ROW])
        keys = matrix(table[self.job.key].combine_chunks())
        nodes = np.repeat(pack(table[SHARD].to_numpy(), table[ROW].to_numpy()), keys.shape[1])
        pairs = pa.table({"key": keys.ravel(), "node": nodes})
        groups = partition_of(pairs["key"].combine_chunks(), self.job.partitions)
        write_groups(self.job, "split", number, pairs, groups, self.job.partitions)
        return {"rows": len(table), "bytes": pairs.nbytes}


@dataclass
class EdgeTask:
    job: Regroup

    def __call__(self, partition: int, attempt: int) -> dict[str, Any]:
        keys, nodes = _received(self.job, "split", len(self.job.blocks), partition)
        order = np.lexsort((nodes, keys))
        keys, nodes = keys[order], nodes[order]
        start = np.append(True, keys[1:] != keys[:-1])[: len(keys)]
        first = nodes[start][np.cumsum(start) - 1]
        joined = first != nodes
        _send(self.job, 0, partition, *contract(first[joined], nodes[joined]))
        return {"rows": len(keys), "bytes": keys.nbytes + nodes.nbytes}


@dataclass
class ContractTask:
    job: Regroup
    number: int

    def __call__(self, partition: int, attempt: int) -> dict[str, Any]:
        low, high = _received(self.job, edges_of(self.number), self.job.partitions, partition)
        low, high = distinct(low, high)
        stars = contract(low, high)
        _send(self.job, self.number + 1, partition, *stars)
        same = np.array_equal(low, stars[0]) and np.array_equal(high, stars[1])
        return {"rows": len(low), "bytes": low.nbytes + high.nbytes, "changed": int(not same)}


@dataclass
class HomeTask:
    """Sends every node but the least ones to its block, from its own partition."""

    job: Regroup
    number: int

    def __call__(self, partition: int, attempt: int) -> dict[str, Any]:
        job = self.job
        low, high = contract(*_received(job, edges_of(self.number), job.partitions, partition))
        own = partition_of(pa.array(high), job.partitions) == partition
        low, high = low[own], high[own]
        write_groups(job, "home", partition, _edges(low, high), job.block_of[high >> ROW_BITS], len(job.blocks))
        return {"rows": len(low), "bytes": low.nbytes + high.nbytes}


@dataclass
class ComponentTask:
    layout: Layout
    job: Regroup
    plan: Plan

    def __call__(self, block: Block, attempt: int) -> dict[str, Any]:
        number, shards = block
        low, high = _received(self.job, "home", self.job.partitions, number)
        fields = self.plan.column.fields
        for shard in shards:
            own = read_block(self.layout, [shard], [self.job.key, ROW])[ROW].to_numpy()
            component = pack(np.full(shard.rows, shard.index), np.arange(shard.rows))
            there = np.zeros(shard.rows, bool)
            there[own] = True
            here = high >> ROW_BITS == shard.index
            component[high[here] & ((1 << ROW_BITS) - 1)] = low[here]
            values = pa.array(component, mask=~there)
            where = ("columns", self.plan.column.name, part_name(shard.index))
            write_part(self.job.store, where, pa.table([values], schema=fields), self.plan.part(shard))
        return {"rows": sum(s.rows for s in shards), "bytes": low.nbytes + high.nbytes}
