"""Artifacts: directories of files fitted on the whole corpus (centroids, a classifier, thresholds).

The marker `artifact.json` is written last and carries the fingerprint: without it the other files do not count.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from pipeline.corpus.storage import Store

MARKER = "artifact.json"


@dataclass(frozen=True)
class Artifact:
    """A directory of files fitted on the whole corpus; pickles, and opens in any worker."""

    name: str
    fingerprint: str
    store: Store

    def stored(self) -> bool:
        """Whether the files are there, whole and of this fingerprint."""
        try:
            marker = json.loads(self.store.read(MARKER))
        except FileNotFoundError:
            return False
        return bool(marker["fingerprint"] == self.fingerprint)

    def local(self) -> Path:
        """The directory on this machine; a remote one is fetched once a machine."""
        if self.store.local:
            return Path(self.store.path)
        cache = Path(tempfile.gettempdir()) / f"tamis-artifacts-{os.getuid()}" / f"{self.name}-{self.fingerprint}"
        if not cache.exists():
            cache.parent.mkdir(mode=0o700, exist_ok=True)
            incoming = cache.with_name(f"{cache.name}.{uuid.uuid4().hex[:8]}.tmp")
            incoming.mkdir()
            pafs.copy_files(self.store.path, str(incoming), self.store.filesystem, pafs.LocalFileSystem())
            try:
                incoming.rename(cache)
            except OSError:  # another worker of this machine was first
                shutil.rmtree(incoming)
        return cache


@dataclass
class BuildTask:
    """Fit an artifact in one worker and publish its files."""

    artifact: Artifact
    build: Callable[[Path], None]

    def __call__(self, unit: None, attempt: int) -> dict[str, Any]:
        store = self.artifact.store
        with tempfile.TemporaryDirectory(prefix="tamis-build-") as directory:
            self.build(Path(directory))
            store.remove()
            if store.local:
                os.makedirs(store.path)
            pafs.copy_files(directory, store.path, pafs.LocalFileSystem(), store.filesystem)
        store.write(json.dumps({"fingerprint": self.artifact.fingerprint}).encode(), MARKER)
        return {"rows": 0, "bytes": 0}
