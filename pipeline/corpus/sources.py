"""Which files there are to ingest: paths, directories and globs to a sorted list, with the format of each.

In a directory, files whose name ends in nothing known are left out and counted; a file that the user names himself
must be readable. Of a `datasets` directory the Arrow files that its `state.json` lists are taken, not its caches.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fsspec.utils import glob_translate
from pyarrow import fs as pafs

from pipeline.corpus.readers.base import Format, Source
from pipeline.corpus.storage import is_remote, resolve
from pipeline.errors import CorpusError

ENDINGS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".arrow": "arrow",
    ".warc": "warc",
    ".wet": "warc",
    ".html": "html",
    ".htm": "html",
}
COMPRESSED = (".gz", ".zst", ".bz2", ".lz4")
DATASETS_NOTES = ("state.json", "dataset_info.json", "dataset_dict.json", "dataset_infos.json")
WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Found:
    """The files to ingest, sorted within each path, and how many others a directory or glob held."""

    sources: list[Source]
    ignored: int


def find_sources(paths: Sequence[str], format: Format | None = None) -> Found:
    """List every path in turn; `format` overrides what the names' endings say.

    Raises CorpusError for a path that holds nothing to ingest.
    """
    sources: dict[str, Source] = {}
    ignored = 0
    for path in paths:
        files = _list(path)
        found = [s for root, info in files if (s := _source(path, root, info, format))]
        if not found:
            raise CorpusError(_why_nothing(path, [info.path for _, info in files]))
        ignored += len(files) - len(found)
        sources.update((s.uri, s) for s in found)
    return Found(list(sources.values()), ignored)


def format_of(name: str) -> Format | None:
    """Format by a file name's ending, compression aside; None where it says nothing."""
    stem, ending = posixpath.splitext(name.lower())
    return ENDINGS.get(posixpath.splitext(stem)[1] if ending in COMPRESSED else ending)


def _list(path: str) -> list[tuple[str, pafs.FileInfo]]:
    """(root that the path means, file) for every visible file, sorted by path."""
    try:
        filesystem, root = resolve(path)
        info = filesystem.get_file_info(root)
        if info.type == pafs.FileType.File:
            return [(posixpath.dirname(root), info)]
        pattern = None
        if info.type == pafs.FileType.NotFound and (wildcard := WILDCARD.search(root)):
            pattern = re.compile(glob_translate(root))
            root = posixpath.dirname(root[: wildcard.start()])
        selector = pafs.FileSelector(root, recursive=True, allow_not_found=True)
        files = [i for i in filesystem.get_file_info(selector) if i.type == pafs.FileType.File]
    except (OSError, ValueError) as error:
        raise CorpusError(f"cannot list {path!r}: {error}") from error
    visible = [
        i for i in files if not any(part.startswith((".", "_")) for part in i.path[len(root) :].strip("/").split("/"))
    ]
    kept = [i for i in visible if pattern is None or pattern.match(i.path)]
    data = _without_caches(filesystem, kept)
    return [(root, i) for i in sorted(data, key=lambda i: i.path)]


def _without_caches(filesystem: pafs.FileSystem, files: list[pafs.FileInfo]) -> list[pafs.FileInfo]:
    """Leave out what `datasets` keeps beside its data: notes in JSON, and Arrow files that hold results of `map`."""
    listed: dict[str, set[str]] = {}
    for info in files:
        if info.base_name == "state.json":
            with filesystem.open_input_stream(info.path) as stream:
                state = json.loads(stream.read(1 << 24))
            if isinstance(state, dict) and "_data_files" in state:
                listed[posixpath.dirname(info.path)] = {entry["filename"] for entry in state["_data_files"]}
    arrows = {posixpath.dirname(i.path) for i in files if i.base_name.endswith(".arrow")}

    def is_data(info: pafs.FileInfo) -> bool:
        directory, name = posixpath.split(info.path)
        if name in DATASETS_NOTES and any(a == directory or a.startswith(directory + "/") for a in arrows):
            return False
        if name.endswith(".arrow"):
            return name in listed[directory] if directory in listed else not name.startswith("cache-")
        return True

    return [i for i in files if is_data(i)]


def _source(path: str, root: str, info: pafs.FileInfo, format: Format | None) -> Source | None:
    kind = format or format_of(info.base_name)
    if kind is None:
        return None
    uri = (path[: path.index("://") + 3] if is_remote(path) else "") + info.path
    slug = re.sub(r"[^A-Za-z0-9]+", "-", posixpath.relpath(info.path, root)).strip("-")[-80:]
    name = f"{slug}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"
    return Source(uri, int(info.size), int(info.mtime_ns or 0), kind, name)


def _why_nothing(path: str, names: list[str]) -> str:
    if any(name.endswith(".parquet") for name in names):
        return f"{path!r} is Parquet, which needs no ingest: give it to corpus.path"
    if any(".wat" in name for name in names):
        return f"{path!r} is WAT, which holds metadata and no text: take the WARC or WET files"
    known = f"{', '.join(ENDINGS)} (and {', '.join(COMPRESSED)} behind them)"
    return f"nothing to ingest at {path!r}: known endings are {known}; for another name set format=..."
