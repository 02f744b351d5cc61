"""Q-Tuning: in every fine-tuning step, the rows and the tokens that are worth the backward pass.

Wang et al. 2025, "Winning the Pruning Gamble" (arXiv 2509.23873, v2). A forward pass without gradient places the rows
of a batch on the plane of perplexity against mean entropy over their answers (`_plane`): noise and what is known
already is dropped, confident mistakes are kept without their worst tokens, what is right but unsure is kept whole.
Exactly floor(rows * B) rows are kept, at least one. A token of a confident mistake counts by its perplexity smoothed
with its neighbours',

    s_i = (1 - lam) PPL_i + lam (PPL_{i-1} + PPL_{i+1}) / 2

and the `tokens` share with the lowest s is kept. The paper's algorithm box says "highest" and leaves the 1/2 out; its
text, figure and ablation (46.79, and 44.86 with the ranking reversed) say what is done here.

What it trades away:
- A choice within a batch is relative: of clean data the same share is thrown away. Batches of 16 or 32 are better than
  of 8, the paper finds, and fewer than 8 rows are refused.
- Perplexity and entropy go together, so quadrants 2 and 4 are thin and the support |PPL - Ent| chooses much:
  the fact `filled` is the share of kept rows that came in by it.
- A forward pass of 2 N FLOPs a token on all rows, against 6 N on those that are kept: at `rows: 0.125` 46 % of full
  training; the authors measured 65 minutes against 90.

Measured on a model of 1 M parameters (bench/in_the_loop.py q_tuning; three seeds): of a set with 40 % good rows 62 % of
what it keeps is good; the loss on unseen answers is 4.818, with as many random rows 4.828 (no difference is shown),
with good rows alone 4.744; a step costs 0.60 of one on all rows.

Rows without a token that counts, and rows whose losses are not finite, are dropped and counted. Dropout is off in the
forward pass. `rows` and `tokens` are of the paper's range (0.0625 to 0.5; 0.5 or 0.7), lam is its.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from pipeline.batches._plane import (
    bisect,
    lowest,
    quadrants,
    smoothed,
    support,
    thresholds,
    token_perplexity,
)
from pipeline.batches.base import (
    IGNORED,
    BatchOperator,
    Choice,
    Operator,
    Setup,
    enough,
    logits_of,
    losses,
    measuring,
    next_labels,
)
from pipeline.models.causal import entropy_of

if TYPE_CHECKING:
    import torch

    from pipeline.batches.base import Batch

LEAST_ROWS = 8
MISTAKE, UNSURE = 2, 4
CHUNK_VALUES = 1 << 22
"""Logits of which entropies are taken at a time."""


class QTuning(BatchOperator):
    """Rows and tokens by error and uncertainty."""

    claim = "fine-tunes on confident mistakes, without their worst tokens, and on what the model is unsure of"
    cost = "2 N FLOPs a token of the batch; saves 6 N on every token that is dropped"
    source = "Wang et al. 2025, arXiv 2509.23873"
    kind: Literal["q_tuning"] = "q_tuning"
    rows: float = Field(0.25, gt=0, le=1, description="share of a batch's rows to keep")
    tokens: float = Field(0.5, gt=0, le=1, description="share of a confident mistake's tokens to keep")
    smoothing: float = Field(0.5, ge=0, le=1, description="lam: weight of a token's neighbours")

    def begin(self, setup: Setup) -> Operator:
        return _QTuning(self, setup.model)

    def choose(self, perplexity: np.ndarray, entropy: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Rows kept of n (ascending), the quadrants of all n, and the share of the kept that support filled in."""
        count = max(1, int(np.floor(self.rows * len(perplexity) + 1e-9)))
        alpha = bisect(perplexity, entropy, self.rows)
        found = quadrants(perplexity, entropy, thresholds(perplexity, entropy, alpha))
        wanted = np.isin(found, (MISTAKE, UNSURE))
        kept = np.lexsort((-support(perplexity, entropy), ~wanted))[:count]  # stable: ties by position
        return np.sort(kept), found, float((~wanted[kept]).mean())

    def token_mask(self, nats: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Which of a confident mistake's tokens count; losses (N,) of rows with these lengths, none of them 0."""
        return lowest(smoothed(token_perplexity(nats), lengths, self.smoothing), lengths, self.tokens)


class _QTuning(Operator):
    def __init__(self, recipe: QTuning, model: torch.nn.Module) -> None:
        self.recipe, self.model = recipe, model

    def __call__(self, batch: Batch) -> Choice:
        import torch

        size, labels = enough(self.recipe.kind, batch, LEAST_ROWS), batch["labels"]
        with torch.no_grad(), measuring(self.model):
            logits = logits_of(self.model, batch)
            each, counts = losses(logits, labels)
            learned = next_labels(labels) != IGNORED
            doubt = entropies(logits[learned])
        nats, where = each[learned].cpu().numpy(), learned.cpu().numpy()
        lengths = counts.cpu().numpy()
        row = np.repeat(np.arange(size), lengths)
        mean = np.bincount(row, nats, size) / np.maximum(lengths, 1)
        entropy = np.bincount(row, doubt.cpu().numpy(), size) / np.maximum(lengths, 1)
        finite = np.isfinite(mean) & np.isfinite(entropy)
        usable = np.flatnonzero(finite & (lengths > 0))
        facts = {"not_finite": float((~finite).sum()), "no_answer_tokens": float((lengths == 0).sum())}
        if not len(usable):
            nothing = torch.zeros(0, dtype=torch.int64, device=labels.device)
            return Choice(nothing, None, torch.zeros(0, device=labels.device), facts)

        kept, found, filled = self.recipe.choose(token_perplexity(mean[usable]), entropy[usable])
        rows, quadrant = usable[kept], found[kept]
        counted = where[rows]
        mistakes = counted & (quadrant == MISTAKE)[:, None]
        if mistakes.any():
            worst = each.cpu().numpy()[rows][mistakes]
            counted[mistakes] = self.recipe.token_mask(worst, lengths[rows[quadrant == MISTAKE]])
        mask = np.zeros_like(counted)
        mask[:, 1:] = counted[:, :-1]  # from the position that predicts to the label
        facts |= {f"quadrant_{q}": float((found == q).mean()) for q in (1, 2, 3, 4)}
        facts |= {"filled": filled, "tokens": float(mask.sum() / lengths.sum())}
        return Choice(
            torch.from_numpy(rows).to(labels.device),
            torch.from_numpy(mask).to(labels.device),
            torch.ones(len(rows), device=labels.device),
            facts,
        )


def entropies(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of n distributions in nats, float32 (n,), from logits (n, V), some at a time."""
    import torch

    return torch.cat([entropy_of(part) for part in logits.split(max(1, CHUNK_VALUES // logits.shape[-1]))])
