"""Models that are cut or masked while they train: what is planned is what they go through and what they pay."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compare.arms import DESIGNS, per_token, scheduled_by_chance, unmatched
from pipeline.compare.flops import ModelShape, full
from pipeline.compare.ledger import Arm, plan
from pipeline.compare.trajectory import Moment, Retraced, rehearse, retraced, spans
from pipeline.compress.allocation.base import Evidence, Target
from pipeline.compress.architecture import anatomy
from pipeline.compress.recover._shapes import shapes
from pipeline.compress.recover.base import Setup
from pipeline.compress.recover.full import Full
from pipeline.compress.recover.lora import Lora
from pipeline.compress.schedule.adapt_pruner import AdaptPruner
from pipeline.compress.schedule.continuous import Continuous
from pipeline.compress.schedule.gradual import Gradual
from pipeline.compress.schedule.gradual_magnitude import GradualMagnitude
from pipeline.compress.schedule.lora_prune import LoraPrune
from pipeline.compress.schedule.soft_shrinkage import SoftShrinkage
from pipeline.compress.steps.depth import Depth
from pipeline.compress.steps.sparse import Sparse
from pipeline.compress.steps.vocab import Vocab
from pipeline.compress.steps.width import Width
from pipeline.compress.surgery import cut, remove_branches
from pipeline.errors import ConfigError
from tests.compress.conftest import make_tiny

torch = pytest.importorskip("torch")

from pipeline.compress.healing import heal  # noqa: E402
from pipeline.models.training import Shape, new_lm  # noqa: E402

LENGTH = 16


def student(seed: int = 0) -> Any:
    return new_lm(Shape(hidden=16, layers=3, heads=4, kv_heads=2, mlp=48, vocab=257, context=LENGTH), seed)


def blocks(rows: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 60, (rows, LENGTH)).astype(np.int32)


def width(ratio: float = 0.5, **more: Any) -> Width:
    return Width.model_validate({"ratio": ratio, "importance": "taylor"} | more)


SCHEDULES = {
    "gradual": Gradual(step=width(0.4), events=4, rows=4),
    "late": Gradual(step=width(0.4, units=["neuron"]), events=3, until=1.0, rows=4),
    "adapt_pruner": AdaptPruner(step=width(allocation={"kind": "adapt", "amplitude": 0.05}), rounds=5, rows=4),
}


def stages(shape: ModelShape, done: Any) -> tuple[tuple[float, float], ...]:
    pairs = zip(done.moments, done.shapes, strict=True)
    return tuple((moment.at, full(shape.resized(told), LENGTH)) for moment, told in pairs)


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("batch", [3, 4])
def test_a_training_spends_what_its_rehearsal_planned(name: str, batch: int, tmp_path: Path) -> None:
    """Trained from other weights, on other data and at another rate than it was rehearsed with."""
    recovery, schedule = Full(batch=batch, lr=1e-3), SCHEDULES[name]
    shape = ModelShape.of(student())
    done = rehearse(schedule, recovery, Setup(student(), blocks()))
    each = full(shape, LENGTH)
    arm = Arm("B", each, stages=stages(shape, done), step=batch * LENGTH)
    line = plan(37.3 * LENGTH * each, [arm], LENGTH).lines[0]
    assert line.tokens > 38 * LENGTH  # a cut model's tokens are cheaper
    model = student(seed=1)
    healed = heal(
        model, recovery, blocks(30, seed=2), line.tokens, directory=tmp_path,
        callbacks=[retraced(schedule, done.moments)],
    )  # fmt: skip
    parts = list(spans(healed.tokens, healed.shapes))
    assert sum(tokens for tokens, _ in parts) == healed.tokens == line.tokens
    assert len(parts) > 2
    spent = sum(tokens * full(shape.resized(told) if told else shape, LENGTH) for tokens, told in parts)
    assert spent == pytest.approx(line.spent, rel=1e-12)
    assert line.spent == pytest.approx(37.3 * LENGTH * each, rel=0.03)
    assert ModelShape.of(healed.model).digest == ModelShape.of(done.model).digest
    assert full(ModelShape.of(healed.model), LENGTH) == full(shape.resized(done.shapes[-1]), LENGTH)


def test_what_a_rehearsal_ran_is_what_the_training_runs(tmp_path: Path) -> None:
    recovery, schedule = Full(batch=4, lr=1e-3), SCHEDULES["gradual"]
    done = rehearse(schedule, recovery, Setup(student(), blocks()))
    healed = heal(
        student(), recovery, blocks(), 32 * LENGTH, directory=tmp_path, callbacks=[retraced(schedule, done.moments)]
    )
    assert sum(p["backward"] for p in done.passes) == healed.passes["schedule_backward"] == 4 * 4 * LENGTH


def test_chance_goes_the_same_way_with_other_units_and_measures_nothing(tmp_path: Path) -> None:
    recovery, schedule = Full(batch=4, lr=1e-9, warmup=0.0), SCHEDULES["adapt_pruner"]
    done = rehearse(schedule, recovery, Setup(student(), blocks()))
    way, found = retraced(schedule, done.moments), {}
    for name, own in (("chosen", way), ("drawn", scheduled_by_chance(way, 3)), ("again", scheduled_by_chance(way, 3))):
        found[name] = heal(student(), recovery, blocks(), 20 * LENGTH, directory=tmp_path / name, callbacks=[own])
    assert len({str(h.shapes) for h in found.values()}) == 1
    assert "schedule_backward" in found["chosen"].passes
    assert "schedule_backward" not in found["drawn"].passes
    weights = {name: h.model.model.layers[0].mlp.up_proj.weight for name, h in found.items()}
    assert torch.equal(weights["drawn"], weights["again"])
    assert not torch.equal(weights["chosen"], weights["drawn"])


def test_of_near_moments_the_one_that_was_due_is_taken() -> None:
    """Rounding left 11 units where 10.4 were due, and 10 where 9.6 were: by what is due, not by what is near."""
    body = new_lm(Shape(hidden=8, layers=1, heads=2, kv_heads=2, mlp=12, vocab=257, context=8), 0)
    seen = anatomy(body)
    units = seen.units("neuron")
    cost = units[0].cost
    kept = Retraced(
        moments=(
            Moment(at=0.1, left=10.4 * cost, kept={"0.neuron": 11}),
            Moment(at=0.2, left=9.6 * cost, kept={"0.neuron": 10}),
        )
    )
    for left, stays in ((10.4, 11), (9.6, 10)):
        assert kept.keep(units, Target(1 - left / 12), Evidence(seen)).tolist() == [stays]


@pytest.mark.parametrize(
    "schedule", [GradualMagnitude(ratio=0.5, events=4), SoftShrinkage(ratio=0.5, harden=0.5)], ids=lambda s: s.kind
)
def test_masks_are_rehearsed_and_change_no_shape(schedule: Any) -> None:
    model = student()
    done = rehearse(schedule, Full(batch=4), Setup(copy.deepcopy(model), blocks()))
    assert done.moments == []
    assert retraced(schedule, done.moments) is schedule
    assert {m.ndim for m in done.masks.values()} == {2}
    for name, mask in done.masks.items():
        assert float(mask.float().mean()) == pytest.approx(0.5, abs=1e-3)
        weight = done.model.get_parameter(name)
        assert torch.equal(weight, model.get_parameter(name) * mask)
        assert weight.grad is None
    assert ModelShape.of(done.model).digest == ModelShape.of(model).digest


def test_lora_prune_is_rehearsed_by_one_gradient() -> None:
    schedule = LoraPrune(ratio=0.5, layers=(0, None))
    done = rehearse(schedule, Lora(batch=4), Setup(student(), blocks()))
    found = ModelShape.of(done.model)
    assert [layer.width for layer in found.layers] == [24] * 3
    assert not done.masks


@settings(max_examples=60)
@given(
    st.floats(1e3, 1e12),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0.05, 1)), max_size=6),
    st.integers(1, 64),
    st.integers(1, 8),
)
def test_the_plan_takes_the_nearest_number_of_blocks(budget: float, cuts: Any, block: int, batch: int) -> None:
    ats, rates = sorted(at for at, _ in cuts), sorted((f for _, f in cuts), reverse=True)
    arm = Arm("B", 1.0, {"importance": 0.1 * budget}, stages=tuple(zip(ats, rates, strict=True)), step=block * batch)
    line = plan(budget, [arm], block).lines[0]
    assert bool(line.refusal) == (line.tokens == 0)
    if line.tokens:
        off = abs(arm.spent(line.tokens) - budget)
        for near in (line.tokens - block, line.tokens + block):
            assert off <= abs(arm.spent(near) - budget) * (1 + 1e-9)
        assert off <= 0.01 * budget
        assert line.tokens >= 0.9 * budget - 2 * block  # never fewer than at the dearest shape


def test_tokens_at_every_shape_by_hand() -> None:
    """1000 tokens in steps of 96: the cut at 0.25 comes behind 288 tokens, the one at 1 behind the last."""
    arm = Arm("B", 10.0, stages=((0.0, 8.0), (0.25, 6.0), (1.0, 1.0)), step=96)
    assert arm.training(1000) == 288 * 8 + 712 * 6
    with pytest.raises(ConfigError, match="never costs more than before"):
        plan(1e6, [Arm("B", 1.0, stages=((0.5, 2.0),))])


def test_sizes_that_a_training_notes_give_the_flops_of_the_model(tiny_shapes: list[Any]) -> None:
    for whole, smaller in tiny_shapes:
        base, then = ModelShape.of(whole), ModelShape.of(smaller)
        resized = base.resized(shapes(smaller))
        assert resized.forward(LENGTH) == then.forward(LENGTH)
        assert base.resized(shapes(whole)) == base


def mixture() -> Any:
    import transformers as t

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    return t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**sizes, **experts, vocab_size=96, intermediate_size=48))


@pytest.fixture
def tiny_shapes() -> list[Any]:
    """Models before and after a cut."""
    found = []
    for whole in (*(make_tiny(name).model for name in ("llama", "gpt2", "qwen3")), mixture()):
        smaller = copy.deepcopy(whole)
        kinds: list[Any] = ["kv_group", "hidden", "neuron" if anatomy(whole).layers[0].mlp else "expert"]
        body = anatomy(smaller)
        removal = {u.name: np.arange(4 if u.kind == "hidden" else 1) for u in body.units(*kinds)}
        cut(smaller, body.units(*kinds), removal)
        found.append((whole, smaller))
    branchless = make_tiny("llama").model
    without = copy.deepcopy(branchless)
    remove_branches(without, [(0, "attention")])
    return [*found, (branchless, without)]


MAGNITUDE = GradualMagnitude(ratio=0.5)
SPARSE = Sparse.model_validate({"ratio": 0.5, "method": "wanda"})


@pytest.mark.parametrize(
    ("steps", "schedules", "recover", "told"),
    [
        ([], [MAGNITUDE], "full", "E, F: their mask would be that of B or C.*; .*R: gradual_magnitude chooses"),
        ([], [MAGNITUDE], "full", r"leave them out: arms: \[A, A', B, C, D\]"),
        (
            [],
            [SCHEDULES["gradual"]],
            "full",
            r"Cr: no step .*: gradual measures on what it trains on.*A, A', B, C, D, E, F, R\]",
        ),
        ([], [Continuous(ratio=0.5)], "full", "continuous cuts by the gradients of the training itself"),
        ([width()], [], "lora", "E, F: recover: lora trains a part of the weights, and theirs are all new"),
        ([Vocab()], [], "full", r"R: a vocabulary that is drawn by chance.*Cr: no step.*\[A, A', B, C, D, E, F\]"),
        ([Depth(ratio=0.5, units="branch", method="finercut")], [], "full", "take units: block"),
        ([width(), Depth(ratio=0.5), SPARSE, Vocab()], [], "full", "^$"),
        ([width()], [SCHEDULES["adapt_pruner"]], "full", "^$"),
    ],
)
def test_what_cannot_be_matched_says_why(steps: Any, schedules: Any, recover: str, told: str) -> None:
    assert re.search(told, unmatched(list(DESIGNS.values()), steps, schedules, recover))


def test_a_rate_is_charged_at_the_shape_of_the_moment() -> None:
    shape = ModelShape.of(student())
    cost = Full().cost(student())
    assert per_token(cost, shape, shape, LENGTH, 64) == full(shape, LENGTH)
