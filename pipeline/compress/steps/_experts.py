"""What experts do with the tokens that are routed to them, and how alike their routers are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.compress.calibration import stage_add

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.compress.calibration import Stage


@dataclass(frozen=True)
class Routing:
    """For each stack of experts, over the tokens routed to an expert: `NAME.routed`, how many; `NAME.saliency`, the sum
    of g_j(x) ||f_j(x)||_2, with g the weight that the router gives and f what the expert puts out; (experts,).

    Every routed expert runs a second time, without the router's weight.
    """

    stacks: tuple[str, ...]

    def hooks(self, model: nn.Module, stage: Stage) -> Iterable[Any]:
        import torch

        def see(name: str, stack: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x, chosen, weight = args
            if stage.mask is not None and stage.mask.numel() == len(x):
                real = stage.mask.flatten()
                x, chosen, weight = x[real], chosen[real], weight[real]
            experts = len(stack.down_proj)
            routed = torch.zeros(experts, dtype=torch.float64)
            saliency = torch.zeros(experts, dtype=torch.float64)
            for slot in range(chosen.shape[1]):
                one = chosen[:, slot : slot + 1]
                # forward, not the module itself: that would come here again
                size = stack.forward(x, one, torch.ones_like(weight[:, :1])).float().norm(dim=-1)
                at = one[:, 0].cpu()
                routed.index_add_(0, at, torch.ones(len(at), dtype=torch.float64))
                saliency.index_add_(0, at, (size * weight[:, slot].float()).double().cpu())
            stage_add(stage, f"{name}.routed", routed)
            stage_add(stage, f"{name}.saliency", saliency)

        return [model.get_submodule(name).register_forward_pre_hook(partial(see, name)) for name in self.stacks]


def clusters(distance: np.ndarray, below: float) -> list[list[int]]:
    """Greedy agglomeration from the closest pair on: two clusters merge if every pair across is closer than `below`.

    `distance` (n, n). Clusters in the order of their first members; of equal pairs the lower indices come first.
    """
    own = [[i] for i in range(len(distance))]
    first, second = np.triu_indices(len(distance), 1)
    order = np.argsort(distance[first, second], kind="stable")
    for i, j in zip(first[order], second[order], strict=True):
        if distance[i, j] >= below:
            break
        a, b = own[i], own[j]
        if a is not b and (distance[np.ix_(a, b)] < below).all():
            a += b
            for k in b:
                own[k] = a
    return sorted({id(c): sorted(c) for c in own}.values())


def agglomerate(rows: np.ndarray, count: int) -> list[list[int]]:
    """`count` clusters of router rows (n, d): those at the largest threshold that leaves as many or more.

    Where no threshold leaves exactly so many, the clusters whose farthest pair is closest are merged until it does.
    """
    distance = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    thresholds = np.append(np.unique(distance), np.inf)
    low, high = 0, len(thresholds) - 1  # at the lowest nothing merges
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(clusters(distance, thresholds[middle])) >= count else (low, middle - 1)
    found = clusters(distance, thresholds[low])
    while len(found) > count:
        pairs = [(distance[np.ix_(found[a], found[b])].max(), a, b) for b in range(len(found)) for a in range(b)]
        _, a, b = min(pairs)
        found = sorted([*(c for i, c in enumerate(found) if i not in (a, b)), sorted(found[a] + found[b])])
    return found


def representative(rows: np.ndarray, cluster: list[int]) -> int:
    """The member whose row is closest to the mean of the cluster's, the lowest of equally close ones."""
    away = np.linalg.norm(rows[cluster] - rows[cluster].mean(0), axis=-1)
    return cluster[int(np.flatnonzero(away <= away.min() * (1 + 1e-9))[0])]
