"""Small models and batches of what operators work on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from pipeline.models.training import Shape, new_lm

Batch = dict[str, torch.Tensor]


@pytest.fixture
def lm() -> LlamaForCausalLM:
    return new_lm(Shape(hidden=16, layers=2, heads=2, kv_heads=1, mlp=32, vocab=300, context=32), 0).train()


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """`make_batch(rows, seed)`: rows of 6 to 16 random tokens, of which those behind the third are learned."""

    def make(rows: int = 12, seed: int = 0, width: int = 16) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, 300, (rows, width), generator=generator)
        there = torch.arange(width) < torch.randint(6, width + 1, (rows, 1), generator=generator)
        labels = ids.masked_fill(~there | (torch.arange(width) < 3), -100)
        return {"input_ids": ids * there, "attention_mask": there.long(), "labels": labels}

    return make
