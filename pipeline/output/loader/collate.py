"""Arrow tables to batches of torch tensors, column by column.

| column | in the batch |
| --- | --- |
| numbers, booleans | tensor (rows,) of that type |
| fixed_size_list of them | tensor (rows, size) |
| list of them | tensor (rows, longest), filled up with 0, and `NAME_mask`, bool of that shape: where there is a value |
| anything else | list of Python values |

A null list is an empty one, a null float NaN; an integer or a boolean has no value for null, so that is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError, CorpusError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

IGNORED = -100
"""Label of a token that is not learnt, for torch's cross-entropy and for transformers."""


def tensors(table: pa.Table) -> dict[str, Any]:
    """A batch as the table above says."""
    import torch

    batch: dict[str, Any] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = column.type
        if _is_number(kind):
            batch[name] = torch.from_numpy(_numbers(name, column))
        elif pa.types.is_fixed_size_list(kind) and _is_number(kind.value_type):
            batch[name] = torch.from_numpy(matrix(name, column))
        elif (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _is_number(kind.value_type):
            values, mask = _padded(name, column)
            batch[name], batch[f"{name}_mask"] = torch.from_numpy(values), torch.from_numpy(mask)
        else:
            batch[name] = column.to_pylist()
    return batch


def language_model(table: pa.Table) -> dict[str, Any]:
    """Packed sequences as a causal model of transformers takes them: `input_ids`, `labels`, `position_ids`, int64
    (rows, length) each; other columns as `tensors` has them.

    Labels are -100 where the loss mask says so, and on the first token of every document: what stands before it is
    another one. There is no attention mask: a model of transformers that is called without one, and without a cache
    (`config.use_cache = False`), tells by the positions where a document begins, and keeps attention inside it.
    """
    import torch

    batch = tensors(table)
    ids, positions = batch["input_ids"].long(), batch["position_ids"].long()
    learnt = batch.pop("loss_mask").bool() & (positions > 0)
    return batch | {
        "input_ids": ids,
        "position_ids": positions,
        "labels": torch.where(learnt, ids, IGNORED),
    }


@dataclass(frozen=True)
class Tokenized:
    """Texts tokenised as they are loaded: `input_ids`, `attention_mask`, `labels` (rows, longest), for small runs.

    A row is cut at `length` tokens and closed by the tokenizer's end token where it is shorter; padding is at the end.
    What a packed set saves is the padding, and tokenising every epoch again.
    """

    tokenizer: PreTrainedTokenizerFast
    length: int
    column: str = "text"

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ConfigError("collate: the tokenizer names no end token: set its eos_token")

    def __call__(self, table: pa.Table) -> dict[str, torch.Tensor]:
        texts = pc.fill_null(table[self.column], "").to_pylist()
        cut = {"truncation": True, "max_length": self.length}
        # What looks like a special token in a text is read as plain text.
        found = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, **cut)["input_ids"]
        rows = [[*ids, self.tokenizer.eos_token_id][: self.length] for ids in found]
        batch = tensors(pa.table({"input_ids": pa.array(rows, pa.list_(pa.int64()))}))
        ids, mask = batch["input_ids"], batch["input_ids_mask"]
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, IGNORED)}


def matrix(name: str, column: pa.ChunkedArray) -> np.ndarray:
    """Values of a fixed_size_list column, (rows, size)."""
    if column.null_count:
        raise CorpusError(f"column {name!r} has rows without values: leave it out with columns=, or pass a collate=")
    values = pa.chunked_array([c.flatten() for c in column.chunks], column.type.value_type)
    return _numbers(name, values).reshape(len(column), column.type.list_size)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _numbers(name: str, column: pa.ChunkedArray) -> np.ndarray:
    """A column's values as one array of its own, which may be written to."""
    if column.null_count and not pa.types.is_floating(column.type):
        raise CorpusError(
            f"column {name!r} has null for a value, and {column.type} has no number for it: leave the column out with "
            "columns=, or pass a collate="
        )
    parts = [c.to_numpy(zero_copy_only=False) for c in column.chunks]
    return np.concatenate(parts) if parts else np.empty(0, column.type.to_pandas_dtype())


def _padded(name: str, column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
    flat = _numbers(name, pc.list_flatten(column))
    values = np.zeros(mask.shape, flat.dtype)
    values[mask] = flat
    return values, mask
