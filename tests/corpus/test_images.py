"""The image column: bytes whatever the corpus stores, a reason for every row without, no path that leads outside."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import CorpusConfig, parse
from pipeline.corpus import images
from pipeline.corpus.images import MISSING, NULL_IMAGE, OUTSIDE, TOO_LARGE, ImageColumn, is_image, place_of
from pipeline.corpus.rows import row_column
from pipeline.corpus.tar import FAULT
from pipeline.engine.reading import REASON, read_shard
from pipeline.errors import ConfigError, CorpusError
from pipeline.hashing import row_keys
from pipeline.report.stored import quarantined
from pipeline.sample import Sample, contents, draw

IMAGE = {"image": "image"}


def corpus(tmp_path: Path, **columns: Any) -> Path:
    (tmp_path / "data").mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), tmp_path / "data" / "a.parquet", row_group_size=1000)
    return tmp_path / "data"


def read(run: Any, *roles: str, batch_rows: int = 1024) -> list[tuple[Any, ...]]:
    """Values of some references and the reason, row by row."""
    batches = [b for s in run.live for b in read_shard(run.layout, s, roles, batch_rows)]
    names = [*roles, REASON]
    assert all(b.schema.field("image").type == pa.binary() for b in batches if "image" in roles)
    return [row for b in batches for row in zip(*(b.column(n).to_pylist() for n in names), strict=True)]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_bytes(tmp_path: Path, open_run: Any, kind: pa.DataType) -> None:
    path = corpus(tmp_path, image=pa.array([b"one", None, b"", b"x" * 2001, b"x" * 2000], kind), text=list("abcde"))
    with open_run(path, corpus_options=IMAGE | {"max_image_mb": 2000 / (1 << 20)}) as run:
        assert read(run, "image", "text") == [
            (b"one", "a", None),
            (None, "b", "caption without image"),
            (None, "c", "empty image"),
            (None, "d", TOO_LARGE),
            (b"x" * 2000, "e", None),
        ]
        assert [why for *_, why in read(run, "image")] == [None, NULL_IMAGE, "empty image", TOO_LARGE, None]


def test_images_without_captions_go_to_quarantine_and_so_does_the_reverse(tmp_path: Path, open_run: Any) -> None:
    path = corpus(tmp_path, image=[b"1", b"2", b"3", None, None], text=["a", None, " ", "d", None])
    with open_run(path, corpus_options=IMAGE, max_bad_fraction=1) as run:
        run.materialize([row_column(False, None, image=True)])
        table = quarantined(run.store, ["row"])
        assert dict(zip(table["row"].to_pylist(), table["reason"].to_pylist(), strict=True)) == {
            1: "image without caption",
            2: "blank text",
            3: "caption without image",
            4: NULL_IMAGE,
        }


def hugging_face(*cells: tuple[bytes | None, str | None] | None) -> pa.Array:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([None if c is None else {"bytes": c[0], "path": c[1]} for c in cells], kind)


def test_hugging_faces_struct_has_bytes_or_a_path(tmp_path: Path, open_run: Any) -> None:
    cells = hugging_face((b"one", "anywhere/else.png"), (None, "b.png"), (None, None), None, (b"", "c.png"))
    path = corpus(tmp_path, image=cells, text=["t"] * 5)
    (path / "b.png").write_bytes(b"two")
    with open_run(path / "a.parquet", corpus_options=IMAGE) as run:
        found = [(b"one", None), (b"two", None), (None, NULL_IMAGE), (None, NULL_IMAGE), (None, "empty image")]
        assert read(run, "image") == found
        assert read(run, "image", batch_rows=1) == found


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_paths_are_relative_to_the_file_and_stay_there(
    tmp_path: Path, open_run: Any, kind: pa.DataType, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "s.png").write_bytes(b"shared")
    inside = tmp_path / "data" / "in"
    inside.mkdir(parents=True)
    (inside / "a.png").write_bytes(b"one")
    (inside / "large.png").write_bytes(b"x" * 2001)
    (inside / "full.png").write_bytes(b"x" * 2000)
    (inside / "link.png").symlink_to(inside / "a.png")
    (inside / "out.png").symlink_to(secret)
    os.mkfifo(inside / "pipe.png")
    paths = {
        "in/a.png": b"one",
        "./in/../in/a.png": b"one",
        f"file://{inside}/a.png": b"one",
        str(inside / "a.png"): b"one",
        "in/link.png": b"one",
        "in/out.png": OUTSIDE,
        "../secret.png": OUTSIDE,
        str(secret): OUTSIDE,
        f"file://{secret}": OUTSIDE,
        "http://127.0.0.1:1/a.png": OUTSIDE,
        "s3://bucket/a.png": OUTSIDE,
        "in/a\0.png": OUTSIDE,
        "in/none.png": MISSING,
        "in": MISSING,
        "in/pipe.png": MISSING,
        "in/large.png": TOO_LARGE,
        "in/full.png": b"x" * 2000,
        str(shared / "s.png"): OUTSIDE,
        None: NULL_IMAGE,
        **{f"in/none-{i}.png": MISSING for i in range(20)},
    }
    texts = [f"text {i}" for i in range(len(paths))]
    path = corpus(tmp_path, image=pa.array(list(paths), kind), text=texts)
    tight = IMAGE | {"max_image_mb": 2000 / (1 << 20)}
    with open_run(path / "a.parquet", corpus_options=tight) as run:
        found = read(run, "image")
        assert dict(zip(paths, [image or why for image, why in found], strict=True)) == paths
        monkeypatch.setattr("pipeline.corpus.shards.BATCH_BYTES", 1)  # an image or sixteen at a time
        assert read(run, "image") == found
        assert [text for _, text, _ in read(run, "image", "text")] == texts
        before = run._reference("image")
    with open_run(path / "a.parquet", name="2", corpus_options=tight | {"image_roots": [str(shared)]}) as run:
        assert read(run, "image")[list(paths).index(str(shared / "s.png"))] == (b"shared", None)
        assert run._reference("image") != before


@given(st.lists(st.sampled_from(["..", ".", "a", "b", ""]), min_size=1, max_size=6))
def test_no_relative_path_climbs_out(parts: list[str]) -> None:
    path = "/".join(["in", *parts, "x.png"])
    depth, climbed = 0, False
    for part in path.split("/"):
        depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
        climbed |= depth < 0
    for base in ("s3://bucket/data", "/nowhere/data"):
        place = place_of(path, base, ())
        if not climbed:
            assert place is not None
        assert place is None or (place.startswith(base + "/") and ".." not in place)


def test_a_file_that_storage_fails_to_give_is_no_bad_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(uri: str) -> Any:
        raise OSError("503 slow down")

    monkeypatch.setattr(images, "resolve", fail)
    batch = pa.record_batch({"image": ["a.png"], FAULT: pa.nulls(1, pa.string())})
    with pytest.raises(OSError, match="slow down"):
        list(ImageColumn("image", 100).load(batch, "s3://bucket/data/a.parquet", 100))


def test_types_of_images() -> None:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert all(map(is_image, (pa.binary(), pa.large_binary(), pa.string(), pa.large_string(), struct)))
    lists, other = pa.list_(pa.uint8()), pa.struct([("bytes", pa.binary()), ("path", pa.int32())])
    assert not any(map(is_image, (pa.int64(), lists, other, pa.struct([("bytes", pa.binary())]))))


def config_of(path: Path, **corpus: Any) -> Any:
    return parse(
        {
            "corpus": {"path": str(path), **corpus},
            "scores": ["random"],
            "select": {"budget": {"rows": 1}},
            "engine": {"address": "inline"},
            "run": str(path.parent / "run"),
        }
    )


def test_what_fits_together_is_checked_at_the_door(tmp_path: Path, open_run: Any) -> None:
    with pytest.raises(ConfigError, match="a row needs a content: name the column of `text`, of `image`"):
        config_of(tmp_path, text=None)
    with pytest.raises(ConfigError, match="max_image_mb"):
        config_of(tmp_path, image="image", max_image_mb=0)
    assert CorpusConfig(path="x", text=None, image="image").image_column == ImageColumn("image", 64 << 20)
    path = corpus(tmp_path, image=[1, 2], text=["a", "b"])
    with pytest.raises(ConfigError, match=r"corpus.image: column 'image' is int64, not images"):
        open_run(path, corpus_options=IMAGE).__enter__()
    with pytest.raises(ConfigError, match=r"corpus.image: the corpus has no column 'picture'; it has image, text"):
        open_run(path, corpus_options={"image": "picture"}).__enter__()


def test_keys_bytes_and_tokens() -> None:
    image, text = pa.array([b"one", b"three", b"one", b"one"], pa.binary()), pa.array(["a", "a", "bcdef", "a"])
    alone = row_column(False, None, text=False, image=True)
    assert alone.inputs == ("image",)
    found = alone.open()(pa.record_batch([image], ["image"]))
    assert found.column("key").equals(row_keys(image))
    assert (found.column("bytes").to_pylist(), found.column("tokens").to_pylist()) == ([3, 5, 3, 3], [1] * 4)

    pair = row_column(False, None, image=True)
    found = pair.open()(pa.record_batch([text, image], ["text", "image"]))
    assert (found.column("bytes").to_pylist(), found.column("tokens").to_pylist()) == ([1, 1, 5, 1], [1, 1, 2, 1])
    keys = found.column("key").to_pylist()
    assert keys[0] == keys[3]
    assert len(set(keys)) == 3
    sliced = pair.open()(pa.record_batch([text, image], ["text", "image"]).slice(1, 2))
    assert sliced.column("key").to_pylist() == keys[1:3]

    named = row_column(True, None, image=True)
    assert named.inputs == ("text", "image", "id")
    found = named.open()(pa.record_batch([text, image, pa.array([1, 2, 3, 4])], ["text", "image", "id"]))
    assert found.column("key").equals(row_keys(pa.array([1, 2, 3, 4])))
    assert len({row_column(False, None, t, i).identity for t, i in ((True, False), (False, True), (True, True))}) == 3


def test_a_recipe_that_reads_what_is_not_there(tmp_path: Path, open_run: Any) -> None:
    path = corpus(tmp_path, image=[b"1"], text=["a"])
    with open_run(path) as run:
        with pytest.raises(CorpusError, match=r"a recipe reads `image`, but corpus\.image names"):
            run.identity("image")


def test_a_sample_of_images_holds_whole_ones_or_none(tmp_path: Path, open_run: Any) -> None:
    rng = np.random.default_rng(0)
    content = [rng.bytes(100 + i % 2) for i in range(40)]
    path = corpus(tmp_path, image=content, text=[f"t{i}" for i in range(40)])
    with open_run(path, corpus_options=IMAGE) as run:
        run.materialize([row_column(False, None, image=True)])
        state = draw(run, Sample(("image", "text"), 10, run.rows, 0, max_bytes=100))
        held = contents(state, "image")
        assert len(held) == 10
        assert all(h == b"" or h in content for h in held)
        rows = [int(t.removeprefix(b"t")) for t in contents(state, "text")]
        assert held == [content[r] if len(content[r]) <= 100 else b"" for r in rows]
