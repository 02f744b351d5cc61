"""Documents that a model is healed on, texts or conversations, as token ids that say what is to be predicted.

Documents are an Arrow array: large_string for texts, `struct<text, targets[, markup]>` for conversations
(`pipeline.corpus.chat`), of which the responses alone count as loss. A token `i` that is read and never to be predicted
has the id `~i`, which is `-1 - i`: one array says both, through shuffling, packing and files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError
from pipeline.models.causal import Encoder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

MAX_TOKENS = 1 << 20
"""Of a conversation; more than any model reads."""


def conversations(documents: pa.Array) -> bool:
    """Whether documents are conversations rather than texts."""
    return bool(pa.types.is_struct(documents.type))


def text_of(documents: pa.Array) -> pa.Array:
    """What documents say, large_string: of conversations as they were rendered."""
    return pc.struct_field(documents, "text") if conversations(documents) else documents


def read_ids(ids: np.ndarray) -> np.ndarray:
    """The tokens that are read, by ids that say which are to be predicted."""
    return np.asarray(np.maximum(ids, ~ids))


def read_tensor(ids: torch.Tensor) -> torch.Tensor:
    """`read_ids` of a tensor."""
    import torch

    return torch.maximum(ids, ~ids)


def tokens_of(documents: pa.Array, tokenizer: PreTrainedTokenizerFast) -> list[np.ndarray]:
    """Token ids (int32) of every document; what looks like a special token in what it says is read as plain text, and
    none is added. Of a conversation, ids outside its responses are inverted."""
    if conversations(documents):
        row = dict(zip((f.name for f in documents.type), documents.flatten(), strict=True))
        found = Encoder(tokenizer, MAX_TOKENS, adds_special=False).read(row)
        tokenizer.backend_tokenizer.no_truncation()  # it may be saved
        assert found.target is not None
        return np.split(np.where(found.target, found.ids, ~found.ids), found.offsets[1:-1])
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    encoded = backend.encode_batch_fast(documents.to_pylist(), add_special_tokens=False)
    return [np.asarray(e.ids, np.int32) for e in encoded]


def response_bytes(documents: pa.StructArray) -> np.ndarray:
    """UTF-8 bytes of the responses of conversations, (n,) int64."""
    text = pc.struct_field(documents, "text").to_pylist()
    spans = pc.struct_field(documents, "targets").to_pylist()
    said = ((t[s["start"] : s["end"]] for s in of) for t, of in zip(text, spans, strict=True))
    return np.array([sum(len(part.encode()) for part in parts) for parts in said])


def shortened(documents: pa.Array, chars: int) -> pa.Array:
    """Documents cut to their first characters; conversations without a response in them are left out."""
    cut = pc.utf8_slice_codeunits(text_of(documents), 0, chars)
    if not conversations(documents):
        return cut
    parts = dict(zip((f.name for f in documents.type), documents.flatten(), strict=True)) | {"text": cut}
    found = pa.StructArray.from_arrays(list(parts.values()), list(parts))
    return found.filter(pa.array(response_bytes(found) > 0))


def end_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token that closes a document. Raises ConfigError where a tokenizer has none."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigError("model: its tokenizer names no end token: set eos_token in tokenizer_config.json")
    return int(end)


def closing(documents: pa.Array, tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that stands behind each document: to be predicted, but where a template has ended its last response."""
    end = end_of(tokenizer)
    ended = conversations(documents) and documents.type.get_field_index("markup") >= 0
    return ~end if ended else end
