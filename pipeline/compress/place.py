"""The run directory of `tamis compress` and `tamis compare`: on a file system, and held by one process at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.corpus.storage import Store, is_remote
from pipeline.engine import threads
from pipeline.errors import ConfigError
from pipeline.lock import RunLock


@contextmanager
def working_in(run: str, cpus: float) -> Iterator[Path]:
    """The directory, made and locked, with libraries limited to `cpus` threads. Raises ConfigError and RunLocked."""
    if is_remote(run):
        raise ConfigError(f"run: {run!r}: models are written to a directory of a file system, not to a store")
    directory = Path(run).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    lock = RunLock(Store(str(directory)))
    lock.acquire()
    try:
        with threads.limited(cpus):
            yield directory
    finally:
        lock.release()


def read_json(path: Path) -> dict[str, Any]:
    """What a file says that this program wrote; nothing where it is missing or was cut off."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found
