"""MosaicML's MDS, for `streaming.StreamingDataset`: written by the library's own `MDSWriter`, one directory a shard.

`00000/shard.00000.mds.zstd` and so on, and one `index.json` above them that joins their indexes, which is what the
library's `merge_index` makes. Text, numbers, flags and bytes are columns of their MDS types, lists and structs are
`json`. The format knows no null: a column that has one is refused by name.

The library pins NumPy below 2.2 and an old huggingface_hub, which `datasets` here does not go with, so it is in no
extra: install `mosaicml-streaming` in an environment beside, and say `tamis export` there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from pipeline.errors import ConfigError, TamisError
from pipeline.output.export.base import Export, Exported, Shard

NUMBERS = {
    pa.int8(): "int8",
    pa.int16(): "int16",
    pa.int32(): "int32",
    pa.int64(): "int64",
    pa.uint8(): "uint8",
    pa.uint16(): "uint16",
    pa.uint32(): "uint32",
    pa.uint64(): "uint64",
    pa.float16(): "float16",
    pa.float32(): "float32",
    pa.float64(): "float64",
    pa.bool_(): "uint8",
}


class Mds(Export):
    kind: Literal["mds"] = "mds"
    compression: str | None = Field("zstd", description="as MDSWriter takes it; null: none")
    shard_mb: int = Field(64, ge=1, description="MiB of one MDS file")

    def check(self, schema: pa.Schema) -> None:
        try:
            import streaming  # noqa: F401  # is it there?
        except ImportError as error:
            raise ConfigError(
                "export to MDS needs mosaicml-streaming, which does not go with the `datasets` of Tamis in one "
                "environment: install it in another, beside Tamis, and export there"
            ) from error

    def write(self, shard: Shard, directory: Path) -> dict[str, Any]:
        from streaming import MDSWriter

        name = f"{shard.number:05d}"
        schema = shard.part.curated.schema
        kinds = {c: encoding(schema.field(c).type) for c in shard.columns}
        options: dict[str, Any] = {
            "compression": self.compression,
            "size_limit": self.shard_mb << 20,
            "hashes": ["xxh64"],
        }
        with MDSWriter(out=str(directory / name), columns=kinds, **options) as out:
            for batch in shard.batches():
                columns = [_values(batch.column(c), kinds[c], c) for c in shard.columns]
                for row in zip(*columns, strict=True):
                    out.write(dict(zip(shard.columns, row, strict=True)))
        index = directory / name / "index.json"
        described = json.loads(index.read_text())
        index.unlink()  # that of all shards takes its place
        return {"shards": [_below(name, s) for s in described["shards"]], "version": described["version"]}

    def finish(self, exported: Exported, notes: Sequence[dict[str, Any]]) -> dict[str, bytes]:
        shards = [s for n in notes for s in n["shards"]]
        return {"index.json": json.dumps({"version": notes[0]["version"], "shards": shards}).encode()}


def encoding(kind: pa.DataType) -> str:
    """MDS type of an Arrow type."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if any(check(kind) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        return "str"
    if any(check(kind) for check in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)):
        return "bytes"
    return NUMBERS.get(kind, "json")


def _values(values: pa.Array, kind: str, name: str) -> Any:
    if values.null_count and kind != "json":
        raise TamisError(f"export to MDS: column {name!r} has a null, which the format cannot hold: leave it out")
    if kind in ("str", "bytes", "json"):
        return values.to_pylist()
    return values.to_numpy(zero_copy_only=False).astype(kind)


def _below(directory: str, shard: dict[str, Any]) -> dict[str, Any]:
    """The description of an MDS file with its names as seen from above its directory."""
    for key in ("raw_data", "zip_data"):
        if shard.get(key):
            shard[key]["basename"] = f"{directory}/{shard[key]['basename']}"
    return shard
