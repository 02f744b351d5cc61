"""Models of every shape come back from their folders as they were; broken folders are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.compress import folder
from pipeline.compress.architecture import anatomy
from pipeline.compress.surgery import cut, keep_tokens, remove_branches
from pipeline.errors import TamisError
from tests.compress.conftest import make_tiny
from tests.compress.test_surgery import MIXTURES, NAMES, greedy, mixture

torch = pytest.importorskip("torch")


def uniform(model: Any) -> None:
    groups = anatomy(model).units("neuron")
    cut(model, groups, {u.name: np.arange(8) for u in groups})


def ragged(model: Any) -> None:
    groups = anatomy(model).units("neuron", "kv_group")
    cut(model, groups, {"0.neuron": np.arange(10), "1.kv_group": np.array([0])})


def branch(model: Any) -> None:
    remove_branches(model, [(0, "attention")])


def narrow(model: Any, channels: tuple[int, ...] = (1, 3, 17, 20)) -> None:
    groups = anatomy(model).units("hidden")
    cut(model, groups, {"hidden": np.array(channels)})


def odd(model: Any) -> None:
    """A width that is no multiple of the heads."""
    narrow(model, (1, 3, 17))


def heads(model: Any) -> None:
    groups = anatomy(model).units("kv_group")
    cut(model, groups, {u.name: np.array([0]) for u in groups})


def block(model: Any) -> None:
    remove_branches(model, [(0, "block")])


def mixed(model: Any) -> None:
    """All of them, one after the other."""
    for change in (ragged, odd, branch):
        change(model)


ANY_HEAD = ("llama", "qwen2", "qwen3", "vit")
PLAIN = {uniform: NAMES, block: NAMES, heads: ANY_HEAD, narrow: ANY_HEAD, odd: ANY_HEAD[1:]}
"""Changes after which the models named can be described by a configuration."""


@pytest.mark.parametrize("change", [uniform, ragged, branch, narrow, odd, heads, block, mixed])
@pytest.mark.parametrize("name", NAMES)
def test_what_was_saved_is_loaded(name: str, change: Any, tmp_path: Path) -> None:
    tiny = make_tiny(name)
    change(tiny.model)
    before = tiny.output()
    folder.save(tiny.model, None, tmp_path / "model", {})
    again, tokenizer = folder.load(tmp_path / "model")
    assert tokenizer is None
    assert torch.equal(before, tiny.output(again))
    assert again.config.to_diff_dict() == tiny.model.config.to_diff_dict() | {"architectures": [type(again).__name__]}
    assert folder.per_layer(again) == folder.per_layer(tiny.model)
    if name in NAMES[:4]:
        assert torch.equal(greedy(tiny.model, tiny), greedy(again, tiny))
    assert (tmp_path / "model" / folder.SHAPES).exists() == (name not in PLAIN.get(change, ()))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2"])
def test_a_uniform_model_needs_transformers_alone(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny = make_tiny(name)
    for change in (uniform, heads, narrow, block) if name != "gpt2" else (uniform, block):
        change(tiny.model)
    folder.save(tiny.model, None, tmp_path / "model", {})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(tiny.output(), tiny.output(again))
    assert torch.equal(greedy(tiny.model, tiny), greedy(again, tiny))


@pytest.mark.parametrize("change", [ragged, branch])
def test_transformers_alone_fails_on_a_ragged_model(change: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = make_tiny("llama").model
    change(model)
    folder.save(model, None, tmp_path / "model", {})
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert "transformers alone does not read it" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("uneven", [False, True])
def test_a_mixture_with_fewer_experts_is_loaded(name: str, uneven: bool, tmp_path: Path) -> None:
    model, ids = mixture(name), torch.arange(24).view(2, 12)
    groups = anatomy(model).units("expert")
    cut(model, groups, {u.name: np.array([1, 3] if i or not uneven else [2]) for i, u in enumerate(groups)})
    folder.save(model, None, tmp_path / "model", {})
    again, _ = folder.load(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    assert (tmp_path / "model" / folder.SHAPES).exists() == (uneven and len(groups) > 1)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_added_biases_are_loaded(name: str, tmp_path: Path) -> None:
    """Llama's configuration knows biases of all matrices together, so the others are 0; Qwen2's knows none of these."""
    tiny = make_tiny(name)
    for layer in tiny.model.model.layers:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.bias = torch.nn.Parameter(torch.randn(module.out_features))
    folder.save(tiny.model, None, tmp_path / "model", {})
    again, _ = folder.load(tmp_path / "model")
    assert torch.equal(tiny.output(), tiny.output(again))
    assert (tmp_path / "model" / folder.SHAPES).exists() == (name == "qwen2")


def test_a_trained_model_speaks_as_before(tiny_trained: Any, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    model, tokenizer, _ = tiny_trained
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    ragged(model)
    folder.save(model, fast, tmp_path / "model", {})
    again, read = folder.load(tmp_path / "model")
    ids = fast("alder birch cedar", return_tensors="pt").input_ids
    given = [m.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0) for m in (model, again)]
    assert torch.equal(*given)
    assert read.decode(given[1][0]) == fast.decode(given[0][0])


def test_a_trimmed_vocabulary_is_loaded(tmp_path: Path) -> None:
    tiny = make_tiny("llama")
    keep_tokens(tiny.model, np.arange(50))
    folder.save(tiny.model, None, tmp_path / "model", {})
    again, _ = folder.load(tmp_path / "model")
    assert again.config.vocab_size == 50
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight


def test_weights_are_loaded_in_the_type_that_is_asked_for(tmp_path: Path) -> None:
    for change in (uniform, ragged):
        model = make_tiny("llama").model.to(torch.bfloat16)
        change(model)
        folder.save(model, None, tmp_path / "model", {})
        assert {p.dtype for p in folder.load(tmp_path / "model")[0].parameters()} == {torch.float32}
        half, _ = folder.load(tmp_path / "model", dtype="bfloat16")
        assert torch.equal(half.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
        assert half.model.rotary_emb.inv_freq.dtype == torch.float32


def test_masks_come_back(tmp_path: Path) -> None:
    model = make_tiny("llama").model
    torch.manual_seed(0)
    masks = {n: torch.rand(p.shape) > 0.5 for n, p in model.named_parameters() if "proj" in n}
    masks["odd"] = torch.tensor([True, False, True])
    folder.save(model, None, tmp_path / "model", {}, masks)
    again = folder.masks(tmp_path / "model")
    assert again.keys() == masks.keys()
    assert all(again[n].dtype == torch.bool and torch.equal(again[n], m) for n, m in masks.items())
    bits = sum(m.numel() for m in masks.values())
    assert (tmp_path / "model" / folder.MASKS).stat().st_size < bits / 8 + 4096
    folder.save(model, None, tmp_path / "model", {})
    assert folder.masks(tmp_path / "model") == {}


# Broken folders.


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = make_tiny("llama").model
    ragged(model)
    folder.save(model, None, tmp_path / "model", {})
    return tmp_path / "model"


@pytest.mark.parametrize("change", [uniform, ragged])
def test_weights_that_were_cut_off_are_refused(change: Any, tmp_path: Path) -> None:
    model = make_tiny("llama").model
    change(model)
    folder.save(model, None, tmp_path / "model", {})
    weights = next((tmp_path / "model").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(TamisError, match=r"model cannot be read as a model: .*"):
        folder.load(tmp_path / "model")


def test_writing_that_was_cut_off_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    model = make_tiny("llama").model
    ragged(model)

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", full_disk)
        with pytest.raises(OSError, match="no space"):
            folder.save(model, None, tmp_path / "model", {})
    with pytest.raises(TamisError, match="writing it was cut off: write it again"):
        folder.load(tmp_path / "model")
    folder.save(model, None, tmp_path / "model", {})
    folder.load(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TamisError, match=r"it has no config\.json"):
        folder.load(tmp_path)


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda s: s | {"format": 2}, "has format 2; this version of Tamis reads 1"),
        (lambda s: s | {"architecture": "LlamaConfig"}, "transformers has no model 'LlamaConfig'"),
        (lambda s: {"format": 1}, "cannot be read as a model"),
        (lambda s: _changed(s, "0", "intermediate_size", 40), r"layer 0 is .* in its weights"),
        (lambda s: _changed(s, "1", "num_attention_heads", 4), r"layer 1 is .* in its weights"),
        (lambda s: _changed(s, "1", "skip", ["mlp"]), "which the model has not"),
    ],
)
def test_shapes_that_are_not_those_of_the_weights_are_refused(saved: Path, edit: Any, why: str) -> None:
    sidecar = saved / folder.SHAPES
    sidecar.write_text(json.dumps(edit(json.loads(sidecar.read_text()))))
    with pytest.raises(TamisError, match=why):
        folder.load(saved)


def _changed(sidecar: Any, layer: str, key: str, value: Any) -> Any:
    sidecar["per_layer_config"][layer][key] = value
    return sidecar


def test_weights_that_lack_something_are_refused(saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / folder.RAGGED)
    del weights["model.norm.weight"]
    save_file(weights, saved / folder.RAGGED)
    with pytest.raises(TamisError, match=r"its weights lack model\.norm\.weight"):
        folder.load(saved)
    folder.save(make_tiny("llama").model, None, tmp_path / "plain", {})
    plain = tmp_path / "plain" / "model.safetensors"
    weights = load_file(plain)
    del weights["model.norm.weight"]
    save_file(weights, plain, {"format": "pt"})
    with pytest.raises(TamisError, match=r"its weights lack model\.norm\.weight"):
        folder.load(tmp_path / "plain")


def test_a_tokenizer_of_another_model_is_refused(tiny_trained: Any, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tiny_trained[1], eos_token="<|endoftext|>")
    folder.save(make_tiny("llama").model, fast, tmp_path / "model", {})
    with pytest.raises(TamisError, match=r"tokenizer has \d+ tokens, its model 96: they do not match"):
        folder.load(tmp_path / "model")


# Counts and the card.


def test_counts_of_a_known_model() -> None:
    """SmolLM2-135M: 134,515,008 parameters; 9.13e8 FLOPs a token, forward and backward, at T = 512, 1.232e9 at 2048."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    counts = folder.count(model)
    assert counts["all"] == 134_515_008
    assert counts["non_embedding"] == 134_515_008 - 49152 * 576
    assert counts["prunable"] == 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert 3 * float(counts["flops_per_token"] or 0) == pytest.approx(9.13e8, rel=1e-3)
    assert 3 * float(folder.count(model, length=2048)["flops_per_token"] or 0) == pytest.approx(1.232e9, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_ratios_by_four_denominators(name: str) -> None:
    model = make_tiny(name).model
    before = folder.count(model)
    uniform(model)
    after = folder.count(model)
    removed = folder.ratios(before, after)
    gone = sum(8 * u.cost for u in anatomy(make_tiny(name).model).units("neuron"))
    assert removed["all"] == pytest.approx(gone / float(before["all"] or 0))
    assert removed["prunable"] > removed["non_embedding"] > 0
    assert ("flops_per_token" in removed) == (name in NAMES[:4])
    with pytest.raises(ValueError, match="at 512 and at 8 tokens"):
        folder.ratios(before, folder.count(model, length=8))


def test_masked_weights_do_not_count_but_cost_their_flops() -> None:
    model = make_tiny("llama").model
    name, weight = "model.layers.0.mlp.up_proj.weight", model.model.layers[0].mlp.up_proj.weight
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[0] = False
    removed = folder.ratios(folder.count(model), folder.count(model, {name: mask}))
    assert removed["all"] == pytest.approx(32 / sum(p.numel() for p in model.parameters()))
    assert removed["flops_per_token"] == 0


def test_the_card_says_what_went_and_nothing_in_it_marks_up(tmp_path: Path) -> None:
    model = make_tiny("llama").model
    before = folder.count(model)
    uniform(model)
    card = {
        "data": "a | b\n# heading <script>alert(1)</script> [x](javascript:y)",
        "data_fingerprint": "0" * 32,
        "steps": [{"kind": "width", "kept": {"0.neuron": "40 of 48"}}],
        "perplexity": {"dense": 3.25, "cut": 4.5},
        "before": before,
        "after": folder.count(model),
    }
    folder.save(model, None, tmp_path / "model", card)
    text = (tmp_path / "model" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert r"| data | a \| b \# heading \<script\>alert(1)\</script\> \[x\](javascript:y) |" in text
    assert "0.neuron" in text
    assert "\n# heading" not in text
    share = folder.ratios(before, card["after"])
    for name, words in folder.DENOMINATORS.items():
        assert f"| {words} |" in text
        assert f"| {share[name]:.2%} |" in text
