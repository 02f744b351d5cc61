"""SLiM's factors beside a masked matrix: written, read, counted, cut, healed."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pipeline.compare.flops import ModelShape  # noqa: E402
from pipeline.compress import folder  # noqa: E402
from pipeline.compress.architecture import anatomy  # noqa: E402
from pipeline.compress.calibration import Calibration  # noqa: E402
from pipeline.compress.compression import compress, shrink  # noqa: E402
from pipeline.compress.healing import heal  # noqa: E402
from pipeline.compress.recover.full import Full  # noqa: E402
from pipeline.compress.recover.perp import Perp  # noqa: E402
from pipeline.compress.sparse._low_rank import LowRank  # noqa: E402
from pipeline.compress.sparse._modules import LowRankPart  # noqa: E402
from pipeline.compress.sparse.base import Matrix, Pruned  # noqa: E402
from pipeline.compress.steps.sparse import Sparse  # noqa: E402
from pipeline.compress.steps.width import Width  # noqa: E402
from pipeline.compress.surgery import cut, zero  # noqa: E402
from pipeline.errors import ConfigError, TamisError  # noqa: E402
from pipeline.models.training import lm_loss  # noqa: E402
from tests.compress.conftest import make_tiny  # noqa: E402
from tests.compress.test_compression import configured  # noqa: E402
from tests.compress.test_surgery import greedy  # noqa: E402


def slim(name: str, **more: Any) -> tuple[Any, dict[str, Any]]:
    """A tiny model after SLiM, with its masks."""
    tiny = make_tiny(name)
    step = Sparse.model_validate({"ratio": 0.5, "method": "wanda", "low_rank": {"rank": 0.25} | more})
    return tiny, step.apply(tiny.model, Calibration(tiny.model, [tiny.batch])).masks


@pytest.mark.parametrize("saliency", ["mean", "rms"])
def test_inputs_weigh_by_their_mean_size_or_its_root_mean_square(saliency: str) -> None:
    rng = np.random.default_rng(0)
    x, weight = torch.from_numpy(rng.exponential(size=(50, 6)) ** 2), torch.from_numpy(rng.normal(size=(4, 6)))
    mask = weight.abs() > 0.5
    seen = {"abs": x.sum(0), "square": x.square().sum(0)}
    recipe = LowRank.model_validate({"rank": 0.5, "saliency": saliency})
    left, right = recipe.fit(Matrix("", weight, 50, seen), Pruned(mask, weight * mask))
    size = x.mean(0) if saliency == "mean" else x.square().mean(0).sqrt()
    error = (weight * ~mask - left @ right) * size
    tail = torch.linalg.svdvals(weight * ~mask * size)[2:]
    torch.testing.assert_close(error.square().sum(), tail.square().sum())


def factors(model: Any) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.endswith((".left", ".right"))}


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "bert"])
def test_the_folder_holds_them_and_transformers_alone_refuses_it(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    tiny, masks = slim(name)
    before = tiny.output()
    folder.save(tiny.model, None, tmp_path / "model", {}, masks)
    held = load_file(tmp_path / "model" / folder.RAGGED)
    assert factors(tiny.model) <= set(held)
    again, _ = folder.load(tmp_path / "model")
    assert torch.equal(before, tiny.output(again))
    assert all(torch.equal(masks[n], m) for n, m in folder.masks(tmp_path / "model").items())
    if name != "bert":
        assert torch.equal(greedy(tiny.model, tiny), greedy(again, tiny))
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "low-rank parts beside them, so transformers alone does not read it" in card
    ranks = json.loads((tmp_path / "model" / folder.SHAPES).read_text())["low_rank"]
    assert set(ranks) == {n.removesuffix(".weight") for n in masks}
    assert set(ranks.values()) == ({8} if name != "qwen2" and name != "llama" else {8, 4})


def test_folded_factors_are_read_by_transformers_alone(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny, masks = slim("llama", fold=True)
    assert masks == {}
    folder.save(tiny.model, None, tmp_path / "model", {}, masks)
    assert torch.equal(tiny.output(), tiny.output(AutoModelForCausalLM.from_pretrained(tmp_path / "model")))
    beside, _ = slim("llama")
    torch.testing.assert_close(tiny.output(), beside.output(), rtol=1e-3, atol=1e-4)


def test_a_sidecar_of_other_factors_is_refused(tmp_path: Path) -> None:
    tiny, masks = slim("llama")
    folder.save(tiny.model, None, tmp_path / "model", {}, masks)
    path = tmp_path / "model" / folder.SHAPES
    sidecar = json.loads(path.read_text())
    (first, _), *rest = sidecar["low_rank"].items()
    path.write_text(json.dumps(sidecar | {"low_rank": dict(rest) | {first: 3}}))
    with pytest.raises(TamisError, match=r"the factors of .* are .* of rank 3"):
        folder.load(tmp_path / "model")
    path.write_text(json.dumps(sidecar | {"low_rank": dict(rest)}))
    with pytest.raises(TamisError, match=r"its weights hold .*\.left, which the model has not"):
        folder.load(tmp_path / "model")


def test_steps_that_follow_a_mask(tiny_trained: Any) -> None:
    """Zeros that a milder step leaves stay masked; what fills them takes the mask away; what cuts a masked matrix is
    refused."""
    model, _, blocks = tiny_trained
    masked = Sparse.model_validate({"ratio": 0.5, "method": "magnitude"})
    milder = Sparse.model_validate({"ratio": 0.3, "method": "wanda"})
    once, twice = (shrink(deepcopy(model), steps, blocks[:4], 4) for steps in ([masked], [masked, milder]))
    assert all((mask <= once.masks[name]).all() for name, mask in twice.masks.items())
    folded = Sparse.model_validate({"ratio": 0.6, "method": "wanda", "low_rank": {"fold": True}, "layers": (1, None)})
    smaller = shrink(deepcopy(model), [masked, folded], blocks[:4], 4)
    assert {name.split(".")[2] for name in smaller.masks} == {"0"}
    width = Width.model_validate({"ratio": 0.25, "importance": "magnitude"})
    with pytest.raises(ConfigError, match=r"steps: width cuts .*, which a step before it masks"):
        shrink(deepcopy(model), [masked, width], blocks[:4], 4)
    shrink(model, [width, masked], blocks[:4], 4)


def test_they_count_by_every_denominator() -> None:
    """By hand: half of the matrices' entries, and r (in + out) for each; in FLOPs all of it, for zeros save none."""
    dense = folder.count(make_tiny("llama").model)
    tiny, masks = slim("llama")
    after = folder.count(tiny.model, masks)
    shapes = [mask.shape for mask in masks.values()]
    added = sum(int(0.25 * min(s)) * sum(s) for s in shapes)
    gone = sum(s.numel() for s in shapes) // 2
    for name in ("prunable", "non_embedding", "all"):
        assert after[name] == float(dense[name] or 0) - gone + added
    assert after["flops_per_token"] == float(dense["flops_per_token"] or 0) + 2 * added
    assert ModelShape.of(tiny.model).parameters == sum(p.numel() for p in tiny.model.parameters())
    from torch.utils.flop_counter import FlopCounterMode

    tiny.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        tiny.model(**tiny.batch, use_cache=False)
    rows, length = tiny.batch["input_ids"].shape
    assert counter.get_total_flops() == rows * length * ModelShape.of(tiny.model).forward(length)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_they_are_cut_with_their_matrices(name: str) -> None:
    tiny, _ = slim(name)
    zeroed = deepcopy(tiny.model)
    groups = anatomy(tiny.model).units("kv_group", "neuron")
    removal = {u.name: np.array([0]) if u.kind == "kv_group" else np.arange(5, 21) for u in groups}
    zero(zeroed, groups, removal)
    cut(tiny.model, groups, removal)
    torch.testing.assert_close(tiny.output(), tiny.output(zeroed), rtol=1e-5, atol=1e-5)
    parts = [m for m in tiny.model.modules() if isinstance(m, LowRankPart)]
    assert all((len(m.left), m.right.shape[1]) == anatomy_shape(m) for m in parts)


def anatomy_shape(module: Any) -> tuple[int, int]:
    """(out, in) of a Linear or Conv1D, as its own sizes tell."""
    if hasattr(module, "nf"):
        return module.nf, module.nx
    return module.out_features, module.in_features


def test_full_training_and_slims_own_heal_them(tiny_trained: Any, tmp_path: Path) -> None:
    model, _, blocks = tiny_trained
    step = Sparse.model_validate({"ratio": 0.7, "method": "wanda", "low_rank": {"rank": 0.1}})
    masks = step.apply(model, Calibration.of_blocks(model, blocks[:8])).masks
    held_out, before = blocks[24:], lm_loss(model, blocks[24:])
    alone = Perp(adapter=None, norms=False, biases=False, lr=1e-2, batch=4)
    for name, recipe in {"full": Full(lr=3e-3, batch=4), "slim": alone, "perp": Perp(rank=4, lr=5e-3, batch=4)}.items():
        own = deepcopy(model)
        healed = heal(own, recipe, blocks[8:24], 64 * 64, directory=tmp_path / name, masks=masks)
        assert lm_loss(healed.model, held_out) < before
        changed = {n for n, p in healed.model.named_parameters() if not torch.equal(p, model.get_parameter(n))}
        assert factors(model) <= changed
        assert (changed == factors(model)) == (name == "slim")
        for n, mask in masks.items():
            assert (healed.model.get_parameter(n)[~mask] == 0).all()
    frozen = Perp(low_rank=False, rank=4, lr=5e-3, batch=4)
    healed = heal(deepcopy(model), frozen, blocks[8:24], 512, directory=tmp_path / "frozen", masks=masks)
    assert all(torch.equal(healed.model.get_parameter(n), model.get_parameter(n)) for n in factors(model))
    size = sum(model.get_parameter(n).numel() for n in factors(model))
    assert Perp(adapter=None).cost(model).extra == 2 * size


def test_a_broken_training_of_factors_goes_on_to_the_same(tiny_trained: Any, tmp_path: Path) -> None:
    from pipeline.compress import healing

    model, _, blocks = tiny_trained
    step = Sparse.model_validate({"ratio": 0.6, "method": "wanda", "low_rank": {}})
    masks = step.apply(model, Calibration.of_blocks(model, blocks[:4])).masks
    recipe = Perp(rank=2, batch=4, checkpoint_every=2)

    def run(place: str) -> Any:
        return heal(deepcopy(model), recipe, blocks[8:24], 64 * 24, directory=tmp_path / place, masks=masks)

    whole = run("whole")
    step_of, taken = healing.Training._step, []

    def breaks(self: Any) -> None:
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(1)
        step_of(self)

    healing.Training._step = breaks  # type: ignore[method-assign]  # put back below
    try:
        with pytest.raises(KeyboardInterrupt):
            run("broken")
    finally:
        healing.Training._step = step_of  # type: ignore[method-assign]  # as it was
    again = run("broken")
    assert again.losses.tolist() == whole.losses.tolist()
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_compress_writes_them_and_a_second_call_does_nothing_again(
    tiny_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.compress import compression

    steps = [{"method": "slim", "ratio": 0.6}]
    config = configured(tiny_run, tmp_path, steps=steps, recover={"kind": "perp", "batch": 8, "lr": 5e-3})
    result = compress(config)
    assert result.healed is not None
    assert result.healed < result.cut
    cut_model, _ = folder.load(tmp_path / "cut")
    healed, tokenizer = folder.load(Path(result.folder))
    assert factors(healed) == factors(cut_model) != set()
    ids = tokenizer("oak pine", return_tensors="pt").input_ids
    assert healed.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4
    report = json.loads(Path(result.report).read_text())
    assert report["steps"][0]["low_rank"]["parameters"] == sum(healed.get_parameter(n).numel() for n in factors(healed))
    assert report["after"]["flops_per_token"] > report["before"]["flops_per_token"]

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it was done before")

    monkeypatch.setattr(compression, "shrink", never)
    assert compress(config).healed == result.healed
