"""A run's directory as it lies there, read without taking it: for `status` and `show`, also while the run goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.chat import Chat
from pipeline.corpus.shards import MIB, Shard, plan_shards
from pipeline.corpus.storage import Store
from pipeline.engine.reading import Layout
from pipeline.errors import TamisError

QUARANTINE_PARTS = 64
QUARANTINE = pa.schema(
    [
        ("column", pa.string()),
        ("shard", pa.int64()),
        ("shard_row", pa.int64()),
        ("reason", pa.string()),
        ("file", pa.string()),
        ("row_group", pa.int32()),
        ("row", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Stored:
    """A run directory with its manifest."""

    store: Store
    manifest: dict[str, Any]

    @classmethod
    def at(cls, uri: str) -> Stored:
        """Raises TamisError where there is no run."""
        store = Store(uri)
        try:
            return cls(store, json.loads(store.read("manifest.json")))
        except FileNotFoundError:
            raise TamisError(f"{uri} is not a run directory: it has no manifest.json") from None
        except (OSError, ValueError) as error:
            raise TamisError(f"cannot read the run in {uri}: {error}") from error

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.manifest["config"])

    @property
    def scores(self) -> list[str]:
        """Names of the score columns, in the order of the configuration."""
        return [s.get("name") or s["kind"] for s in self.config["scores"]]

    @cached_property
    def shards(self) -> list[Shard]:
        """The corpus as the run has cut it. Raises TamisError where it is not listed yet."""
        try:
            listing = pq.read_table(pa.BufferReader(self.store.read("corpus", "files.parquet")))
        except FileNotFoundError:
            raise TamisError(f"the run in {self.store.uri} has not listed its corpus yet") from None
        limit = int(self.config["corpus"].get("max_image_mb", 0) * MIB)
        return plan_shards(listing, self.manifest["shard_bytes"], self.store, limit)

    @property
    def layout(self) -> Layout:
        corpus, chat = self.config["corpus"], self.manifest.get("chat")
        return Layout(self.store, corpus["text"], corpus["id"], Chat.stored(chat) if chat else None)


def quarantined(
    store: Store, columns: Sequence[str], shards: Sequence[int] | None = None, parts: int = QUARANTINE_PARTS
) -> pa.Table:
    """Rows in quarantine for some columns: of the given shards, or of the first `parts` parts of each column."""
    from pipeline.engine.parts import part_name

    tables = [QUARANTINE.empty_table()]
    for column in columns:
        there = store.files("quarantine", column)
        names = sorted(there)[:parts] if shards is None else [n for n in map(part_name, shards) if n in there]
        for name in names:
            with store.filesystem.open_input_file(store.at("quarantine", column, name)) as source:
                table = pq.read_table(source).replace_schema_metadata(None)
            shard = int(name.removeprefix("part-").removesuffix(".parquet"))
            table = table.append_column("column", pa.array([column] * len(table), pa.string()))
            tables.append(
                table.append_column("shard", pa.array(np.full(len(table), shard)))
                .select(QUARANTINE.names)
                .cast(QUARANTINE)
            )
    return pa.concat_tables(tables)
