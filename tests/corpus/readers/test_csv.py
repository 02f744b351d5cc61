"""CSV: strings as written, ragged rows rejected with their number, quotes that span lines, other encodings."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.corpus.ingest import ingest
from pipeline.corpus.listing import expand
from pipeline.corpus.readers.base import IngestOptions
from pipeline.errors import NoShardLeft


def ingested(path: Path, content: bytes, **options: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and quarantined records of a file with this content."""
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    output = path.parent / "out"
    ingest(str(path), str(output), IngestOptions(**options))
    rows = [row for uri, _, _ in expand([str(output)]) for row in pq.read_table(uri).to_pylist()]
    return rows, [row for p in sorted(output.glob("_quarantine/*")) for row in pq.read_table(p).to_pylist()]


def test_rows(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbfid,text,zip\r\n1,"two\r\nlines, ""quoted""",007\r\n2,plain,\r\n'
    content += b'3,"",""\r\n\r\n4,nul \0 stays,x\r\n'
    rows, bad = ingested(tmp_path / "x.csv.gz", content)
    assert rows == [
        {"id": "1", "text": 'two\r\nlines, "quoted"', "zip": "007"},
        {"id": "2", "text": "plain", "zip": None},
        {"id": "4", "text": "nul \0 stays", "zip": "x"},
    ]
    assert [(row["record"], row["reason"]) for row in bad] == [(3, "blank text")]


def test_ragged_rows_and_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    lines = [b"text,tag", *(b"row %d,t" % i for i in range(1, 40_001))]
    lines[2], lines[20_000], lines[40_000] = b"row 2", b"row 20000,t,more", b"row 40000,t,\xff"
    lines[7], lines[30_000] = b"caf\xe9,t", b"row 30000,\xe9"
    rows, bad = ingested(tmp_path / "x.csv", b"\n".join(lines), record_mb=0.01)
    left = [i for i in range(1, 40_001) if i not in (2, 7, 20_000, 30_000, 40_000)]
    assert [row["text"] for row in rows] == [f"row {i}" for i in left]
    assert sorted((row["record"], row["reason"]) for row in bad) == [
        (2, "ragged row: 1 fields where the header has 2"),
        (7, "not of the encoding: field 'text'"),
        (20_000, "ragged row: 3 fields where the header has 2"),
        (30_000, "not of the encoding: field 'tag'"),
        (40_000, "ragged row: 3 fields where the header has 2"),
    ]
    assert {row["record"]: row["raw"] for row in bad}[7] == b"caf\xe9"
    assert {row["record"]: row["raw"] for row in bad}[40_000] == lines[40_000]


def test_numbers_of_rows_hold_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.corpus.readers.csv.BLOCK", 1000)
    lines = [b"text", *(b"row %d" % i for i in range(1, 2001))]
    for i in range(1, 2001, 7):
        lines[i] = b"a,b" if i % 2 else b"\xff"
    rows, bad = ingested(tmp_path / "x.csv", b"\n".join(lines), record_mb=0.0005)
    assert [row["text"] for row in rows] == [f"row {i}" for i in range(1, 2001) if i % 7 != 1]
    assert sorted(row["record"] for row in bad) == list(range(1, 2001, 7))


def test_dialects(tmp_path: Path) -> None:
    assert ingested(tmp_path / "x.tsv", b"text\ttag\na,b\tc\n")[0][0]["text"] == "a,b"
    assert ingested(tmp_path / "x.tsv", b"text;tag\na,b;c\n", delimiter=";")[0][0]["text"] == "a,b"
    rows, bad = ingested(
        tmp_path / "x.tsv", "text\ttag\ncafé\tü\n".encode("latin-1"), encoding="latin-1", fields=["tag"]
    )
    assert (rows[0]["text"], rows[0]["tag"], bad) == ("café", "ü", [])
    assert ingested(tmp_path / "x.tsv", b"text\tn\na\t5\n", fields=["n:int64"])[0][0]["n"] == 5


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"text,text\na,b\n", "two columns are named 'text'"),
        (b"te\xffxt\na\n", "the header is not utf-8: set encoding="),
        (b'text,tag\na,"never closed\n' + b"b,c\n" * 6_000_000, "a quote that is never closed"),
        (b"body\na\n", "no field 'text': it has body"),
    ],
)
def test_files_that_fail(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(NoShardLeft, match=reason):
        ingested(tmp_path / "x.csv", content, record_mb=1)


def test_text_files(tmp_path: Path) -> None:
    rows, _ = ingested(tmp_path / "x.txt", b"\xef\xbb\xbfone\n\ntwo\n")
    assert [row["text"] for row in rows] == ["one\n\ntwo\n"]
    assert rows[0]["file"] == str(tmp_path / "x.txt")
    rows, bad = ingested(tmp_path / "x.txt", b"\xef\xbb\xbfone\r\n\n \ntwo\nthr\xe9e\nfour", document="line")
    assert [row["text"] for row in rows] == ["one", "two", "four"]
    assert [(row["record"], row["reason"], row["raw"]) for row in bad] == [(5, "text is not UTF-8", b"thr\xe9e")]
    rows, _ = ingested(tmp_path / "x.txt", "ünï\nzwei".encode("cp1252"), document="line", encoding="cp1252")
    assert [row["text"] for row in rows] == ["ünï", "zwei"]
    rows, bad = ingested(tmp_path / "x.txt", b"x" * 2_000_000, record_mb=1)
    assert rows == []
    assert bad[0]["bytes"] == 2_000_000
    assert "set document=line" in bad[0]["reason"]
