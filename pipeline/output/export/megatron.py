"""Megatron's indexed binaries, `part-00000.bin` and `part-00000.idx`: tokens, as `GPTDataset` maps them into memory.

Written by `megatron.core`'s own `IndexedDatasetBuilder`, one document a row, closed by the end token, in the smallest
type that holds the vocabulary (uint16 up to 65,500 as Megatron chooses, else int32). Megatron packs and shuffles by
itself; name all prefixes in `--data-path`, which the run's `exports/*/export.json` lists.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.corpus.text import clean_text
from pipeline.errors import ConfigError, MissingExtra
from pipeline.output.export.base import Export, Shard
from pipeline.output.pack._tokens import encoder


class Megatron(Export):
    kind: Literal["megatron"] = "megatron"
    tokenizer: str = Field(description="tokenizer.json, a folder that holds one, or a hub name")
    end: str | None = Field(None, description="token that closes a document (default: the tokenizer's eos_token)")
    text: str | None = Field(None, description="text column (default: the corpus's)")

    def check(self, schema: pa.Schema) -> None:
        _library()
        encoder(self.tokenizer, self.end, None)

    def write(self, shard: Shard, directory: Path) -> dict[str, Any]:
        indexed = _library()
        column = self.text or shard.text
        if column is None or column not in shard.part.curated.schema.names:
            raise ConfigError(f"export to Megatron: there is no text column {column!r}: name `text`")
        encode = encoder(self.tokenizer, self.end, None)
        prefix = directory / f"part-{shard.number:05d}"
        kind = indexed.DType.optimal_dtype(encode.backend.get_vocab_size())
        builder = indexed.IndexedDatasetBuilder(f"{prefix}.bin", dtype=kind)
        documents = tokens = 0
        for batch in shard.batches([column]):
            ids, lengths, _ = encode({"text": clean_text(batch.column(0))[0].drop_null()})
            for document in np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []:
                builder.add_document(document, [len(document)])
            documents, tokens = documents + len(lengths), tokens + len(ids)
        builder.finalize(f"{prefix}.idx")
        return {"documents": documents, "tokens": tokens}


def _library() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says which CUDA libraries are missing, none of which this needs
            from megatron.core.datasets import indexed_dataset
    except ImportError as error:
        raise MissingExtra("export to Megatron's binaries", "export", "megatron-core") from error
    return indexed_dataset
