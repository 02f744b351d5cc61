"""Losses over token positions that never hold all logits: a few positions at a time, recomputed for the gradient.

At a vocabulary of 49,152, the logits of 8 x 512 positions are 0.8 GB in float32, and a softmax, its gradient and the
teacher's come on top. All log-probabilities are taken in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.compress.documents import read_tensor

if TYPE_CHECKING:
    import torch
    from torch import nn

CHUNK_LOGITS = 1 << 25
"""Logits of one model that are there at a time (128 MiB in float32)."""


def labels(ids: torch.Tensor) -> torch.Tensor:
    """What comes after each position but the last; negative where it does not count. (B, T) to (B, T - 1)."""
    return ids[:, 1:]


def states(model: nn.Module, ids: torch.Tensor, every: bool = False) -> Any:
    """The body's output for token ids (B, T), those of no label too (`read_tensor`); with `every` layer's states."""
    return model.base_model(input_ids=read_tensor(ids), use_cache=False, output_hidden_states=every)


def cross_entropy(model: nn.Module, hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Sum over positions of -log p(wanted), nats; from the body's last states (B, T, d) and labels (B, T - 1)."""
    import torch

    head = model.get_output_embeddings()

    def part(rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(head(rows).float(), ids, reduction="sum")

    return over_positions(part, head.weight.shape[0], [hidden[:, :-1]], wanted)


def over_positions(
    part: Callable[..., torch.Tensor], vocabulary: int, rows: Sequence[torch.Tensor], wanted: torch.Tensor
) -> torch.Tensor:
    """Sum of what `part` gives for positions that count (`wanted` not negative), a few at a time.

    `part` takes a row of each of `rows` and the label for every position: (n, d), ..., (n,). Only what it takes as
    arguments, or holds as parameters, gets gradients.
    """
    from torch.utils.checkpoint import checkpoint

    counts = wanted.flatten() >= 0
    flat = [r.flatten(0, 1) for r in rows] + [wanted.flatten()]
    if not bool(counts.all()):
        flat = [f[counts] for f in flat]
    size = max(1, CHUNK_LOGITS // vocabulary)
    parts = list(zip(*(f.split(size) for f in flat), strict=True))
    if len(parts) == 1:
        return part(*parts[0])
    total = checkpoint(part, *parts[0], use_reentrant=False)
    for each in parts[1:]:
        total = total + checkpoint(part, *each, use_reentrant=False)
    return total


def forward_kl(teacher: torch.Tensor, student: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Sum over positions of T^2 KL(p_teacher || p_student), nats, from logits (n, V); softmax of logits / T.

    T^2 keeps the gradients' size (Hinton et al. 2015).
    """
    log_t = (teacher.float() / temperature).log_softmax(-1)
    log_s = (student.float() / temperature).log_softmax(-1)
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum()
