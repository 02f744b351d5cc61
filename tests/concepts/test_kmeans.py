"""Spherical k-means: as good as FAISS's own, the same every time, and sound on data that break it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pipeline.concepts import kmeans
from pipeline.concepts.assign import concept_column
from pipeline.concepts.kmeans import CENTROIDS, Cluster, lloyd_step, spherical_kmeans
from pipeline.config import parse
from pipeline.corpus.rows import row_column
from pipeline.engine import threads
from pipeline.engine.pool import InlinePool, Pool
from pipeline.errors import ConfigError
from pipeline.run import Run


def mixture(rows: int, k: int, dims: int, seed: int = 0, spread: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors (n, d) around k directions, and which."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((k, dims))
    member = rng.integers(0, k, rows)
    x = centres[member] / np.linalg.norm(centres[member], axis=1, keepdims=True)
    x = x + spread / np.sqrt(dims) * rng.standard_normal((rows, dims))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), member


def mean_distance(x: np.ndarray, points: np.ndarray) -> float:
    return float(lloyd_step(x, points)["distance"][0]) / len(x)


def clustered(
    directory: Path,
    x: np.ndarray,
    files: int = 3,
    seed: int = 0,
    pool: Callable[[], Pool] = InlinePool,
    texts: list[str] | None = None,
    **cluster: Any,
) -> pa.Table:
    """The columns `concept` and `distance` of rows whose vectors are in the corpus."""
    new = not (directory / "corpus").exists()
    (directory / "corpus").mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(np.array_split(np.arange(len(x)), files) if new else ()):
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(x[part].ravel()), x.shape[1])
        table = pa.table({"text": [texts[row] if texts else f"row {row}" for row in part], "emb": vectors})
        pq.write_table(table, directory / f"corpus/{i:04d}.parquet", row_group_size=100)
    config = {"corpus": {"path": str(directory / "corpus"), "shard_mb": 1e-6}, "seed": seed}
    config |= {"embed": {"kind": "precomputed", "column": "emb"}, "cluster": cluster, "scores": ["density"]}
    config |= {"select": {"budget": {"rows": 1}}, "engine": {"address": "inline"}, "run": str(directory / "run")}
    with Run(parse(config), pool, quiet=True) as run:
        assert run.config.embed is not None
        run.materialize([row_column(False, None)])
        run.materialize([run.config.embed.column(run)])
        run.materialize([concept_column(run, run.config.cluster)])
    parts = sorted((directory / "run/columns/concept").glob("*.parquet"))
    return pa.concat_tables([pq.read_table(p) for p in parts])


def centroids(directory: Path) -> np.ndarray:
    found: np.ndarray = np.load(directory / "run/artifacts/centroids" / CENTROIDS)
    return found


def test_finds_the_clusters_of_a_mixture_as_well_as_faiss() -> None:
    x, _ = mixture(4000, 20, 32)
    points, distances = spherical_kmeans(x, 20, 20, seed=1)
    assert points.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, atol=1e-5)
    reference = faiss.Kmeans(32, 20, niter=20, spherical=True, seed=1, max_points_per_centroid=4000)
    reference.train(x)
    assert mean_distance(x, points) < mean_distance(x, reference.centroids) * 1.001
    assert distances[-1] < distances[0]
    assert 1 < len(distances) <= 20


def test_lloyd_step_is_the_textbook_one() -> None:
    x, _ = mixture(500, 5, 8)
    points = x[:7]
    state = lloyd_step(x, points)
    cosine = x.astype(np.float64) @ points.T
    member = cosine.argmax(axis=1)
    assert state["rows"].tolist() == np.bincount(member, minlength=7).tolist()
    np.testing.assert_allclose(
        state["sums"], [x[member == j].sum(axis=0, dtype=np.float64) for j in range(7)], atol=1e-4
    )
    np.testing.assert_allclose(state["distance"], (1 - cosine.max(axis=1)).sum(), atol=1e-4)


def test_threads_do_not_matter() -> None:
    x, _ = mixture(3000, 12, 48)
    found = []
    for count in (1, 2):
        with threads.limited(count):
            found.append(spherical_kmeans(x, 12, 5, seed=0)[0])
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize(
    ("x", "k", "concepts"),
    [
        (np.tile([[0.6, 0.8]], (100, 1)), 5, 1),  # all identical
        (np.repeat(np.eye(3), [4, 1, 1], axis=0), 6, 3),
        (np.array([[1, 0], [-1, 0]] * 20), 1, 1),  # the mean is zero
        (np.eye(6), 6, 6),  # as many concepts as rows
        (np.array([[0.0, 1.0]]), 1, 1),
    ],
    ids=["identical", "lopsided", "cancelling", "k is n", "one row"],
)
def test_awkward_vectors_leave_sound_centroids(x: np.ndarray, k: int, concepts: int) -> None:
    points, _ = spherical_kmeans(x.astype(np.float32), k, 10, seed=0)
    assert len(points) == concepts
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, atol=1e-5)
    assert (lloyd_step(x, points)["rows"] > 0).all()


@pytest.mark.parametrize(("rows", "k"), [(1, 1), (2, 1), (100, 10), (12_000, 110), (1_281_167, 1132), (10**9, 10_000)])
def test_auto_is_the_square_root_of_the_rows(rows: int, k: int) -> None:
    assert Cluster().concepts(rows) == k


def test_k_above_the_rows_says_what_to_change() -> None:
    with pytest.raises(ConfigError, match="k = 1,000 but the corpus has 30 rows: set k between 1 and 30, or auto"):
        Cluster(k=1000).concepts(30)
    assert Cluster(k=30).concepts(30) == 30


@pytest.mark.parametrize("k", [0, -3, "many", 2.5])
def test_k_is_a_positive_integer_or_auto(k: object) -> None:
    with pytest.raises(ValidationError):
        Cluster.model_validate({"k": k})


def test_concepts_of_a_run_are_those_of_the_mixture(tmp_path: Path) -> None:
    x, member = mixture(900, 6, 16, spread=0.1)
    table = clustered(tmp_path, x, k=6)
    assert table.schema.field("concept").type == pa.int32()
    assert table.schema.field("distance").type == pa.float32()
    pairs = set(zip(table["concept"].to_pylist(), member.tolist(), strict=True))
    assert len(pairs) <= 9  # k-means may halve one and join two, but a concept does not cut through the mixture
    points = centroids(tmp_path)
    np.testing.assert_array_equal(table["concept"].to_numpy(), (x @ points.T).argmax(axis=1))
    expected = 1 - np.einsum("ij,ij->i", x.astype(np.float64), points[table["concept"].to_numpy()])
    np.testing.assert_allclose(table["distance"].to_numpy(), expected, atol=2e-4)  # stored vectors are float16


@pytest.mark.parametrize(
    "cluster", [{"k": 7, "sample_per_concept": 20}, {"k": 7, "full_lloyd": True}], ids=["sample", "full"]
)
def test_shards_do_not_matter(tmp_path: Path, cluster: dict[str, Any]) -> None:
    x, _ = mixture(600, 7, 16)
    clustered(tmp_path / "one", x, files=1, **cluster)
    clustered(tmp_path / "many", x, files=6, **cluster)
    # One shard and six differ in the order in which float64 sums are made, and only where all rows are summed.
    np.testing.assert_allclose(
        centroids(tmp_path / "one"), centroids(tmp_path / "many"), atol=1e-6 if "full_lloyd" in cluster else 0
    )


def test_order_and_copies_of_rows_do_not_matter(tmp_path: Path) -> None:
    x, _ = mixture(500, 6, 16, spread=1.0)
    texts = [f"row {i}" for i in range(500)]
    order = np.random.default_rng(0).permutation(500)
    options: dict[str, Any] = {"k": 6, "sample_per_concept": 30}
    plain = clustered(tmp_path / "plain", x, texts=texts, **options)["distance"].to_numpy()
    turned = clustered(tmp_path / "turned", x[order], texts=[texts[i] for i in order], **options)["distance"].to_numpy()
    twice = clustered(tmp_path / "twice", np.tile(x, (2, 1)), texts=texts * 2, **options)["distance"].to_numpy()
    np.testing.assert_array_equal(turned, plain[order])
    np.testing.assert_array_equal(twice, np.tile(plain, 2))


def test_a_seed_changes_the_centroids_and_the_same_seed_does_not(tmp_path: Path) -> None:
    x, _ = mixture(400, 9, 16, spread=1.0)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        clustered(tmp_path / name, x, seed=seed, k=9)
    a, b, c = (centroids(tmp_path / name) for name in "abc")
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_full_lloyd_goes_on_where_the_sample_ends(tmp_path: Path) -> None:
    x, _ = mixture(2000, 10, 16, spread=1.5)
    clustered(tmp_path / "sample", x, k=10, sample_per_concept=5)
    clustered(tmp_path / "full", x, k=10, sample_per_concept=5, full_lloyd=True)
    half = x.astype(np.float16)
    before, after = (
        mean_distance(half, centroids(tmp_path / "sample")),
        mean_distance(half, centroids(tmp_path / "full")),
    )
    assert after < before * 0.99
    steps = sorted((tmp_path / "full/run/artifacts").glob("centroids-iteration-*"))
    said = [json.loads((s / "kmeans.json").read_text())["mean_distance"] for s in steps]
    assert said == sorted(said, reverse=True)
    np.testing.assert_allclose(
        said[0],
        mean_distance(half, np.load(tmp_path / "full/run/artifacts/centroids-on-sample" / CENTROIDS)),
        atol=1e-6,
    )


@pytest.mark.parametrize("cluster", [{}, {"full_lloyd": True}], ids=["sample", "full"])
def test_ray_and_inline_agree_to_the_byte(tmp_path: Path, lasting_pool: Pool, cluster: dict[str, Any]) -> None:
    x, _ = mixture(3000, 8, 24, spread=1.0)
    inline = clustered(tmp_path / "inline", x, k=8, **cluster)
    ray = clustered(tmp_path / "ray", x, k=8, pool=lambda: lasting_pool, **cluster)
    assert inline.equals(ray)
    np.testing.assert_array_equal(centroids(tmp_path / "inline"), centroids(tmp_path / "ray"))


def test_the_sample_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = mixture(600, 4, 16)
    monkeypatch.setattr(kmeans, "SAMPLE_BYTES", 100 * 2 * 16)
    clustered(tmp_path, x, k=4)
    assert json.loads((tmp_path / "run/artifacts/centroids/kmeans.json").read_text())["sample_rows"] == 100


def test_identical_rows_are_one_concept(tmp_path: Path) -> None:
    table = clustered(tmp_path, np.tile(np.float32([[0.6, 0.8]]), (200, 1)), k=4)
    assert set(table["concept"].to_pylist()) == {0}
    assert max(table["distance"].to_pylist()) < 1e-6
    notes = json.loads((tmp_path / "run/artifacts/centroids/kmeans.json").read_text())
    assert (notes["asked"], notes["concepts"]) == (4, 1)


def test_a_second_call_fits_nothing(tmp_path: Path) -> None:
    x, _ = mixture(300, 4, 8)
    clustered(tmp_path, x, k=4, full_lloyd=True)
    clustered(tmp_path, x, k=4, full_lloyd=True)
    passes = json.loads((tmp_path / "run/manifest.json").read_text())["passes"]
    assert passes == []
