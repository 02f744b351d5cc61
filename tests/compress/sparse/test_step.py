"""The step: exact counts on every architecture, the block-after-block driver, allocations, adapters, and that criteria
that look at data beat those that do not on a trained model."""

from __future__ import annotations

import logging
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

torch = pytest.importorskip("torch")

from pipeline.compress.allocation._blocks import linears  # noqa: E402
from pipeline.compress.architecture import anatomy  # noqa: E402
from pipeline.compress.calibration import Calibration, InputMoments  # noqa: E402
from pipeline.compress.sparse._modules import LowRankPart, WrappedLinear, with_low_rank  # noqa: E402
from pipeline.compress.sparse._sequential import capture, walk  # noqa: E402
from pipeline.compress.steps.sparse import Sparse  # noqa: E402
from pipeline.errors import ConfigError, TamisError  # noqa: E402
from pipeline.models.training import lm_loss  # noqa: E402

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2", "bert", "vit")
METHODS = ("magnitude", "random", "wanda", "sparsegpt", "gblm")


def sparse(**fields: Any) -> Sparse:
    return Sparse.model_validate(fields)


def weights(model: Any) -> dict[str, Any]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def label_loss(model: Any, batch: Any) -> Any:
    """A loss for any of the tiny models: how far the logits are from the first class."""
    logits = model(**batch).logits
    return -logits.reshape(len(logits), -1, logits.shape[-1]).log_softmax(-1)[..., 0].mean(1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_loses_exactly_half_of_its_matrices(tiny_models: Any, name: str, method: str) -> None:
    tiny = tiny_models[name]
    before = weights(tiny.model)
    outcome = sparse(ratio=0.5, method=method).apply(tiny.model, Calibration(tiny.model, [tiny.batch], loss=label_loss))
    inside = {f"{n}.weight" for names in linears(anatomy(tiny.model)) for n in names}
    assert set(outcome.masks) == inside
    for parameter, value in weights(tiny.model).items():
        if parameter in inside:
            mask = outcome.masks[parameter]
            assert int(mask.sum()) == mask.numel() // 2
            assert (value[~mask] == 0).all()
            if method != "sparsegpt":
                assert (value[mask] == before[parameter][mask]).all()
        else:
            assert torch.equal(value, before[parameter])
    total = sum(before[n].numel() for n in inside)
    assert outcome.report["removed_weights"] == total // 2
    assert outcome.report["of_parameters"] == pytest.approx(total / 2 / sum(p.numel() for p in before.values()))
    assert torch.isfinite(tiny.output()).all()


@pytest.mark.parametrize("method", [*METHODS, {"kind": "armor", "block": 16, "iterations": 3}])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_two_of_four(tiny_models: Any, name: str, method: Any) -> None:
    tiny = tiny_models[name]
    pattern = {"keep": 2, "of": 4}
    if isinstance(method, dict):
        method = method | {"fold": False}
    outcome = sparse(pattern=pattern, method=method).apply(tiny.model, Calibration(tiny.model, [tiny.batch]))
    modules = dict(tiny.model.named_modules())
    for name_of, mask in outcome.masks.items():
        module = modules[name_of.removesuffix(".weight")]
        along_inputs = mask.T if type(module).__name__ == "Conv1D" else mask
        assert (along_inputs.reshape(-1, 4).sum(1) == 2).all()
        assert (module.weight[~mask] == 0).all()
    assert len(outcome.masks) == sum(len(names) for names in linears(anatomy(tiny.model)))
    stored = outcome.report["bytes"]
    assert stored["pattern"] / stored["dense"] == pytest.approx(0.5 + 2 / 4 * 2 / 32)  # float32
    assert torch.isfinite(tiny.output()).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_nothing_to_remove_changes_nothing(tiny_models: Any, name: str, method: str) -> None:
    tiny = tiny_models[name]
    before = weights(tiny.model)
    calibration = Calibration(tiny.model, [tiny.batch])
    outcome = sparse(ratio=0.0, method=method, refit=True).apply(tiny.model, calibration)
    assert outcome.masks == {}
    assert outcome.report["removed_weights"] == 0
    assert all(torch.equal(value, before[parameter]) for parameter, value in weights(tiny.model).items())
    assert not calibration.passes


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "gblm"])
def test_one_batch_or_three_and_the_same_twice(tiny_trained: Any, method: str) -> None:
    model, _, blocks = tiny_trained
    found = []
    for batch in (12, 4, 4):
        own = deepcopy(model)
        outcome = sparse(ratio=0.5, method=method).apply(own, Calibration.of_blocks(own, blocks[:12], batch))
        found.append((outcome.masks, weights(own)))
    (one, w1), (three, w3), (again, w3again) = found
    assert all(torch.equal(mask, again[name]) for name, mask in three.items())
    assert all(torch.equal(value, w3again[name]) for name, value in w3.items())
    differ = sum(int((mask != three[name]).sum()) for name, mask in one.items())
    assert differ <= 1e-3 * sum(mask.numel() for mask in one.values())
    if not differ:
        for name, value in w1.items():
            assert float((value - w3[name]).norm()) < 1e-4 * float(value.norm())


@pytest.mark.parametrize("how", [{"ratio": 0.5}, {"pattern": {"keep": 2, "of": 4}}], ids=["half", "2 of 4"])
def test_data_beats_magnitude_and_magnitude_beats_chance(tiny_trained: Any, how: dict[str, Any]) -> None:
    model, _, blocks = tiny_trained
    calibration, held_out = blocks[:12], blocks[12:]
    loss = {"dense": lm_loss(model, held_out)}
    for method in ("random", "magnitude", "wanda", "sparsegpt"):
        own = deepcopy(model)
        sparse(method=method, **how).apply(own, Calibration.of_blocks(own, calibration))
        loss[method] = lm_loss(own, held_out)
    own = deepcopy(model)
    sparse(method="wanda", refit=True, **how).apply(own, Calibration.of_blocks(own, calibration))
    loss["refit"] = lm_loss(own, held_out)
    assert loss["dense"] < loss["sparsegpt"] < loss["wanda"] < loss["magnitude"] < loss["random"], loss
    assert loss["refit"] < loss["wanda"], loss


def test_armor_beats_its_own_beginning_on_a_trained_model(tiny_trained: Any) -> None:
    model, _, blocks = tiny_trained
    found = []
    for iterations in (0, 30):
        own = deepcopy(model)
        method = {"kind": "armor", "block": 16, "iterations": iterations, "lr": 3e-3}
        outcome = sparse(method=method, pattern={"keep": 2, "of": 4}, layers=(1, 2)).apply(
            own, Calibration.of_blocks(own, blocks[:12])
        )
        assert outcome.masks == {}  # folded: dense
        found.append(lm_loss(own, blocks[12:]))
    assert found[1] < found[0], found


def test_low_rank_part_beside_any_mask(tiny_trained: Any) -> None:
    """Most of what a mask cost comes back; folded into the weights, the factors say the same and leave no zero."""
    model, _, blocks = tiny_trained
    low_rank = {"rank": 0.25, "saliency": "rms"}
    loss, cut = {}, {}
    for how, asked in {"bare": None, "beside": low_rank, "folded": low_rank | {"fold": True}}.items():
        cut[how] = deepcopy(model)
        outcome = sparse(method="wanda", ratio=0.6, low_rank=asked).apply(
            cut[how], Calibration.of_blocks(cut[how], blocks[:12])
        )
        loss[how] = lm_loss(cut[how], blocks[12:])
        parts = {name: m for name, m in cut[how].named_modules() if isinstance(m, LowRankPart)}
        assert bool(outcome.masks) == (how != "folded")
        assert set(parts) == ({n.removesuffix(".weight") for n in outcome.masks} if how == "beside" else set())
        if how == "beside":
            added = sum(m.left.numel() + m.right.numel() for m in parts.values())
            assert outcome.report["low_rank"] == {"parameters": added, "flops_per_token": 2 * added}
            parameters = dict(cut[how].named_parameters())
            assert all((parameters[name][~mask] == 0).all() for name, mask in outcome.masks.items())
            with pytest.raises(ConfigError, match="has a low-rank part already"):
                sparse(method="wanda", ratio=0.7, low_rank=low_rank).apply(
                    cut[how], Calibration.of_blocks(cut[how], blocks[:4])
                )
        elif how == "folded":
            assert outcome.report["removed_weights"] == 0
    assert loss["beside"] < loss["bare"] - 0.3 * (loss["bare"] - lm_loss(model, blocks[12:])), loss
    assert loss["folded"] == pytest.approx(loss["beside"], rel=1e-4)


def test_low_rank_and_wrapped_modules_compute_what_they_say(tiny_models: Any) -> None:
    from transformers.pytorch_utils import Conv1D

    from pipeline.compress.sparse.armor import assemble

    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, generator=rng)

    x, left, right = draw(2, 5, 8), draw(12, 3), draw(3, 8)
    for inner in (torch.nn.Linear(8, 12), Conv1D(12, 8)):
        beside = with_low_rank(inner, left, right)
        assert isinstance(beside, type(inner))
        assert beside.weight is inner.weight
        torch.testing.assert_close(beside(x), inner(x) + x @ (left @ right).T)
    a, b, core = draw(3, 4, 4), draw(2, 4, 4), draw(12, 8)
    linear = torch.nn.Linear(8, 12)
    expected = x @ assemble(core, a, b).T + linear.bias
    torch.testing.assert_close(WrappedLinear(linear, core, a, b)(x), expected, rtol=1e-4, atol=1e-4)


def test_the_global_ranking_is_one_ranking(tiny_models: Any) -> None:
    model = tiny_models["llama"].model
    names = [n for group in linears(anatomy(model)) for n in group]
    magnitudes = {n: model.get_submodule(n).weight.detach().abs() for n in names}
    for i, n in enumerate(names):
        magnitudes[n] *= 1 + i  # so that matrices differ
        model.get_submodule(n).weight.data.mul_(1 + i)
    outcome = sparse(ratio=0.4, method={"kind": "magnitude", "scope": "global"}, cap=1).apply(
        model, Calibration(model, [])
    )
    removed = torch.cat([magnitudes[n][~outcome.masks[f"{n}.weight"]] for n in names if f"{n}.weight" in outcome.masks])
    kept = torch.cat([magnitudes[n][outcome.masks[f"{n}.weight"]] for n in names if f"{n}.weight" in outcome.masks])
    assert removed.max() <= kept.min()
    assert len(removed) == round(0.4 * sum(m.numel() for m in magnitudes.values()))
    assert len({text.split()[0] for text in outcome.report["kept"].values()}) > 3


def test_allocations_meet_the_total_and_layers_can_be_left_out(tiny_models: Any) -> None:
    tiny = tiny_models["llama"]
    outcome = sparse(ratio=0.5, method="wanda", allocation="erk", layers=(1, None)).apply(
        tiny.model, Calibration(tiny.model, [tiny.batch])
    )
    assert all(".layers.1." in name for name in outcome.masks)
    removed = sum(int((~mask).sum()) for mask in outcome.masks.values())
    second = sum(p.numel() for n, p in tiny.model.named_parameters() if ".layers.1." in n and p.ndim == 2)
    assert removed == second // 2
    assert len({float(m.float().mean()) for m in outcome.masks.values()}) > 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_driver_sees_what_the_whole_model_sees(tiny_models: Any, name: str) -> None:
    """Without pruning, sums block after block are those of a forward pass; padding counts for nothing."""
    tiny = tiny_models[name]
    batch = dict(tiny.batch)
    if "input_ids" in batch:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, 7:] = 0
    body = anatomy(tiny.model)
    names = [list(block) for block in linears(body)]
    flat = tuple(n for block in names for n in block)
    whole = Calibration(tiny.model, [batch]).measure(InputMoments(flat, gram=True))
    for propagate, passes in (("pruned", 2 - 1 / len(names)), ("dense", 1)):
        calibration = Calibration(tiny.model, [batch])
        seen: dict[str, Any] = {}
        with torch.no_grad():
            for _, sums in walk(calibration, body.blocks, names, {"gram"}, propagate):  # type: ignore[arg-type]  # a literal
                seen |= sums
        for n in flat:
            for kind in ("square", "gram"):
                torch.testing.assert_close(seen[f"{n}.{kind}"], whole[f"{n}.{kind}"], rtol=1e-4, atol=1e-4)
        assert calibration.passes["forward"] == round(passes * float(seen["tokens"]))


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_the_second_block_is_measured_behind_the_first(tiny_models: Any, propagate: Any) -> None:
    model = tiny_models["llama"].model
    batches = [tiny_models["llama"].batch]
    body = anatomy(model)
    names = [list(block) for block in linears(body)]
    before = Calibration(model, batches).measure(InputMoments(tuple(names[1])))
    seen: dict[str, Any] = {}
    with torch.no_grad():
        for inside, sums in walk(Calibration(model, batches), body.blocks, names, set(), propagate):
            seen |= sums
            for n in inside:
                model.get_submodule(n).weight.mul_(0.5)
        for n in names[1]:
            model.get_submodule(n).weight.mul_(2)
    behind = Calibration(model, batches).measure(InputMoments(tuple(names[1])))
    expected, other = (behind, before) if propagate == "pruned" else (before, behind)
    for n in names[1]:
        torch.testing.assert_close(seen[f"{n}.square"], expected[f"{n}.square"], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(seen[f"{n}.square"], other[f"{n}.square"], rtol=1e-2)


def test_the_arguments_of_every_block_are_its_own() -> None:
    """Qwen2 with sliding windows gives blocks different masks."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16,
        vocab_size=32, max_position_embeddings=32, use_sliding_window=True, sliding_window=4, max_window_layers=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    batch = {"input_ids": torch.randint(0, 32, (2, 16))}
    with torch.no_grad():
        stream = capture(model, model.model.layers, batch)
        for i, layer in enumerate(model.model.layers):
            stream.hidden = stream.forward(layer, i)
        expected = model(**batch, output_hidden_states=True, use_cache=False).hidden_states[-1]
    torch.testing.assert_close(model.model.norm(stream.hidden), expected)


@pytest.mark.parametrize("rows", [100, 99])
def test_rows_that_are_not_finite_are_dropped_up_to_one_in_a_hundred(tiny_models: Any, rows: int) -> None:
    model = tiny_models["llama"].model
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = torch.inf
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 96, (rows, 6), generator=rng)
    good = Calibration.of_blocks(model, np.delete(ids.numpy(), 5, axis=0))
    ids[5, 2] = 0
    bad = Calibration.of_blocks(deepcopy(model), ids.numpy())
    step = sparse(ratio=0.5, method="wanda")
    if rows < 100:
        with pytest.raises(TamisError, match="1 of 99 calibration rows give values that are not finite in block 0"):
            step.apply(bad.model, bad)
        return
    dropped = step.apply(bad.model, bad)
    clean = step.apply(model, good)
    assert bad.dropped == 1
    different = sum(int((m != clean.masks[n]).sum()) for n, m in dropped.masks.items())
    assert different <= 1e-3 * sum(m.numel() for m in clean.masks.values())


def test_matrices_that_no_pattern_fits(tiny_models: Any, caplog: pytest.LogCaptureFixture) -> None:
    tiny = tiny_models["llama"]
    pattern = {"keep": 3, "of": 5}
    with pytest.raises(ConfigError, match=r"q_proj cannot be pruned: its 32 inputs are no multiple of 5; set indivis"):
        sparse(pattern=pattern, method="magnitude").apply(tiny.model, Calibration(tiny.model, []))
    pattern = {"keep": 8, "of": 12}
    with caplog.at_level(logging.WARNING):
        outcome = sparse(pattern=pattern, method="magnitude", indivisible="skip").apply(
            tiny.model, Calibration(tiny.model, [])
        )
    assert set(outcome.masks) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}  # 48 inputs
    assert caplog.text.count("left as it is") == 12
    with pytest.raises(ConfigError, match="no matrix that can be pruned"):
        sparse(pattern={"keep": 1, "of": 64}, method="magnitude", indivisible="skip").apply(
            tiny.model, Calibration(tiny.model, [])
        )


def test_half_precision_is_scored_in_full(tiny_models: Any) -> None:
    tiny = tiny_models["llama"]
    half = deepcopy(tiny.model).bfloat16()
    full = deepcopy(half).float()
    masks = [
        sparse(ratio=0.5, method=method).apply(model, Calibration(model, [tiny.batch])).masks
        for method in ("magnitude",)
        for model in (half, full)
    ]
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())
    assert half.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16


def test_masked_model_saves_loads_and_generates(tiny_models: Any, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    tiny = tiny_models["llama"]
    sparse(ratio=0.5, method="sparsegpt").apply(tiny.model, Calibration(tiny.model, [tiny.batch]))
    tiny.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny.output(loaded), tiny.output())
    prompt = tiny.batch["input_ids"][:1]
    assert torch.equal(
        loaded.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0),
        tiny.model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0),
    )


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"method": "wanda"}, "set either ratio or pattern"),
        ({"method": "wanda", "ratio": 0.5, "pattern": {"keep": 2, "of": 4}}, "set either ratio or pattern"),
        ({"method": "wanda", "ratio": 1.0}, "less than 1"),
        ({"method": "wander", "ratio": 0.5}, "wander"),
        ({"method": "wanda", "pattern": {"keep": 2, "of": 4}, "allocation": "owl"}, "remove allocation 'owl'"),
        ({"method": {"kind": "magnitude", "scope": "global"}, "ratio": 0.5, "allocation": "erk"}, "remove alloc"),
        ({"method": "armor", "ratio": 0.5}, "armor prunes to a pattern"),
        ({"method": "armor", "pattern": {"keep": 2, "of": 4}, "refit": True}, "remove refit and low_rank"),
        ({"method": "wanda", "pattern": {"keep": 4, "of": 4}}, "fewer than all"),
    ],
)
def test_errors_at_the_door(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        sparse(**fields)


def test_snip_ratios_are_those_of_one_cut_and_the_mask_is_chance(tiny_models: Any) -> None:
    tiny = tiny_models["gpt2"]
    calibration = Calibration(tiny.model, [tiny.batch])
    names = [f"{n}.weight" for block in linears(anatomy(tiny.model)) for n in block]
    gradients = calibration.gradients()
    scores = {n: (tiny.model.get_parameter(n).detach() * gradients[n]).abs() for n in names}
    total = sum(s.numel() for s in scores.values())
    limit = torch.cat([s.flatten() for s in scores.values()]).sort().values[total // 2]
    outcome = sparse(ratio=0.5, method="random", allocation="snip", cap=1).apply(tiny.model, calibration)
    assert {n: int(m.sum()) for n, m in outcome.masks.items()} == {
        n: int((s >= limit).sum()) for n, s in scores.items()
    }
    for n, mask in outcome.masks.items():
        by_snip = float((mask == (scores[n] >= limit)).float().mean())
        share = float(mask.float().mean())
        assert by_snip == pytest.approx(share**2 + (1 - share) ** 2, abs=0.05)


def test_a_block_that_does_not_fit_says_what_to_lower(tiny_models: Any) -> None:
    tiny = tiny_models["llama"]
    tiny.model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: torch.empty(1 << 60))
    with pytest.raises(TamisError, match="block 1 does not fit in memory with 3 rows at a time: set a smaller batch"):
        sparse(ratio=0.5, method="wanda").apply(tiny.model, Calibration(tiny.model, [tiny.batch]))
