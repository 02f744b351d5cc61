"""Main text of hostile pages: right on real ones, bounded on bad ones, and never more than reading."""

from __future__ import annotations

import html
import http.server
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline.corpus.ingest import ingest

pytest.importorskip("resiliparse", reason="the extra `web` is not installed")

from pipeline.corpus.readers.extract import EXTRACTORS, Extractor, PageError, decode

GOOD = (
    b"<article><h1>Title</h1><p>" + b"A sentence of the main text, which goes on for a while. " * 8 + b"</p></article>"
)


@pytest.fixture(params=EXTRACTORS)
def pages(request: pytest.FixtureRequest) -> Iterator[Extractor]:
    extractor = Extractor(request.param, page_seconds=1)
    yield extractor
    extractor.close()


@pytest.fixture(scope="module")
def real(shared_data: Path) -> Any:
    return pq.read_table(shared_data / "html_extraction" / "pages.parquet")


def token_f1(text: str, truth: str) -> float:
    found, true = (Counter(re.findall(r"\w+", t)) for t in (text, truth))
    return 2 * (found & true).total() / (found.total() + true.total())


def test_main_text_of_real_pages(pages: Extractor, real: Any) -> None:
    sample = real.filter(pc.equal(real["source"], "scrapinghub")).slice(0, 40).select(["html", "text"]).to_pylist()
    scores = [token_f1(pages.main_text(row["html"]), row["text"]) for row in sample]
    assert sum(scores) / len(scores) > 0.9


def test_charsets_of_real_pages(real: Any) -> None:
    """The pages that are not UTF-8: their own words must come out, without a broken character."""
    foreign = [row for row in real.select(["html", "must_have"]).to_pylist() if not _is_utf8(row["html"])]
    segments = found = broken = 0
    for row in foreign:
        text = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", decode(row["html"]))))
        broken += text.count("�") > 3
        segments += len(row["must_have"] or [])
        found += sum(re.sub(r"\s+", " ", segment) in text for segment in row["must_have"] or [])
    assert len(foreign) >= 14
    assert broken == 0
    assert found >= 0.95 * segments > 30


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize(
    ("content", "declared", "text"),
    [
        ("naïve".encode(), "iso-8859-1", "naïve"),  # the header lies
        ("naïve".encode("cp1252"), None, "naïve"),
        ("Привет, мир".encode("koi8-r"), "koi8-r", "Привет, мир"),
        ("Привет, мир".encode("koi8-r"), '"KOI8-R"', "Привет, мир"),
        (b'<meta charset="gbk">' + "简体中文".encode("gbk"), None, '<meta charset="gbk">简体中文'),
        ("日本語".encode("iso-2022-jp"), "iso-2022-jp", "日本語"),
        ("\ufeffÜ".encode("utf-16"), None, "\ufeffÜ"),
        (b"\xef\xbb\xbfa", "latin-1", "a"),
        ("é".encode() * 100 + b"\xc3", "no-such-charset", "é" * 100 + "�"),  # cut inside a character
        (b"", None, ""),
    ],
)
def test_charsets(content: bytes, declared: str | None, text: str) -> None:
    assert decode(content, declared) == text


def test_a_page_that_takes_too_long_costs_itself_alone(pages: Extractor) -> None:
    attributes = b"<div " + b" ".join(b"a%d=1" % i for i in range(300_000)) + b">text</div>"
    with pytest.raises(PageError, match="page took too long: more than 1 cpu seconds"):
        pages.main_text(attributes)
    assert "main text" in pages.main_text(GOOD)


def test_a_page_that_kills_its_parser_costs_itself_alone(pages: Extractor) -> None:
    pages.main_text(GOOD)
    assert pages._child is not None
    os.kill(pages._child.pid, signal.SIGSEGV)
    with pytest.raises(PageError, match="page crashed its parser: SIGSEGV"):
        pages.main_text(GOOD)
    assert "main text" in pages.main_text(GOOD)


def test_pages_with_nothing_to_say(pages: Extractor) -> None:
    for page in (b"", b"\0\0\0", b"<html></html>", b"<script>alert(1)</script>"):
        with pytest.raises(PageError, match="no main text"):
            pages.main_text(page)
    assert pages.main_text(b"caf\xe9", "latin-1", plain=True) == "café"


def test_nothing_on_a_page_is_fetched_or_run(pages: Extractor, tmp_path: Path) -> None:
    asked: list[str] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    (tmp_path / "secret").write_text("the secret content of a file")
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        page = f"""<?xml version="1.0"?>
            <!DOCTYPE html SYSTEM "{url}/dtd" [<!ENTITY file SYSTEM "file://{tmp_path}/secret">
            <!ENTITY web SYSTEM "{url}/entity">]>
            <html xmlns:xi="http://www.w3.org/2001/XInclude"><head><base href="{url}/">
            <link rel=stylesheet href="{url}/css">
            <meta http-equiv=refresh content="0; url={url}/refresh"><script src="{url}/js"></script></head>
            <body><img src="{url}/img"><iframe src="{url}/frame"></iframe><object data="{url}/object"></object>
            <xi:include href="file://{tmp_path}/secret" parse="text"/><?php touch("{tmp_path}/ran"); ?>
            <p>&file;&web;</p>{GOOD.decode()}</body></html>"""
        text = pages.main_text(page.encode())
        server.shutdown()
    assert "main text" in text
    assert "secret content" not in text
    assert asked == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["secret"]


@pytest.mark.parametrize(
    "attempt",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import pathlib; pathlib.Path('written').write_text('x' * 100)",
        "bytearray(8 << 30)",
    ],
)
def test_the_child_is_locked_down(attempt: str, tmp_path: Path) -> None:
    program = f"from pipeline.corpus.readers.extract import _lock_down; _lock_down()\n{attempt}\nprint('done')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60)
    assert ran.returncode != 0
    assert "done" not in ran.stdout
    assert re.search(r"PermissionError: a page tried|File too large|MemoryError", ran.stderr)


def test_a_directory_of_pages(shared_data: Path, real: Any, tmp_path: Path) -> None:
    rows = real.filter(pc.equal(real["source"], "scrapinghub")).slice(0, 5).to_pylist()
    (tmp_path / "in").mkdir()
    for number, row in enumerate(rows):
        (tmp_path / f"in/{number}.html").write_bytes(row["html"])
    (tmp_path / "in/empty.htm").write_bytes(b"")
    done = ingest(str(tmp_path / "in"), str(tmp_path / "out"))
    assert (done.files, done.rows, done.reasons) == (6, 5, {"no main text": 1})
    table = pq.read_table(sorted((tmp_path / "out").glob("*.parquet"))[0])
    assert table["file"].to_pylist() == [str(tmp_path / "in/0.html")]
    assert token_f1(table["text"][0].as_py(), rows[0]["text"]) > 0.7
