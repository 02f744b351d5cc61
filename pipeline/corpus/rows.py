"""The base column `row`: what every later step asks of a row without reading its text again.

`key` (16 bytes, xxh3-128 of the id or of the text), `bytes` (UTF-8) and `tokens`. Writing it is also where unusable
rows of the source enter quarantine. Without a tokenizer tokens are counted as bytes / 4, rounded up, and every place
that shows a token count says so.

Of a pair of image and text without an id the key is that of both together, so that a caption which a thousand images
share does not make them one; bytes and tokens are the text's, as what an image comes to depends on the model that reads
it. Of images alone `key` is that of the encoded bytes, `bytes` counts these, and an image is one token.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def row_column(has_id: bool, tokenizer: str | None, text: bool = True, image: bool = False) -> Column:
    """The column `row`. `tokenizer`: a tokenizer.json, a folder that holds one, a hub name, or None for bytes / 4.

    `text`, `image`: what a row consists of.
    """
    content = tuple(role for role, there in (("text", text), ("image", image)) if there)
    known = [] if content == ("text",) else [content]
    identity = fingerprint("row", 1, has_id, _tokenizer_identity(tokenizer), *known)
    inputs, keyed = ((*content, "id"), ("id",)) if has_id else (content, content)
    return Column("row", inputs, FIELDS, partial(_open, keyed, content[0], tokenizer), identity)


def _open(keyed: tuple[str, ...], content: str, tokenizer: str | None) -> Transform:
    count = partial(_count, load_tokenizer(tokenizer)) if tokenizer and content == "text" else None

    def transform(batch: pa.RecordBatch) -> pa.RecordBatch:
        values = batch.column(content)
        size = pc.binary_length(values).cast(pa.int64())
        if content == "image":
            tokens = pa.array(np.ones(len(values), np.int64))
        else:
            tokens = count(values) if count else pc.divide(pc.add(size, BYTES_A_TOKEN - 1), BYTES_A_TOKEN)
        keys = [row_keys(batch.column(name)) for name in keyed]
        return pa.RecordBatch.from_arrays([keys[0] if len(keys) == 1 else _joint(keys), size, tokens], schema=FIELDS)

    return transform


def _joint(keys: Sequence[pa.FixedSizeBinaryArray]) -> pa.FixedSizeBinaryArray:
    """A key of several keys of every row."""
    parts = [np.frombuffer(k.buffers()[1], np.uint8).reshape(-1, KEY.byte_width) for k in keys]
    joined = pa.py_buffer(np.concatenate(parts, axis=1))
    width = KEY.byte_width * len(keys)
    return row_keys(pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(keys[0]), [None, joined]))


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
