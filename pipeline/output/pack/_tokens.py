"""From texts to tokens, and from Arrow's lists to flat arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError
from pipeline.recipe import fingerprint


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, and the tokens that packing adds. `reads`: how criteria read it, responses and markup included."""

    backend: Any
    reads: Any
    end_id: int
    pad_id: int
    identity: str

    def __call__(self, said: Mapping[str, pa.Array]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens of n rows end to end, int32; their number a row, int64; and which are learnt, bool.

        `said`: `text` alone, every token of which is learnt, or a conversation's `targets` and `markup` beside it. A
        special token that a text only seems to hold is read as plain text. Every row is closed by the end token, but
        for one that a chat template has written, which has ends of its own.
        """
        if "targets" not in said:
            found = [e.ids for e in self.backend.encode_batch_fast(said["text"].to_pylist(), add_special_tokens=False)]
            lengths = np.fromiter(map(len, found), np.int64, len(found))
            ids = np.concatenate([np.empty(0, np.int32), *(np.asarray(i, np.int32) for i in found)])
            learnt = np.ones(len(ids), bool)
        elif not len(said["text"]):
            return np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, bool)
        else:
            read = self.reads.conversations(said["text"], said["targets"], said.get("markup"))
            ids, lengths, learnt = read.ids, np.diff(read.offsets), read.target
            if "markup" in said:
                return ids, lengths, learnt
        inside = np.ones(len(ids) + len(lengths), bool)
        inside[np.cumsum(lengths + 1) - 1] = False
        closed, known = np.full(len(inside), self.end_id, np.int32), np.ones(len(inside), bool)
        closed[inside], known[inside] = ids, learnt
        return closed, lengths + 1, known


MOST_TOKENS = 1 << 22
"""Tokens of a conversation that are read."""


@lru_cache(maxsize=4)
def encoder(
    tokenizer: str | None, end: str | None, pad: str | None, end_id: int | None = None, conversations: bool = False
) -> Encoder:
    """The encoder of a packing; without a tokenizer, one that only knows its end. Raises ConfigError, MissingExtra."""
    if tokenizer is None:
        assert end_id is not None
        return Encoder(None, None, end_id, end_id, fingerprint(end_id))
    from pipeline.corpus.rows import load_tokenizer

    backend = load_tokenizer(tokenizer)
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    reads = _reader(backend) if conversations else None
    named = end or _eos(tokenizer)
    ids = {name: backend.token_to_id(name) for name in (named, pad) if name is not None}
    if unknown := next((name for name, number in ids.items() if number is None), None):
        raise ConfigError(f"pack: the tokenizer {tokenizer} has no token {unknown!r}")
    if named is None:
        raise ConfigError(
            f"pack: {tokenizer} names no eos_token: say which token ends a document, such as --set end='</s>'"
        )
    number = ids[named]
    return Encoder(backend, reads, number, ids[pad] if pad else number, fingerprint(backend.to_str(), named, pad))


def _reader(backend: Any) -> Any:
    """The criteria's reader of conversations, by the same tokenizer."""
    from transformers import PreTrainedTokenizerFast

    from pipeline.models.causal import Encoder as Reader

    return Reader(PreTrainedTokenizerFast(tokenizer_object=backend), MOST_TOKENS)


def _eos(tokenizer: str) -> str | None:
    """The end token that the configuration beside a tokenizer names."""
    path = Path(tokenizer)
    beside = (path if path.is_dir() else path.parent) / "tokenizer_config.json"
    if path.exists() and beside.is_file():
        found = json.loads(beside.read_text(encoding="utf-8")).get("eos_token")
        return found.get("content") if isinstance(found, dict) else found
    if path.exists():
        return None
    from transformers import AutoTokenizer

    eos = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False).eos_token
    return str(eos) if eos else None


def field_of(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A column, or with dots a field of a struct column."""
    column, *fields = name.split(".")
    values = batch.column(column)
    for field in fields:
        values = pc.struct_field(values, field)
    return values


def ragged(values: pa.Array, kind: type) -> tuple[np.ndarray, np.ndarray]:
    """Lists of numbers or flags as one array of a kind, and their lengths, int64; a null list has none."""
    lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = pc.fill_null(values.flatten(), False if pa.types.is_boolean(values.type.value_type) else 0)
    return flat.to_numpy(zero_copy_only=False).astype(kind), lengths
