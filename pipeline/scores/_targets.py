"""Target examples: the texts that a corpus is to be like, read from files and embedded as the run embeds its rows.

Files are those of `pipeline.scores._seeds`. Where the run's embedding reads the text, examples need a text alone; where
it reads other columns of the corpus (vectors that are there already, images), the files have columns of those names.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.corpus.chat import Chat
from pipeline.corpus.text import clean_text, is_text
from pipeline.errors import ConfigError
from pipeline.hashing import hash64, row_keys
from pipeline.recipe import QUARANTINE, Column
from pipeline.scores._seeds import read_columns
from pipeline.vectors import matrix

log = logging.getLogger(__name__)


def listed(paths: str | list[str] | None) -> list[str]:
    return [paths] if isinstance(paths, str) else paths or []


def read_targets(
    uris: Sequence[str], text: str, role: str, group: str | None = None, embed: Column | None = None
) -> pa.Table:
    """Distinct usable examples: `text` (large_string) and what the embedding reads beside it, by its references.

    They come in the order of their hashes, whatever that of the files. `group`: column that names the benchmark of an
    example; every benchmark then gives as many as the smallest has. Raises ConfigError where no example is left, warns
    of a single one.
    """
    table = read_examples(uris, text, role, [group] if group else [], embed)
    _, first = np.unique(hash64(row_keys(table["text"].combine_chunks()), 0), return_index=True)
    table = table.take(pa.array(first))
    if group is not None:
        table = balanced(table, group).drop_columns([group])
    if len(table) == 1:
        log.warning("%s: there is one example: rows are ranked by their likeness to this one text", role)
    return table


def read_examples(
    uris: Sequence[str], text: str, role: str, also: Sequence[str] = (), embed: Column | None = None
) -> pa.Table:
    """All rows of some files with a usable text, as they come: `text`, the columns `also`, and what `embed` reads.

    A row with a null in any of them is left out. Raises ConfigError where none remains.
    """
    read = {r: r.removeprefix("corpus.") for r in (embed.inputs if embed else ()) if r != "text"}
    if odd := [r for r in read if not r.startswith("corpus.")]:
        raise ConfigError(f"{role}: an embedding that reads {', '.join(odd)} cannot embed examples from files")
    found = []
    for uri in uris:
        columns = read_columns(uri, list(dict.fromkeys([text, *also, *read.values()])), role)
        if not is_text(columns[text].type):
            raise ConfigError(f"{role}: column {text!r} of {uri!r} is {columns[text].type}, not text")
        usable = clean_text(columns[text].combine_chunks())[0].cast(pa.large_string())
        names = ["text", *also, *read]
        found.append(pa.table([usable, *(columns[c] for c in [*also, *read.values()])], names))
    table = pa.concat_tables(found, promote_options="permissive").drop_null()
    if not len(table):
        raise ConfigError(f"{role}: there is no usable text in {', '.join(uris)}")
    return table.combine_chunks()


def read_conversations(uris: Sequence[str], chat: Chat, role: str, also: Sequence[str] = ()) -> pa.Table:
    """Distinct examples that the corpus's own columns and template make of some files: `text`, `targets`, `markup`, and
    the columns `also`. They come in the order of their hashes. Raises ConfigError where there is none."""
    found = []
    for uri in uris:
        columns = read_columns(uri, list(dict.fromkeys([*chat.columns, *also])), role)
        chat.check(columns.schema, role)
        rendered = chat.render({name: columns[name].combine_chunks() for name in chat.columns})
        made = pa.table([getattr(rendered, name) for name in chat.references], list(chat.references))
        for name in also:
            made = made.append_column(name, columns[name])
        found.append(made.filter(rendered.reasons.is_null()))
    table = pa.concat_tables(found, promote_options="permissive").combine_chunks()
    if not len(table):
        raise ConfigError(f"{role}: there is no usable conversation in {', '.join(uris)}")
    _, first = np.unique(hash64(row_keys(table["text"].combine_chunks()), 0), return_index=True)
    return table.take(pa.array(first))


def balanced(table: pa.Table, group: str) -> pa.Table:
    """The first rows of every group, as many of each as the smallest has, in their order."""
    codes = table[group].combine_chunks().dictionary_encode().indices.to_numpy()
    sizes = np.bincount(codes)
    order = np.argsort(codes, kind="stable")
    place = np.empty(len(codes), np.int64)
    place[order] = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return table.filter(pa.array(place < sizes.min()))


def embedded(embed: Column, examples: pa.Table, role: str) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of the examples that the embedding takes, (m, d) float16 like those of rows, and which these are.

    Raises ConfigError where it takes none.
    """
    transform = embed.open()
    batches = examples.select(list(embed.inputs)).to_batches(embed.batch_rows)
    out = pa.Table.from_batches([transform(batch) for batch in batches]).combine_chunks()
    taken = np.flatnonzero(out["vector"].is_valid().to_numpy(zero_copy_only=False))
    if not len(taken):
        raise ConfigError(f"{role}: no example has a vector: {out[QUARANTINE].drop_null()[0]}")
    return matrix(out["vector"].combine_chunks().take(pa.array(taken))), taken
