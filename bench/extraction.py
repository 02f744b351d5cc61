"""Main text of 675 real web pages: how right and how fast the two extractors are, and the choices around them.

usage: python bench/extraction.py [--pages PAGES.parquet] [--rounds 1]     (needs tamis[web])

`PAGES.parquet` has columns html, text, must_have, must_not_have and source. Where a page has the full `text`,
tokens (`\\w+`, as bags) are compared: precision, recall and F1, means over pages. Where it has segments, `kept` is the
share of must_have that is found and `dropped` the share of must_not_have that is not. Rows in brackets are not what
Tamis runs; they show what the settings are worth. Speed is pages a cpu second, charset detection included; `ingest` is
the whole of `tamis ingest` on the same pages as one WARC file: reading, child process, ids and Parquet.
"""

from __future__ import annotations

import argparse
import gzip
import logging
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.corpus.ingest import ingest
from pipeline.corpus.readers.base import IngestOptions
from pipeline.corpus.readers.extract import EXTRACTORS, decode, extractor

PAGES = Path(__file__).parents[2] / "shared/data/html_extraction/pages.parquet"
HEAD = ("extractor", "precision", "recall", "F1", "kept", "dropped", "pages/s")


def with_fallbacks(page: str) -> str:
    import trafilatura

    return trafilatura.extract(page, include_comments=False) or ""


def library_defaults(page: str) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    return str(extract_plain_text(page, main_content=True))


def whole_page(page: str) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    return str(extract_plain_text(page))


OTHERS: dict[str, Callable[[str], str]] = {
    "[trafilatura, with its fallbacks]": with_fallbacks,
    "[resiliparse, library defaults]": library_defaults,
    "[all text of the page]": whole_page,
}


def overlap(text: str, truth: str) -> tuple[float, float, float]:
    """Precision, recall and F1 of the tokens of a text, as bags."""
    found, true = (Counter(re.findall(r"\w+", t)) for t in (text, truth))
    both = (found & true).total()
    precision, recall = both / max(1, found.total()), both / max(1, true.total())
    return precision, recall, 2 * both / max(1, found.total() + true.total())


def score(texts: Sequence[str], pages: Sequence[dict[str, Any]]) -> list[float]:
    """Mean precision, recall, F1; shares of segments kept and dropped."""
    overlaps = [
        overlap(text, page["text"]) for text, page in zip(texts, pages, strict=True) if page["text"] is not None
    ]
    have = [segment in text for text, page in zip(texts, pages, strict=True) for segment in page["must_have"] or []]
    lack = [
        segment not in text for text, page in zip(texts, pages, strict=True) for segment in page["must_not_have"] or []
    ]
    means = [sum(column) / len(overlaps) for column in zip(*overlaps, strict=True)]
    return [*means, sum(have) / len(have), sum(lack) / len(lack)]


def measure(extract: Callable[[str], str], pages: Sequence[dict[str, Any]], rounds: int) -> list[float]:
    extract("<p>Load the library before the clock starts.</p>")
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        texts = [extract(decode(page["html"]).replace("\0", "")) for page in pages]
        seconds.append(time.process_time() - start)
    return [*score(texts, pages), len(pages) / min(seconds)]


def cpu_seconds() -> float:
    """Of this process and of children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def write_warc(path: Path, pages: Sequence[dict[str, Any]]) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        for number, page in enumerate(pages):
            block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + page["html"]
            head = f"WARC/1.1\r\nWARC-Type: response\r\nWARC-Target-URI: http://example.org/{number}\r\n"
            head += f"Content-Type: application/http\r\nContent-Length: {len(block)}\r\n\r\n"
            file.write(head.encode() + block + b"\r\n\r\n")


def print_table(description: str | None, extractors: dict[str, Callable[[str], str]]) -> list[dict[str, Any]]:
    """Read the pages that the command line names, and print a line for each way to their text; returns the pages."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--pages", type=Path, default=PAGES)
    arguments.add_argument("--rounds", type=int, default=1)
    options = arguments.parse_args()
    logging.disable(logging.CRITICAL)  # libraries complain of bad markup
    pages: list[dict[str, Any]] = pq.read_table(options.pages).to_pylist()
    print(f"{len(pages)} pages, {sum(len(p['html']) for p in pages) / 1e6:.0f} MB of HTML")
    print("{:36}{:>10}{:>8}{:>8}{:>8}{:>9}{:>9}".format(*HEAD))
    for name, extract in extractors.items():
        figures = measure(extract, pages, options.rounds)
        print("{:36}{:>10.3f}{:>8.3f}{:>8.3f}{:>8.3f}{:>9.3f}{:>9.0f}".format(name, *figures), flush=True)
    return pages


def main() -> None:
    pages = print_table(__doc__, {**EXTRACTORS, **OTHERS})
    with tempfile.TemporaryDirectory() as directory:
        warc = Path(directory) / "pages.warc.gz"
        write_warc(warc, pages)
        for name in EXTRACTORS:
            start = cpu_seconds()
            done = ingest(str(warc), f"{directory}/{name}", IngestOptions(extractor=name))  # type: ignore[arg-type]  # a key
            extractor(name, 10.0).close()  # its seconds count once it has ended
            seconds = cpu_seconds() - start
            print(
                f"ingest, {name}: {done.rows} rows, {done.quarantined} quarantined, {len(pages) / seconds:.0f} pages/s"
            )


if __name__ == "__main__":
    main()
