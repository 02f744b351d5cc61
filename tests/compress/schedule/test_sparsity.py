"""Schedules: the ramps' own numbers, what may come back and what may not, and a run with a real optimiser."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pipeline.compress.schedule._sparsity import Gradual, SoftShrinkage  # noqa: E402
from pipeline.compress.schedule.base import cubic  # noqa: E402
from pipeline.compress.sparse.base import Pattern  # noqa: E402


class Holder(torch.nn.Module):  # type: ignore[misc, name-defined]  # torch is any to the checker here
    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.as_tensor(weight, dtype=torch.float32))


def test_the_cubic_of_the_spec() -> None:
    np.testing.assert_allclose([cubic(0, 0.8, t / 4) for t in range(5)], [0, 0.4625, 0.7, 0.7875, 0.8])
    assert cubic(0.1, 0.8, -1) == pytest.approx(0.1)
    assert cubic(0.1, 0.8, 2) == pytest.approx(0.8)


def test_gradual_prunes_at_its_events_and_by_the_cubic() -> None:
    model = Holder(torch.randn(40, 50, generator=torch.Generator().manual_seed(0)))
    schedule = Gradual(["weight"], final=0.8, end=0.5, events=4)
    zeros = []
    for step in range(1, 21):
        schedule.after_step(model, step / 20)
        zeros.append(int((model.weight == 0).sum()))
    at = {2: 0, 3: 925, 5: 1400, 8: 1575, 10: 1600, 20: 1600}  # events at steps 2.5, 5, 7.5 and 10
    assert {step: zeros[step - 1] for step in at} == at
    assert int((~schedule.masks()["weight"]).sum()) == 1600


@pytest.mark.parametrize("regrow", [False, True])
def test_what_comes_back(regrow: bool) -> None:
    model = Holder([[1.0, 2, 3, 4]])
    schedule = Gradual(["weight"], final=0.5, end=0.5, events=2, regrow=regrow)
    schedule.after_step(model, 0.25)  # cubic(0.5) = 0.4375 of 4 weights: 2 go
    assert model.weight.tolist() == [[0, 0, 3, 4]]
    model.weight.data[0, 0] = 9.0  # the optimiser moves a masked weight
    schedule.after_step(model, 0.3)
    assert model.weight[0, 0] == (9 if regrow else 0)
    schedule.after_step(model, 0.5)
    assert model.weight.tolist() == ([[9, 0, 0, 4]] if regrow else [[0, 0, 3, 4]])
    model.weight.data.fill_(1.0)
    schedule.after_step(model, 0.6)  # the ramp is over: frozen either way
    assert model.weight.tolist() == ([[1, 0, 0, 1]] if regrow else [[0, 0, 1, 1]])


def test_soft_shrinkage_of_the_spec() -> None:
    model = Holder([[1, -0.1, 0.5, 0.05]])
    schedule = SoftShrinkage(["weight"], 0.5)
    for done in (0.1, 0.2, 0.3):
        schedule.after_step(model, done)
    np.testing.assert_allclose(model.weight.detach(), [[1, -0.0857375, 0.5, 0.04286875]], rtol=1e-6)
    model.weight.data[0, 3] = 2.0  # it recovers, and another is shrunk
    schedule.after_step(model, 0.4)
    assert model.weight[0, 3] == 2
    np.testing.assert_allclose(model.weight[0, 2].item(), 0.475)
    schedule.after_step(model, 0.75)
    assert schedule.masks()["weight"].tolist() == [[True, False, False, True]]
    assert (model.weight[0, 1:3] == 0).all()
    model.weight.data[0, 1] = 5.0  # after that nothing comes back
    schedule.after_step(model, 0.8)
    assert model.weight[0, 1] == 0


def test_soft_shrinkage_to_a_pattern() -> None:
    model = Holder(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))
    before = model.weight.detach().clone()
    schedule = SoftShrinkage(["weight"], pattern=Pattern(2, 4), rate=0.5)
    schedule.after_step(model, 0.1)
    shrunk = (model.weight.detach() == 0.5 * before).view(-1, 4)
    assert (shrunk.sum(1) == 2).all()
    schedule.after_step(model, 1.0)
    assert ((model.weight != 0).view(-1, 4).sum(1) == 2).all()


def test_both_follow_an_optimiser() -> None:
    """A regression onto a sparse truth: the zeros end where the truth has them, and moments stay the optimiser's."""
    rng = torch.Generator().manual_seed(0)
    truth = torch.randn(4, 16, generator=rng).sign() * (torch.rand(4, 16, generator=rng) < 0.4)
    share = float((truth == 0).float().mean())
    x = torch.randn(256, 16, generator=rng)
    for make in (
        lambda: Gradual(["weight"], share, start=0.5, end=0.8, events=20),
        lambda: SoftShrinkage(["weight"], share),
    ):
        model, schedule = Holder(torch.randn(4, 16, generator=rng)), make()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
        for step in range(1, 301):
            optimizer.zero_grad()
            ((x @ model.weight.T - x @ truth.T) ** 2).mean().backward()
            optimizer.step()
            schedule.after_step(model, step / 300)
        assert torch.equal(schedule.masks()["weight"], truth != 0)
        torch.testing.assert_close(model.weight.detach(), truth, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gradual([], 1.0),
        lambda: Gradual([], 0.5, initial=0.6),
        lambda: Gradual([], 0.5, start=0.5, end=0.4),
        lambda: Gradual([], 0.5, events=0),
        lambda: SoftShrinkage([], 1.0),
        lambda: SoftShrinkage([], 0.5, rate=1.1),
    ],
)
def test_errors_at_the_door(make: Any) -> None:
    with pytest.raises(ValueError, match="needs 0 <="):
        make()
