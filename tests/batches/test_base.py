"""What a choice makes of a batch, and the loss of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pipeline.batches.base import IGNORED, WEIGHTS, Choice, keep_all, measuring, row_losses, weighted_loss


def test_a_choice_takes_rows_masks_labels_and_adds_weights(make_batch: Callable[..., Any]) -> None:
    batch = make_batch(5) | {"id": torch.arange(5), "epoch": 3, "text": list("abcde")}
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, 4] = False
    kept = Choice(torch.tensor([1, 4]), mask, torch.tensor([1.0, 0.5])).of(batch)
    assert kept["id"].tolist() == [1, 4]
    assert (kept["epoch"], kept["text"]) == (3, ["b", "e"])
    torch.testing.assert_close(kept["input_ids"], batch["input_ids"][[1, 4]])
    changed = kept["labels"] != batch["labels"][[1, 4]]
    assert changed.nonzero().tolist() == [[1, 4]]
    assert kept["labels"][1, 4] == IGNORED
    assert kept[WEIGHTS].tolist() == [1.0, 0.5]


def test_the_loss_is_the_models_own_where_all_is_kept(lm: Any, make_batch: Callable[..., Any]) -> None:
    batch = make_batch()
    own = lm(**batch).loss
    torch.testing.assert_close(weighted_loss(lm, batch), own)
    torch.testing.assert_close(weighted_loss(lm, keep_all(batch).of(batch)), own)


def test_a_row_without_weight_gives_no_gradient(lm: Any, make_batch: Callable[..., Any]) -> None:
    batch = make_batch(4)
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0], requires_grad=True)
    weighted_loss(lm, batch | {WEIGHTS: weights}).backward()
    assert weights.grad is None
    found = lm.get_input_embeddings().weight.grad.clone()
    lm.zero_grad()
    each, counts = row_losses(lm, batch)
    (each * counts * torch.tensor([1, 0, 2, 1])).sum().div(counts.sum()).backward()
    torch.testing.assert_close(found, lm.get_input_embeddings().weight.grad)


def test_rows_that_are_classified() -> None:
    class Linear(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> Any:
            return type("Out", (), {"logits": torch.nn.functional.one_hot(input_ids[:, 0], 3).float()})

    batch = {"input_ids": torch.tensor([[0], [1], [2]]), "labels": torch.tensor([0, 0, 2])}
    each, counts = row_losses(Linear(), batch)
    expected = torch.tensor([0.551445, 1.551445, 0.551445])  # ln(e + 2) less the logit of the label
    torch.testing.assert_close(each, expected, atol=1e-5, rtol=0)
    assert counts.tolist() == [1, 1, 1]
    torch.testing.assert_close(weighted_loss(Linear(), batch), expected.mean(), atol=1e-5, rtol=0)


def test_measuring_leaves_every_module_in_its_mode() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    model[1].eval()
    with measuring(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, True, False]
