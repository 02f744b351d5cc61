"""Dynamic batch loading: domains that are behind where they should be are seen more often.

Sheared-LLaMA (Xia et al. 2023, arXiv 2310.06694, algorithm 1): every so many steps the loss of each domain is measured
on held-out blocks, and its weight w_d grows to w_d exp(max(loss_d - reference_d, 0)), normalised. Losses (2.5, 2.0)
with references (2.0, 2.0) take equal weights to (0.6225, 0.3775). The reference is what the model ought to reach:
given, or the loss of the teacher. Blocks of a batch are drawn by these weights, those of a domain in a new random order
an epoch.

It costs a forward pass over the held-out blocks each time; theirs is every 50 to 100 steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.compress.schedule.base import Callback, Change, Schedule
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from pipeline.compress.recover._session import Session
    from pipeline.compress.recover.base import Setup


class DynamicBatches(Schedule):
    """Weights of domains that follow their losses."""

    source: ClassVar[str] = "Xia et al. 2023, arXiv 2310.06694, algorithm 1"
    kind: Literal["dynamic_batches"] = "dynamic_batches"
    every: int = Field(50, ge=1, description="steps between measurements")
    reference: tuple[float, ...] | None = Field(
        None, description="nats a token for each domain (default: what the teacher has on it)"
    )
    weights: tuple[float, ...] | None = Field(None, description="at the start (default: shares of the blocks)")
    seed: int = Field(0, ge=0)

    def start(self, setup: Setup, session: Session) -> Callback:
        if setup.domains is None or setup.held_out_domains is None or setup.held_out is None:
            raise ConfigError("schedule: dynamic_batches needs to know the domain of every block, held-out ones too")
        count = int(setup.domains.max()) + 1
        present = set(range(count))
        if set(setup.domains.tolist()) != present or set(setup.held_out_domains.tolist()) != present:
            raise ConfigError(f"schedule: dynamic_batches: each of {count} domains needs blocks, and held-out ones")
        for name, values in (("reference", self.reference), ("weights", self.weights)):
            if values is not None and len(values) != count:
                raise ConfigError(f"schedule: dynamic_batches: {name} has {len(values)} values for {count} domains")
        if self.reference is None and setup.teacher is None:
            raise ConfigError("schedule: dynamic_batches: give a reference, or a teacher")
        return Sampler(self, setup, count)


class Sampler(Callback):
    """Draws blocks by weights of domains, and moves the weights."""

    def __init__(self, recipe: DynamicBatches, setup: Setup, count: int) -> None:
        super().__init__()
        assert setup.domains is not None
        assert setup.held_out is not None
        self.recipe = recipe
        self.members = [np.flatnonzero(setup.domains == d) for d in range(count)]
        self.held_out = [setup.held_out[setup.held_out_domains == d] for d in range(count)]
        given = np.array(recipe.weights or [len(m) for m in self.members], np.float64)
        self.weights = given / given.sum()
        self.seen = np.zeros(count, np.int64)
        self.step = 0
        self.reference = np.array(recipe.reference or self._losses(setup.teacher), np.float64)

    def rows(self, count: int) -> np.ndarray:
        from pipeline.compress.healing import epoch_rows

        rng = np.random.default_rng((self.recipe.seed, int(self.seen.sum())))
        chosen = rng.choice(len(self.members), count, p=self.weights)
        found = np.empty(count, np.int64)
        for d in np.unique(chosen):
            members, wanted = self.members[d], int((chosen == d).sum())
            found[chosen == d] = members[epoch_rows(len(members), int(self.seen[d]), wanted, self.recipe.seed)]
            self.seen[d] += wanted
        return found

    def after_step(self, model: nn.Module, done: float) -> Change | None:
        self.step += done > 0
        if done > 0 and self.step % self.recipe.every == 0:
            self.weights = moved(self.weights, np.array(self._losses(model)), self.reference)
        return None

    def _losses(self, model: nn.Module | None) -> list[float]:
        """Mean loss of every domain, nats a token."""
        from pipeline.compress.healing import Place, loss_sum

        assert model is not None
        place = Place(str(next(model.parameters()).device))
        found = [loss_sum(model, blocks, place) for blocks in self.held_out]
        self.passes["forward"] += sum(blocks.size for blocks in self.held_out)
        return [total / count for total, count in found]

    def state(self) -> dict[str, np.ndarray]:
        return {"weights": self.weights, "seen": self.seen, "step": np.array([self.step])}

    def restore(self, model: nn.Module, state: Mapping[str, np.ndarray]) -> None:
        self.weights, self.seen, self.step = state["weights"], state["seen"].copy(), int(state["step"][0])


def moved(weights: np.ndarray, losses: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Weights of domains after a measurement; they sum to 1."""
    grown = weights * np.exp(np.maximum(losses - reference, 0.0))
    return np.asarray(grown / grown.sum(), np.float64)
