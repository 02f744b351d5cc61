"""What happens between steps: moments that are cut with the weights, counts on the way, masks, domains."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.compress.architecture import anatomy
from pipeline.compress.recover.base import Setup
from pipeline.compress.recover.distill import Distill
from pipeline.compress.recover.full import Full
from pipeline.compress.recover.lora import Lora
from pipeline.compress.schedule._cutting import lost
from pipeline.compress.schedule.adapt_pruner import AdaptPruner
from pipeline.compress.schedule.continuous import Continuous
from pipeline.compress.schedule.dynamic_batches import DynamicBatches, moved
from pipeline.compress.schedule.gradual import Gradual, cubic
from pipeline.compress.schedule.gradual_magnitude import GradualMagnitude
from pipeline.compress.schedule.lora_prune import LoraPrune
from pipeline.compress.schedule.soft_shrinkage import SoftShrinkage
from pipeline.compress.steps.width import Width
from pipeline.compress.surgery import cut
from pipeline.errors import ConfigError
from tests.tiny_lm import sentences

torch = pytest.importorskip("torch")

from pipeline.compress.healing import heal, read_metrics  # noqa: E402
from pipeline.compress.recover import _optimizer  # noqa: E402
from pipeline.compress.recover._lora import LoraSession  # noqa: E402
from pipeline.compress.schedule._lora_prune import unit_sums  # noqa: E402
from pipeline.models.training import Shape, lm_loss, new_lm, pack  # noqa: E402


def student(seed: int = 0, mlp: int = 48, layers: int = 2) -> Any:
    return new_lm(Shape(hidden=16, layers=layers, heads=4, kv_heads=2, mlp=mlp, vocab=257, context=16), seed)


def blocks(rows: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 60, (rows, 16)).astype(np.int32)


def neurons(ratio: float = 0.5, **more: Any) -> Width:
    return Width.model_validate({"ratio": ratio, "units": ["neuron"], "importance": "taylor"} | more)


def widths(shapes: dict[str, Any]) -> list[int]:
    return [layer["intermediate_size"] for layer in shapes["layers"].values()]


def test_the_cubic_takes_48_neurons_to_24_in_four_events(tmp_path: Path) -> None:
    shares = [cubic(0, 0.5, i / 4) for i in range(5)]
    assert shares == pytest.approx([0, 0.2890625, 0.4375, 0.4921875, 0.5])
    schedule = Gradual(step=neurons(), events=4, rows=4)
    healed = heal(
        student(), Full(batch=2, lr=1e-3), blocks(), 16 * 16 * 2, directory=tmp_path, callbacks=[schedule]
    )  # fmt: skip
    assert [widths(shapes)[0] for _, shapes in healed.shapes] == [34, 27, 24, 24]
    assert [sum(widths(shapes)) for _, shapes in healed.shapes] == [68, 54, 49, 48]  # 24.4 of 48 is 49 of 96
    assert [tokens for tokens, _ in healed.shapes] == [64, 128, 192, 256]  # of 512: an eighth each
    assert healed.model.config.intermediate_size == 24
    assert healed.passes["schedule_backward"] == 4 * 4 * 16


def test_moments_are_cut_as_the_weights_are(tiny_models: dict[str, Any]) -> None:
    for family in ("llama", "qwen2", "qwen3", "gpt2"):
        model = tiny_models[family].model
        parameters = dict(model.named_parameters())
        generator = torch.Generator().manual_seed(0)
        moments = {f"{n}/exp_avg": torch.rand(p.shape, generator=generator) for n, p in parameters.items()}
        moments |= {f"{n}/step": torch.tensor(3.0) for n in parameters}
        shadow = copy.deepcopy(model)  # its weights are the moments, so that cutting it tells what has to come out
        with torch.no_grad():
            for name, parameter in shadow.named_parameters():
                parameter.copy_(moments[f"{name}/exp_avg"])
        groups = anatomy(model).units("kv_group", "neuron")
        removal = {u.name: np.array([1] if u.kind == "kv_group" else [0, 5, 7 + u.layer]) for u in groups}
        found = _optimizer.cut(moments, lost(model, groups, removal))
        cut(shadow, groups, removal)
        for name, parameter in shadow.named_parameters():
            assert torch.equal(found[f"{name}/exp_avg"], parameter), f"{family}: {name}"
            assert float(found[f"{name}/step"]) == 3


def test_a_cut_keeps_the_momentum_of_what_stays(tmp_path: Path) -> None:
    """Neurons that take no part (all their weights are 0) go: what is left must train as if they had never been."""
    small, large = student(mlp=40), student(mlp=48)
    with torch.no_grad():
        for name, parameter in large.named_parameters():
            part = small.get_parameter(name)
            parameter.zero_()
            parameter[tuple(slice(size) for size in part.shape)] = part
    recipe = Full(batch=4, lr=3e-3, warmup=0.0, clip=1e9)
    schedule = Gradual(step=neurons(8 / 48, importance="magnitude"), events=1, until=0.5, rows=2)
    cut_on_the_way = heal(large, recipe, blocks(), 640, directory=tmp_path / "a", callbacks=[schedule])
    never = heal(small, recipe, blocks(), 640, directory=tmp_path / "b")
    assert widths(cut_on_the_way.shapes[0][1]) == [40, 40]
    np.testing.assert_allclose(cut_on_the_way.losses, never.losses, rtol=1e-5)


def test_adapt_pruner_takes_equal_parts_and_more_where_the_stream_turns_less(tmp_path: Path) -> None:
    model = student(layers=3)
    step = neurons(allocation={"kind": "adapt", "amplitude": 0.05})
    schedule = AdaptPruner(step=step, rounds=5, rows=4)
    healed = heal(model, Full(batch=4, decay="wsd"), blocks(), 640, directory=tmp_path, callbacks=[schedule])
    totals = [sum(widths(shapes)) for _, shapes in healed.shapes]
    assert totals == pytest.approx([144 * (1 - 0.1 * i) for i in range(1, 6)], abs=1.5)
    assert [tokens for tokens, _ in healed.shapes] == [0, 128, 256, 384, 512]
    assert len(set(widths(healed.shapes[-1][1]))) > 1
    assert read_metrics(healed.metrics)[0]["shapes"] == healed.shapes[0][1]


def test_continuous_pruning_removes_what_has_no_effect_and_costs_no_pass(tmp_path: Path) -> None:
    model = student()
    dead = [np.arange(24), np.arange(12, 36)]
    with torch.no_grad():
        for layer, gone in zip(model.model.layers, dead, strict=True):
            layer.mlp.down_proj.weight[:, gone] = 0
            layer.mlp.up_proj.weight[gone] = 0  # so that no gradient reaches any weight of these neurons
    alive = [np.setdiff1d(np.arange(48), gone) for gone in dead]
    up = [model.model.layers[i].mlp.up_proj.weight[alive[i]].detach().clone() for i in range(2)]
    schedule = Continuous(ratio=0.5, units=("neuron",), every=2, cap=1.0)
    recipe = Full(batch=4, lr=1e-6)
    healed = heal(model, recipe, blocks(), 16 * 16 * 4, directory=tmp_path, callbacks=[schedule])
    assert [len(healed.shapes) > 1, widths(healed.shapes[-1][1])] == [True, [24, 24]]
    for i in range(2):
        torch.testing.assert_close(healed.model.model.layers[i].mlp.up_proj.weight, up[i], atol=1e-4, rtol=0)
    assert set(healed.passes) == {"backward", "forward"}


def test_sums_of_lora_saliencies_over_units_on_either_side() -> None:
    body = anatomy(student())
    units = body.units("kv_group")[0]
    for member in units.members:
        shape = body.modules[member.module].weight.shape
        values = torch.arange(float(shape.numel())).view(shape)
        size = member.size
        rows = values if member.side == "out" else values.T
        expected = [float(rows[u * size : (u + 1) * size].sum()) for u in range(2)]
        assert unit_sums(values, member, units).tolist() == expected


def test_what_lora_prune_masks_is_what_it_cuts_in_the_end(tmp_path: Path) -> None:
    model, held_out = student(layers=3), blocks(6, seed=3)
    setup = Setup(model, blocks())
    session = Lora(dropout=0.0, rank=2).begin(setup)
    assert isinstance(session, LoraSession)
    pruner = LoraPrune(ratio=0.4, every=1, warmup=0.0, cooldown=0.1).start(setup, session)
    with torch.no_grad():
        for parameter in session.parameters().values():
            parameter.add_(0.1)
    session.loss(torch.from_numpy(blocks()).long()).backward()
    pruner.gradients(model, 1.0)
    pruner.after_step(model, 1.0)
    ids = torch.from_numpy(held_out).long()
    with torch.no_grad():
        masked = model.eval()(input_ids=ids).logits
        merged = session.merge()
        pruner.merged(merged)
        after = merged.eval()(input_ids=ids).logits
    torch.testing.assert_close(after, masked, atol=1e-5, rtol=1e-5)
    shapes = [layer.mlp.width for layer in anatomy(merged).layers if layer.mlp]
    assert shapes == [29, 29, 48]  # 0.6 of 48, and the last layer whole


def test_gradual_magnitude_leaves_the_asked_zeros_exactly(tmp_path: Path) -> None:
    schedule = GradualMagnitude(ratio=0.5, events=5, until=0.5)
    recipe = Full(batch=4, lr=1e-2, weight_decay=0.1)
    healed = heal(student(), recipe, blocks(), 640, directory=tmp_path, callbacks=[schedule])
    for name, mask in healed.masks.items():
        weight = healed.model.get_parameter(name)
        assert not weight[~mask].any()
        assert int((~mask).sum()) == round(0.5 * mask.numel())
    assert len(healed.masks) == 14


def test_soft_shrinkage_hardens(tmp_path: Path) -> None:
    schedule = SoftShrinkage(ratio=0.5, harden=0.7)
    healed = heal(student(), Full(batch=4, lr=1e-2), blocks(), 640, directory=tmp_path, callbacks=[schedule])
    assert len(healed.masks) == 14
    for name, mask in healed.masks.items():
        assert torch.equal(healed.model.get_parameter(name) != 0, mask)


def test_domains_that_are_behind_are_seen_more_often(tmp_path: Path) -> None:
    weights = moved(np.array([0.5, 0.5]), np.array([2.5, 2.0]), np.array([2.0, 2.0]))
    assert weights == pytest.approx([0.6225, 0.3775], abs=5e-5)
    assert moved(weights, np.array([1.0, 1.0]), np.array([2.0, 2.0])).tolist() == weights.tolist()
    domains = np.arange(20) % 4 // 3  # three quarters, one quarter
    setup = Setup(
        student(), blocks(), held_out=blocks(4, 1), domains=domains, held_out_domains=np.arange(4) % 2
    )  # fmt: skip
    sampler: Any = DynamicBatches(reference=(0.0, 9.0), every=1, weights=(0.5, 0.5)).start(setup, None)  # type: ignore[arg-type]  # it asks nothing of the session
    seen = np.concatenate([sampler.rows(7) for _ in range(200)])
    assert 0.45 < domains[seen].mean() < 0.55
    per_block = np.bincount(seen, minlength=20)
    assert np.ptp(per_block[domains == 0]) <= 1  # epoch after epoch
    assert np.ptp(per_block[domains == 1]) <= 1
    sampler.after_step(setup.student, 0.1)
    assert sampler.weights[0] > 0.99
    assert domains[sampler.rows(50)].mean() < 0.1


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0, 8), st.floats(0, 8)), min_size=1, max_size=6))
def test_weights_of_domains_stay_a_distribution(values: list[tuple[float, float, float]]) -> None:
    weights, losses, reference = (np.array(v) for v in zip(*values, strict=True))
    after = moved(weights / weights.sum(), losses, reference)
    assert after.sum() == pytest.approx(1)
    assert (after > 0).all()


def test_the_teacher_is_the_reference_where_none_is_given() -> None:
    teacher, held_out = student(1), blocks(4, 1)
    setup = Setup(
        student(), blocks(), teacher, held_out=held_out, domains=np.arange(20) % 2, held_out_domains=np.arange(4) % 2
    )
    sampler: Any = DynamicBatches().start(setup, None)  # type: ignore[arg-type]  # it asks nothing of the session
    assert sampler.reference.tolist() == pytest.approx([lm_loss(teacher, held_out[d::2]) for d in range(2)])


@pytest.mark.parametrize(
    ("recipe", "schedule", "says"),
    [
        (Lora(), Gradual(step=neurons()), "trained whole.*full or distill"),
        (Lora(), Continuous(ratio=0.5), "trained whole"),
        (Lora(), GradualMagnitude(ratio=0.5), "trained whole"),
        (Full(), LoraPrune(), "heal it by `lora`"),
        (Full(), Gradual.model_validate({"step": {"kind": "depth", "ratio": 0.5}}), "'depth' cannot be taken in parts"),
        (Full(), DynamicBatches(reference=(1.0, 1.0)), "domain of every block"),
    ],
)
def test_schedules_that_do_not_fit_the_recovery(tmp_path: Path, recipe: Any, schedule: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        heal(student(), recipe, blocks(), 640, directory=tmp_path, callbacks=[schedule])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"held_out_domains": np.zeros(4, int)}, "needs blocks, and held-out ones"),
        ({"recipe": DynamicBatches(reference=(1.0,))}, "reference has 1 values for 2 domains"),
        ({"recipe": DynamicBatches(reference=(1.0, 1.0), weights=(1.0,))}, "weights has 1 values"),
        ({"recipe": DynamicBatches()}, "give a reference, or a teacher"),
    ],
)
def test_domains_that_do_not_fit(fields: dict[str, Any], says: str) -> None:
    fields = dict(fields)
    recipe = fields.pop("recipe", DynamicBatches(reference=(1.0, 1.0)))
    options = {"held_out": blocks(4), "domains": np.arange(20) % 2, "held_out_domains": np.arange(4) % 2} | fields
    with pytest.raises(ConfigError, match=says):
        recipe.start(Setup(student(), blocks(), **options), None)  # type: ignore[arg-type]  # it asks nothing of the session


def test_times_that_make_no_sense() -> None:
    with pytest.raises(ValidationError, match="leave no time"):
        LoraPrune(warmup=0.5, cooldown=0.5)
    with pytest.raises(ValidationError, match="before until"):
        GradualMagnitude(ratio=0.5, begin=0.6)


WIDTH = {"ratio": 0.4, "importance": "taylor"}
PROGRESSIVE: list[tuple[Any, Any]] = [
    (Full(lr=3e-3), Gradual(step=Width.model_validate(WIDTH), rows=8)),
    (Distill(lr=3e-3), Gradual(step=Width.model_validate(WIDTH), rows=8)),
    (
        Full(lr=3e-3, decay="wsd"),
        AdaptPruner(step=Width.model_validate(WIDTH | {"allocation": "adapt"}), rounds=5, rows=8),
    ),
    (Full(lr=3e-3), Continuous(ratio=0.4, every=2)),
    (Lora(lr=2e-2), LoraPrune(ratio=0.4, every=2, layers=(0, None))),
]


@pytest.mark.parametrize(("recipe", "schedule"), PROGRESSIVE, ids=lambda r: r.kind)
def test_pruning_while_healing_ends_better_than_a_cut_alone(
    tiny_trained: Any, tmp_path: Path, recipe: Any, schedule: Any
) -> None:
    teacher, tokenizer, held_out = tiny_trained
    data = pack([e.ids for e in tokenizer.encode_batch(sentences(200))], 64, 0)
    from pipeline.compress.calibration import Calibration

    alone = copy.deepcopy(teacher)
    Width.model_validate({"ratio": 0.4, "importance": "random"}).apply(alone, Calibration.of_blocks(alone, data[:8]))
    quick = recipe.model_copy(update={"batch": 8, "evaluate_every": 1000})
    healed = heal(
        copy.deepcopy(teacher), quick, data, 14 * 8 * 64, directory=tmp_path, teacher=teacher, callbacks=[schedule]
    )
    units = anatomy(healed.model).units("kv_group", "neuron")
    whole = sum(u.parameters for u in anatomy(teacher).units("kv_group", "neuron"))
    assert sum(u.parameters for u in units) == pytest.approx(0.6 * whole, abs=2 * max(u.cost for u in units) + 1)
    assert lm_loss(healed.model, held_out) < lm_loss(alone, held_out)
