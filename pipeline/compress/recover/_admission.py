"""What a training is admitted by, before it takes time: that its parts fit together, and what identifies it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.compress.recover._session import causal
from pipeline.compress.recover.base import Recovery, Setup
from pipeline.errors import ConfigError
from pipeline.recipe import fingerprint

if TYPE_CHECKING:
    from pipeline.compress.schedule.base import Schedule


def check(setup: Setup, recovery: Recovery, tokens: int) -> None:
    """What would fail late, or silently."""
    causal(setup.student, recovery.kind)
    rows = setup.student.get_input_embeddings().weight.shape[0]
    for name, blocks in (("blocks", setup.blocks), ("held_out", setup.held_out)):
        if blocks is None:
            continue
        if blocks.ndim != 2 or not len(blocks) or blocks.shape[1] < 2 or blocks.dtype.kind not in "iu":
            raise ConfigError(
                f"recovery: {name}: {blocks.dtype} of shape {blocks.shape} are no blocks (n, tokens) of token ids"
            )
        if (largest := max(int(blocks.max()), -1 - int(blocks.min()))) >= rows:
            raise ConfigError(
                f"recovery: {name}: token id {largest}, where the student knows {rows}: the blocks were made with "
                "another tokenizer"
            )
    if tokens < setup.blocks.shape[1]:
        raise ConfigError(f"recovery: {tokens} tokens do not pay one block of {setup.blocks.shape[1]}: raise tokens")
    if recovery.needs_teacher and setup.teacher is None:
        raise ConfigError(f"recovery: {recovery.kind} needs a teacher: the model before it was made smaller")
    if recovery.patience is not None and setup.held_out is None:
        raise ConfigError("recovery: patience needs held-out blocks to measure on")
    for name, of, domains in (
        ("domains", setup.blocks, setup.domains), ("held_out_domains", setup.held_out, setup.held_out_domains)
    ):  # fmt: skip
        if domains is not None and (of is None or len(domains) != len(of)):
            raise ConfigError(f"recovery: {name}: {len(domains)} for {0 if of is None else len(of)} blocks")


def identity(recovery: Recovery, setup: Setup, tokens: int, schedules: Sequence[Schedule]) -> str:
    """Of everything that determines the result, so that no checkpoint of another training is gone on from."""
    settings = recovery.model_dump(mode="json", exclude={"checkpoint_every"})
    arrays = [setup.blocks, setup.vocabulary, setup.held_out, setup.domains, setup.held_out_domains]
    models = [setup.student, setup.teacher] if setup.teacher is not None else [setup.student]
    weights = [{n: _digest(t) for n, t in model.state_dict().items()} for model in models]
    masks = {n: _digest(m) for n, m in setup.masks.items()}
    data = [None if a is None else _digest(a) for a in arrays]
    return fingerprint("recovery", settings, tokens, [s.identity() for s in schedules], data, weights, masks)


def _digest(values: Any) -> str:
    import torch
    import xxhash

    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()  # NumPy has no bfloat16
    array = np.ascontiguousarray(values)
    return f"{array.shape} {array.dtype} {xxhash.xxh3_128_hexdigest(array.data)}"
