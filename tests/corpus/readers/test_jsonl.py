"""Every non-blank line of a JSONL file is a row or a reject, whatever is on it, and types are those of the sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.corpus.readers import jsonl
from pipeline.corpus.readers.base import IngestOptions, Source

OPTIONS = IngestOptions()
FIELDS = pa.schema([("text", pa.string())])


def source(path: Path, content: bytes) -> Source:
    path.write_bytes(content)
    return Source(str(path), len(content), 0, "jsonl", "x")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, None], pa.int64()),
        ([1, 2.5], pa.float64()),
        ([2**63], pa.float64()),
        ([True, None], pa.bool_()),
        ([True, 1], pa.string()),
        (["2024-05-18T01:58:10Z"], pa.string()),  # a date stays as it was written
        ([[1], [2.5, None]], pa.list_(pa.float64())),
        ([["a"], []], pa.list_(pa.string())),
        ([[], None], pa.list_(pa.string())),
        ([[[1]], [2]], pa.string()),
        ([{"a": 1}], pa.string()),
        ([[1], 1], pa.string()),
        ([None], pa.string()),
    ],
)
def test_types_of_fields(tmp_path: Path, values: list[Any], kind: pa.DataType) -> None:
    file = source(tmp_path / "x.jsonl", b"\n".join(json.dumps({"v": v}).encode() for v in values))
    fields = jsonl.schema(file, OPTIONS)
    assert fields == pa.schema([("v", kind)])
    batches = list(jsonl.read(file, OPTIONS, fields))
    assert not any(batch.rejects for batch in batches)
    for got, value in zip([v for b in batches for v in b.rows["v"].to_pylist()], values, strict=True):
        whole = [] if value == [None] else value
        assert got == (json.dumps(whole) if kind == pa.string() and not isinstance(whole, str | None) else whole)


TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=8)
LINE = st.one_of(
    st.builds(lambda t: json.dumps({"text": t}).encode(), TEXT),
    st.builds(lambda t: json.dumps({"text": t}, ensure_ascii=False).encode("utf-8", "surrogatepass"), TEXT),
    st.builds(lambda t: b'{"text": "' + t.replace('"', "").encode() + b'"}', st.text(r"\u dD8Fcef0123", max_size=14)),
    st.builds(lambda t: b'{"other": "' + t + b'"}', st.binary(max_size=3)),
    st.binary(max_size=12),
    st.just(b""),
).map(lambda line: line.replace(b"\n", b" "))


@given(st.lists(LINE, max_size=12))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_line_is_a_row_or_a_reject(tmp_path: Path, lines: list[bytes]) -> None:
    (*batches,) = jsonl.read(source(tmp_path / "x.jsonl", b"\n".join(lines)), OPTIONS, FIELDS)
    rows = {n: t for b in batches for n, t in zip(b.records.tolist(), b.rows["text"].to_pylist(), strict=True)}
    rejected = {r.record: r for b in batches for r in b.rejects}
    assert not rows.keys() & rejected.keys()
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            value = json.loads(line)["text"]
            value.encode()
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # what polars makes of such a line is tested by example
        if len(json.loads(line, object_pairs_hook=list)) == 1:
            assert rows[number] == value, "what Python reads as text, polars reads alike"
    written = [n for n, line in enumerate(lines, 1) if line.strip()]
    assert set(written) - {1} <= rows.keys() | rejected.keys() <= set(range(1, len(lines) + 1))
    assert all(line in b"\n".join(lines) for line in (r.raw for r in rejected.values()))


@pytest.mark.parametrize("magic", [b"(\xb5/\xfd", b"\x1f\x8b\x08", b"x\x9c", b"x\x01"])
def test_a_line_that_begins_like_a_compressed_file_is_rejected_alone(tmp_path: Path, magic: bytes) -> None:
    (*batches,) = jsonl.read(source(tmp_path / "x.jsonl", magic + b'{"}\n{"text": "a"}'), OPTIONS, FIELDS)
    assert [text for b in batches for text in b.rows["text"].to_pylist()] == ["a"]
    assert [r.record for b in batches for r in b.rejects] == [1]


@pytest.mark.parametrize("half", [r"\ud83d", r"\uDE00 x", r"\ude00\ud83d", r"\ud83d\ud83d\ude00", r"\\\ud83d"])
def test_half_a_surrogate_pair_is_no_text(tmp_path: Path, half: str) -> None:
    lines = ['{"text": "a"}', f'{{"text": "{half}"}}', r'{"text": "\ud83d\ude00 \\ud83d"}']
    (batch,) = jsonl.read(source(tmp_path / "x.jsonl", "\n".join([*lines, ""]).encode()), OPTIONS, FIELDS)
    assert batch.rows["text"].to_pylist() == ["a", "\U0001f600 \\ud83d"]
    assert [(r.record, r.reason) for r in batch.rejects] == [(2, "half a surrogate pair")]


def test_blocks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"text": f"row {i} " + "x" * (i % 50)}).encode() if i % 7 else b"bad" for i in range(500)]
    file = source(tmp_path / "x.jsonl", b"\n".join(lines))
    whole = list(jsonl.read(file, OPTIONS, FIELDS))
    original = jsonl.line_blocks
    monkeypatch.setattr(jsonl, "line_blocks", lambda stream, limit: original(stream, limit, 100))
    cut = list(jsonl.read(file, OPTIONS, FIELDS))
    assert len(whole) < 3 < len(cut)
    assert pa.Table.from_batches(b.rows for b in cut).equals(pa.Table.from_batches(b.rows for b in whole))
    assert [n for b in cut for n in b.records.tolist()] == [n for b in whole for n in b.records.tolist()]
    assert sorted(r for b in cut for r in b.rejects) == sorted(r for b in whole for r in b.rejects)
