"""The columns of an ingested corpus: `id`, `text` and the fields of all its files together, alike in every output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from pipeline.corpus.readers.base import FIELDED, IngestOptions, Source, may_pass, reader_of
from pipeline.corpus.text import is_text
from pipeline.errors import CorpusError


def names_in(source: Source, options: IngestOptions) -> dict[str, str]:
    """What the columns `id` and `text` are called in a file."""
    if source.format in FIELDED:
        return {"id": options.id or "id", "text": options.text}
    return {"id": "id", "text": "text"}


def fields_of(source: Source, attempt: int, options: IngestOptions) -> dict[str, Any]:
    """Fields of one file that are kept beside `id` and `text`, as a serialized schema. A unit of work.

    Raises CorpusError for a file without the fields that the options name, or that cannot be read.
    """
    with reading():
        fields = reader_of(source).schema(source, options)
    names, kept = names_in(source, options), options.kept()
    if len(fields) == 0:
        return {"schema": fields.serialize().to_pybytes()}  # an empty file has no fields and no rows
    has = ", ".join(fields.names)
    text = names["text"]
    if text not in fields.names:
        raise CorpusError(f"no field {text!r}: it has {has}; set text=NAME")
    if not is_text(fields.field(text).type):
        raise CorpusError(f"field {text!r} holds {fields.field(text).type}, not text: it has {has}; set text=NAME")
    if source.format in FIELDED and options.id not in (None, *fields.names):
        raise CorpusError(f"no field {options.id!r}: it has {has}; set id=NAME, or leave it out")
    others = [f for f in fields if f.name not in names.values() and (kept is None or f.name in kept)]
    if clash := next((f.name for f in others if f.name in names), None):
        raise CorpusError(f"a field {clash!r} beside {clash}={names[clash]}: say which to keep with fields=[...]")
    return {"schema": pa.schema(others).serialize().to_pybytes()}


def join_fields(schemas: Iterable[bytes], options: IngestOptions) -> pa.Schema:
    """Columns that hold the fields of all files, in order of first appearance, with the types that hold them all."""
    types: dict[str, pa.DataType] = {"id": pa.string(), "text": pa.string()}
    for schema in schemas:
        for field in pa.ipc.read_schema(pa.BufferReader(schema)):
            types[field.name] = _join(types.get(field.name, field.type), field.type)
    for name, wanted in (options.kept() or {}).items():
        types[name] = wanted or types.get(name, pa.string())
    return pa.schema(types.items())


def _join(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The type that holds both, string where there is no other."""
    try:
        both = [pa.schema([("value", kind)]) for kind in (one, other)]
        return pa.unify_schemas(both, promote_options="permissive").field(0).type
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return pa.string()


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """What a file does to its reader becomes a CorpusError; its cause is left where the engine should try again."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, UnicodeError) as error:
        message = f"unreadable: {str(error) or type(error).__name__}"
        raise CorpusError(message) from (error if may_pass(error) else None)
