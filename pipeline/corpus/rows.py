"""The base column `row`: what every later step asks of a row without reading its text again.

`key` (16 bytes, xxh3-128 of the id or of the text), `bytes` (UTF-8) and `tokens`. Writing it is also where unusable
rows of the source enter quarantine. Without a tokenizer tokens are counted as bytes / 4, rounded up, and every place
that shows a token count says so.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError, MissingExtra
from pipeline.hashing import KEY, row_keys
from pipeline.recipe import Column, Transform, fingerprint

FIELDS = pa.schema([("key", KEY), ("bytes", pa.int64()), ("tokens", pa.int64())])
BYTES_A_TOKEN = 4


def row_column(has_id: bool, tokenizer: str | None) -> Column:
    """The column `row`. `tokenizer`: a tokenizer.json, a folder that holds one, a hub name, or None for bytes / 4."""
    identity = fingerprint("row", 1, has_id, _tokenizer_identity(tokenizer))
    inputs = ("text", "id") if has_id else ("text",)
    return Column("row", inputs, FIELDS, partial(_open, has_id, tokenizer), identity)


def _open(has_id: bool, tokenizer: str | None) -> Transform:
    count = partial(_count, load_tokenizer(tokenizer)) if tokenizer else None

    def transform(batch: pa.RecordBatch) -> pa.RecordBatch:
        text = batch.column("text")
        size = pc.binary_length(text).cast(pa.int64())
        tokens = count(text) if count else pc.divide(pc.add(size, BYTES_A_TOKEN - 1), BYTES_A_TOKEN)
        keys = row_keys(batch.column("id") if has_id else text)
        return pa.RecordBatch.from_arrays([keys, size, tokens], schema=FIELDS)

    return transform


def _count(tokenizer: Any, text: pa.Array) -> pa.Array:
    encodings = tokenizer.encode_batch_fast(text.to_pylist(), add_special_tokens=False)
    return pa.array(np.fromiter((len(e) for e in encodings), np.int64, len(encodings)))


def load_tokenizer(name: str) -> Any:
    """A `tokenizers.Tokenizer` from a file, a folder or the hub. Raises MissingExtra and ConfigError."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtra("counting tokens with a tokenizer", "models", "tokenizers") from error
    file = _tokenizer_file(name)
    try:
        return Tokenizer.from_file(str(file)) if file else Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"corpus.tokenizer: cannot load {name!r}: {error}") from error


def _tokenizer_file(name: str) -> Path | None:
    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    return file if file.is_file() else None


def _tokenizer_identity(name: str | None) -> str | None:
    import hashlib

    file = _tokenizer_file(name) if name else None
    return hashlib.sha256(file.read_bytes()).hexdigest() if file else name
