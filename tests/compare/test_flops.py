"""FLOPs: known totals, torch's own counter, and the costs of evaluation.md's table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.compare import flops
from pipeline.compare.flops import LayerShape, ModelShape
from pipeline.compress.architecture import anatomy
from pipeline.errors import ConfigError

torch = pytest.importorskip("torch")

SMOLLM2 = ModelShape(576, 49152, (LayerShape(9, 3, 64, 1536, vectors=1152),) * 30, vectors=576)
STUDENT = SMOLLM2.cut(heads=6, kv_heads=2, width=1152)


def configs() -> dict[str, Callable[..., Any]]:
    from transformers import GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

    small = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 48,
        "vocab_size": 96,
        "max_position_embeddings": 64,
    }
    grouped = small | {"num_attention_heads": 4, "num_key_value_heads": 2}
    return {
        "llama": lambda **more: LlamaConfig(**grouped | more),
        "llama tied": lambda **more: LlamaConfig(**grouped | {"tie_word_embeddings": True, "mlp_bias": True} | more),
        "qwen2": lambda **more: Qwen2Config(**grouped | more),
        "qwen3": lambda **more: Qwen3Config(**grouped | {"head_dim": 16} | more),
        "gpt2": lambda **more: GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=3, n_head=4, **more),
    }


def made(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(configs()[name](attn_implementation="eager"))


def counted(model: Any, rows: int = 2, length: int = 11, backward: bool = False) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.arange(rows * length).reshape(rows, length) % 96
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, use_cache=False).logits
        if backward:
            logits.sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", list(configs()))
def test_forward_and_backward_are_what_torch_counts(name: str) -> None:
    model = made(name)
    shape = ModelShape.of(model)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert 2 * 11 * shape.forward(11) == counted(model)
    assert 2 * 11 * flops.full(shape, 11) == counted(model, backward=True)
    assert ModelShape.of_config(configs()[name]()) == shape


@pytest.mark.parametrize("name", list(configs()))
@pytest.mark.parametrize("kinds", [("kv_group", "neuron"), ("neuron",), ("hidden",)])
def test_a_ragged_cut_counts_as_what_it_is(name: str, kinds: tuple[Any, ...]) -> None:
    from pipeline.compress.surgery import cut

    model = made(name)
    before = ModelShape.of(model)
    groups = anatomy(model).units(*kinds)
    removal = {u.name: np.arange(1 + (u.layer + 1) % 2 * (u.count > 4)) for u in groups if u.layer != 0}
    cut(model, groups, removal)
    shape = ModelShape.of(model)
    assert shape.parameters == sum(p.numel() for p in model.parameters()) < before.parameters
    assert 2 * 11 * shape.forward(11) == counted(model) < 2 * 11 * before.forward(11)
    assert 2 * 11 * flops.full(shape, 11) == counted(model, backward=True)
    assert len(set(shape.layers)) > 1 or kinds == ("hidden",)


def test_a_cut_that_is_planned_is_the_cut_that_is_made() -> None:
    from pipeline.compress.surgery import cut

    for name in ("llama tied", "qwen2", "gpt2"):
        model = made(name)
        planned = ModelShape.of(model)
        groups = anatomy(model).units("kv_group", "neuron")
        width, kv = planned.layers[0].width - 5, planned.layers[0].kv_heads - 1
        heads = kv * planned.layers[0].heads // planned.layers[0].kv_heads
        cut(model, groups, {u.name: np.arange(1 if u.kind == "kv_group" else 5) for u in groups})
        assert ModelShape.of(model) == planned.cut(heads, kv, width)


def test_known_totals() -> None:
    from transformers import LlamaConfig, Qwen2Config

    llama3 = {
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
    }
    qwen = {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    smol = {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    }  # fmt: skip
    assert ModelShape.of_config(LlamaConfig(**smol)) == SMOLLM2
    assert SMOLLM2.parameters == 134_515_008
    assert ModelShape.of_config(LlamaConfig()).parameters == 6_738_415_616  # Llama-2-7B
    assert ModelShape.of_config(LlamaConfig(**llama3)).parameters == 8_030_261_248  # Llama-3.1-8B
    assert ModelShape.of_config(Qwen2Config(**qwen)).parameters == 494_032_768  # Qwen2.5-0.5B


def test_numbers_of_the_specification() -> None:
    assert SMOLLM2.forward(512) == pytest.approx(3.043e8, rel=2e-4)
    assert STUDENT.forward(512) == pytest.approx(2.350e8, rel=2e-4)
    assert STUDENT.parameters / 1e6 == pytest.approx(105.8, abs=0.05)
    assert flops.full(SMOLLM2, 512) == pytest.approx(9.13e8, rel=2e-4)
    assert flops.full(SMOLLM2, 2048) == pytest.approx(1.232e9, rel=5e-4)
    six = 6 * SMOLLM2.parameters
    assert 1 - six / flops.full(SMOLLM2, 512) == pytest.approx(0.116, abs=5e-4)
    assert 1 - six / flops.full(SMOLLM2, 2048) == pytest.approx(0.345, abs=5e-4)
    without_embedding = 6 * (SMOLLM2.parameters - 49152 * 576)
    assert 1 - without_embedding / flops.full(SMOLLM2, 512) == pytest.approx(0.30, abs=5e-3)
    assert flops.adapter_parameters(SMOLLM2, 8) == 2_442_240
    assert flops.lora(SMOLLM2, 512, 8) / flops.full(SMOLLM2, 512) == pytest.approx(0.683, abs=5e-4)
    assert flops.distillation(STUDENT, SMOLLM2, 512) == pytest.approx(1.0095e9, rel=2e-4)
    assert flops.adam_step(SMOLLM2) / (200 * flops.full(SMOLLM2, 512)) < 0.01
    assert flops.full(SMOLLM2, 2048) * 2e12 == pytest.approx(2.5e21, rel=0.02)  # the parent's pretraining


def test_every_activity_on_two_layers_by_hand() -> None:
    layer = LayerShape(heads=2, kv_heads=1, head_dim=4, width=10, vectors=16)
    shape = ModelShape(8, 20, (layer, LayerShape(width=6, matrices=2, vectors=8)), vectors=8)
    attention, gated, plain, head = 8 * 8 * 2 + 2 * 8 * 4, 3 * 8 * 10, 2 * 8 * 6, 8 * 20
    assert shape.matmul_parameters == attention + gated + plain + head == 688
    assert shape.parameters == 688 + 16 + 8 + 8
    f = 2 * 688 + 4 * 8 * 5
    assert shape.forward(5) == f
    assert (flops.full(shape, 5), flops.full(shape, 5, recompute=True)) == (3 * f, 4 * f)
    inputs = [8, 8, 8, 8, 8, 8, 10, 8, 6]
    outputs = [8, 4, 4, 8, 10, 10, 8, 6, 8]
    assert shape.linears == tuple(zip(inputs, outputs, strict=True))
    assert flops.statistics(shape, 5) == f + 2 * sum(inputs)
    assert flops.layerwise(shape, 5) == 2 * f
    assert flops.hessian(shape, 5) == 2 * f + 2 * sum(i * i for i in inputs)
    assert flops.hessian_solve(shape) == sum(i**3 + o * i**2 for i, o in zip(inputs, outputs, strict=True))
    assert flops.gradients(shape, 5) == 3 * f
    assert flops.zeroth_order(shape, 5, groups=3, draws=2) == 12 * f
    assert flops.last_layers(shape, 5, 1) == f + 2 * (2 * (plain + head))
    assert flops.last_layers(shape, 5, 2) == flops.full(shape, 5)
    assert flops.soft_prompt(shape, 5, 3) == 2 * (2 * 688 + 4 * 8 * 8) * 8 / 5
    assert flops.search([shape, shape.top(1)], 5) == f + 2 * (plain + head)
    assert flops.scoring(5, shape, shape) == 2 * f
    assert flops.distillation(shape, shape, 5, cached=True) == 3 * f
    with pytest.raises(ConfigError, match="last 3 of 2"):
        shape.top(3)


def test_torch_counts_lora_and_last_layers_within_what_they_are_charged() -> None:
    """Charged a little more: no gradient is passed below the first trained matrix, which the formulas leave in."""
    from peft import LoraConfig, get_peft_model

    model = made("llama")
    shape = ModelShape.of(model)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=names, lora_dropout=0.0))
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == flops.adapter_parameters(shape, 2)
    charged = 2 * 11 * flops.lora(shape, 11, 2)
    assert 0.85 * charged < counted(adapted, backward=True) <= charged

    model = made("llama").requires_grad_(False)
    model.model.layers[-1].requires_grad_()
    model.lm_head.requires_grad_()
    charged = 2 * 11 * flops.last_layers(shape, 11, 1)
    assert 0.9 * charged < counted(model, backward=True) <= charged


def test_positions_that_a_query_sees() -> None:
    assert flops.keys(512) == 512
    assert flops.keys(512, causal=True) == 256.5
    assert flops.keys(512, window=128) == 128
    assert flops.keys(100, window=128) == 100
    assert flops.keys([3, 1]) == 10 / 4
    assert flops.keys([3, 1], causal=True) == 7 / 4
    assert flops.keys(4, causal=True, window=2) == (1 + 2 + 2 + 2) / 4
    for wrong in (0, [], [3, 0]):
        with pytest.raises(ConfigError, match="one token"):
            flops.keys(wrong)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.booleans(), st.none() | st.integers(1, 40))
def test_positions_counted_one_by_one(lengths: list[int], causal: bool, window: int | None) -> None:
    w = window or 99
    seen = sum(min(w, i + 1 if causal else t) for t in lengths for i in range(t))
    assert flops.keys(lengths, causal, window) == pytest.approx(seen / sum(lengths))


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "olmoe"])
def test_experts_cost_what_a_token_goes_through(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 24, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12, "vocab_size": 96,
        "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **options))
    shape = ModelShape.of(model)
    assert (shape.layers[0].experts, shape.layers[0].chosen) == (4, 2)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert 2 * 11 * shape.forward(11) == counted(model)


def test_branches_and_layers_that_went_cost_nothing() -> None:
    from pipeline.compress.surgery import remove_branches

    for name in ("qwen2", "gpt2"):
        model = made(name)
        remove_branches(model, [(0, "attention"), (1, "block"), (2, "mlp")])
        shape = ModelShape.of(model)
        assert [(bool(layer.heads), bool(layer.width)) for layer in shape.layers] == [(False, True), (True, False)]
        assert shape.parameters == sum(p.numel() for p in model.parameters())
        assert 2 * 11 * shape.forward(11) == counted(model)


def test_digest_and_refusals() -> None:
    from transformers import BertConfig, BertForMaskedLM

    assert SMOLLM2.digest == SMOLLM2.cut().digest != STUDENT.digest
    bert = BertForMaskedLM(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=30)
    )
    with pytest.raises(ConfigError, match="decoders only"):
        ModelShape.of(bert)
