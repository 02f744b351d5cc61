"""In-context pretraining: the specification's walk, its properties, planted topics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.concepts.kmeans import load_centroids
from pipeline.engine.regroup import ROW, SHARD
from pipeline.errors import ConfigError
from pipeline.output.order import _walk
from pipeline.output.order._walk import Graph, neighbours, path_weight, walk
from pipeline.output.order.base import write_order
from pipeline.output.order.in_context import FIELDS, InContext, string_together
from pipeline.output.order.shuffled import Shuffled
from pipeline.output.pack.best_fit import BestFit
from pipeline.sample import stored
from tests.output.feeding_runs import column, curated, kept, opened, ordinals, rows

VECTORS = {"embed": {"kind": "precomputed", "column": "vector"}, "cluster": {"k": 3}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return curated(tmp_path_factory.mktemp("contexts"), **VECTORS)


def test_the_toy_walk() -> None:
    """Edges (0,1) .9, (1,2) .8, (0,2) .5, (3,4) .7, (2,3) .3; node 5 is alone."""
    edges = np.array([[0, 1], [1, 2], [0, 2], [3, 4], [2, 3]])
    graph = Graph.of(6, edges[:, 0], edges[:, 1], np.array([0.9, 0.8, 0.5, 0.7, 0.3]))
    assert np.diff(graph.start).tolist() == [2, 2, 3, 2, 1, 0]
    path, anew = walk(graph)
    assert path.tolist() == [5, 4, 3, 2, 1, 0]
    assert np.flatnonzero(anew).tolist() == [0, 1]
    assert path_weight(graph, path) == pytest.approx(2.7)


def test_ties_go_to_the_lowest_node() -> None:
    square = np.array([[0, 1], [1, 2], [2, 3], [3, 0]])
    graph = Graph.of(4, square[:, 0], square[:, 1], np.ones(4))
    assert walk(graph)[0].tolist() == [0, 1, 2, 3]
    both_ways = Graph.of(4, np.append(square[:, 0], square[:, 1]), np.append(square[:, 1], square[:, 0]), np.ones(8))
    assert np.array_equal(both_ways.to, graph.to)


@given(st.integers(1, 40), st.integers(0, 200), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_a_walk_visits_every_node_once_and_only_leaves_where_it_must(nodes: int, edges: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    graph = Graph.of(nodes, *rng.integers(0, nodes, (2, edges)), rng.random(edges))
    path, anew = walk(graph)
    assert sorted(path.tolist()) == list(range(nodes))
    seen: set[int] = set()
    for at, node in enumerate(path.tolist()):
        if at and not anew[at]:
            before = path[at - 1]
            mine = slice(graph.start[before], graph.start[before + 1])
            free = [
                (-w, t)
                for t, w in zip(graph.to[mine].tolist(), graph.weight[mine].tolist(), strict=True)
                if t not in seen
            ]
            assert node == min(free)[1]
        seen.add(node)


def test_a_walk_is_nearly_always_heavier_than_a_random_order() -> None:
    won = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        graph = Graph.of(30, *rng.integers(0, 30, (2, 120)), rng.random(120))
        won += path_weight(graph, walk(graph)[0]) >= path_weight(graph, rng.permutation(30))
    assert won >= 99


def test_twenty_planted_topics_stay_together() -> None:
    """The specification's blocks: 20 topics of 50 documents; over 95 % of neighbours share one, shuffled under 10 %."""
    rng = np.random.default_rng(0)
    topic = rng.permutation(np.repeat(np.arange(20), 50))
    vectors = np.linalg.qr(rng.standard_normal((32, 32)))[0][topic] + 0.1 * rng.standard_normal((1000, 32))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    for k, least, most in ((50, 0.95, 1), (20, 0.92, 0.96), (10, 0.87, 0.92)):  # 10 is too few
        path, _ = walk(neighbours(vectors, k, seed=0))
        assert least < (topic[path][1:] == topic[path][:-1]).mean() <= most
    assert (topic[1:] == topic[:-1]).mean() < 0.1


def test_neighbours_are_clipped_and_inverted_lists_find_most_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((600, 8)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    assert neighbours(x[:1], 5, seed=0).nodes == 1
    assert np.diff(neighbours(x[:4], 50, seed=0).start).tolist() == [3, 3, 3, 3]
    exact = neighbours(x, 5, seed=0)
    cosine = x @ x.T - 2 * np.eye(600)
    nearest = np.argsort(-cosine, axis=1)[:, :5]
    for node in range(0, 600, 50):
        assert set(nearest[node]) <= set(exact.to[exact.start[node] : exact.start[node + 1]])
    monkeypatch.setattr(_walk, "EXACT_ROWS", 100)
    found = neighbours(x, 5, seed=0)
    pairs = [set((np.repeat(np.arange(600), np.diff(g.start)) * 600 + g.to).tolist()) for g in (exact, found)]
    assert len(pairs[0] & pairs[1]) > 0.9 * len(pairs[0])


def topics(run: str, order: np.ndarray) -> np.ndarray:
    return kept(run)["topic"].to_numpy()[order]


def test_related_rows_follow_one_another_and_none_comes_twice(run: str) -> None:
    """Three regions of six topics: contexts are of one topic or two, whatever their order."""
    with opened(run) as fed:
        walked = write_order(fed, InContext(context=10**9, name="whole"))
        order = ordinals(fed, walked)
        contexts = write_order(fed, InContext(context=200))
        shuffled = ordinals(fed, write_order(fed, Shuffled()))
    assert sorted(order.tolist()) == list(range(200))
    together = (np.diff(topics(run, order)) == 0).mean()
    assert together > 0.95
    assert (np.diff(topics(run, shuffled)) == 0).mean() < 0.3
    about = walked.described["about"]
    assert about["regions"] == 3
    assert about["near_duplicates"] <= 5
    rows_kept = kept(run)
    vectors = np.stack(rows_kept["vector"].to_numpy())
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    nearest = np.argsort(-(vectors @ vectors.T - 3 * np.eye(200)), axis=1)[:, :50]
    concept = np.array([t["concept"] for t in rows_kept["tamis"].to_pylist()])
    assert about["edges_cut"] == pytest.approx((concept[nearest] != concept[:, None]).mean(), abs=0.005)
    assert about["mean_similarity"] > 0.6
    assert about["walks"] == 3  # so every row but the first of a region has the one before it as a neighbour
    beside = np.diff(concept[order]) == 0
    steps = np.vecdot(vectors[order[1:]], vectors[order[:-1]])[beside]
    assert about["mean_similarity"] == pytest.approx(steps.mean(), abs=0.002)
    assert contexts.rows == 200


def test_contexts_are_whole_of_about_their_tokens_and_shuffled(run: str) -> None:
    with opened(run) as fed:
        order = write_order(fed, InContext(k=5, context=200, name="short"))
        found, group = ordinals(fed, order), np.asarray(column(order, "group"))
        straight = write_order(fed, InContext(k=5, context=200, shuffle=False, name="straight"))
        lying, concepts = ordinals(fed, straight), np.asarray(column(straight, "group")) >> 40
    edges = np.flatnonzero(np.diff(group)) + 1
    assert len(edges) + 1 == len(np.unique(group)) > 10  # a context's rows are all together
    tokens = np.array([-(-len(t) // 4) for t in kept(run)["text"].to_pylist()])
    sizes = np.add.reduceat(tokens[found], np.append(0, edges))
    assert sizes.max() < 200 + tokens.max()
    assert 120 < sizes.mean() < 210
    assert np.flatnonzero(np.diff(concepts)).size == 2  # unshuffled: one region after the other
    assert sorted(lying.tolist()) == sorted(found.tolist())
    cuts = np.flatnonzero(np.diff(np.asarray(column(straight, "group")))) + 1
    assert {tuple(c) for c in np.split(found, edges)} == {tuple(c) for c in np.split(lying, cuts)}


def test_a_context_holds_the_rows_that_begin_in_its_tokens() -> None:
    angle = np.array([0.0, 0.1, 0.2, 0.3, 0.4])
    points = pa.array(np.stack([np.cos(angle), np.sin(angle)], 1).ravel().astype(np.float32))
    table = pa.table(
        {
            "concept.concept": pa.array([0] * 5, pa.int32()),
            "embed.vector": pa.FixedSizeListArray.from_arrays(points, 2),
            "row.tokens": [6, 6, 6, 25, 1],
            SHARD: [0] * 5,
            ROW: np.arange(5),
        }
    )
    found = string_together(1, 10, 0, table)  # a chain, which is walked from its end
    assert found.column_names == [SHARD, ROW, *FIELDS.names]
    assert found["position"].to_pylist() == [0, 1, 2, 3, 4]
    assert found["context"].to_pylist() == [0, 0, 1, 1, 4]
    assert found["similarity"].to_pylist() == pytest.approx([0, *[np.cos(0.1)] * 4])


def test_regions_follow_one_another_by_their_centroids(tmp_path: Path) -> None:
    with opened(curated(tmp_path, **VECTORS | {"cluster": {"k": 6}})) as fed:
        order = write_order(fed, InContext(k=5, shuffle=False))
        points = load_centroids(stored(fed, "centroids"))
        concept = np.array([t["concept"] for t in kept(fed.store.uri)["tamis"].to_pylist()])[ordinals(fed, order)]
    walked = concept[np.append(True, np.diff(concept) != 0)]
    cosine = points @ points.T
    expected = [0]  # all are neighbours of all
    while len(expected) < 6:
        expected.append(max(set(range(6)) - set(expected), key=lambda c: cosine[expected[-1], c]))
    assert expected != list(range(6))
    assert walked.tolist() == expected


def test_the_order_does_not_depend_on_shards(run: str, tmp_path: Path) -> None:
    corpus = {"path": str(Path(run).parent / "corpus-*.parquet"), "shard_mb": 1}
    other = curated(tmp_path, corpus=corpus, **VECTORS)
    found = []
    for uri in (run, other):
        with opened(uri) as fed:
            found.append(ordinals(fed, write_order(fed, InContext(k=5, context=200))))
    assert np.array_equal(*found)


def test_copies_are_counted(tmp_path: Path) -> None:
    table = rows(40)
    table = pa.concat_tables([table] * 6).set_column(0, "n", pa.array(np.arange(240)))
    with opened(curated(tmp_path, table, **VECTORS)) as fed:
        assert write_order(fed, InContext(k=5)).described["about"]["near_duplicates"] > 100


def test_without_vectors_it_says_what_to_add(tmp_path: Path) -> None:
    with opened(curated(tmp_path)) as fed, pytest.raises(ConfigError, match="add `embed"):
        write_order(fed, InContext())


def test_best_fit_would_tear_contexts_apart(run: str) -> None:
    with opened(run) as fed:
        order = write_order(fed, InContext(k=5, context=200))
        with pytest.raises(ConfigError, match="use --kind concat"):
            BestFit(ids="ids", end_id=0).check(order)
