"""Main text of HTML pages, in a child process that can neither reach the network nor outlive its time.

A page is hostile input: it can make a parser run for hours (a tag with 300,000 attributes takes either library more
than 25 s, quadratically), take all memory or crash it. So pages go through a pipe to a child that has a limit of cpu
seconds a page and of memory, may not open sockets, start programs or write files, and whose death costs one page: it
is rejected with the reason and the next page gets a new child. Nothing on a page is run or fetched.

Measured on 675 real pages of 137 kB (bench/extraction.py): `trafilatura` has a token F1 of 0.951, drops 92 % of the
segments that are no content, and does 47 pages a cpu second; `resiliparse` 0.942, 76 %, 364. Rows can be sieved later,
boilerplate inside a row cannot, so trafilatura is the default.

Bytes become text as: byte-order mark; UTF-8 if that is what they are (up to stray bytes); the charset of the HTTP
header; that of the page's <meta>; detection.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection

MEMORY = 4 << 30
"""Bytes of address space that the child may take."""
PAGES_A_CHILD = 10_000
"""A new child after so many pages: native parsers may leak a little on each."""
ASCII = bytes(range(128))
FORBIDDEN = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.startfile",
    "ftplib.",
    "urllib.",
)


class PageError(Exception):
    """A page without usable text; the message says why."""


class Extractor:
    """Talks to one child. Not for several threads."""

    def __init__(self, name: str, page_seconds: float) -> None:
        self.name = name
        self.page_seconds = page_seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._pages = 0

    def main_text(self, page: bytes, charset: str | None = None, plain: bool = False) -> str:
        """Main text of a page in the encoding that its server declared; the whole text when it is `plain` text.

        Raises PageError where the page has no main text, or took too long or too much memory.
        """
        header = f"{'plain' if plain else 'html'} {(charset or '').strip()}\n".encode("ascii", "replace")
        pipe = self._connected()
        try:
            pipe.send_bytes(header + page)
            reply = pipe.recv_bytes()
        except (EOFError, OSError):
            raise PageError(self._obituary()) from None
        self._pages += 1
        if reply[:1] != b"+":
            raise PageError(reply[1:].decode())
        return reply[1:].decode()

    def _connected(self) -> Connection:
        if self._pages >= PAGES_A_CHILD:
            self.close()
        if self._pipe is None:
            ours, theirs = Pipe()
            command = [sys.executable, "-m", __name__, str(theirs.fileno()), self.name, str(self.page_seconds)]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            # Quiet: libraries complain of bad markup on stderr, and the page's fate is in the reply.
            self._child = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            theirs.close()
            self._pipe, self._pages = ours, 0
        return self._pipe

    def _obituary(self) -> str:
        assert self._child is not None
        code = self._child.wait()
        self.close()
        if code == -signal.SIGPROF:
            return f"page took too long: more than {self.page_seconds:g} cpu seconds"
        return f"page crashed its parser: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"

    def close(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        self._child = self._pipe = None


@lru_cache(maxsize=1)
def extractor(name: str, page_seconds: float) -> Extractor:
    """The extractor of this process, which keeps its child from file to file."""
    return Extractor(name, page_seconds)


def decode(page: bytes, charset: str | None = None) -> str:
    """Text of a page's bytes. Never raises: what no encoding explains becomes U+FFFD."""
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

    for mark, name in ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if page.startswith(mark):
            return page[len(mark) :].decode(name, "replace")
    if b"\x1b$" not in page:  # ISO-2022-JP is seven-bit and looks like UTF-8
        text = page.decode("utf-8", "replace")
        # Each high byte of a page in another encoding breaks; one in a UTF-8 page cut off or mixed up hardly ever does.
        if text.count("�") * 20 <= len(page.translate(None, ASCII)):
            return text
    with contextlib.suppress(LookupError, UnicodeDecodeError):
        if charset:
            return page.decode(map_encoding_to_html5(charset.strip("\"' "), fallback_utf8=False) or "")
    return str(bytes_to_str(page, detect_encoding(page, from_html_meta=True), errors="replace"))


def _trafilatura(page: str) -> str:
    import trafilatura

    return trafilatura.extract(page, fast=True, include_comments=False) or ""


def _resiliparse(page: str) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    text = extract_plain_text(
        page, main_content=True, preserve_formatting=True, alt_texts=False, comments=False, post_meta=False
    )
    return str(text)


EXTRACTORS: dict[str, Callable[[str], str]] = {"trafilatura": _trafilatura, "resiliparse": _resiliparse}


def _serve(pipe: Connection, name: str, page_seconds: float) -> None:
    """The child: one page in, its text out, until the pipe closes. SIGPROF ends it where a page takes too long."""
    import logging

    logging.disable(logging.CRITICAL)
    extract = EXTRACTORS[name]
    extract("<p>Load the libraries before the doors close.</p>")
    _lock_down()
    while True:
        try:
            kind, _, page = pipe.recv_bytes().partition(b"\n")
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, page_seconds)
        try:
            mode, _, charset = kind.decode().partition(" ")
            text = decode(page, charset).replace("\0", "")
            reply = "+" + (text if mode == "plain" else extract(text))
            reply = reply if reply[1:].strip() else "-no main text"
        except MemoryError:
            reply = f"-page took too much memory: more than {MEMORY >> 30} GiB"
        except Exception as error:
            reply = f"-extraction failed: {type(error).__name__}: {error}"[:200]
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send_bytes(reply.encode("utf-8", "replace"))


def _lock_down() -> None:
    """No more network, programs, written files or endless memory for this process."""
    import resource

    def refuse(event: str, _: tuple[object, ...]) -> None:
        if event.startswith(FORBIDDEN):
            raise PermissionError(f"a page tried {event}")

    sys.addaudithook(refuse)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), sys.argv[2], float(sys.argv[3]))
