"""SASRec: a small causal transformer over sequences of items that says which item comes next.

Source: Kang and McAuley 2018, "Self-Attentive Sequential Recommendation", arXiv 1808.09781, in the shape and with the
settings that DEALRec (Lin et al. 2024) gives its surrogate: width 64, 2 layers, 2 heads, dropout 0.5, the last 50
items, Adam at 1e-3 with batches of 500 prefixes, cross-entropy over all items, 200 epochs of which the one with the
best recall of held-out last items is kept. An epoch takes one prefix of every sequence, cut at random; recall is at 20,
and looked at 20 times in all (both ours, as is the feed-forward width of four times the model's).

Item 0 is every item that was not there in training. Sequences are padded behind, where a causal model does not look.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.models.gradients import tapped

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.models.gradients import Take

WIDTH, LAYERS, HEADS, DROPOUT = 64, 2, 2, 0.5
LR, BATCH, LOOKS, RECALLED = 1e-3, 500, 20, 20
ROWS = 256
FILES = ("items.npy", "sasrec.safetensors")


@dataclass(frozen=True)
class Sequences:
    """n sequences of at least two items as numbers: `items` (n, length + 1) int64, padded with 0 behind, and how many
    each has, (n,)."""

    items: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, lists: pa.ListArray, known: np.ndarray, length: int) -> Sequences:
        """The last `length` + 1 items of n lists of integers, as their places in `known` (sorted) counted from 1."""
        sizes = lists.value_lengths().to_numpy().astype(np.int64)
        ends = np.cumsum(sizes)
        kept = np.minimum(sizes, length + 1)
        flat = pc.fill_null(lists.flatten().cast(pa.int64()), -1).to_numpy()
        at = np.minimum(np.searchsorted(known, flat), len(known) - 1)
        numbers = np.where(known[at] == flat, at + 1, 0)
        items = np.zeros((len(sizes), length + 1), np.int64)
        inside = np.arange(length + 1) < kept[:, None]
        items[inside] = numbers[((ends - kept)[:, None] + np.arange(length + 1))[inside]]
        return cls(items, kept)

    def take(self, rows: np.ndarray) -> Sequences:
        return Sequences(self.items[rows], self.sizes[rows])

    def batches(self, rows: int) -> Iterator[tuple[slice, Sequences]]:
        for start in range(0, len(self.sizes), rows):
            part = slice(start, start + rows)
            yield part, Sequences(self.items[part], self.sizes[part])


def new_sasrec(items: int, length: int, seed: int) -> nn.Module:
    """An untrained model of so many items, with weights drawn from the seed: item numbers (n, t <= length) to logits
    (n, t, items + 1)."""
    import torch
    from torch import nn

    class Layer(nn.Module):  # type: ignore[misc]  # torch is untyped here
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.dense = nn.Linear(WIDTH, WIDTH, bias=False)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
            self.norm, self.out = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.drop = nn.Dropout(DROPOUT)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n, t, _ = x.shape
            q, k, v = (f(x).view(n, t, HEADS, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
            logits = q @ k.transpose(2, 3) / (WIDTH / HEADS) ** 0.5
            ahead = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
            weights = self.drop(
                logits.masked_fill(ahead, float("-inf")).softmax(-1)
            )  # plain: it has a second derivative
            x = self.norm(x + self.drop(self.dense((weights @ v).transpose(1, 2).reshape(n, t, WIDTH))))
            return torch.as_tensor(self.out(x + self.drop(self.down(nn.functional.gelu(self.up(x))))))

    class SasRec(nn.Module):  # type: ignore[misc]  # torch is untyped here
        def __init__(self) -> None:
            super().__init__()
            self.items, self.places = nn.Embedding(items + 1, WIDTH), nn.Embedding(length, WIDTH)
            self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(DROPOUT)
            self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
            for table in (self.items, self.places):
                nn.init.normal_(table.weight, std=0.02)

        def forward(self, numbers: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
            places = self.places(torch.arange(numbers.shape[1], device=numbers.device))
            x = self.drop(self.norm(self.items(numbers) + places))
            for layer in self.layers:
                x = layer(x)
            return x[torch.arange(len(x), device=x.device), last] @ self.items.weight.T

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SasRec()


def observed(model: Any) -> nn.Linear:
    """The layer whose gradients stand for the model's: what the last layer's attention gives out."""
    layer: nn.Linear = model.layers[-1].dense
    return layer


def losses(model: Any, rows: Sequences, sizes: np.ndarray | None = None) -> torch.Tensor:
    """Cross-entropy in nats of the last item of each row given those before it, or of item `sizes` - 1; (n,)."""
    import torch

    ends = rows.sizes if sizes is None else sizes
    width = int(ends.max()) - 1
    numbers = torch.from_numpy(rows.items[:, :width])
    wanted = torch.from_numpy(rows.items[np.arange(len(ends)), ends - 1])
    logits = model(numbers, torch.from_numpy(ends - 2))
    return torch.nn.functional.cross_entropy(logits, wanted, reduction="none")


def train_sasrec(
    train: Sequences, held_out: Sequences, items: int, epochs: int, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The model at its best recall of held-out last items, for inference, and how the training went."""
    import torch

    model = new_sasrec(items, train.items.shape[1] - 1, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    rng = np.random.default_rng(seed)
    looks: list[tuple[int, float]] = []
    best: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for epoch in range(1, epochs + 1):
            model.train()
            order, cuts = rng.permutation(len(train.sizes)), rng.integers(2, train.sizes + 1)
            for start in range(0, len(order), BATCH):
                rows = order[start : start + BATCH]
                losses(model, train.take(rows), cuts[rows]).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            if epoch % max(1, epochs // LOOKS) == 0 or epoch == epochs:
                looks.append((epoch, recall(model.eval(), held_out)))
                if looks[-1][1] >= max(found for _, found in looks):
                    best = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best)
    at, found = max(looks, key=lambda look: (look[1], look[0]))
    return model.eval().requires_grad_(False), {"epoch": at, "recall": found, "looks": looks}


def recall(model: Any, rows: Sequences) -> float:
    """Share of rows whose last item is among the 20 that the model thinks likeliest."""
    import torch

    hits = 0
    with torch.inference_mode():
        for _, part in rows.batches(ROWS):
            width = int(part.sizes.max()) - 1
            logits = model(torch.from_numpy(part.items[:, :width]), torch.from_numpy(part.sizes - 2))
            likely = logits.topk(min(RECALLED, logits.shape[1]), dim=1).indices.numpy()
            hits += int((likely == part.items[np.arange(len(likely)), part.sizes - 1][:, None]).any(axis=1).sum())
    return hits / max(len(rows.sizes), 1)


def gradients(model: Any, rows: Sequences, take: Take) -> None:
    """Hand out inputs and output gradients of the observed layer for the loss of every row, see `tapped`."""
    with tapped({"dense": observed(model)}, take):
        losses(model, rows).sum().backward()


def hessian_product(model: Any, row: Sequences, h: torch.Tensor) -> torch.Tensor:
    """H h for the Hessian of one row's loss by the observed layer's weight; both (64, 64)."""
    import torch

    weight = observed(model).weight.requires_grad_(True)
    try:
        (gradient,) = torch.autograd.grad(losses(model, row).sum(), weight, create_graph=True)
        (product,) = torch.autograd.grad((gradient * h).sum(), weight)
    finally:
        weight.requires_grad_(False)
    return product


def save_sasrec(model: Any, known: np.ndarray, directory: Path) -> None:
    from safetensors.torch import save_file

    np.save(directory / FILES[0], known)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, directory / FILES[1])


def load_sasrec(directory: Path) -> tuple[nn.Module, np.ndarray, int]:
    """The model for inference, the items that it knows (sorted), and how many it looks at."""
    from safetensors.torch import load_file

    known = np.load(directory / FILES[0], allow_pickle=False)
    weights = load_file(directory / FILES[1])
    length = weights["places.weight"].shape[0]
    model = new_sasrec(len(known), length, 0)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False), known, length
