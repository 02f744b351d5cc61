"""A student that learns from its teacher's distribution and hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from pipeline.compress.documents import read_tensor
from pipeline.compress.recover import _losses
from pipeline.compress.recover._features import normalised_feature_loss
from pipeline.compress.recover._session import Session, freeze

if TYPE_CHECKING:
    from pipeline.compress.recover.base import Setup
    from pipeline.compress.recover.distill import Distill


class DistillSession(Session):
    """`ce CE + kl L_logits + alpha L_is`, summed over the positions that count."""

    def __init__(self, setup: Setup, recipe: Distill) -> None:
        setup.student.requires_grad_(True)
        super().__init__(setup.student, setup.masks)
        assert setup.teacher is not None
        self.teacher, self.recipe = setup.teacher.eval(), recipe
        freeze(self.teacher)
        self.ce, self.kl = recipe.weights
        device = next(self.model.parameters()).device
        self.kept = None if setup.vocabulary is None else torch.from_numpy(setup.vocabulary).long().to(device)
        ours, theirs = (m.get_input_embeddings().weight.shape[1] for m in (self.model, self.teacher))
        if recipe.hidden != "none" and ours != theirs:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(recipe.seed)
                self.beside["projection"] = nn.Linear(ours, theirs, bias=False).to(device)

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        if not self.kl and self.recipe.hidden == "none":
            return self.ce * super().loss(ids)
        deep = self.recipe.hidden != "none"
        student = _losses.states(self.model, ids, deep)
        with torch.no_grad():
            read = ids if self.kept is None else self.kept[read_tensor(ids)]
            teacher = _losses.states(self.teacher, read, deep)
        wanted = _losses.labels(ids)
        ce, kl = self._logits(student.last_hidden_state, teacher.last_hidden_state, wanted)
        total = self.ce * ce + self.kl * kl
        if not deep:
            return total
        counted = wanted >= 0
        hidden = self._hidden(student.hidden_states, teacher.hidden_states, counted) * counted.sum()
        weight = self.recipe.hidden_weight
        return total + (balance(kl, hidden) if weight is None else weight) * hidden

    def _logits(self, student: torch.Tensor, teacher: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Sums of cross-entropy and of forward KL, (2,)."""
        ours, theirs = self.model.get_output_embeddings(), self.teacher.get_output_embeddings()

        def part(s: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            logits = ours(s).float()
            with torch.no_grad():
                said = theirs(t) if self.kept is None else theirs(t)[:, self.kept]
            ce = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            return torch.stack([ce, _losses.forward_kl(said, logits, self.recipe.temperature)])

        rows = [student[:, :-1], teacher[:, :-1]]
        return _losses.over_positions(part, theirs.weight.shape[0], rows, wanted)

    def _hidden(
        self, student: tuple[torch.Tensor, ...], teacher: tuple[torch.Tensor, ...], counted: torch.Tensor
    ) -> torch.Tensor:
        """L_is, a mean over positions. States: embeddings, then after every block; of the last behind the last norm."""
        project = self.beside.get("projection", nn.Identity())
        if self.recipe.hidden == "normalised":
            ours, theirs = len(student) - 1, len(teacher) - 1
            at = [round(i * theirs / ours) for i in range(1, ours + 1)]
            s, t = [project(x[:, :-1]) for x in student[1:]], [teacher[i][:, :-1] for i in at]
            return normalised_feature_loss(t, s, counted, squared=True)
        first = self._distance(project(student[0][:, :-1]), teacher[0][:, :-1], counted)
        return first + self._distance(project(two_before(student)[:, :-1]), two_before(teacher)[:, :-1], counted)

    def _distance(self, student: torch.Tensor, teacher: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        s, t = (torch.nn.functional.layer_norm(x.float(), x.shape[-1:])[counted] for x in (student, teacher))
        if self.recipe.hidden == "mse":
            return (s - t).square().mean()
        return (1 - torch.nn.functional.cosine_similarity(s, t, dim=-1)).mean()


def balance(logits: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Weight, without a gradient, that makes the hidden loss as large as that of the logits; 0 where there is none."""
    return torch.where(hidden > 0, logits / hidden, 0.0).detach()


def two_before(states: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """After the block two before the last; after the first where there are fewer."""
    return states[max(1, len(states) - 3)]
