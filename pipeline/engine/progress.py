"""What a person sees while a pass runs: shards, rows/s, bytes/s, failures, time left.

A live line in a terminal, log lines elsewhere.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

LOG_SECONDS = 10.0
WORTH_A_LINE_S = 0.5


class Progress:
    """Counts the outcomes of one pass. `quiet` shows nothing at all."""

    def __init__(self, label: str, total: int, quiet: bool = False) -> None:
        self.label, self.total, self.quiet = label, total, quiet
        self.done = self.failed = self.rows = self.bytes = 0
        self.started = self.logged = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
            )
            self._bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(f"{self.label:<12}", total=self.total, rate="")
        return self

    def add(self, rows: int, size: int, failed: bool) -> None:
        self.done += 1
        self.failed += failed
        self.rows += rows
        self.bytes += size
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=self._rate())
        elif not self.quiet and time.monotonic() - self.logged >= LOG_SECONDS:
            self.logged = time.monotonic()
            left = (self.logged - self.started) / self.done * (self.total - self.done)
            self._line(f"{self.done}/{self.total} shards, {self._rate()}, {left:.0f} s left")

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.rows / seconds:,.0f} rows/s, {self.bytes / seconds / 1e6:,.1f} MB/s{failed}"

    def _line(self, text: str) -> None:
        print(f"{self.label:<12} {text}", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif (
            not self.quiet
            and self.done
            and ((seconds := time.monotonic() - self.started) >= WORTH_A_LINE_S or self.failed)
        ):
            self._line(f"{self.done}/{self.total} shards, {self._rate()}, done in {seconds:.1f} s")


@contextmanager
def stage(label: str, quiet: bool = False) -> Iterator[None]:
    """Says what begins and how long it took: for work that has no units to count."""
    started = time.monotonic()
    if not quiet:
        print(f"{label} ...", file=sys.stderr, flush=True)
    yield
    seconds = time.monotonic() - started
    if not quiet and seconds >= WORTH_A_LINE_S:
        print(f"{label}: done in {seconds:.1f} s", file=sys.stderr, flush=True)
