"""Semantic duplicates: SemDeDup. In every concept, how close a row comes to one listed before it.

Source: Abbas et al. 2023, "SemDeDup: Data-efficient learning at web-scale through semantic deduplication", arXiv
2303.09540, and facebookresearch/SemDeDup. The rows of a concept are listed by their distance to the centroid: farthest
first (`keep: hard`, the authors' choice: the least prototypical copy survives), nearest first (`easy`), or in a seeded
order (`random`); ties, such as exact copies, by address; last comes what a criterion for duplicates before this one
dropped. M of a row is its greatest cosine to any row before it, 0 for the first, and a row is a duplicate where
M > 1 - epsilon. The score is -M, so that other values of epsilon are other floors over stored scores:
`select.floors: {semantic_duplicates: -(1 - epsilon)}`. A higher epsilon drops more; the README of the authors' code
says the reverse.

As published, M looks at all earlier rows, dropped ones too. So it is a product of matrices and a maximum, and chains
collapse further than in a pass over kept rows: of unit vectors at 0, 15 and 30 degrees one stays at epsilon = .05. The
group of a duplicate is what it leads to, from nearest earlier row to nearest earlier row, up to a row that is kept.

Trades: similarity in an embedding is not identity, boilerplate and short texts collapse, so drop exact and fuzzy
duplicates first. Pairs across the border of a concept are missed. For text DCLM saw no gain in quality: it is hygiene.

Cost: n_c**2 d FLOPs in a concept of n_c rows of d dimensions, at 0.8 of the rate of bare matrix products. A concept of
more than `max_rows` distinct vectors (50,000: ours) is cut by a second k-means, with a warning, and pairs across its
parts are missed, too. Equal vectors are compared once. Memory of a worker: 2.7 times the vectors of its largest concept
as they are stored, a third of it page cache (300,000 x 384), and two float32 blocks of 1,024 rows with their products;
bench/dedup.py has both figures.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.concepts.table import concept_table
from pipeline.engine.components import pack
from pipeline.engine.regroup import ROW, SHARD, key_groups
from pipeline.hashing import hash64, row_keys
from pipeline.recipe import Column, fingerprint
from pipeline.scores._duplicates import FIELDS, describe, dropped, filled, report_groups, rule_of, survivors
from pipeline.scores.base import Score
from pipeline.vectors import as_float32, flat_index, load_faiss, matrix, nearest

if TYPE_CHECKING:
    from pipeline.run import Run

log = logging.getLogger(__name__)

CONCEPT, DISTANCE, VECTOR, KEY = "concept.concept", "concept.distance", "embed.vector", "row.key"
NEAREST = pa.schema([("max_sim", pa.float32()), ("nearest", pa.int64())])
BLOCK = 1024
"""Rows whose products with as many others are held at once: 4 MB."""
HASHED = 1 << 13


class SemanticDuplicates(Score):
    """-M, the negative of the greatest cosine to an earlier row of the concept, in [-1, 1]; 0 for the first row."""

    needs: ClassVar[Literal["text", "vectors", "concepts"]] = "concepts"
    claim = "unlike every row of its concept that is listed before it"
    cost = "n_c d FLOPs in a concept of n_c rows of d dimensions"
    source = "Abbas et al. 2023 (SemDeDup), arXiv 2303.09540"
    kind: Literal["semantic_duplicates"] = "semantic_duplicates"
    epsilon: float = Field(
        0.05, ge=0, le=1, description="rows closer than 1 - epsilon to an earlier one are duplicates: names the groups"
    )
    keep: Literal["hard", "easy", "random"] = Field("hard", description="which copy stays: far from the centroid, ...")
    seed: int | None = Field(None, description="seed of keep: random and of the second k-means (default: the run's)")
    max_rows: int = Field(50_000, ge=2, description="distinct vectors of a concept that are compared, all with all")

    def column(self, run: Run) -> Column:
        closest = self._closest(run)
        inputs = tuple(f"{closest.name}.{f}" for f in NEAREST.names)
        return filled(self.column_name, inputs, FIELDS, fingerprint("semantic duplicates", 1, self.epsilon))

    def _closest(self, run: Run) -> Column:
        """Column `<name>-nearest`: M and the address of the row that it is to (packed; -1 for the first)."""
        seed = run.seed if self.seed is None else self.seed
        inputs = (VECTOR, DISTANCE, *((KEY,) if self.keep == "random" else ()), *survivors(run, self.column_name))
        identity = fingerprint("nearest earlier", 1, self.keep, seed, self.max_rows)
        return filled(f"{self.column_name}-nearest", inputs, NEAREST, identity)

    def fill(self, run: Run) -> None:
        closest = self._closest(run)
        self._warn(run)
        seed = run.seed if self.seed is None else self.seed
        run.regroup(closest, CONCEPT, partial(nearest_earlier, self.keep, seed, self.max_rows))
        column = self.column(run)
        run.regroup(column, CONCEPT, partial(follow, closest.name, self.epsilon, rule_of(self.kind)))
        report_groups(run, self.column_name)

    def _warn(self, run: Run) -> None:
        sizes = concept_table(run, run.config.scores)["n"].to_numpy()
        if large := int((sizes > self.max_rows).sum()):
            said = "%s: %d concepts have more than max_rows = %s rows, the largest %s; where their vectors differ they "
            said += "are cut, and duplicates across the cuts missed: raise cluster.k, or max_rows at a quadratic cost"
            log.warning(said, self.column_name, large, f"{self.max_rows:,}", f"{int(sizes.max()):,}")


def nearest_earlier(keep: str, seed: int, max_rows: int, table: pa.Table) -> pa.Table:
    """Reduce of `Run.regroup` by concept: M of every row, and the address of the row that it is to."""
    address = pack(table[SHARD].to_numpy(), table[ROW].to_numpy())
    max_sim, closest = np.zeros(len(table), np.float32), np.full(len(table), -1, np.int64)
    start = 0
    for concept in key_groups(table, CONCEPT):
        here = slice(start, start := start + len(concept))
        order = listed(keep, seed, concept)
        vectors = matrix(concept[VECTOR].combine_chunks())
        m, at = compare(vectors, order, max_rows, seed)
        max_sim[here] = m
        closest[here] = np.where(at < 0, -1, address[here][at])
    return pa.table({SHARD: table[SHARD], ROW: table[ROW], "max_sim": max_sim, "nearest": closest})


def listed(keep: str, seed: int, concept: pa.Table) -> np.ndarray:
    """The rows of a concept, given by address, in the order in which they are listed; int64 (n,)."""
    if keep == "random":
        first = hash64(concept[KEY].combine_chunks(), seed)
    else:
        first = concept[DISTANCE].to_numpy() * (-1 if keep == "hard" else 1)
    return np.lexsort((first, dropped(concept)))  # stable, so ties stay in the order of addresses


def compare(vectors: np.ndarray, order: np.ndarray, max_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """M of (n, d) vectors listed in an order, and which row it is to (-1 where none is earlier): float32, int64 (n,).

    A vector that is there already has M = 1 to its first copy, without a product.
    """
    max_sim, closest = np.zeros(len(order), np.float32), np.full(len(order), -1, np.int64)
    first, of = first_copies(vectors, order)
    copies = order[first[of] != np.arange(len(order))]
    max_sim[copies] = 1
    closest[order] = order[first[of]]
    distinct = order[first]
    closest[distinct] = -1
    for part in parts(vectors, distinct, max_rows, seed):
        max_sim[part], at = max_products(vectors, part)
        closest[part] = np.where(at < 0, -1, part[at])
    return max_sim, closest


def first_copies(vectors: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the order at which a vector is new, ascending, and for every position which of them it equals."""
    kind = pa.binary(vectors.shape[1] * vectors.itemsize)
    keys: list[np.ndarray] = []
    for start in range(0, len(order), HASHED):
        some = np.ascontiguousarray(vectors[order[start : start + HASHED]])
        values = pa.FixedSizeBinaryArray.from_buffers(kind, len(some), [None, pa.py_buffer(some)])
        keys.append(np.frombuffer(row_keys(values).buffers()[1], "V16"))
    codes = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(order), [None, pa.py_buffer(np.concatenate(keys))])
    of = codes.dictionary_encode().indices.to_numpy()  # numbered as they come
    return np.unique(of, return_index=True)[1], of


def parts(vectors: np.ndarray, rows: np.ndarray, most: int, seed: int) -> Iterator[np.ndarray]:
    """Rows in sets of at most `most` whose members are near, by k-means, each in the order given."""
    if len(rows) <= most:
        yield rows
        return
    k = 2 * -(-len(rows) // most)
    faiss = load_faiss()
    kmeans: Any = faiss.Kmeans(
        vectors.shape[1], k, niter=10, spherical=True, seed=seed & 0x7FFFFFFF, min_points_per_centroid=1
    )
    drawn = np.random.default_rng(seed).choice(len(rows), min(len(rows), 256 * k), replace=False)
    kmeans.train(as_float32(vectors[rows[drawn]]))
    index = flat_index(kmeans.centroids)
    of = np.concatenate(
        [nearest(vectors[rows[i : i + HASHED]], kmeans.centroids, index)[0] for i in range(0, len(rows), HASHED)]
    )
    for part in range(k):
        own = rows[of == part]
        if len(own) > 0.9 * len(rows):  # it does not come apart
            yield from (own[i : i + most] for i in range(0, len(own), most))
        elif len(own):
            yield from parts(vectors, own, most, seed)


def max_products(vectors: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Greatest cosine of every one of n rows to those before it, at most 1, and the position of that row.

    (0, -1) for the first. float32 (n,), int64 (n,).
    """
    n = len(rows)
    best, at = np.full(n, -np.inf, np.float32), np.full(n, -1, np.int64)
    products = np.empty((BLOCK, BLOCK), np.float32)
    for start in range(0, n, BLOCK):
        own = _units(vectors, rows[start : start + BLOCK])
        here = slice(start, start + len(own))
        for before in range(0, start + 1, BLOCK):
            other = own if before == start else _units(vectors, rows[before : before + BLOCK])
            s = np.matmul(own, other.T, out=products[: len(own), : len(other)])
            if before == start:
                s[np.triu_indices(len(own))] = -np.inf
            column = s.argmax(axis=1)
            value = s[np.arange(len(own)), column]
            better = value > best[here]
            best[here][better] = value[better]
            at[here][better] = before + column[better]
    best[:1] = 0
    return np.clip(best, -1, 1), at


def _units(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Some rows as float32 of norm 1, which float16 leaves off by up to 5e-4."""
    x = as_float32(vectors[rows])
    x /= np.sqrt(np.vecdot(x, x))[:, None]
    return x


def follow(name: str, epsilon: float, rule: str, table: pa.Table) -> pa.Table:
    """Reduce of `Run.regroup` by concept: score and group of every row, from its M and nearest earlier row."""
    address = pack(table[SHARD].to_numpy(), table[ROW].to_numpy())
    in_order = np.argsort(address)
    m = table[f"{name}.max_sim"].to_numpy()
    kept = -m >= np.float32(epsilon - 1)  # as `select.floors` compares
    to = table[f"{name}.nearest"].to_numpy()
    leads = np.arange(len(table))
    leads[~kept] = in_order[np.searchsorted(address, to[~kept], sorter=in_order)]
    while not np.array_equal(further := leads[leads], leads):
        leads = further
    return describe(table, leads, kept, -m, rule)
