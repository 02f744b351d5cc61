"""The contract of a batch operator: what of a batch a model learns from, decided while it trains.

A recipe is frozen; `begin` opens an `Operator` on a model and its optimizers. Each batch goes in before its training
step, and a `Choice` comes out: the rows that are kept, the tokens of theirs that count, and the rows' weights in the
loss. It knows no trainer. A plain loop is

    operator = recipe.begin(Setup(model, [optimizer]))
    for batch in loader:
        weighted_loss(model, operator(batch).of(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

A batch is a mapping of tensors as a loader yields them: `input_ids` (B, T), `labels` (B, T) with -100 where nothing is
learned and otherwise the token at that position (the shift by one is done here), `attention_mask` (B, T); `labels` (B,)
where rows are classified; other tensors and lists with an entry a row go along. Rows are padded at their ends, if at
all; packed ones have `position_ids` that start anew and no mask. The model is any that is called with a batch's
`MODEL_INPUTS` and answers with `.logits`.

An operator never touches weights, gradients, the modes of modules or global random states, but where it says so. What
it remembers from batch to batch is in `state_dict`, of tensors, numbers and strings alone (`torch.load` reads it with
`weights_only`): a training that goes on from it sees the same choices. Under data parallelism each rank chooses from
its own batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.errors import ConfigError
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn

    Batch = Mapping[str, torch.Tensor]

IGNORED = -100
"""Label of a token that is not learned."""
WEIGHTS = "loss_weights"
"""Where a batch holds the weights of its rows, float32 (B,)."""
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


@dataclass(frozen=True)
class Choice:
    """What of a batch of B rows is learned from.

    `rows`: int64 (K,), ascending. `mask`: bool (K, T), which labels of the kept rows count, beside those that count
    already; None where all do. `weights`: float32 (K,), of the rows in the loss. `facts`: numbers to log. K is 0 where
    no row of a batch can be learned from: there is no step to take.
    """

    rows: torch.Tensor
    mask: torch.Tensor | None
    weights: torch.Tensor
    facts: dict[str, float] = field(default_factory=dict)

    def of(self, batch: Batch) -> dict[str, Any]:
        """The batch that is trained on: kept rows, labels of -100 where the mask is False, and `WEIGHTS`."""
        kept = taken(batch, self.rows)
        if self.mask is not None:
            kept["labels"] = kept["labels"].masked_fill(~self.mask, IGNORED)
        return kept | {WEIGHTS: self.weights}


def taken(batch: Batch, rows: torch.Tensor) -> dict[str, Any]:
    """Some rows of a batch: of its tensors and lists with an entry a row; anything else stays as it is."""
    import torch

    size, rows = len(batch["labels"]), rows.to(batch["labels"].device)

    def take(values: Any) -> Any:
        if isinstance(values, torch.Tensor) and values.ndim and len(values) == size:
            return values[rows.to(values.device)]
        return [values[i] for i in rows.tolist()] if isinstance(values, list) and len(values) == size else values

    return {name: take(values) for name, values in batch.items()}


def keep_all(batch: Batch, **facts: float) -> Choice:
    """The whole batch, as if there were no operator."""
    import torch

    labels = batch["labels"]
    rows = torch.arange(len(labels), device=labels.device)
    return Choice(rows, None, torch.ones(len(labels), device=labels.device), facts)


@dataclass
class Setup:
    """What an operator is opened on: the model in training (without a wrapper such as DistributedDataParallel), the
    optimizers that step it, and, for those that ask for it, a `proxy` of what it should become good at: a batch of M
    rows, from which a few are drawn at a time (tensors or NumPy arrays, which may be mapped from disk)."""

    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer] = ()
    proxy: Mapping[str, Any] | None = None


class Operator(ABC):
    """An open batch operator."""

    @abstractmethod
    def __call__(self, batch: Batch) -> Choice:
        """What of the batch is learned from in the training step that follows. Raises TamisError for a batch that it
        cannot choose from."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same recipe; one that remembers nothing has nothing to do."""
        return

    def close(self) -> None:
        """Let go of the model and its optimizers; one that holds no hook of theirs has nothing to do."""
        return


class BatchOperator(Recipe, ABC):
    """One file and one class a method; the module's name is its `kind`."""

    claim: ClassVar[str] = ""
    """What it does to a training, in a line."""
    cost: ClassVar[str] = ""
    """What it costs, as a share of a training step."""
    source: ClassVar[str] = ""
    """The paper: authors, year, arXiv number."""

    kind: str

    @abstractmethod
    def begin(self, setup: Setup) -> Operator:
        """Open it. Raises ConfigError where it does not fit the model or the optimizers."""


def logits_of(model: Callable[..., Any], batch: Batch) -> torch.Tensor:
    """A model's answer to a batch: (B, T, V), or (B, C) where rows are classified."""
    found: torch.Tensor = model(**{name: batch[name] for name in MODEL_INPUTS if name in batch}).logits
    return found


def next_labels(labels: torch.Tensor) -> torch.Tensor:
    """What each position of (B, T) is to predict: the label behind it; -100 at the last one."""
    import torch

    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy in nats, float32, and how many there are of a row (int64, (B,)).

    (B, T) where tokens are predicted, at the position that predicts, 0 where nothing is learned; else (B, 1).
    """
    import torch

    targets = labels[:, None] if labels.ndim == 1 else next_labels(labels)
    each = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return each.view(targets.shape), (targets != IGNORED).sum(1)


def row_losses(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss of every row, float32 (B,), 0 where nothing of it is learned; and how many tokens it is the mean of."""
    each, counts = losses(logits_of(model, batch), batch["labels"])
    return each.sum(1) / counts.clamp_min(1), counts


def weighted_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss to train on: sum of weight times loss over the tokens (or rows) that count, over their number; nats.

    Without weights, and with weights of 1, it is the usual mean. No gradient goes through the weights.
    """
    each, counts = losses(logits_of(model, batch), batch["labels"])
    if (weights := batch.get(WEIGHTS)) is not None:
        each = each * weights.detach()[:, None]
    return each.sum() / counts.sum().clamp_min(1)


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Within, dropout is off; behind it, every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def enough(kind: str, batch: Batch, least: int) -> int:
    """Rows of a batch. Raises ConfigError where they are fewer than an operator can choose from."""
    size = len(batch["labels"])
    if size < least:
        raise ConfigError(
            f"{kind}: a batch of {size} rows: it chooses within a batch, which needs {least} rows: raise the loader's "
            "batch size, and drop the last batch where it is short"
        )
    return size
