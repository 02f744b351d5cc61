"""The code of docs/batches.md runs as it stands there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.batches.base import Setup, weighted_loss
from pipeline.batches.q_tuning import QTuning

BLOCKS = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "batches.md").read_text(), flags=re.DOTALL
)


def test_the_plain_loop(lm: Any, make_batch: Callable[..., Any]) -> None:
    seen: list[dict[str, float]] = []
    before = lm.lm_head.weight.detach().clone()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-3)
    loader = [make_batch(12, seed) for seed in range(3)]
    exec(BLOCKS[0], {"model": lm, "optimizer": optimizer, "loader": loader, "log": seen.append})
    assert len(seen) == 3
    assert {"filled", "quadrant_2", "tokens"} <= seen[0].keys()
    assert not torch.equal(before, lm.lm_head.weight)


def test_the_trainer_of_hugging_face(lm: Any, make_batch: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import TrainingArguments

    names: dict[str, Any] = {"Setup": Setup, "weighted_loss": weighted_loss, "recipe": QTuning(rows=0.25)}
    exec(BLOCKS[1], names)
    whole = make_batch(32)
    rows = [{name: values[i] for name, values in whole.items()} for i in range(32)]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=16, num_train_epochs=1, use_cpu=True, report_to=[],
        logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = names["Choosing"](lm, arguments, train_dataset=rows)
    result = trainer.train()
    assert result.global_step == 2
    assert 3 < result.training_loss < 9  # ln 300 is 5.7
    assert type(trainer.operator.recipe).__name__ == "QTuning"
