"""WARC and WET: real crawl records, and records that lie, each of which costs itself alone."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.corpus.ingest import Ingested, ingest
from pipeline.corpus.listing import expand
from pipeline.corpus.readers.base import IngestOptions
from pipeline.errors import NoShardLeft

pytest.importorskip("fastwarc", reason="the extra `web` is not installed")

Rows = list[dict[str, Any]]


def ingested(path: Path, content: bytes | None = None, **options: Any) -> tuple[Ingested, Rows, Rows]:
    """Summary, rows and quarantined records of a file (with this content)."""
    if content is not None:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    output = path.parent / "out"
    done = ingest(str(path), str(output), IngestOptions(**options))
    rows = [row for uri, _, _ in expand([str(output)]) for row in pq.read_table(uri).to_pylist()]
    return done, rows, [row for p in sorted(output.glob("_quarantine/*")) for row in pq.read_table(p).to_pylist()]


def record(block: bytes, number: int = 1, kind: str = "response", content_type: str = "application/http") -> bytes:
    head = (
        f"WARC/1.1\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{number}>\r\nWARC-Date: 2024-04-25T16:24:44Z\r\n"
        f"WARC-Target-URI: http://example.org/{number}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def response(body: bytes, *headers: str, status: str = "200 OK", kind: str = "text/html") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", f"Content-Type: {kind}", *headers, "", ""]).encode() + body


def page(word: str) -> bytes:
    sentence = f"The {word} is described in this sentence, which is long enough to count as the content of a page. "
    return f"<html><body><article><h1>{word}</h1><p>{sentence * 4}</p></article></body></html>".encode()


@pytest.fixture
def warc(shared_data: Path, tmp_path: Path) -> Iterator[Path]:
    for file in (shared_data / "warc").glob("*.gz"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_real_warc(warc: Path) -> None:
    done, rows, bad = ingested(warc / "cc_sample_0000.warc.gz")
    assert (done.rows, bad, done.skipped) == (22, [], {"other record": 26})
    assert rows[0]["id"] == "<urn:uuid:283E41D7-F686-4C3E-B7DA-E8D248A100C1>"
    assert rows[0]["url"] == "https://www.semanticscholar.org/research/research-team"
    assert rows[0]["date"] == datetime(2024, 4, 25, 16, 24, 44, tzinfo=UTC)
    assert {row["content_type"] for row in rows} == {"text/html"}
    assert all(len(row["text"]) > 300 and "<div" not in row["text"] for row in rows)
    assert any("Topic modeling" in row["text"] or "topic model" in row["text"] for row in rows)


def test_the_same_page_as_warc_and_wet(warc: Path) -> None:
    _, (from_html,), _ = ingested(warc / "whirlwind.warc.gz")
    _, both, _ = ingested(warc / "whirlwind.warc.wet.gz")
    (from_wet,) = [row for row in both if row["content_type"] == "text/plain"]
    stored = gzip.decompress((warc / "whirlwind.warc.wet.gz").read_bytes()).split(b"\r\n\r\n")[-2].decode()
    assert from_wet["text"] == stored
    assert from_wet["language"] == "spa"
    assert from_html["url"] == from_wet["url"] == "https://an.wikipedia.org/wiki/Escopete"
    assert "Escopete" in from_html["text"]
    assert len(from_html["text"]) < len(from_wet["text"]), "the menus are gone"


HOSTILE: list[tuple[bytes, str | None]] = [
    (response(page("plain")), None),
    (response(gzip.compress(page("zipped")), "Content-Encoding: gzip"), None),
    (response(b"%x\r\n%b\r\n0\r\n\r\n" % (len(page("piece")), page("piece")), "Transfer-Encoding: chunked"), None),
    (b"no HTTP at all", "undecodable HTTP"),
    (b"\r\n\r\n", "undecodable HTTP"),
    (response(b"", status="what"), "undecodable HTTP: no status"),
    (response(b"<p>no gzip", "Content-Encoding: gzip"), "undecodable HTTP"),
    (response(b"<p>no brotli", "Content-Encoding: br"), "undecodable HTTP"),
    (response(b"<p>no chunks", "Transfer-Encoding: chunked"), "undecodable HTTP"),
    (response(b"<p>?", "Content-Encoding: secret"), "undecodable HTTP"),
    (response(b"<p>long", "X: " + "y" * 100_000), "undecodable HTTP"),
    (response(gzip.compress(bytes(200_000_000)), "Content-Encoding: gzip"), "record too large: above record_mb=1"),
    (response(page("large") + b"<!-- -->" * 200_000), "record too large: above record_mb=1"),
    (response(b"<html><body></body></html>"), "no main text"),
    (response(page("x").replace(b"The", b"L\xe9on"), kind="text/html; charset=iso-8859-1"), None),
    (response(b"caf\xe9 cr\xe8me", kind="text/plain; charset=latin-1"), None),
]


@pytest.mark.parametrize("name", ["x.warc", "x.warc.gz"])
def test_records_that_lie_cost_themselves_alone(tmp_path: Path, name: str) -> None:
    blocks = [record(block, i) for i, (block, _) in enumerate(HOSTILE, 1)]
    blocks += [record(response(b"x", status="404 Not Found"), 90), record(response(b"x", kind="image/png"), 91)]
    done, rows, bad = ingested(tmp_path / name, b"".join(blocks), record_mb=1)
    assert [row["id"] for row in rows] == [f"<urn:uuid:{i}>" for i, (_, why) in enumerate(HOSTILE, 1) if why is None]
    expected = [(i, why) for i, (_, why) in enumerate(HOSTILE, 1) if why]
    assert [row["record"] for row in bad] == [number for number, _ in expected]
    for row, (number, why) in zip(bad, expected, strict=True):
        assert row["reason"].startswith(why)
        assert row["offset"] == sum(map(len, blocks[: number - 1]))
    assert done.skipped == {"status not 200": 1, "not HTML or text": 1}
    texts = [row["text"] for row in rows]
    assert [word in text for word, text in zip(["plain", "zipped", "piece", "Léon", "café crème"], texts, strict=True)]


@pytest.mark.parametrize("name", ["x.warc", "x.warc.gz"])
def test_a_file_that_is_cut_off_fails(tmp_path: Path, name: str) -> None:
    """FastWARC itself ends without a word at nearly all of these places."""
    record_ = record(response(page("word")))
    whole = record_ * 3
    ends = [len(record_) * 2 + n for n in (5, 9, 20, 100, len(record_) // 2, len(record_) - 8, len(record_) - 3)]
    if name.endswith(".gz"):
        member = gzip.compress(record_)
        contents = [member * 2 + member[:n] for n in (1, 10, len(member) // 2, len(member) - 1)]
    else:
        contents = [whole[:end] for end in ends]
    for content in contents:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(NoShardLeft, match=r"truncated|Truncated|Invalid WARC header|ends inside record 3"):
            ingested(tmp_path / name)
    assert ingested(tmp_path / "x.warc", whole)[0].rows == 3


def test_what_is_not_warc_fails(tmp_path: Path) -> None:
    for content in (b'{"text": "json"}\n' * 100, b"<html><body>page</body></html>", bytes(1000)):
        with pytest.raises(NoShardLeft, match="not WARC"):
            ingested(tmp_path / "x.warc.gz", content)
    assert ingested(tmp_path / "x.warc", b"")[0].rows == 0
    lying = record(response(page("word"))).replace(b"Content-Length: ", b"Content-Length: 9")
    with pytest.raises(NoShardLeft, match=r"ends inside record 1: .* where its header says"):
        ingested(tmp_path / "x.warc", lying)
