"""Spans and texts: what is cut, what is left over, what is written, and what the source and the budget see of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import curate
from pipeline.rewrite.base import Pieces, above, cut, strings

TEXT = st.text(st.sampled_from("ab é漢😀\n"), max_size=12)


def slices(text: str, spans: list[tuple[int, int]]) -> str:
    return "".join(text[a:b] for a, b in spans)


@settings(max_examples=60)
@given(st.lists(st.tuples(TEXT, st.lists(st.integers(0, 12))), max_size=6), st.randoms(use_true_random=False))
def test_pieces_tile_and_what_is_kept_and_removed_are_the_whole(rows: list[tuple[str, list[int]]], coin: Any) -> None:
    texts = [t for t, _ in rows]
    array = pa.array(["x", *texts], pa.large_string()).slice(1)  # a slice: its buffers hold more than its texts
    units = Pieces.between([[0, *sorted(min(e, len(t)) for e in edges), len(t)] for t, edges in rows])
    assert "".join(strings(array, units).to_pylist()) == "".join(texts)
    kept = units.keep(np.array([coin.random() < 0.5 for _ in range(len(units))], bool))
    lengths = np.array([len(t) for t in texts], np.int64)
    rest = kept.rest(lengths)
    for pieces in (kept, rest):
        same = pieces.row[1:] == pieces.row[:-1]
        assert (pieces.start < pieces.end).all()
        assert (pieces.end <= lengths[pieces.row]).all()
        assert (pieces.start[1:][same] > pieces.end[:-1][same]).all()
    inside, outside = (pieces.lists(len(texts)).to_pylist() for pieces in (kept, rest))
    for text, shown, a, b in zip(texts, cut(array, kept).to_pylist(), inside, outside, strict=True):
        spans = [(s["start"], s["end"]) for s in a]
        assert shown == slices(text, spans)
        everything = sorted(spans + [(s["start"], s["end"]) for s in b])
        assert slices(text, everything) == text
    assert Pieces.of(kept.lists(len(texts))).start.tolist() == kept.start.tolist()


def test_the_best_piece_stays_where_none_reaches_the_threshold() -> None:
    units = Pieces(np.array([0, 0, 1, 1, 2]), np.array([0, 2, 0, 3, 0]), np.array([2, 4, 3, 5, 1]))
    score = np.array([0.2, 0.1, 0.05, 0.05, -np.inf])
    assert above(units, score, 0.1).tolist() == [True, True, True, False, True]
    assert above(units, score, 0.15).tolist() == [True, False, True, False, True]


@pytest.mark.parametrize(
    ("threshold", "fractions", "kept"),
    [(0.1, [2 / 3, 1 / 4, 0], [True, True, False]), (0.5, [1 / 3, 0, 0], [True, False, False])],
)
def test_provences_rule_for_sentences(threshold: float, fractions: list[float], kept: list[bool]) -> None:
    """The example of a token classifier: a sentence's score is the share of its tokens above the threshold, which is
    the sentences' threshold, too. At 0.5 that would drop all of them; here the best one stays."""
    tokens = [[0.9, 0.2, 0.05], [0.05, 0.02, 0.3, 0.04], [0.01, 0.02]]
    share = np.array([np.mean([p > threshold for p in sentence]) for sentence in tokens])
    np.testing.assert_allclose(share, fractions)
    units = Pieces(np.zeros(3, np.int64), np.array([0, 3, 7]), np.array([3, 7, 9]))
    assert above(units, share, threshold).tolist() == kept
    if threshold == 0.1:
        assert above(units, share, 0.5).tolist() == [
            True,
            False,
            False,
        ]  # the paper's text: sentences always at one half


LINES = ["A sentence of many words stands here.", "MENU", "Read more", "Another one ends, as it should, with a stop."]
RULES = {"kind": "sentences", "unit": "line", "rules": ["c4"]}


def lines_of(file: int, rows: int) -> dict[str, Any]:
    return {
        "id": [f"{file}-{i}" for i in range(rows)],
        "text": ["é\n" + "\n".join(LINES[: 1 + i % 4]) for i in range(rows)],
    }


def configuration(corpus: Path, run: Path, **output: Any) -> dict[str, Any]:
    return {
        "corpus": {"path": str(corpus), "id": "id", "shard_mb": 1e-6},
        "scores": ["length"],
        "select": {"budget": {"fraction": 0.5, "of": "tokens"}},
        "output": output,
        "handoff": {"calibration_rows": 4, "recovery_tokens": 40},
        "engine": {"address": "inline"},
        "run": str(run),
    }


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_curate_writes_shortened_texts_with_their_spans(
    write_corpus: Callable[..., Path], tmp_path: Path, kind: pa.DataType
) -> None:
    corpus = write_corpus(rows=16, rows_of=lambda f, n: {k: pa.array(v) for k, v in lines_of(f, n).items()})
    for file in corpus.iterdir():
        table = pq.read_table(file)
        text = table["text"].combine_chunks()
        text = text.dictionary_encode() if pa.types.is_dictionary(kind) else text
        pq.write_table(table.set_column(1, "text", text.cast(kind)), file, row_group_size=8)
    before = {f: f.read_bytes() for f in corpus.iterdir()}
    plain = curate(configuration(corpus, tmp_path / "plain"), quiet=True)
    result = curate(configuration(corpus, tmp_path / "run", rewrite=RULES), quiet=True)
    assert {f: f.read_bytes() for f in corpus.iterdir()} == before
    assert (result.rows_kept, result.tokens_kept) == (plain.rows_kept, plain.tokens_kept)

    originals = {r["id"]: r["text"] for f in sorted(corpus.iterdir()) for r in pq.read_table(f).to_pylist()}
    table = pq.read_table(Path(result.path))
    assert table.schema.field("text").type == kind
    rows = table.to_pylist()
    assert len(rows) == result.rows_kept
    size = 0
    for row in rows:
        original, text = originals[row["id"]], row["text"]
        if isinstance(text, bytes):
            original, text = original.decode(), text.decode()
        spans = {key: [(s["start"], s["end"]) for s in row["tamis"][key]] for key in ("kept", "removed")}
        assert text == slices(original, spans["kept"])
        assert slices(original, sorted(spans["kept"] + spans["removed"])) == original
        assert row["tamis"]["kept_fraction"] == pytest.approx(len(text) / len(original))
        assert "MENU" not in text
        assert "é" not in text
        size += len(text.encode())
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["curated"]["rewritten"]["bytes"] == size
    assert f"{size:,} bytes of text" in (tmp_path / "run" / "README.md").read_text()
    handed = pq.read_table(tmp_path / "run" / "handoff" / "calibration")["text"].cast(pa.string()).to_pylist()
    assert handed
    assert not [t for t in handed if "MENU" in t]

    again = curate(configuration(corpus, tmp_path / "run"), quiet=True)  # without: the originals come back
    assert sorted(r["text"] for r in pq.read_table(Path(again.path)).to_pylist()) == sorted(
        originals[r["id"]] for r in rows
    )


def test_every_layout_is_shortened_and_the_shards_do_not_show(
    write_corpus: Callable[..., Path], tmp_path: Path
) -> None:
    corpus = write_corpus(rows=16, rows_of=lines_of)
    texts = []
    for run, shard_mb in (("a", 1e-6), ("b", 64)):
        config = configuration(corpus, tmp_path / run, rewrite=RULES, layout="nanochat")
        config["corpus"]["shard_mb"] = shard_mb
        result = curate(config, quiet=True)
        texts.append(sorted(pq.read_table(Path(result.path))["text"].to_pylist()))
    assert texts[0] == texts[1]
    assert not [t for t in texts[0] if "MENU" in t]
