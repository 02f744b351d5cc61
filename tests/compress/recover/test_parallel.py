"""Ray Train: one worker gives the losses of this process to the bit, two share the batch and agree to float noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.compress.recover.full import Full
from pipeline.compress.schedule.continuous import Continuous
from pipeline.config import EngineConfig
from pipeline.errors import TamisError

torch = pytest.importorskip("torch")

from pipeline.compress.healing import Healed, heal, read_metrics  # noqa: E402
from pipeline.models.training import Shape, new_lm  # noqa: E402


def run(directory: Path, workers: int | None, lr: float = 3e-3) -> Healed:
    ids = np.random.default_rng(0).integers(0, 60, (24, 16)).astype(np.int32)
    ids[:, 1::2] = (ids[:, ::2] * 3) % 60
    ids[::5, 4:9] = -1  # workers do not count the same number of positions
    model = new_lm(Shape(hidden=16, layers=2, heads=4, kv_heads=2, mlp=24, vocab=257, context=16), 0)
    engine = EngineConfig(address="local", workers=workers, retries=0) if workers else None
    recipe = Full(batch=5, accumulate=2, lr=lr, evaluate_every=4, checkpoint_every=3)
    schedules = [Continuous(ratio=0.3, every=2)] if lr < 1 else []
    return heal(
        model, recipe, ids[:20], 41 * 16, directory=directory, held_out=ids[20:], engine=engine, callbacks=schedules
    )  # fmt: skip


@pytest.mark.slow
def test_workers_of_ray_train_do_what_this_process_does(ray_session: None, tmp_path: Path) -> None:
    here, one, two = (run(tmp_path / str(workers), workers) for workers in (None, 1, 2))
    assert one.losses.tolist() == here.losses.tolist()
    for (name, a), b in zip(one.model.named_parameters(), here.model.parameters(), strict=True):
        assert torch.equal(a, b), name

    assert len(two.losses) == 9  # the last step has one block, so that one of the workers has none
    np.testing.assert_allclose(two.losses, here.losses, rtol=1e-5)
    assert two.shapes == here.shapes
    assert two.passes == here.passes
    held_out = [[line["held_out"] for line in read_metrics(r.metrics) if "held_out" in line] for r in (here, two)]
    np.testing.assert_allclose(held_out[1], held_out[0], rtol=1e-5)
    for a, b in zip(two.model.parameters(), here.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_what_fails_in_a_worker_reaches_the_driver(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(TamisError, match="not finite: lower lr"):
        run(tmp_path, 1, lr=1e30)
