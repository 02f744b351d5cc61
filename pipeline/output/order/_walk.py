"""A greedy walk over a graph of neighbours that visits every node once: the path of in-context pretraining.

Shi et al. 2024 (arXiv 2310.10638), section 2.2, the greedy maximum travelling salesman: start at an unvisited node of
least degree, go on to the unvisited neighbour of greatest weight, and where there is none start again. Degrees are
those of the whole graph, counted once. Ties go to the lowest node, so the walk is a function of the graph.

Sequential by nature, so it is plain Python over lists that NumPy has sorted: 266,000 nodes a second with 50 neighbours
each (bench/packing.py). Finding the neighbours costs far more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.vectors import as_float32, load_faiss

EXACT_ROWS = 1 << 15
"""Up to so many rows all pairs are compared; beyond, FAISS looks into the nearest of sqrt(n) inverted lists."""
PROBES = 8


@dataclass(frozen=True)
class Graph:
    """An undirected graph of n nodes: the edges of node i are `slice(start[i], start[i + 1])` of `to` and `weight`, the
    greatest weight first."""

    start: np.ndarray
    to: np.ndarray
    weight: np.ndarray

    @property
    def nodes(self) -> int:
        return len(self.start) - 1

    @classmethod
    def of(cls, nodes: int, a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> Graph:
        """From edges between a and b, int64 (m,), each in one direction or both; loops are left out."""
        apart = a != b
        a, b, weight = a[apart], b[apart], weight[apart]
        pair, first = np.unique(np.minimum(a, b) * nodes + np.maximum(a, b), return_index=True)
        low, high, w = pair // nodes, pair % nodes, weight[first]
        source, to, weight = np.concatenate([low, high]), np.concatenate([high, low]), np.concatenate([w, w])
        order = np.lexsort((to, -weight, source))
        return cls(np.searchsorted(source[order], np.arange(nodes + 1)), to[order], weight[order])


def neighbours(vectors: np.ndarray, k: int, seed: int) -> Graph:
    """The graph that joins each of (n, d) unit vectors to its k nearest by inner product; k is clipped to n - 1."""
    n = len(vectors)
    k = min(k, n - 1)
    if k < 1:
        none = np.empty(0, np.int64)
        return Graph.of(n, none, none, np.empty(0, np.float32))
    faiss = load_faiss()
    x = as_float32(vectors)
    if n <= EXACT_ROWS:
        index = faiss.IndexFlatIP(x.shape[1])
    else:
        lists = int(np.sqrt(n))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(x.shape[1]), x.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe, index.cp.seed = PROBES, seed & 0x7FFFFFFF
        index.train(x[np.sort(np.random.default_rng(seed).choice(n, min(n, 64 * lists), replace=False))])
    index.add(x)
    _, found = index.search(x, k + 1)  # itself comes along, or a copy of it does in its place
    a, b = np.repeat(np.arange(n), k + 1), found.ravel()
    a, b = a[b >= 0], b[b >= 0]
    weight = np.concatenate([np.vecdot(x[a[i : i + 65536]], x[b[i : i + 65536]]) for i in range(0, len(a), 65536)])
    return Graph.of(n, a, b, weight)


def walk(graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """Nodes in the order of the walk, int64 (n,), and whether each was started from anew, bool (n,)."""
    start, to = graph.start.tolist(), graph.to.tolist()
    seen = bytearray(graph.nodes)
    path: list[int] = []
    anew: list[int] = []
    for first in np.argsort(np.diff(graph.start), kind="stable").tolist():
        if seen[first]:
            continue
        anew.append(len(path))
        node: int | None = first
        while node is not None:
            seen[node] = 1
            path.append(node)
            node = next((other for other in to[start[node] : start[node + 1]] if not seen[other]), None)
    starts = np.zeros(graph.nodes, bool)
    starts[anew] = True
    return np.array(path, np.int64), starts


def path_weight(graph: Graph, path: np.ndarray) -> float:
    """Sum of the weights of the edges between nodes that follow one another; pairs that no edge joins count 0."""
    source = np.repeat(np.arange(graph.nodes), np.diff(graph.start))
    edges = source * graph.nodes + graph.to
    steps = path[:-1] * graph.nodes + path[1:]
    by = np.argsort(edges)
    at = by[np.minimum(np.searchsorted(edges, steps, sorter=by), max(len(edges) - 1, 0))] if len(edges) else None
    return 0.0 if at is None else float(graph.weight[at][edges[at] == steps].sum(dtype=np.float64))
