"""Angle, length and margin of what a model knows of the next token, on clean and on corrupted texts.

Source: Robustness Lottery (Li et al., arXiv 2206.07918, IEEE TVCG 2024), for language models: f is what the head reads
at a position, w_y the head's row of the token that follows. angle = acos(f.w_y / (|f| |w_y|)) in degrees, length = |f|,
margin = min over c != y of ((w_y - w_c).f + b_y - b_c) / |w_y - w_c|, the distance to the nearest boundary, negative
where another token is more likely. Rows that equal w_y (tokens that were never trained) have no boundary with it.

An item is a text, its value the mean over its first `POSITIONS` predictions. On corrupted texts the tokens that follow
are the corrupted ones. A margin takes a second product with the head, and both are taken in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.compare.measures.base import Measured, batches, context_length, encode, evaluating, prefix
from pipeline.compare.measures.corruption import Kind, corrupt
from pipeline.errors import TamisError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.compare.measures.base import Tokenizer

POSITIONS = 32
CHUNK = 64
"""Positions whose distances to every row of the head are taken at a time."""
CORRUPTIONS: tuple[tuple[Kind, float], ...] = (
    ("typos", 0.01), ("typos", 0.03), ("typos", 0.05), ("case", 0.05), ("space", 0.05), ("ocr", 0.05)
)  # fmt: skip
UNITS = ("angle", "length", "margin")


def geometry(
    features: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Angle (degrees), length and margin, (n, 3) float64, of features (n, d) with class rows (classes, d) and targets
    (n,).

    The margin is infinite where every row equals that of the target.
    """
    import torch

    f, w = features.double(), rows.double()
    mine = w[targets]
    length = f.norm(dim=1)
    angle = ((f * mine).sum(1) / (length * mine.norm(dim=1))).clamp(-1, 1).arccos().rad2deg()
    logits = f @ w.T + (0 if bias is None else bias.double())
    square = w.square().sum(1)
    apart = (square[targets][:, None] + square - 2 * mine @ w.T).clamp_min(0)
    same = apart <= 1e-12 * (square[targets][:, None] + square)
    same[torch.arange(len(targets)), targets] = True
    distance = (logits.gather(1, targets[:, None]) - logits) / apart.sqrt().masked_fill(same, 1)
    margin = distance.masked_fill(same, torch.inf).min(1).values
    return torch.stack([angle, length, margin], 1)


def feature_geometry(model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], name: str) -> list[Measured]:
    """Measures `geometry.<name>.angle`, `.length` and `.margin`, an item a text."""
    import torch

    if not texts or not all(texts):
        raise TamisError(f"geometry.{name}: a text is empty, or there is none")
    head = model.get_output_embeddings()
    limit = min(POSITIONS + 1, context_length(model))
    values = np.empty((len(texts), 3))
    rows = [[prefix(tokenizer), *ids][:limit] for ids in encode(tokenizer, texts)]
    with evaluating(model):
        weight = head.weight.double()
        bias = getattr(head, "bias", None)
        for members, ids in batches(model, rows):
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            counts = [len(rows[m]) - 1 for m in members]
            features = torch.cat([states[i, :n] for i, n in enumerate(counts)])
            targets = torch.cat([ids[i, 1 : n + 1] for i, n in enumerate(counts)])
            parts = zip(features.split(CHUNK), targets.split(CHUNK), strict=True)
            given = torch.cat([geometry(f, weight, y, bias) for f, y in parts])
            for member, each in zip(members, given.split(counts), strict=True):
                values[member] = each.mean(0).cpu().numpy()
    # A smaller angle and a larger margin mean a prediction that is surer; a length says nothing of better or worse.
    return [
        Measured(f"geometry.{name}.{unit}", "geometry", values[:, j], unit != "angle") for j, unit in enumerate(UNITS)
    ]


def robustness(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    corruptions: Sequence[tuple[Kind, float]] = CORRUPTIONS,
    seed: int = 0,
) -> list[Measured]:
    """The geometry of texts as they are (`clean`) and with every kind of error (`typos-3%`)."""
    variants: Mapping[str, Sequence[str]] = {"clean": texts} | {
        f"{kind}-{100 * rate:g}%": [corrupt(text, kind, rate, seed) for text in texts] for kind, rate in corruptions
    }
    return [m for name, given in variants.items() for m in feature_geometry(model, tokenizer, given, name)]
