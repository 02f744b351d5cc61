"""Q-Tuning in a loop: what is kept and masked beside a slow definition, and batches that cannot be chosen from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.batches.base import IGNORED, Setup
from pipeline.batches.q_tuning import QTuning, entropies
from pipeline.errors import ConfigError


def test_it_keeps_rows_and_masks_tokens_as_defined(lm: Any, make_batch: Callable[..., Any]) -> None:
    with torch.no_grad():
        lm.lm_head.weight.mul_(30)  # so that rows differ in perplexity and entropy
    batch, recipe = make_batch(16), QTuning(rows=0.5, tokens=0.5)
    choice = recipe.begin(Setup(lm))(batch)
    assert lm.training
    assert len(choice.rows) == 8
    assert choice.weights.tolist() == [1.0] * 8

    perplexity, entropy, each = [], [], []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        with torch.no_grad():
            logp = lm.eval()(input_ids=ids[None]).logits[0].log_softmax(-1)
        at = [t for t in range(1, len(ids)) if labels[t] != IGNORED]
        each.append({t: -float(logp[t - 1, labels[t]]) for t in at})
        perplexity.append(np.exp(np.mean(list(each[-1].values()))))
        entropy.append(np.mean([-float((logp[t - 1].exp() * logp[t - 1]).sum()) for t in at]))
    kept, quadrant, _ = recipe.choose(np.array(perplexity), np.array(entropy))
    assert choice.rows.tolist() == kept.tolist()
    assert 2 in quadrant[kept]
    assert 4 in quadrant[kept]
    for row, mask in zip(kept, choice.mask, strict=True):
        answer = list(each[row])
        wanted = set(answer)
        if quadrant[row] == 2:
            p = np.exp([min(each[row][t], 20) for t in answer])
            padded = np.pad(p, 1, mode="edge")
            s = 0.5 * p + 0.25 * (padded[:-2] + padded[2:])
            wanted = {answer[i] for i in np.argsort(s, kind="stable")[: max(1, len(p) // 2)]}
        assert set(mask.nonzero()[:, 0].tolist()) == wanted
    trained = choice.of(batch)
    assert ((trained["labels"] != IGNORED) == choice.mask).all()


def test_entropy_is_that_of_the_definition() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, -torch.inf], [1.0, 2.0, 3.0, 4.0]])
    p = logits[2].softmax(-1)
    expected = torch.stack([torch.tensor(4.0).log(), torch.tensor(0.0), -(p * p.log()).sum()])
    torch.testing.assert_close(entropies(logits), expected)


def test_rows_without_an_answer_or_a_number_are_dropped_and_counted(lm: Any, make_batch: Callable[..., Any]) -> None:
    batch = make_batch(12)
    batch["labels"][3] = IGNORED
    batch["input_ids"][5, 4] = 299
    with torch.no_grad():
        lm.get_input_embeddings().weight[299] = torch.nan
        lm.lm_head.weight = torch.nn.Parameter(torch.randn(300, 16))
    for row in (i for i in range(12) if i != 5):
        batch["input_ids"][row][batch["input_ids"][row] == 299] = 1
    choice = QTuning(rows=1.0).begin(Setup(lm))(batch)
    assert sorted({*range(12)} - {*choice.rows.tolist()}) == [3, 5]
    assert (choice.facts["no_answer_tokens"], choice.facts["not_finite"]) == (1, 1)

    batch["labels"][:] = IGNORED
    nothing = QTuning().begin(Setup(lm))(batch)
    assert len(nothing.rows) == len(nothing.weights) == 0


def test_a_batch_too_small_to_choose_from_is_refused(lm: Any, make_batch: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="needs 8 rows: raise the loader's batch size"):
        QTuning().begin(Setup(lm))(make_batch(7))
