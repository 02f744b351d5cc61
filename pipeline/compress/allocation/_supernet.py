"""A model whose o_proj and down_proj lie ready pruned to several levels, so that any mix of levels can be run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.compress._weights import dampened, matrix
from pipeline.compress.calibration import tokens_of
from pipeline.compress.compensation.refit import solved
from pipeline.compress.depth.distance import distance
from pipeline.compress.depth.rerun import output
from pipeline.compress.surgery import entries
from pipeline.compress.units import Member, Units, lowest
from pipeline.errors import TamisError

if TYPE_CHECKING:
    import torch

    from pipeline.compress.allocation._evolution import Choice
    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.calibration import Batch, Calibration


class Supernet:
    """The dense model in its place, and for every part the weights of its consumer at each level.

    A variant is the indices of the columns that stay and what they hold: in all, levels times the size of all o_proj
    and down_proj, less what is pruned. Producers are left whole: a column of zeros reads nothing of them.
    """

    def __init__(
        self, calibration: Calibration, body: Anatomy, groups: Sequence[Units], scores: Sequence[np.ndarray]
    ) -> None:
        self.calibration, self.body, self.groups, self.scores = calibration, body, groups, scores
        self.dense = [matrix(body, units.consumer).clone() for units in groups]
        self.variants: list[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def build(self, levels: Sequence[Sequence[int]], damping: float | None) -> None:
        """Make the variants that lose so many units, part by part: refit, where a damping is given.

        Each is measured behind the mean of the variants of the blocks before it, weighed by the share that they keep
        ("expected error accumulation"): as they differ in one linear map, the mean of their outputs is that of the mean
        weight.
        """
        import torch

        from pipeline.compress.sparse._sequential import walk

        self.variants = []
        self.restore()
        at = {units.consumer: i for i, units in enumerate(self.groups)}
        blocks = len(self.body.layers)
        inside = [[u.consumer for u in self.groups if u.layer == block] for block in range(blocks)]
        found: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        with torch.no_grad():
            for names, sums in walk(self.calibration, self.body.blocks, inside, {"gram"}, "pruned"):
                for i in (at[name] for name in names):
                    units = self.groups[i]
                    h = None
                    if damping is not None:
                        h = dampened(sums[f"{units.consumer}.gram"] / sums["tokens"], damping)
                    found[i] = [self._variant(i, removed, h) for removed in levels[i]]
                    kept = 1 - np.array(levels[i]) / units.count
                    mean = torch.zeros_like(self.dense[i])
                    for share, (stays, weight) in zip(kept / kept.sum(), found[i], strict=True):
                        mean[:, stays] += share * weight
                    matrix(self.body, units.consumer).copy_(mean)
        self.variants = [found[i] for i in range(len(self.groups))]
        self.restore()

    def _variant(self, i: int, removed: int, h: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        units, weight = self.groups[i], self.dense[i]
        gone = lowest(self.scores[i], units.count - removed, units.groups)
        index = entries(Member(units.consumer, "in", units.width), gone)
        goes = torch.from_numpy(index)
        stays = torch.from_numpy(np.setdiff1d(np.arange(units.count * units.width), index))
        new = weight[:, stays]
        return stays, new if h is None or not removed else new + solved(weight, h, goes, stays, "tyr")

    def take(self, choice: Choice) -> None:
        """Be the subnet of these levels."""
        for units, variants, level in zip(self.groups, self.variants, choice, strict=True):
            stays, weight = variants[level]
            own = matrix(self.body, units.consumer)
            own.zero_()
            own[:, stays] = weight

    def restore(self) -> None:
        """Be the dense model, bit for bit."""
        for units, weight in zip(self.groups, self.dense, strict=True):
            matrix(self.body, units.consumer).copy_(weight)

    def divergences(self, choices: Sequence[Choice], tokens: int, top: int) -> list[float]:
        """KL(dense || subnet) of each choice, nats a row's mean token, on the first `tokens` calibration tokens.

        Of the dense model's `top` largest logits, over which both distributions are taken. The dense model runs once a
        batch: that and every choice is charged to the calibration. Raises TamisError where one is not finite.
        """
        import torch

        model = self.calibration.model.eval()
        totals, rows = np.zeros(len(choices)), 0
        with torch.no_grad():
            for batch in first_tokens(self.calibration, tokens):
                self.restore()
                said = output(model, batch)
                wanted, index = said.topk(min(top, said.shape[-1]), dim=-1)
                mask = batch.get("attention_mask")
                for c, choice in enumerate(choices):
                    self.take(choice)
                    found = output(model, batch).gather(-1, index)
                    totals[c] += float(distance("kl", wanted, found, mask).sum())
                self.calibration.passes["forward"] += tokens_of(batch) * (1 + len(choices))
                rows += len(said)
        if not np.isfinite(totals).all():
            raise TamisError("allocation tyr: outputs are not finite: load the model in float32, look at the data")
        return list(totals / max(1, rows))


def first_tokens(calibration: Calibration, tokens: int) -> Iterator[Batch]:
    """The calibration's rows up to so many tokens, at least one."""
    for batch in calibration.batches:
        rows = len(next(iter(batch.values())))
        taken = min(rows, -(-tokens * rows // tokens_of(batch)))
        if taken <= 0:
            return
        part = {name: value[:taken] for name, value in batch.items()}
        yield part
        tokens -= tokens_of(part)
