"""How far two language models of one tokenizer are apart: divergences of their next-token distributions, per token.

    JSD(p, q) = 1/2 sum_v p ln(p / m) + 1/2 sum_v q ln(q / m),  m = (p + q) / 2    symmetric, in [0, ln 2]
    KL(p, q)  = sum_v p ln(p / q)                                                  >= 0, unbounded

in nats, from log-softmax in float32. Nothing is clamped: in log space q is never 0 where p is not, and a term with
p = 0 is 0. A model whose vocabulary was cut is compared on the ids that both have, each distribution renormalised to
those; the mass that p has on the others is told beside.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import ConfigError
from pipeline.models.causal import CHUNK_VALUES, GROUP_TOKENS, LOGIT_BYTES, groups

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Measure = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""Log-probabilities of p and q, (n, vocabulary) float32, to a divergence a row (n,)."""


def jsd(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence; as p ln(1 + (p - q) / (p + q)) it is exact where p and q are nearly the same."""
    p, q = log_p.exp(), log_q.exp()
    tilt = (p - q) / (p + q)
    return (_part(p, tilt.log1p()) + _part(q, (-tilt).log1p())).clamp(min=0) / 2


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of p from q."""
    return _part(log_p.exp(), log_p - log_q)


def _part(p: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    return (p * log_ratio.where(p > 0, 0.0)).sum(-1)


def between(
    p: PreTrainedModel, q: PreTrainedModel, ids: np.ndarray, offsets: np.ndarray, measure: Measure
) -> tuple[np.ndarray, np.ndarray]:
    """Divergence of what predicts every token, and p's mass on ids that q lacks; (N,) float32 each.

    `ids` (N,): rows of tokens end to end, row i between offsets[i] and offsets[i + 1]. A row's first token is predicted
    by nothing and has 0. Rows run in groups of one width, padded behind, so neighbours change values by float noise.
    """
    import torch

    shared = min(vocabulary(p), vocabulary(q))
    found = np.zeros((2, len(ids)), np.float32)
    lengths, chunk = np.diff(offsets), max(1, CHUNK_VALUES[p.device.type] // vocabulary(p))
    together = min(GROUP_TOKENS, LOGIT_BYTES // (2 * vocabulary(p) * p.dtype.itemsize))
    with torch.inference_mode():
        for rows, width in groups(lengths, together):
            inside = np.arange(width) < lengths[rows, None]
            where = offsets[rows, None] + np.arange(width)
            block = np.zeros((len(rows), width), np.int64)
            block[inside] = ids[where[inside]]
            tokens = torch.from_numpy(block).to(p.device)
            of_p, of_q = (model(input_ids=tokens, use_cache=False).logits.flatten(0, 1) for model in (p, q))
            # What predicts a token stands one place before it.
            before = torch.from_numpy(np.flatnonzero(inside[:, 1:].ravel())).to(p.device)
            before += before // (width - 1)
            values = [_measured(of_p[part], of_q[part], shared, measure) for part in before.split(chunk)]
            found[:, where[:, 1:][inside[:, 1:]]] = torch.cat(values, dim=1).cpu().numpy()
    return found[0], found[1]


def _measured(of_p: torch.Tensor, of_q: torch.Tensor, shared: int, measure: Measure) -> torch.Tensor:
    import torch

    whole = of_p.float()
    log_p = whole[:, :shared].log_softmax(-1)
    value = measure(log_p, of_q[:, :shared].float().log_softmax(-1))
    if shared == whole.shape[1]:
        return torch.stack([value, torch.zeros_like(value)])
    return torch.stack([value, 1 - (whole[:, :shared].logsumexp(-1) - whole.logsumexp(-1)).exp()])


def vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)


def check_tokenizers(original: Path, pruned: Path, role: str) -> None:
    """Raise ConfigError where the folder `pruned` reads texts as other ids than `original`. A vocabulary may be cut."""
    from tokenizers import Tokenizer

    first, second = (folder / "tokenizer.json" for folder in (original, pruned))
    if first.read_bytes() == second.read_bytes():
        return
    ours, theirs = (Tokenizer.from_file(str(file)).get_vocab() for file in (first, second))
    other = [token for token, number in theirs.items() if ours.get(token) != number]
    if other:
        raise ConfigError(
            f"{role}: the tokenizers of {original} and {pruned} differ: {json.dumps(min(other))} has "
            "another id in the first, or none; give two models of one tokenizer, the second made from the first"
        )
