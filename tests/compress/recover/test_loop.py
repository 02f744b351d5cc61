"""The training loop: budget, rate, resuming to the same losses, broken checkpoints, accumulation, masks, stopping."""

from __future__ import annotations

import copy
import json
import logging
import math
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compress.recover.base import Recovery, Setup, rate
from pipeline.compress.recover.full import Full
from pipeline.compress.schedule.base import Callback, Change, Schedule
from pipeline.config import recipe_class
from pipeline.errors import ConfigError, TamisError

torch = pytest.importorskip("torch")

from pipeline.compress.healing import Healed, epoch_rows, heal, read_metrics  # noqa: E402
from pipeline.compress.recover import _losses  # noqa: E402
from pipeline.models.training import Shape, new_lm  # noqa: E402

LENGTH = 16
QUICK: dict[str, Any] = {"batch": 4, "lr": 3e-3, "checkpoint_every": 2, "evaluate_every": 3}


def student(seed: int = 0, mlp: int = 24) -> Any:
    return new_lm(Shape(hidden=16, layers=2, heads=4, kv_heads=2, mlp=mlp, vocab=257, context=LENGTH), seed)


def blocks(count: int = 20, seed: int = 0) -> np.ndarray:
    """Every second token follows from the one before it."""
    ids = np.random.default_rng(seed).integers(0, 60, (count, LENGTH)).astype(np.int32)
    ids[:, 1::2] = (ids[:, ::2] * 3) % 60
    return ids


def recovery(kind: str = "full", **fields: Any) -> Recovery:
    return recipe_class("pipeline.compress.recover", Recovery, kind).model_validate(QUICK | fields)


def schedule(kind: str, **fields: Any) -> Schedule:
    return recipe_class("pipeline.compress.schedule", Schedule, kind).model_validate(fields)


def half_masks(model: Any) -> dict[str, Any]:
    """Every second weight of the layers' matrices; among the kept ones some that are 0."""
    masks = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "layers" in name:
            masks[name] = torch.arange(parameter.numel()).view_as(parameter) % 2 == 0
            with torch.no_grad():
                parameter[0, 0] = 0.0
    return masks


def weights(model: Any) -> dict[str, Any]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Broken(Exception):
    """What stands for a machine that goes off."""


class BreakOff(Schedule):
    """Ends a training after a step without a word; the file `armed` says whether it still has to."""

    kind: Literal["break_off"] = "break_off"
    at: float
    armed: Path

    def start(self, setup: Setup, session: Any) -> Callback:
        return _Bomb(self)


class _Bomb(Callback):
    def __init__(self, recipe: BreakOff) -> None:
        super().__init__()
        self.recipe = recipe

    def after_step(self, model: Any, done: float) -> Change | None:
        if done >= self.recipe.at and self.recipe.armed.exists():
            self.recipe.armed.unlink()
            raise Broken
        return None


def run(directory: Path, recipe: Recovery, tokens: int = 9 * 4 * LENGTH, model: Any = None, **options: Any) -> Healed:
    model = student() if model is None else model
    options = {"held_out": blocks(6, seed=9)} | options
    return heal(model, recipe, options.pop("data", blocks()), tokens, directory=directory, **options)


WIDTH = {"kind": "width", "ratio": 0.4, "importance": {"kind": "taylor"}}
RESUMED: list[tuple[str, dict[str, Any], dict[str, Any] | None]] = [
    ("full", {"weight_decay": 0.1}, None),
    ("lora", {"dropout": 0.2}, None),
    ("distill", {"hidden": "cosine", "ce_weight": 0.5}, None),
    ("perp", {}, None),
    ("last_layers", {"layers": 1}, None),
    ("full", {}, {"kind": "gradual", "step": WIDTH, "rows": 4}),
    ("full", {}, {"kind": "adapt_pruner", "step": WIDTH | {"allocation": "adapt"}, "rows": 4, "rounds": 5}),
    ("distill", {"patience": 9}, {"kind": "continuous", "ratio": 0.4, "every": 2}),
    ("lora", {}, {"kind": "lora_prune", "ratio": 0.4, "every": 2, "layers": (0, None)}),
    ("full", {}, {"kind": "gradual_magnitude", "ratio": 0.5, "events": 6, "regrow": True}),
    ("full", {"weight_decay": 0.1}, {"kind": "soft_shrinkage", "ratio": 0.5}),
    ("full", {}, {"kind": "dynamic_batches", "every": 2, "reference": (5.0, 5.5)}),
]


@pytest.mark.parametrize(("kind", "fields", "between"), RESUMED, ids=lambda v: v if isinstance(v, str) else None)
def test_a_training_that_is_broken_off_goes_on_to_the_same_losses(
    tmp_path: Path, kind: str, fields: dict[str, Any], between: dict[str, Any] | None
) -> None:
    recipe = recovery(kind, **fields)
    options: dict[str, Any] = {"domains": np.arange(20) % 2, "held_out_domains": np.arange(6) % 2}
    if recipe.needs_teacher:
        options["teacher"] = student(1, mlp=32)

    def go(name: str, armed: Path) -> Healed:
        model = student()
        masks = half_masks(model) if kind == "perp" else None
        schedules = [schedule(**between)] if between else []
        bomb = BreakOff(at=5 / 9, armed=tmp_path / "armed")
        return run(tmp_path / name, recipe, model=model, masks=masks, callbacks=[*schedules, bomb], **options)

    whole = go("whole", tmp_path / "armed")
    (tmp_path / "armed").touch()
    with pytest.raises(Broken):
        go("broken", tmp_path / "armed")
    resumed = go("broken", tmp_path / "armed")

    assert len(whole.losses) == 9
    assert resumed.losses.tolist() == whole.losses.tolist()
    assert resumed.passes == whole.passes
    assert resumed.shapes == whole.shapes
    assert [n for n, _ in resumed.model.named_parameters()] == [n for n, _ in whole.model.named_parameters()]
    for (_, a), (name, b) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(resumed.metrics)]
    assert lines == [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(whole.metrics)]


def test_a_checkpoint_that_was_cut_off_is_reported_and_the_one_before_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(tmp_path / "whole", recovery())
    (tmp_path / "armed").touch()
    with pytest.raises(Broken):
        run(tmp_path / "r", recovery(), callbacks=[BreakOff(at=0.99, armed=tmp_path / "armed")])
    files = sorted((tmp_path / "r" / "checkpoints").glob("step-*"))
    assert [f.name for f in files] == ["step-00000006.safetensors", "step-00000008.safetensors"]
    files[1].write_bytes(files[1].read_bytes()[:-100])
    (files[0].parent / "step-00000009.incoming").write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        resumed = run(tmp_path / "r", recovery(), callbacks=[BreakOff(at=0.99, armed=tmp_path / "armed")])
    assert "step-00000008.safetensors is not whole" in caplog.text
    assert resumed.losses.tolist() == whole.losses.tolist()
    assert [f.name for f in (tmp_path / "r" / "checkpoints").iterdir()] == ["step-00000009.safetensors"]


def test_what_is_done_is_not_done_again_and_other_settings_begin_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = run(tmp_path, recovery())
    text = first.metrics.read_text()
    again = run(tmp_path, recovery(checkpoint_every=5))  # which changes nothing
    assert again.metrics.read_text() == text
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert not caplog.text
    other = run(tmp_path, recovery(lr=1e-3))
    assert "another recovery" in caplog.text
    assert other.losses.tolist() != first.losses.tolist()


@pytest.mark.parametrize("kind", ["full", "distill"])
def test_accumulation_changes_nothing_but_float_noise(tmp_path: Path, kind: str) -> None:
    data = blocks()
    data[::3, 5:9] = -1  # parts of a step do not count the same number of positions
    options = {"data": data, "teacher": student(1)}
    one = run(tmp_path / "1", recovery(kind), **options)
    three = run(tmp_path / "3", recovery(kind, accumulate=3), **options)
    np.testing.assert_allclose(three.losses, one.losses, rtol=2e-5)
    for a, b in zip(one.model.parameters(), three.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_logits_in_parts_give_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.from_numpy(blocks(3)).long()
    gradients = []
    for chunk in (1 << 25, 257 * 7):
        monkeypatch.setattr(_losses, "CHUNK_LOGITS", chunk)
        model = student()
        loss = _losses.cross_entropy(model, _losses.states(model, ids).last_hidden_state, ids[:, 1:])
        loss.backward()
        loss = loss.detach()
        expected = torch.nn.functional.cross_entropy(
            model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )
        assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-6)
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_budget_is_spent_to_within_a_block(tmp_path: Path) -> None:
    healed = run(tmp_path, recovery(), tokens=25 * LENGTH + 3)
    lines = read_metrics(healed.metrics)
    assert healed.tokens == 25 * LENGTH
    assert healed.epochs == 25 / 20
    assert [line["tokens"] // LENGTH for line in lines] == [0, 4, 8, 12, 16, 20, 24, 25]
    assert "loss" not in lines[0]  # what held-out loss was before the first step
    assert ["held_out" in line for line in lines] == [True, False, False, True, False, False, True, True]
    assert healed.passes == {"backward": 25 * LENGTH, "forward": 4 * 6 * LENGTH}
    assert all(a["seconds"] <= b["seconds"] for a, b in pairwise(lines))


def test_a_metrics_line_cut_off_while_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


def test_rates_rise_over_the_warm_up_and_end_with_the_budget() -> None:
    recipe = Full(warmup=0.1, floor=0.1)
    assert rate(recipe, 0.0, 0.05) == pytest.approx(0.5)
    assert rate(recipe, 0.05, 0.1) == 1.0
    assert rate(recipe, 0.55, 0.6) == pytest.approx(0.55)
    assert rate(recipe, 1.0, 1.0) == pytest.approx(0.1)
    linear = Full(warmup=0.0, floor=0.0, decay="linear")
    assert [rate(linear, i / 4, (i + 1) / 4) for i in range(4)] == [1.0, 0.75, 0.5, 0.25]
    wsd = Full(warmup=0.0, floor=0.0, decay="wsd")
    assert [rate(wsd, x, x) for x in (0.3, 0.8, 0.9, 1.0)] == pytest.approx([1, 1, 0.5, 0])
    assert rate(Full(decay="constant"), 0.99, 1.0) == 1.0


@settings(max_examples=40)
@given(
    st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    st.floats(0, 0.9),
    st.floats(0, 1),
    st.integers(1, 50),
)
def test_rates_never_leave_their_range_nor_rise_behind_the_warm_up(
    decay: Any, warmup: float, floor: float, steps: int
) -> None:
    recipe = Full(decay=decay, warmup=warmup, floor=floor)
    rates = [rate(recipe, i / steps, (i + 1) / steps) for i in range(steps)]
    assert all(0 < r <= 1 + 1e-12 for r in rates)
    late = [r for i, r in enumerate(rates) if (i + 1) / steps >= warmup]
    assert all(a >= b - 1e-12 for a, b in pairwise(late))
    assert min(late) >= floor - 1e-12


@settings(max_examples=30)
@given(st.integers(1, 30), st.integers(0, 90), st.integers(1, 40), st.integers(0, 5))
def test_every_epoch_has_every_block_once_however_it_is_asked_for(
    count: int, position: int, rows: int, seed: int
) -> None:
    whole = epoch_rows(count, 0, position + rows, seed)
    assert epoch_rows(count, position, rows, seed).tolist() == whole[position:].tolist()
    for start in range(0, len(whole) - count + 1, count):
        assert sorted(whole[start : start + count]) == list(range(count))


@pytest.mark.parametrize("kind", ["full", "distill", "last_layers", "perp"])
def test_zeros_stay_zeros_and_kept_zeros_learn(tmp_path: Path, kind: str) -> None:
    model = student()
    masks = half_masks(model)
    fields: dict[str, Any] = {"lr": 3e-2} if kind == "perp" else {"weight_decay": 0.1}
    fields |= {"layers": 1} if kind == "last_layers" else {}
    healed = run(tmp_path, recovery(kind, **fields), model=model, masks=masks, teacher=student(1))
    parameters = dict(healed.model.named_parameters())
    assert {name for name in parameters if "parametrizations" in name} == set()
    for name, mask in masks.items():
        assert not parameters[name][~mask].any(), name
    last = {name: p for name, p in parameters.items() if "layers.1" in name and name in masks}
    assert all(p[0, 0] != 0 for p in last.values())  # kept by the pruner, though it was 0
    assert healed.masks.keys() == masks.keys()


def test_it_stops_when_held_out_loss_rises_and_returns_the_best(tmp_path: Path) -> None:
    data = blocks(4)
    recipe = recovery(lr=3e-2, patience=2, evaluate_every=2, warmup=0.0, decay="constant")
    held_out = (blocks(6, seed=9) * 7 + 11) % 60  # another language: what is learned of the data hurts there
    healed = run(tmp_path, recipe, tokens=400 * LENGTH, data=data, held_out=held_out)
    measured = [line["held_out"] for line in read_metrics(healed.metrics) if "held_out" in line]
    assert healed.stopped_early
    assert healed.tokens < 400 * LENGTH
    assert measured[-2] > min(measured) < measured[-1]
    from pipeline.models.training import lm_loss

    assert lm_loss(healed.model, held_out) == pytest.approx(min(measured), rel=1e-5)


def test_a_recovery_that_only_hurts_gives_the_model_back(tmp_path: Path) -> None:
    model = student()
    before = weights(model)
    data = blocks(4)
    run(tmp_path / "first", recovery(lr=1e-2), tokens=80 * LENGTH, model=model, data=data)
    learned = weights(model)
    assert any(not torch.equal(before[n], learned[n]) for n in before)
    wrong = recovery(lr=1.0, patience=1, evaluate_every=1, warmup=0.0)
    healed = run(tmp_path / "second", wrong, model=model, data=data, held_out=data)
    assert healed.stopped_early
    assert all(torch.equal(learned[n], p) for n, p in healed.model.named_parameters())


def test_tokens_that_the_vocabulary_lacks_are_never_to_be_predicted(tmp_path: Path) -> None:
    data = blocks()
    data[:, 3] = -1
    one, other = student(), student()
    run(tmp_path / "a", recovery(), model=one, data=data)
    with torch.no_grad():
        ids = torch.from_numpy(data[:4]).long()
        loss = _losses.cross_entropy(other, _losses.states(other, ids).last_hidden_state, ids[:, 1:])
        losses = torch.nn.functional.cross_entropy(
            other(input_ids=ids.clamp_min(0)).logits[:, :-1].transpose(1, 2), ids[:, 1:].clamp_min(0), reduction="none"
        )
    assert float(loss) == pytest.approx(float(losses.sum() - losses[:, 2].sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data": blocks().astype(np.float32)}, "no blocks"),
        ({"data": blocks()[0]}, "no blocks"),
        ({"data": blocks()[:0]}, "no blocks"),
        ({"data": blocks() + 250}, "made with another tokenizer"),
        ({"held_out": blocks() + 250}, "held_out: token id 309, where the student knows 257"),
        ({"tokens": LENGTH - 1}, "do not pay one block"),
        ({"recipe": recovery(patience=1), "held_out": None}, "patience needs held-out"),
        ({"recipe": recovery("distill")}, "distill needs a teacher"),
        ({"masks": {"lm_head": torch.ones(2, 2)}}, "no parameter of the model"),
        ({"domains": np.zeros(3)}, "domains: 3 for 20 blocks"),
        ({"model": torch.nn.Linear(2, 2)}, "causal language model"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_door(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    change = dict(change)
    with pytest.raises(ConfigError, match=says):
        run(tmp_path, change.pop("recipe", recovery()), change.pop("tokens", 999), **change)


def test_a_loss_that_is_not_finite_stops_it_and_says_what_to_do(tmp_path: Path) -> None:
    model = student()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.inf)
    with pytest.raises(TamisError, match="step 1 is not finite: lower lr"):
        run(tmp_path, recovery(), model=model, held_out=None)


def test_blocks_may_lie_in_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "blocks.npy", blocks())
    in_memory = run(tmp_path / "a", recovery())
    in_file = heal(
        student(), recovery(), tmp_path / "blocks.npy", 9 * 4 * LENGTH, directory=tmp_path / "b",
        held_out=blocks(6, seed=9),
    )  # fmt: skip
    assert in_file.losses.tolist() == in_memory.losses.tolist()
    assert copy.copy(in_file.passes) == in_memory.passes
