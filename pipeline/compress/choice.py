"""Which rows a model is calibrated on: a choice like any other, and one that can be judged.

Rows are drawn at random, or taken by a score of the curated run, highest first. Where there is more than one choice,
each is tried: a copy of the model is cut with it, and the one whose cut model says most nearly what the dense model
says of unseen text is kept (NIRVANA, arXiv 2509.14230: KL(dense || cut) on 128 x 64 held-out tokens). That costs a
measurement, a cut and a held-out pass a choice; `Chosen.passes` counts them for the ledger.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.compare.measures.language import kl
from pipeline.compress.calibration import Calibration
from pipeline.compress.config import CalibrationData
from pipeline.compress.documents import read_ids
from pipeline.compress.steps.base import Step

if TYPE_CHECKING:
    from torch import nn

HELD_ROWS, HELD_LENGTH = 128, 64
"""Blocks and tokens of each that the choice is judged on (NIRVANA)."""


@dataclass
class Chosen:
    """Blocks to calibrate on, and how they were found: `about` is JSON-able; `passes` counts tokens of the trials."""

    blocks: np.ndarray
    about: dict[str, Any]
    passes: Counter[str] = field(default_factory=Counter)


def choose(
    wanted: CalibrationData,
    model: nn.Module,
    steps: Sequence[Step],
    drawn: Mapping[tuple[str, int], np.ndarray],
    held_out: np.ndarray,
) -> Chosen:
    """The calibration blocks of a configuration, of those that each way of choosing gave. The model is not changed."""
    if len(drawn) == 1:
        (way, seed), blocks = next(iter(drawn.items()))
        return Chosen(blocks, {"by": way, "seed": seed, "rows": len(blocks)})
    unseen = held_out[:HELD_ROWS, :HELD_LENGTH]
    passes: Counter[str] = Counter()
    tried: list[dict[str, Any]] = []
    for (way, seed), blocks in drawn.items():
        trial = copy.deepcopy(model)
        batches = Calibration.of_blocks(trial, blocks, wanted.batch).batches
        for step in steps:
            measured = Calibration(trial, batches)
            trial, batches = step.apply(trial, measured).model, measured.batches
            passes.update(measured.passes)
        tried.append({"by": way, "seed": seed, "rows": len(blocks), "kl": divergence(model, trial, unseen)})
        passes["forward"] += 2 * unseen.size
    best = min(range(len(tried)), key=lambda i: tried[i]["kl"])
    return Chosen(list(drawn.values())[best], tried[best] | {"tried": tried}, passes)


def divergence(dense: nn.Module, cut: nn.Module, blocks: np.ndarray, batch: int = 8) -> float:
    """KL(p_dense || p_cut) in nats, mean over the tokens of blocks (n, length)."""
    import torch

    device, total = next(dense.parameters()).device, 0.0
    dense.eval()
    cut.eval()
    with torch.inference_mode():
        for start in range(0, len(blocks), batch):
            ids = torch.from_numpy(np.asarray(read_ids(blocks[start : start + batch]), np.int64)).to(device)
            p, q = (m(input_ids=ids, use_cache=False).logits.float() for m in (dense, cut))
            total += float(kl(p, q).sum())
    return max(0.0, total / blocks.size)
