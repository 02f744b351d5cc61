"""Ignore-top-k: each update loses its largest entries, so that new facts are learned and not carried elsewhere.

Sun et al. 2025, "How new data permeates LLM knowledge and how to dilute it" (arXiv 2504.09522): a model that learns a
text with a surprising keyword goes on to use it in contexts that have nothing to do with it (priming). Dropping the 8 %
of parameter updates of largest magnitude, the reverse of what sparsification keeps, lowered priming by 50 to 95 % with
memorisation kept (theirs). Here an entry of a tensor goes back to what it was before the optimizer's step where its
update is larger than all but floor(share * n) of the tensor's: with ties fewer are dropped, never more. That the line
is drawn for each tensor and not for all is from memory, unverified. In tensors of more than `sample` entries it is
drawn from that many of them.

Measured on a language model of 1 M parameters that had seen little (bench/in_the_loop.py priming; 16 texts): the risk
ranks texts as published (Spearman of -log p and log S_prime 0.59), but without the 8 % largest updates priming stayed
what it was (median log S_prime 0.27, and 0.26 with them) and memorisation fell (0.82, and 1.15).

The operator keeps every batch whole and hangs on the optimizers' steps until it is closed. It costs a copy of the
weights, and a quantile a tensor and step.

`priming` is what to verify it by: S = E_j [p_after(keyword | X_j) / p_before(keyword | X_j)] over contexts X_j that
have nothing to do with the text, and its geometric mean, which one lucky context does not decide; with contexts that
are the text's own prefix it is memorisation. `keyword_logp` measures the probabilities; the criterion `priming`
predicts the risk from a text alone, before anything is learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from pipeline.batches.base import BatchOperator, Choice, Operator, Setup, keep_all, measuring
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.batches.base import Batch

LEAST_P = 1e-8
"""Probabilities below are taken for it: a ratio of two that nobody can tell from 0 says nothing."""


class IgnoreTopK(BatchOperator):
    """Updates without their largest entries."""

    claim = "learns a surprising text without priming other contexts with it"
    cost = "a copy of the weights; a quantile a tensor and step"
    source = "Sun et al. 2025, arXiv 2504.09522"
    kind: Literal["ignore_top_k"] = "ignore_top_k"
    share: float = Field(0.08, ge=0, lt=1, description="share of a tensor's updates to drop")
    sample: int = Field(100_000, ge=1, description="entries that say where the line is, in tensors with more")
    seed: int = Field(0, ge=0, description="of the entries drawn")

    def begin(self, setup: Setup) -> Operator:
        if not setup.optimizers:
            raise ConfigError("ignore_top_k: needs the optimizers whose updates it thins out (Setup.optimizers)")
        return _IgnoreTopK(self, setup.optimizers)


class _IgnoreTopK(Operator):
    def __init__(self, recipe: IgnoreTopK, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        import torch

        self.recipe = recipe
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.before: dict[int, list[tuple[nn.Parameter, torch.Tensor]]] = {}
        self.entries = self.dropped = 0
        self.hooks = [
            hook
            for i, optimizer in enumerate(optimizers)
            for hook in (
                optimizer.register_step_pre_hook(partial(self._remember, i)),
                optimizer.register_step_post_hook(partial(self._thin, i)),
            )
        ]

    def __call__(self, batch: Batch) -> Choice:
        dropped = self.dropped / max(1, self.entries)
        self.entries = self.dropped = 0
        return keep_all(batch, dropped=dropped)

    def _remember(self, number: int, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        stepped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.before[number] = [(p, p.detach().clone()) for p in stepped]

    def _thin(self, number: int, *_: Any) -> None:
        import torch

        with torch.no_grad():
            for parameter, old in self.before.pop(number):
                largest = self.largest(parameter - old)
                parameter.copy_(torch.where(largest, old, parameter))
                self.entries += largest.numel()
                self.dropped += int(largest.sum())

    def largest(self, update: torch.Tensor) -> torch.Tensor:
        """Which entries of an update are dropped; bool, of its shape."""
        import torch

        size = update.abs().flatten()
        seen = size
        if len(size) > self.recipe.sample:
            drawn = torch.randint(len(size), (self.recipe.sample,), generator=self.generator)
            seen = size[drawn.to(size.device)]
        kept = len(seen) - math.floor(self.recipe.share * len(seen) + 1e-9)
        return update.abs() > seen.kthvalue(kept).values

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["generator"])

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


def keyword_logp(model: nn.Module, contexts: Sequence[Sequence[int]], keyword: Sequence[int]) -> np.ndarray:
    """Natural log of p(keyword | context) of J contexts, the product over its tokens; float64 (J,).

    A tokenizer gives a word behind a space other tokens than one at the beginning: take those of where it stands.
    """
    import torch

    device = next(model.parameters()).device
    found = np.zeros(len(contexts))
    with torch.no_grad(), measuring(model):
        for j, context in enumerate(contexts):
            ids = torch.tensor([[*context, *keyword]], device=device)
            logp = model(input_ids=ids[:, :-1]).logits[0].float().log_softmax(-1)
            found[j] = float(logp[len(context) - 1 :].gather(1, ids[0, len(context) :, None]).sum())
    return found


def priming(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Arithmetic and geometric mean of p_after / p_before, from natural logs (J,) of both."""
    change = np.maximum(after, math.log(LEAST_P)) - np.maximum(before, math.log(LEAST_P))
    return float(np.exp(change).mean()), float(np.exp(change.mean()))
