"""Packing of image-text pairs to full sequences, after Open-Qwen2VL (Wang et al. 2025, arXiv 2504.00595).

A pair is `image_tokens` copies of the image token, where a model puts what it sees, and then its text; one that has no
image is its text alone. Image tokens are not learnt. Pairs go into sequences by best fit, decreasing, where the paper's
code takes the first that fits; on its example both give the same sequences. That code lets a pair above the length
open a sequence of its own, which the collator then cuts without a word. Here it is cut at its end (`overlong: cut`;
the image stays whole) or left out, and counted as cropped either way. The images are not copied: `rows` says where they
are, in the order of the documents.

144 tokens an image are the paper's pooled 729 of SigLIP. Attention across pairs is the trainer's choice, by `document`;
the paper allows it.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from pipeline.errors import ConfigError
from pipeline.output.feeding import CuratedSet
from pipeline.output.order.base import StoredOrder
from pipeline.output.pack._bins import best_fit_decreasing
from pipeline.output.pack._tokens import Encoder, field_of
from pipeline.output.pack.base import Pack, Pieces
from pipeline.output.pack.best_fit import refuse_contexts


class Pairs(Pack):
    kind: Literal["pairs"] = "pairs"
    length: int = Field(4096, ge=2, description="tokens a sequence")
    image: str = Field("image", description="column of the images")
    image_tokens: int = Field(144, ge=1, description="tokens that an image takes")
    image_token: str = Field("<image>", description="the tokenizer's token for a place of an image")
    overlong: Literal["cut", "drop"] = Field("cut", description="pairs longer than a sequence: cut their text, or drop")

    @model_validator(mode="after")
    def _with_tokenizer(self) -> Self:
        if self.tokenizer is None:
            raise ValueError("pairs need a `tokenizer`, which knows the image token")
        if self.image_tokens >= self.length:
            raise ValueError(f"an image of {self.image_tokens} tokens leaves no room for text in {self.length}")
        return self

    def check(self, order: StoredOrder | None) -> None:
        refuse_contexts(self.kind, order)

    def columns(self, source: CuratedSet) -> list[str]:
        return [*super().columns(source), self.image]

    def leading(self, batch: pa.RecordBatch, encode: Encoder) -> tuple[np.ndarray, int]:
        number = encode.backend.token_to_id(self.image_token)
        if number is None:
            raise ConfigError(
                f"pack: the tokenizer has no token {self.image_token!r}: name it with --set image_token=..."
            )
        there = field_of(batch, self.image).is_valid().to_numpy(zero_copy_only=False)
        return there * self.image_tokens, number

    def place(self, lengths: np.ndarray, last: bool) -> Pieces:
        document = np.flatnonzero(lengths <= self.length) if self.overlong == "drop" else np.arange(len(lengths))
        held = np.minimum(lengths[document], self.length)
        return Pieces(document, np.zeros_like(held), held, best_fit_decreasing(held, self.length))
