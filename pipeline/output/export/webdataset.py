"""WebDataset: `shard-000000.tar`, one tar a shard, written by the library `webdataset`.

A sample is named by the number of its shard and of its row in it, as the format wants names without dots. Its members
are the text (`.txt`), an image where a column of encoded ones is named (`.jpg`, `.png`, `.gif`, `.webp`, `.bmp`, by its
first bytes; `.bin` where they say nothing), and all other columns as `.json`. Owner, mode and time of the members are
fixed, so the same rows give the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from pipeline.errors import ConfigError, MissingExtra
from pipeline.output.export._json import lines
from pipeline.output.export.base import Export, Shard

MAGIC = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\x00": "tiff",
    b"MM\x00*": "tiff",
}


class Webdataset(Export):
    kind: Literal["webdataset"] = "webdataset"
    image: str | None = Field(None, description="column of encoded images")

    def check(self, schema: pa.Schema) -> None:
        try:
            import webdataset  # noqa: F401  # is it there?
        except ImportError as error:
            raise MissingExtra("export to WebDataset", "export", "webdataset") from error
        if self.image is not None and self.image not in schema.names:
            raise ConfigError(
                f"export: there is no column {self.image!r} of images; there are {', '.join(schema.names)}"
            )

    def write(self, shard: Shard, directory: Path) -> dict[str, Any]:
        from webdataset import TarWriter

        at = 0
        with TarWriter(str(directory / f"shard-{shard.number:06d}.tar"), encoder=False, mtime=0) as tar:
            for batch in shard.batches():
                apart = {n for n in (shard.text, self.image) if n in shard.columns}
                rest = batch.select([n for n in shard.columns if n not in apart])
                described = lines(rest).splitlines() if rest.num_columns else [b"{}"] * batch.num_rows
                texts = self._bytes(batch, shard.text)
                images = self._bytes(batch, self.image)
                for row, about in enumerate(described):
                    sample: dict[str, Any] = {"__key__": f"{shard.number:06d}{at + row:09d}"}
                    if texts is not None and texts[row] is not None:
                        sample["txt"] = texts[row]
                    if images is not None and (image := images[row]) is not None:
                        sample[extension(image)] = image
                    if rest.num_columns:
                        sample["json"] = about
                    tar.write(sample)
                at += batch.num_rows
        return {}

    def _bytes(self, batch: pa.RecordBatch, name: str | None) -> list[bytes | None] | None:
        if name is None or name not in batch.schema.names:
            return None
        values = batch.column(name)
        values = values.field("bytes") if pa.types.is_struct(values.type) else values
        found: list[bytes | None] = values.cast(pa.large_binary()).to_pylist()
        return found


def extension(image: bytes) -> str:
    """What a file of an image's bytes is called."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    return next((name for magic, name in MAGIC.items() if image.startswith(magic)), "bin")
