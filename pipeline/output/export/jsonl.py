"""JSON lines, compressed with zstd: `part-00000.jsonl.zst`, one object a row, for whatever reads text.

Written by polars and Arrow's codec; bytes such as images become base64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from pipeline.output.export._json import lines
from pipeline.output.export.base import Export, Shard


class Jsonl(Export):
    kind: Literal["jsonl"] = "jsonl"

    def write(self, shard: Shard, directory: Path) -> dict[str, Any]:
        path = directory / f"part-{shard.number:05d}.jsonl.zst"
        with pa.CompressedOutputStream(str(path), "zstd") as sink:
            for batch in shard.batches():
                sink.write(lines(batch))
        return {}
