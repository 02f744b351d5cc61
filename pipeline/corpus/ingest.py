"""`tamis ingest`: other formats become Parquet shards with ids, one input file a unit of work.

What an output directory holds: `<name>-00000.parquet`, ... for every input, with the columns `id` (the source's own,
else the xxh3-128 of the text in hex), `text` (valid UTF-8, never blank) and the source's other fields, alike in every
file; `_quarantine/<name>-00000.parquet` for every record that gave no row, with file, number, reason and its head;
`_ingest.json`, what was done and which files failed, with the reason.

What it guarantees: memory does not grow with a file; a file is there whole or not at all, and one that cannot be read
stops no other; rows keep their order; the same inputs and options give the same bytes, whatever the workers. Parts
carry a fingerprint of the input (place, size, time), the options and the columns: a rerun does exactly what is missing
or changed. An input that has vanished leaves its output behind.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.corpus.fields import fields_of, join_fields, names_in, reading
from pipeline.corpus.readers.base import RAW, WEB, Batch, IngestOptions, Reject, Source, reader_of, too_large
from pipeline.corpus.rolling import RollingParts, finished_summary, remove_parts
from pipeline.corpus.sources import find_sources
from pipeline.corpus.storage import Store
from pipeline.corpus.text import clean_text
from pipeline.errors import ConfigError, CorpusError, MissingExtra, NoShardLeft
from pipeline.hashing import row_keys
from pipeline.recipe import fingerprint

if TYPE_CHECKING:
    from pipeline.engine.pool import Pool

VERSION = 1
"""Raised when the same input and options begin to give other rows."""
QUARANTINE = pa.schema(
    [
        ("file", pa.string()),
        ("record", pa.int64()),
        ("offset", pa.int64()),
        ("reason", pa.string()),
        ("bytes", pa.int64()),
        ("raw", pa.binary()),
    ]
)
"""`record` counts from 1 (lines of JSONL and text, rows of CSV, records of WARC); `offset` is in the decompressed bytes
(null where the reader cannot say); `raw` is the head of the record, 64 KiB at the most, of `bytes`."""


@dataclass
class Ingested:
    """What was done: how many, why not, where."""

    output: str
    files: int = 0
    resumed: int = 0
    """Files that were done before and are still true."""
    ignored: int = 0
    """Files in the directories given whose names say no format."""
    parts: int = 0
    rows: int = 0
    bytes: int = 0
    """UTF-8 bytes of text."""
    quarantined: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Why records are in quarantine, the most frequent reasons first."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Records that are no document (WARC: requests, images, errors)."""
    failed: dict[str, str] = field(default_factory=dict)
    """Files that could not be read, and why."""

    @property
    def exit_code(self) -> int:
        return 2 if self.failed else 0


def ingest(
    sources: str | Sequence[str],
    output: str,
    options: IngestOptions | None = None,
    connect: Callable[[], Pool] | None = None,
    quiet: bool = True,
) -> Ingested:
    """Turn files, directories and globs of other formats into Parquet shards below `output`.

    `connect` gives the pool that the files are spread over, and is asked only when there is more than one file
    (default: in this process). Raises CorpusError for a path with nothing to ingest, MissingExtra for web formats
    without `tamis[web]`, NoShardLeft where every single file failed.
    """
    from pipeline.engine.pool import InlinePool
    from pipeline.engine.progress import Progress

    options = options or IngestOptions()
    found = find_sources([sources] if isinstance(sources, str) else sources, options.format)
    _require_extras(found.sources, options)
    done = Ingested(output, files=len(found.sources), ignored=found.ignored)
    reasons, skipped = Counter[str](), Counter[str]()
    pool = connect() if connect and len(found.sources) > 1 else InlinePool()

    def run(label: str, task: Any, files: list[Source]) -> Iterator[tuple[int, dict[str, Any]]]:
        with Progress(label, len(files), quiet) as progress:
            for outcome in pool.map(task, files):
                result, source = outcome.result, files[outcome.index]
                progress.add(result.get("rows", 0), result.get("bytes", 0), outcome.error is not None)
                if outcome.error is None:
                    yield outcome.index, result
                else:
                    done.failed[source.uri] = outcome.error
                    for store in (Store(output), Store(output).child("_quarantine")):
                        remove_parts(store, source.name)  # of a time when it could still be read

    try:
        first: dict[bytes, int] = {}
        for index, result in run("fields", functools.partial(fields_of, options=options), found.sources):
            first[result["schema"]] = min(index, first.get(result["schema"], index))
        columns = join_fields(sorted(first, key=lambda schema: first[schema]), options)
        readable = [source for source in found.sources if source.uri not in done.failed]
        task = functools.partial(_ingest_unit, output=output, options=options, columns=columns)
        for _, result in run("ingest", task, readable):
            for name in ("resumed", "parts", "rows", "bytes", "quarantined"):
                setattr(done, name, getattr(done, name) + result[name])
            reasons.update(result["reasons"])
            skipped.update(result["skipped"])
    finally:
        pool.close()
    done.reasons, done.skipped = dict(reasons.most_common(20)), dict(skipped.most_common())
    done.failed = dict(sorted(done.failed.items()))
    report = {"options": options.model_dump(), **asdict(done)}
    Store(output).write(json.dumps(report, indent=2).encode(), "_ingest.json")
    if len(done.failed) == done.files:
        examples = "; ".join(f"{uri}: {reason}" for uri, reason in list(done.failed.items())[:3])
        raise NoShardLeft(f"none of the {done.files} files can be read ({examples})")
    return done


def ingest_file(source: Source, output: str, options: IngestOptions, columns: pa.Schema) -> dict[str, Any]:
    """Turn one file into the parts of its name below `output`, unless they are there and true already.

    `columns`: of the output, `id` and `text` first. Returns counts of under a kilobyte. Raises CorpusError where the
    file cannot be read to its end; then none of its parts is left.
    """
    store = Store(output)
    identity = _identity(source, options, columns)
    if (summary := finished_summary(store, source.name, identity)) is not None:
        return {**summary, "resumed": 1}
    count: Counter[str] = Counter(rows=0, bytes=0, quarantined=0)
    reasons, skipped = Counter[str](), Counter[str]()
    sizes = (int(options.file_mb * (1 << 20)), int(options.row_group_mb * (1 << 20)))
    with (
        RollingParts(store, source.name, columns, identity, *sizes) as good,
        RollingParts(store.child("_quarantine"), source.name, QUARANTINE, identity, *sizes) as bad,
    ):
        for batch in _read(source, options, columns):
            table, rejects = _conform(batch, columns, options.limit)
            good.add(table)
            bad.add(_quarantine_rows(source, rejects))
            size = pc.sum(pc.binary_length(table.column("text"))).as_py() or 0
            count.update(rows=table.num_rows, bytes=size, quarantined=len(rejects))
            reasons.update(r.reason.partition(":")[0] for r in rejects)
            skipped.update(batch.skipped)
        summary = {**count, "reasons": dict(reasons.most_common(5)), "skipped": dict(skipped)}
        bad.finish({}, keep_empty=False)
        good.finish(summary, keep_empty=True)  # the last part says that the file is done, so it comes last
    return {**summary, "parts": good.count, "resumed": 0}


def _ingest_unit(
    source: Source, attempt: int, output: str, options: IngestOptions, columns: pa.Schema
) -> dict[str, Any]:
    return ingest_file(source, output, options, columns)


def _identity(source: Source, options: IngestOptions, columns: pa.Schema) -> str:
    """Fingerprint of everything that an input's rows depend on."""
    web = ("fastwarc", "resiliparse", options.extractor) if source.format in WEB else ()
    libraries = {name: importlib.metadata.version(name) for name in web}
    place = [source.uri, source.size, source.mtime_ns, source.format]
    return fingerprint("ingest", VERSION, place, options.model_dump(), columns.to_string(), libraries)


def _require_extras(files: list[Source], options: IngestOptions) -> None:
    if any(file.format in WEB for file in files):
        for module in ("fastwarc", "resiliparse", options.extractor):
            if importlib.util.find_spec(module) is None:
                raise MissingExtra("reading WARC and HTML", "web", module)


def _read(source: Source, options: IngestOptions, columns: pa.Schema) -> Iterator[Batch]:
    """A reader's batches under the output's names."""
    names = names_in(source, options)
    fields = pa.schema([f.with_name(names.get(f.name, f.name)) for f in columns])
    with reading():
        for batch in reader_of(source).read(source, options, fields):
            yield batch._replace(rows=batch.rows.rename_columns(columns.names))


def _conform(batch: Batch, columns: pa.Schema, limit: int) -> tuple[pa.Table, list[Reject]]:
    """Rows with usable text, of the columns' types and with an id each; and the records that have none."""
    text, reasons = clean_text(batch.rows.column("text"))
    reasons = pa.nulls(len(text), pa.string()) if reasons is None else reasons
    reasons = pc.if_else(pc.fill_null(pc.greater(pc.binary_length(text), limit), False), too_large(limit), reasons)
    values = {"text": text.cast(pa.string())}
    for column in columns.remove(columns.get_field_index("text")):
        values[column.name], broken = _as_type(batch.rows.column(column.name), column.type, column.name)
        if broken is not None:
            reasons = pc.if_else(broken, f"field not UTF-8: {column.name}", reasons)
    table = pa.table([values[name] for name in columns.names], schema=columns)
    rejects = list(batch.rejects)
    if reasons.null_count < len(reasons):
        rejects += _rejects(batch, reasons)
        table = table.filter(pc.is_null(reasons))
    ids = table.column("id").combine_chunks()
    if ids.null_count:
        hashed = _hex(row_keys(table.column("text").combine_chunks()))
        table = table.set_column(0, columns.field(0), pc.coalesce(ids, hashed))
    return table, rejects


def _as_type(values: pa.Array, kind: pa.DataType, name: str) -> tuple[pa.Array, pa.Array | None]:
    """Values as a type; where bytes are to be strings, which of them are not UTF-8 (null in the values)."""
    if values.null_count == len(values):
        return pa.nulls(len(values), kind), None  # a field that this file does not have
    try:
        return values.cast(kind), None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        reasons = clean_text(values)[1] if pa.types.is_string(kind) and pa.types.is_binary(values.type) else None
        if reasons is None:
            advice = f"set fields=[{name}:string], or leave it out"
            raise CorpusError(f"field {name!r} cannot be {kind} ({error}): {advice}") from error
    broken = pc.fill_null(pc.equal(reasons, "text is not UTF-8"), False)
    return pc.if_else(broken, None, values).cast(kind), broken


def _rejects(batch: Batch, reasons: pa.Array) -> Iterator[Reject]:
    """One reject for every row with a reason; few, so one by one."""
    text = batch.rows.column("text")
    for i in np.flatnonzero(pc.is_valid(reasons).to_numpy(zero_copy_only=False)).tolist():
        raw = b"" if text[i].as_buffer() is None else text[i].as_buffer().to_pybytes()
        yield Reject(int(batch.records[i]), None, reasons[i].as_py(), len(raw), raw[:RAW])


def _hex(keys: pa.FixedSizeBinaryArray) -> pa.Array:
    """16-byte keys as strings of 32 hex digits."""
    digits = memoryview(keys.buffers()[1])[keys.offset * 16 : (keys.offset + len(keys)) * 16].hex().encode()
    ends = np.arange(len(keys) + 1, dtype=np.int32) * 32
    return pa.StringArray.from_buffers(len(keys), pa.py_buffer(ends), pa.py_buffer(digits))


def _quarantine_rows(source: Source, rejects: list[Reject]) -> pa.Table:
    record, offset, reason, size, raw = zip(*rejects, strict=True) if rejects else ((),) * 5
    return pa.table([[source.uri] * len(rejects), record, offset, reason, size, raw], schema=QUARANTINE)


def parse_options(overrides: Sequence[str]) -> IngestOptions:
    """Options from `name=value` words, values in YAML. Raises ConfigError that names the option and the fix."""
    import yaml
    from pydantic import ValidationError

    values: dict[str, Any] = {}
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override}: write name=value, such as --set text=content")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override}: {error}") from error
    try:
        return IngestOptions.model_validate(values)
    except ValidationError as error:
        unknown = f"unknown option; the options are {', '.join(IngestOptions.model_fields)}"
        raise ConfigError(
            "\n".join(
                f"--set {e['loc'][0]}: {unknown if e['type'] == 'extra_forbidden' else e['msg']}"
                for e in error.errors()
            )
        ) from error


def ingest_command(
    sources: Sequence[str], output: str, overrides: Sequence[str], address: str | None, workers: int | None
) -> int:
    """`tamis ingest`: run, say what came of it, return the exit code."""
    from pipeline.config import EngineConfig
    from pipeline.engine.connect import connect

    options = parse_options(overrides)
    engine = EngineConfig.model_validate({"address": address, "workers": workers})
    done = ingest(sources, output, options, lambda: connect(engine), quiet=False)
    print(f"{done.rows:,} rows, {done.bytes / 1e6:,.1f} MB of text, in {done.parts} Parquet files below {output}")
    print(f"{done.files - len(done.failed)} of {done.files} files read, {done.resumed} of them in an earlier run")
    if done.ignored:
        print(f"{done.ignored} files of other kinds left out")
    for what, count in done.skipped.items():
        print(f"{count} records left out: {what}")
    if done.quarantined:
        reasons = ", ".join(f"{count} {reason}" for reason, count in done.reasons.items())
        print(f"{done.quarantined} records in {output}/_quarantine: {reasons}")
    for uri, reason in done.failed.items():
        print(f"failed: {uri}: {reason}")
    return done.exit_code
