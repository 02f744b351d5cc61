"""Seed sets: the documents that a criterion learns from.

Parquet, JSON lines (.jsonl, .ndjson, .json) or plain text with a document a line (.txt), the last two also compressed
(.gz, .zst, .bz2); local or on an object store; a file, a glob, or a directory of Parquet files.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from pipeline.corpus.listing import expand
from pipeline.corpus.storage import is_remote, resolve
from pipeline.corpus.text import clean_text, is_text
from pipeline.errors import ConfigError, CorpusError

FORMATS = {"parquet": "parquet", "jsonl": "json", "ndjson": "json", "json": "json", "txt": "text"}
JSON_BLOCK = 64 << 20
"""Bytes that the JSON reader takes at once; a document must fit."""


def locate(paths: Sequence[str], role: str) -> list[str]:
    """Addresses, absolute so that they hold in any worker, of the files behind paths, directories and globs.

    `role` names the key of the configuration in errors. Raises ConfigError where there is no such file.
    """
    try:
        return [uri for uri, _, _ in expand(paths)]
    except (CorpusError, OSError, ValueError) as error:
        raise ConfigError(f"{role}: no such file: {', '.join(paths)}") from error


def identify(uris: Sequence[str]) -> list[str]:
    """Fingerprints of files: by content where they are local, by address, size and time on an object store."""
    import xxhash

    prints = []
    for uri, size, mtime in expand(uris):
        digest = xxhash.xxh3_128()
        if is_remote(uri):
            digest.update(f"{uri} {size} {mtime}".encode())
        else:
            with open(uri, "rb") as source:
                while block := source.read(1 << 24):
                    digest.update(block)
        prints.append(digest.hexdigest())
    return prints


def read_seeds(uris: Sequence[str], column: str, role: str) -> pa.Array:
    """Usable texts (large_string) of seed files, in order; nulls, blanks and what is not UTF-8 are left out.

    Raises ConfigError for a file of another format or without the column, and where no text is left.
    """
    found = [clean_text(_read_file(uri, column, role))[0] for uri in uris]
    texts = pa.concat_arrays([t.cast(pa.large_string()).drop_null() for t in found])
    if len(texts) == 0:
        raise ConfigError(f"{role}: the seed set is empty: no text in {', '.join(uris)}")
    return texts


def _read_file(uri: str, column: str, role: str) -> pa.Array:
    values = read_columns(uri, [column], role)[column]
    if not is_text(values.type):
        raise ConfigError(f"{role}: column {column!r} of {uri!r} is {values.type}, not text")
    return values.combine_chunks()


def read_columns(uri: str, columns: Sequence[str], role: str) -> pa.Table:
    """Some columns of a seed file as they are; plain text has the one that is asked for.

    Raises ConfigError for a file of another format, one that cannot be read and one without a column.
    """
    suffixes = uri.rpartition("/")[2].lower().split(".")[1:]
    kind = FORMATS.get(next((s for s in reversed(suffixes) if s not in ("gz", "zst", "bz2")), ""))
    filesystem, path = resolve(uri)
    try:
        if kind == "parquet":
            import pyarrow.parquet as pq

            with filesystem.open_input_file(path) as source:
                file = pq.ParquetFile(source)
                known = file.schema_arrow
                table = file.read(list(columns)) if {*columns} <= {*known.names} else known.empty_table()
        elif kind == "json":
            from pyarrow import json

            with filesystem.open_input_stream(path) as source:
                table = json.read_json(source, json.ReadOptions(block_size=JSON_BLOCK))
        elif kind == "text":
            with filesystem.open_input_stream(path) as source:
                table = pa.table({columns[0]: pa.array(source.read().split(b"\n"), pa.large_binary())})
        else:
            raise ConfigError(f"{role}: {uri!r} is not a .parquet, .jsonl or .txt file")
    except pa.ArrowException as error:
        raise ConfigError(f"{role}: cannot read {uri!r}: {error}") from error
    if missing := next((c for c in columns if c not in table.column_names), None):
        raise ConfigError(f"{role}: {uri!r} has no column {missing!r}; it has {', '.join(table.column_names)}")
    return table.select(list(columns))
