"""Corpora of images through the whole job: pairs in tars, images alone, paths; and the same bytes twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import parse
from pipeline.corpus.storage import Store
from pipeline.curation import Curated, curate
from pipeline.report.plan import make_plan
from pipeline.report.show import print_rows
from pipeline.report.stored import quarantined
from tests.corpus.samples import encoded, write_tar

pytest.importorskip("PIL")


def pairs_corpus(directory: Path) -> Path:
    """Two tars of twelve pairs each, most of them good; every caption and document is hostile to a terminal."""
    for file in range(2):
        samples: dict[str, dict[str, bytes]] = {}
        for i in range(12):
            size = (250 if i % 3 else 100, 220)
            caption = f"\x1b[2Ja picture of number {file}-{i} <script>alert(1)</script>" + " and more" * i
            document = {"url": f"https://example.org/{file}/{i}\x1b[31m"}
            samples[f"{file:02d}{i:02d}"] = {
                "png" if i % 2 else "jpg": encoded("PNG" if i % 2 else "JPEG", size, seed=100 * file + i),
                "txt": caption.encode(),
                "json": json.dumps(document).encode(),
            }
        samples[f"{file:02d}90"] = {"jpg": b"\xff\xd8 no picture", "txt": b"a caption of nothing that opens"}
        samples[f"{file:02d}91"] = {"txt": b"a caption alone"}
        write_tar(directory / f"{file}.tar", samples)
    return directory


def config(corpus: dict[str, Any], run: Path | str, **more: Any) -> dict[str, Any]:
    return {
        "corpus": corpus,
        "scores": ["image_size", {"kind": "length", "unit": "words"}],
        "select": {"budget": {"rows": 8}, "floors": {"image_size": 1}, "weights": {"length": 1}},
        "handoff": {"calibration_rows": 2, "recovery_tokens": 100},
        "engine": {"address": "inline", "max_bad_fraction": 0.5},
        "run": str(run),
    } | more


def kept(result: Curated) -> pa.Table:
    return pa.concat_tables(pq.read_table(pa.BufferReader(Store(result.path).read(f))) for f in result.files)


def test_a_corpus_of_pairs_in_tars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = pairs_corpus(tmp_path / "data")
    corpus = {"path": f"{path}/*.tar", "image": "image", "id": "key", "source": "json.url", "shard_mb": 0.2}
    result = curate(config(corpus, tmp_path / "run"), quiet=True)
    assert (result.rows, result.rows_kept, result.exit_code) == (28, 8, 0)
    assert result.reasons["image_size:short_side"] == 8

    table = kept(result)
    assert table.schema.names == ["key", "image", "text", "json", "json.url", "tamis"]
    assert table.schema.field("image").type == pa.binary()
    rows = {r["key"]: r for r in table.to_pylist()}
    for key, row in rows.items():
        file, i = int(key[:2]), int(key[2:])
        assert i >= 5  # the longest captions of the images that are large enough
        assert i % 3
        assert row["image"] == encoded("PNG" if i % 2 else "JPEG", (250, 220), seed=100 * file + i)
        assert row["text"].startswith(f"\x1b[2Ja picture of number {file}-{i} ")
        assert json.loads(row["json"])["url"] == row["json.url"]

    run = Store(str(tmp_path / "run"))
    bad = quarantined(run, ["row", "image_info"]).to_pylist()
    assert [(q["column"], q["reason"], q["row"]) for q in bad] == [
        ("row", "caption without image", 13),
        ("row", "caption without image", 13),
        ("image_info", "not an image of a known format", 12),
        ("image_info", "not an image of a known format", 12),
    ]
    handoff = json.loads(run.read("handoff.json"))
    assert (handoff["text_column"], handoff["image_column"]) == ("text", "image")

    again = curate(config(corpus, tmp_path / "again"), quiet=True)
    for name in result.files:
        assert Store(again.path).read(name) == Store(result.path).read(name)
    assert json.loads(run.read("manifest.json"))["passes"]
    curate(config(corpus, tmp_path / "run"), quiet=True)
    passes = json.loads(run.read("manifest.json"))["passes"]
    assert [p["pass"] for p in passes if "row" in p["pass"]] == []  # nothing is read twice

    print_rows(str(tmp_path / "run"), count=3)
    print_rows(str(tmp_path / "run"), kept=False, count=40)
    page = run.read("report", "index.html").decode()
    for shown in (capsys.readouterr().out, page):
        assert "a picture of number" in shown
        assert "\x1b[2J" not in shown
        assert "\x1b[31m" not in shown
        assert "PNG" not in shown
    assert "<script>alert" not in page


def images_alone(tmp_path: Path) -> dict[str, Any]:
    images = [encoded("PNG", (200 + i, 200), seed=i) for i in range(12)]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"image": images, "label": [i % 2 for i in range(12)]}), tmp_path / "data" / "a.parquet")
    return {"path": str(tmp_path / "data"), "image": "image", "text": None}


def test_a_corpus_of_images_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = images_alone(tmp_path)
    more = {"scores": ["image_size", "random"], "select": {"budget": {"bytes": 400_000}, "weights": {"random": 1}}}
    result = curate(config(corpus, tmp_path / "run", **more), quiet=True)
    table = kept(result)
    assert table.schema.names == ["image", "label", "tamis"]
    assert sum(map(len, table["image"].to_pylist())) == result.bytes_kept <= 400_000
    assert result.tokens_kept == result.rows_kept == len(table) >= 2  # an image is one token
    card = Store(result.run).read("README.md").decode()
    assert f"{result.tokens_kept} tokens (one an image), {result.bytes_kept:,} bytes of\nimages" in card
    assert "bytes of images" in Store(result.run).read("report", "index.html").decode()
    print_rows(result.run, count=2)
    assert "(no text)" in capsys.readouterr().out
    curate(config(corpus | {"id": "label"}, tmp_path / "named", **more), quiet=True)
    print_rows(str(tmp_path / "named"), count=1)
    assert "(no text)" not in capsys.readouterr().out  # the id says which it is


@pytest.mark.parametrize(
    ("corpus", "more", "says"),
    [
        ({}, {"scores": ["heuristics"]}, "a recipe reads `text`"),
        ({}, {"scores": ["density"]}, "images alone: name an `embed`"),
        ({}, {"output": {"layout": "nanochat"}}, "layout: nanochat needs a column of texts"),
        ({"image": None}, {}, "a row needs a content"),
    ],
)
def test_what_needs_a_text_says_so(tmp_path: Path, corpus: dict[str, Any], more: dict[str, Any], says: str) -> None:
    settings = config(images_alone(tmp_path) | corpus, tmp_path / "run", **({"scores": ["random"]} | more))
    settings["select"] = {"budget": {"rows": 2}}
    with pytest.raises(Exception, match=says):
        curate(settings, quiet=True)


def test_images_of_paths_come_along_as_bytes(tmp_path: Path) -> None:
    (tmp_path / "data" / "in").mkdir(parents=True)
    for i in range(6):
        (tmp_path / "data" / "in" / f"{i}.png").write_bytes(encoded("PNG", (210, 210 + i), seed=i))
    paths = [f"in/{i}.png" for i in range(6)] + ["../../etc/passwd", "in/none.png"]
    pq.write_table(pa.table({"picture": paths, "text": [f"n {i}" for i in range(8)]}), tmp_path / "data" / "a.parquet")
    corpus = {"path": str(tmp_path / "data"), "image": "picture"}
    result = curate(config(corpus, tmp_path / "run", select={"budget": {"rows": 6}}), quiet=True)
    found = {r["text"]: r["picture"] for r in kept(result).to_pylist()}
    assert found == {f"n {i}": encoded("PNG", (210, 210 + i), seed=i) for i in range(6)}


@pytest.mark.parametrize("kind", ["tar", "paths"])
def test_a_plan_reads_corpora_of_images(tmp_path: Path, kind: str) -> None:
    corpus: dict[str, Any] = {"path": str(pairs_corpus(tmp_path / "data")), "image": "image"}
    if kind == "paths":
        corpus["path"] = str(tmp_path / "p")
        (tmp_path / "p").mkdir()
        (tmp_path / "p" / "a.png").write_bytes(encoded("PNG", (210, 210)))
        pq.write_table(pa.table({"image": ["a.png"] * 8, "text": ["some words"] * 8}), tmp_path / "p" / "a.parquet")
    plan = make_plan(parse(config(corpus, tmp_path / "run")))
    assert plan.rows == (28 if kind == "tar" else 8)
    assert {"row", "image_info", "image_size", "length"} <= plan.columns.keys()
    assert not (tmp_path / "run").exists()
    curate(config(corpus, tmp_path / "run", select={"budget": {"rows": 2}}), quiet=True)
    assert make_plan(parse(config(corpus, tmp_path / "run"))).rows == plan.rows  # by the run's own listing
