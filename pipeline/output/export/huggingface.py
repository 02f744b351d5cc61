"""A data set for Hugging Face `datasets` and the hub: `data/train-00000-of-00004.parquet` and a card.

The files are written by `datasets` itself, so they carry its features, and a column of encoded images that is named in
`images` is one of images to it. The card is that of the curation, with the configuration of the files and what they
hold in its front matter; `load_dataset(DIR)` follows it, and so does the hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from pipeline.output.export.base import Export, Exported, Shard


class Huggingface(Export):
    kind: Literal["huggingface"] = "huggingface"
    split: str = Field("train", pattern=r"^\w+$", description="name of the split")
    images: tuple[str, ...] = Field((), description="columns that hold encoded images")

    def write(self, shard: Shard, directory: Path) -> dict[str, Any]:
        from datasets.arrow_writer import ParquetWriter

        path = directory / "data" / f"{self.split}-{shard.number:05d}-of-{shard.shards:05d}.parquet"
        path.parent.mkdir()
        features = self._features(shard.part.curated.schema, shard.columns)
        with ParquetWriter(path=str(path), features=features) as writer:
            for batch in shard.batches():
                table = pa.Table.from_batches([batch])
                writer.write_table(self._as_images(table).cast(features.arrow_schema))
            writer.finalize()
        return {"bytes": path.stat().st_size, "decoded": _decoded(path)}

    def finish(self, exported: Exported, notes: Sequence[dict[str, Any]]) -> dict[str, bytes]:
        from huggingface_hub import DatasetCard

        front: dict[str, Any] = {
            "configs": [
                {"config_name": "default", "data_files": [{"split": self.split, "path": f"data/{self.split}-*"}]}
            ],
            "dataset_info": {
                "features": self._features(exported.schema, tuple(exported.schema.names))._to_yaml_list(),
                "splits": [
                    {"name": self.split, "num_bytes": sum(n["decoded"] for n in notes), "num_examples": exported.rows}
                ],
                "download_size": sum(n["bytes"] for n in notes),
                "dataset_size": sum(n["decoded"] for n in notes),
            },
        }
        card = DatasetCard(exported.card) if exported.card else DatasetCard("---\n{}\n---\n\n# Curated by Tamis\n")
        for key, value in front.items():
            setattr(card.data, key, value)
        return {"README.md": str(card).encode()}

    def _features(self, schema: pa.Schema, columns: tuple[str, ...]) -> Any:
        from datasets import Features, Image

        features = Features.from_arrow_schema(pa.schema([schema.field(c) for c in columns]))
        return Features({name: Image() if name in self.images else f for name, f in features.items()})

    def _as_images(self, table: pa.Table) -> pa.Table:
        """Bytes as the library's struct of bytes and path."""
        for name in self.images:
            values = table[name].combine_chunks()
            if not pa.types.is_struct(values.type):
                nothing = pa.nulls(len(values), pa.string())
                values = pa.StructArray.from_arrays(
                    [values.cast(pa.binary()), nothing], ["bytes", "path"], mask=values.is_null()
                )
            table = table.set_column(table.schema.get_field_index(name), name, values)
        return table


def _decoded(path: Path) -> int:
    footer = pq.read_metadata(path)
    return sum(footer.row_group(i).total_byte_size for i in range(footer.num_row_groups))
