"""Vectors that the corpus holds: every list type, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import parse
from pipeline.corpus.rows import row_column
from pipeline.embed.precomputed import Precomputed
from pipeline.engine.pool import InlinePool
from pipeline.errors import ConfigError, TamisError
from pipeline.run import Run
from pipeline.vectors import matrix

VECTORS = [[3.0, 4.0], [0.0, -2.0], [1e-3, 0.0], [5.0, 12.0]]


def embedded(directory: Path, vectors: pa.Array, **fields: Any) -> tuple[pa.ChunkedArray, list[tuple[int, str]]]:
    """The column `vector` and (row, reason) of what was refused."""
    directory.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": [f"row {i}" for i in range(len(vectors))], "emb": vectors})
    pq.write_table(table, directory / "corpus.parquet")
    config = {"corpus": {"path": str(directory / "corpus.parquet")}, "scores": ["density"]}
    config |= {"embed": {"kind": "precomputed", "column": "emb", **fields}, "select": {"budget": {"rows": 1}}}
    config |= {"engine": {"address": "inline", "max_bad_fraction": 1}, "run": str(directory / "run")}
    with Run(parse(config), InlinePool, quiet=True) as run:
        run.materialize([row_column(False, None)])
        recipe = run.config.embed
        assert isinstance(recipe, Precomputed)
        recipe.fit(run)
        run.materialize([recipe.column(run)])
    refused = [pq.read_table(p) for p in (directory / "run/quarantine/embed").glob("*.parquet")]
    pairs = [(r["shard_row"], r["reason"]) for t in refused for r in t.select(["shard_row", "reason"]).to_pylist()]
    return pq.read_table(directory / "run/columns/embed/part-00000.parquet")["vector"], pairs


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float32(), 2),
        pa.list_(pa.float16(), 2),
        pa.list_(pa.float64(), 2),
        pa.list_(pa.float16()),
        pa.list_(pa.float32()),
        pa.list_(pa.float64()),
        pa.large_list(pa.float32()),
    ],
    ids=str,
)
def test_every_list_of_floats_is_normalised(tmp_path: Path, kind: pa.DataType) -> None:
    vectors, refused = embedded(tmp_path, pa.array(VECTORS, pa.list_(pa.float64())).cast(kind))
    assert (vectors.type, refused) == (pa.list_(pa.float16(), 2), [])
    x = matrix(vectors.combine_chunks()).astype(np.float32)
    np.testing.assert_allclose(x, [[0.6, 0.8], [0, -1], [1, 0], [5 / 13, 12 / 13]], atol=5e-4)


def test_bad_vectors_are_quarantined_with_the_reason(tmp_path: Path) -> None:
    bad = [[float("nan"), 1.0], [float("inf"), 1.0], [0.0, 0.0], [1.0], [1.0, 2.0, 3.0], [None, 1.0], []]
    vectors, refused = embedded(tmp_path, pa.array([*VECTORS, *bad, None], pa.list_(pa.float32())))
    assert vectors.is_null().to_pylist() == [False] * 4 + [True] * 8
    assert sorted(refused) == [
        (4, "vector is not finite"),
        (5, "vector is not finite"),
        (6, "vector is zero"),
        (7, "vector has 1 numbers instead of 2"),
        (8, "vector has 3 numbers instead of 2"),
        (9, "vector is not finite"),
        (10, "vector has 0 numbers instead of 2"),
        (11, "corpus.emb is null"),
    ]


def test_empty_lists_do_not_set_the_length(tmp_path: Path) -> None:
    vectors, refused = embedded(tmp_path, pa.array([[], [], [], [3.0, 4.0]], pa.list_(pa.float32())))
    assert (vectors.type.list_size, len(refused)) == (2, 3)


def test_dims_win_over_the_most_common_length(tmp_path: Path) -> None:
    vectors, refused = embedded(tmp_path, pa.array([*VECTORS, [0.0, 0.0, 1.0]], pa.list_(pa.float32())), dims=3)
    assert vectors.type.list_size == 3
    assert len(refused) == 4


@pytest.mark.parametrize(
    ("vectors", "fields", "error", "says"),
    [
        (pa.array(["a"]), {}, ConfigError, "'emb' is string, not a list of float16, float32 or float64"),
        (pa.array([[1, 2]]), {}, ConfigError, "not a list of float16"),
        (
            pa.array([VECTORS[0]], pa.list_(pa.float32(), 2)),
            {"dims": 3},
            ConfigError,
            "holds vectors of 2: leave dims out",
        ),
        (pa.array([VECTORS[0]]), {"column": "other"}, ConfigError, "no column 'other'; it has text, emb"),
        (pa.array([[], None], pa.list_(pa.float32())), {}, TamisError, "no row of the corpus holds a vector"),
    ],
    ids=["text", "integers", "dims", "missing", "empty"],
)
def test_errors_at_the_door(
    tmp_path: Path, vectors: pa.Array, fields: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        embedded(tmp_path, vectors, **fields)


def test_the_column_is_part_of_the_identity_and_of_the_manifest() -> None:
    a, b = Precomputed(column="a"), Precomputed(column="b")
    assert a.identity() != b.identity()
    assert a.model_dump()["column"] == "a"
