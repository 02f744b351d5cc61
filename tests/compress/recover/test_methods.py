"""Every way to heal: the published numbers of small examples, what is trained and what is not, the gap that closes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.compress.recover.base import Cost, Setup
from pipeline.compress.recover.distill import Distill, soft_share
from pipeline.compress.recover.full import Full
from pipeline.compress.recover.last_layers import LastLayers
from pipeline.compress.recover.lora import Lora, shares
from pipeline.compress.recover.perp import Perp
from pipeline.compress.steps.width import Width
from pipeline.errors import ConfigError
from tests.tiny_lm import sentences

torch = pytest.importorskip("torch")

from pipeline.compress.calibration import Calibration  # noqa: E402
from pipeline.compress.healing import heal  # noqa: E402
from pipeline.compress.recover import _losses  # noqa: E402
from pipeline.compress.recover._distill import balance  # noqa: E402
from pipeline.compress.recover._masked import LowRank, MaskLora, ScaleLora  # noqa: E402
from pipeline.models.training import Shape, lm_loss, new_lm, pack  # noqa: E402


def student(seed: int = 0, **sizes: int) -> Any:
    shape = {"hidden": 16, "layers": 3, "heads": 4, "kv_heads": 2, "mlp": 24, "vocab": 257, "context": 16} | sizes
    return new_lm(Shape(**shape), seed)


def ids(rows: int = 3, seed: int = 0, vocabulary: int = 257) -> Any:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, vocabulary, (rows, 16)))


def halves(model: Any) -> dict[str, Any]:
    return {
        name: torch.arange(p.numel()).view_as(p) % 2 == 0
        for name, p in model.named_parameters()
        if p.ndim == 2 and "layers" in name
    }


def logits(model: Any, read: Any) -> Any:
    with torch.no_grad():
        return model.eval()(input_ids=read).logits


# Distillation


def test_forward_kl_of_three_logits() -> None:
    teacher, same = torch.tensor([[2.0, 1.0, 0.0]]), torch.ones(1, 3)
    assert float(_losses.forward_kl(teacher, same)) == pytest.approx(0.266217, abs=1e-6)
    assert float(_losses.forward_kl(teacher, same, 2.0)) == pytest.approx(0.313684, abs=1e-6)
    assert float(_losses.forward_kl(teacher, same, 2.0)) / 4 == pytest.approx(0.078421, abs=1e-6)
    assert float(_losses.forward_kl(teacher, teacher)) == 0.0


def test_soft_and_hard_labels_mixed_and_their_gradient() -> None:
    z = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    ce = torch.nn.functional.cross_entropy(z, torch.tensor([0]), reduction="sum")
    kl = _losses.forward_kl(torch.tensor([[0.7, 0.2, 0.1]]).log(), z)
    loss = 0.5 * ce + 0.5 * kl
    loss.backward()
    values = [x.detach().item() for x in (ce, kl, loss)]
    assert values == pytest.approx([0.407606, 0.005787, 0.206697], abs=1e-6)
    assert z.grad is not None
    assert z.grad[0].tolist() == pytest.approx([-0.184759, 0.144728, 0.040031], abs=1e-6)
    assert float(z.grad.sum()) == pytest.approx(0, abs=1e-7)


def test_the_less_of_the_data_is_kept_the_more_the_teacher_says() -> None:
    assert [soft_share(f) for f in (1e-9, 0.1, 0.5, 1.0)] == pytest.approx([1.0, 0.95, 0.75, 0.5])
    assert Distill(keep_fraction=0.1).weights == pytest.approx((0.05, 0.95))


def test_the_weight_of_hidden_states_balances_them_with_the_logits() -> None:
    assert float(balance(torch.tensor(0.9), torch.tensor(0.3))) == pytest.approx(3.0)
    assert float(balance(torch.tensor(0.9), torch.tensor(0.0))) == 0.0
    model, teacher = student(), student(1)
    alone = Distill().begin(Setup(copy.deepcopy(model), ids().numpy(), teacher)).loss(ids())
    for hidden in ("cosine", "mse", "normalised"):
        both = Distill(hidden=hidden).begin(Setup(copy.deepcopy(model), ids().numpy(), teacher)).loss(ids())
        assert float(both.detach()) == pytest.approx(2 * float(alone.detach()), rel=1e-5)


@pytest.mark.parametrize("hidden", ["none", "cosine", "mse", "normalised"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(hidden: Any) -> None:
    weight = None if hidden == "none" else 1.0
    setup = Setup(student(), ids().numpy(), student())
    session = Distill(hidden=hidden, hidden_weight=weight).begin(setup)
    session.loss(ids()).backward()
    assert max(float(p.grad.abs().max()) for p in session.parameters().values() if p.grad is not None) < 1e-4


def test_distillation_without_its_teacher_is_training_bit_for_bit(tmp_path: Path) -> None:
    blocks, healed = ids(20).numpy(), []
    for recipe in (Full(batch=4), Distill(batch=4, kl_weight=0, ce_weight=1)):
        given = heal(student(), recipe, blocks, 640, directory=tmp_path / recipe.kind, teacher=student(1))
        healed.append(given)
    assert healed[0].losses.tolist() == healed[1].losses.tolist()
    for a, b in zip(healed[0].model.parameters(), healed[1].model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_labels_and_teacher_are_weighed_as_they_are_told() -> None:
    """L = ce_weight CE + kl_weight KL, by hand from the two models' logits."""
    shape = Shape(hidden=16, layers=1, heads=2, kv_heads=1, mlp=16, vocab=300, context=8)
    student, teacher = new_lm(shape, 0), new_lm(shape, 1)
    blocks = np.random.default_rng(0).integers(0, 300, (2, 8))
    session = Distill(ce_weight=0.7, kl_weight=0.2).begin(Setup(student, blocks, teacher))
    ids = torch.from_numpy(blocks)
    found = session.loss(ids).detach()
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids).logits[:, :-1].flatten(0, 1) for m in (student, teacher))
    ce = torch.nn.functional.cross_entropy(ours, ids[:, 1:].flatten(), reduction="sum")
    kl = (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum()
    assert float(found) == pytest.approx(float(0.7 * ce + 0.2 * kl), rel=1e-5)


def test_a_trimmed_vocabulary_renormalises_the_teacher_and_drops_positions_without_a_label() -> None:
    kept = np.sort(np.random.default_rng(1).choice(300, 257, replace=False))
    model, teacher = student(), student(1, vocab=300)
    read = ids()
    read[1, 4] = -1
    session = Distill().begin(Setup(model, read.numpy(), teacher, vocabulary=kept))
    said = logits(teacher, torch.from_numpy(kept)[read.clamp_min(0)])[..., torch.from_numpy(kept)][:, :-1]
    log_t, log_s = said.log_softmax(-1), logits(model, read.clamp_min(0))[:, :-1].log_softmax(-1)
    kl = (log_t.exp() * (log_t - log_s)).sum(-1)
    assert float(session.loss(read).detach()) == pytest.approx(float(kl.sum() - kl[1, 3]), rel=1e-5)


def test_logits_in_parts_teach_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for chunk in (1 << 25, 257 * 7):
        monkeypatch.setattr(_losses, "CHUNK_LOGITS", chunk)
        session = Distill(ce_weight=0.5).begin(Setup(student(), ids().numpy(), student(1)))
        session.loss(ids()).backward()
        gradients.append([p.grad for p in session.parameters().values()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_narrower_student_learns_its_way_up_to_the_teachers_width(tmp_path: Path) -> None:
    narrow, blocks = student(hidden=8), ids(16).numpy()
    recipe = Distill(hidden="cosine", batch=4, lr=1e-2)
    healed = heal(narrow, recipe, blocks, 16 * 16, directory=tmp_path, teacher=student(1))
    assert healed.losses[-1] < healed.losses[0]
    assert not any("projection" in name for name, _ in healed.model.named_parameters())
    assert recipe.cost(narrow, student(1)) == Cost(teacher=True, extra=6.0 * 2 * 8 * 16)
    assert recipe.cost(student(), student(1)) == Cost(teacher=True)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"keep_fraction": 0.5, "ce_weight": 0.5}, "keep_fraction sets"),
        ({"kl_weight": 0}, "nothing would be learned"),
        ({"kl_weight": 0, "ce_weight": 1, "hidden": "mse"}, "kl_weight is 0"),
        ({"temperature": 0}, "greater than 0"),
    ],
)
def test_weights_of_distillation_that_make_no_sense(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Distill.model_validate(fields)


def test_a_teacher_with_another_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"257 token ids, the teacher 300.*share a tokenizer"):
        Distill().begin(Setup(student(), ids().numpy(), student(vocab=300)))
    with pytest.raises(ConfigError, match="3 are said to be kept"):
        Distill().begin(Setup(student(), ids().numpy(), student(vocab=300), vocabulary=np.arange(3)))


# PERP


def test_masked_corrections_of_a_matrix() -> None:
    weight = torch.tensor([[1.0, 0.0, 2.0], [0.0, -1.0, 0.0]])
    a, b = torch.tensor([[1.0, 2.0, -1.0]]), torch.tensor([[0.5], [-1.0]])
    given = {}
    for kind in (MaskLora, LowRank, ScaleLora):
        correction = kind(weight, weight != 0, 1, 2.0)
        with torch.no_grad():
            correction.a.copy_(a)
            correction.b.copy_(b)
            given[kind] = correction(weight).tolist()
    assert given[MaskLora] == [[2, 0, 1], [0, -5, 0]]
    assert given[LowRank] == [[2, 2, 1], [-2, -5, 2]]  # which fills the zeros
    assert given[ScaleLora] == [[0.5, 0, -1], [0, 2, 0]]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("adapter", ["masklora", "scalelora", "lora_prune"])
def test_merging_perp_changes_no_bit_unless_it_masks_late(
    tiny_models: dict[str, Any], family: str, adapter: Any
) -> None:
    tiny = tiny_models[family]
    names = [n for n, p in tiny.model.named_parameters() if p.ndim == 2 and (".layers." in n or ".h." in n)]
    masks = {
        n: torch.arange(tiny.model.get_parameter(n).numel()).view_as(tiny.model.get_parameter(n)) % 3 > 0 for n in names
    }
    with torch.no_grad():
        for name, mask in masks.items():
            tiny.model.get_parameter(name).mul_(mask)
    before = tiny.output()
    session = Perp(adapter=adapter, rank=4).begin(Setup(tiny.model, np.zeros((1, 2), np.int32), masks=masks))
    assert torch.equal(tiny.output(), before)  # it begins as the model it was
    with torch.no_grad():
        for name, parameter in session.parameters().items():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    learned = tiny.output()
    assert not torch.equal(learned, before)
    merged = session.merge()
    assert torch.equal(tiny.output(merged), learned) == (adapter != "lora_prune")
    assert all(not merged.get_parameter(n)[~m].any() for n, m in masks.items())
    assert all(p.requires_grad for p in merged.parameters())


def test_perp_without_corrections_trains_norms_and_biases_alone(tiny_models: dict[str, Any]) -> None:
    model = tiny_models["qwen2"].model
    session = Perp(adapter=None).begin(Setup(model, ids().numpy()))
    trained = set(session.parameters())
    assert trained == {n for n, p in model.named_parameters() if p.ndim == 1}
    assert {n.rpartition(".")[2] for n in trained} == {"weight", "bias"}
    norms = Perp(adapter=None, biases=False).begin(Setup(model, ids().numpy())).parameters()
    assert trained - set(norms) == {n for n in trained if n.endswith("bias")}


def test_reconstruction_teaches_every_block_by_itself() -> None:
    """By hand: each block on the teacher's own states; at the start 0 where nothing was pruned."""
    teacher, model, read = student(), student(), ids(2)
    masks = halves(model)
    whole = {name: torch.ones_like(mask) for name, mask in masks.items()}
    session = Perp(reconstruct=True, rank=2).begin(Setup(copy.deepcopy(teacher), read.numpy(), teacher, masks=whole))
    assert float(session.loss(read).detach()) == pytest.approx(0, abs=1e-9)
    session = Perp(reconstruct=True, rank=2).begin(Setup(model, read.numpy(), teacher, masks=masks))
    loss = session.loss(read)
    with torch.no_grad():
        states: list[Any] = []
        hooks = [
            block.register_forward_hook(lambda module, args, out: states.append((args[0], out)))
            for block in teacher.model.layers
        ]
        teacher(input_ids=read)
        for hook in hooks:
            hook.remove()
        rotations = teacher.model.rotary_emb(states[0][0], torch.arange(16)[None])
        expected = 0.0
        for block, (given, wanted) in zip(model.model.layers, states, strict=True):
            found = block(given, position_embeddings=rotations)
            expected += float((found - wanted).square().sum() / wanted.square().sum())
    assert float(loss.detach()) == pytest.approx(expected * 2 * 15, rel=1e-4)
    loss.backward()
    trained = session.parameters()
    assert all(name.startswith("model.layers.") for name in trained)
    assert all(p.grad is not None for p in trained.values())
    with pytest.raises(ValidationError, match="reconstruct is of blocks"):
        Perp(reconstruct=True, head=True)
    with pytest.raises(ConfigError, match=r"the student has \(3, 16\) \(blocks, channels\), the teacher \(2, 16\)"):
        Perp(reconstruct=True).begin(Setup(student(), ids().numpy(), student(layers=2), masks=masks))


def test_reconstruction_closes_the_gap_without_labels(tiny_trained: Any, tmp_path: Path) -> None:
    dense, _, blocks = tiny_trained
    cut = copy.deepcopy(dense)
    from pipeline.compress.steps.sparse import Sparse

    step = Sparse.model_validate({"ratio": 0.6, "method": "magnitude"})
    masks = step.apply(cut, Calibration.of_blocks(cut, blocks[:4])).masks
    recipe = Perp(reconstruct=True, rank=4, lr=5e-3, batch=4)
    before, known = (lm_loss(m, blocks[32:]) for m in (cut, dense))
    with pytest.raises(ConfigError, match="perp needs a teacher"):
        heal(copy.deepcopy(cut), recipe, blocks[:32], 64 * 8, directory=tmp_path / "none", masks=masks)
    healed = heal(cut, recipe, blocks[:32], 64 * 128, directory=tmp_path / "heal", masks=masks, teacher=dense)
    assert healed.losses[-1] < healed.losses[0]
    assert lm_loss(healed.model, blocks[32:]) < before - 0.3 * (before - known)
    assert all((healed.model.get_parameter(n)[~m] == 0).all() for n, m in masks.items())


def test_what_perp_refuses() -> None:
    with pytest.raises(ConfigError, match="no step left masks"):
        Perp().begin(Setup(student(), ids().numpy()))
    with pytest.raises(ConfigError, match="tied"):
        Perp(head=True).begin(Setup(student(), ids().numpy(), masks=halves(student())))
    with pytest.raises(ConfigError, match="nothing is left to train"):
        Perp(adapter=None, norms=False, biases=False).begin(Setup(student(), ids().numpy()))


# LoRA


def test_lora_of_rank_8_on_every_linear_of_smollm2() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(**sizes, intermediate_size=1536, vocab_size=49152, tie_word_embeddings=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    whole = sum(p.numel() for p in model.parameters())
    assert Lora().cost(model) == Cost("adapters", trained=2_442_240)
    assert 2_442_240 / whole == pytest.approx(0.018, abs=5e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_lora_trains_its_matrices_alone_and_merges_into_the_weights(tiny_models: dict[str, Any], family: str) -> None:
    tiny = tiny_models[family]
    before, names = tiny.output(), [n for n, _ in tiny.model.named_parameters()]
    cost = Lora(rank=4).cost(tiny.model)
    session = Lora(rank=4).begin(Setup(tiny.model, np.zeros((1, 2), np.int32)))
    torch.testing.assert_close(tiny.output(), before)
    assert all("lora_" in name for name in session.parameters())
    assert sum(p.numel() for p in session.parameters().values()) == cost.trained
    with torch.no_grad():
        for parameter in session.parameters().values():
            parameter.add_(0.05)
    learned = tiny.output()
    merged = session.merge()
    assert [n for n, _ in merged.named_parameters()] == names
    torch.testing.assert_close(tiny.output(merged), learned, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(learned, before)


def test_ranks_follow_importance_and_are_never_nothing() -> None:
    assert shares(8, np.array([0.2, 0.1, 0.1, 0.4])) == [8, 4, 4, 16]
    assert shares(2, np.array([1.0, 0.01, 0.01, 0.98])) == [4, 1, 1, 4]
    assert shares(8, np.ones(5)) == [8] * 5


def test_layers_that_turn_the_stream_more_get_larger_ranks() -> None:
    model = student()
    with torch.no_grad():
        for parameter in model.model.layers[2].mlp.parameters():
            parameter.mul_(30)
    session = Lora(ranks="importance", rank=4).begin(Setup(model, ids().numpy()))
    ranks = [model.model.layers[i].mlp.up_proj.lora_A["default"].weight.shape[0] for i in range(3)]
    assert ranks[2] > 4 > ranks[0]
    scales = {model.model.layers[i].mlp.up_proj.scaling["default"] for i in range(3)}
    assert len(scales) == 1
    assert session.merge() is model


def test_lora_refuses_a_sparse_model() -> None:
    with pytest.raises(ConfigError, match=r"fill the zeros.*use perp"):
        Lora().begin(Setup(student(), ids().numpy(), masks=halves(student())))


# The last layers


def test_only_the_last_layers_change(tmp_path: Path) -> None:
    model = student()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    healed = heal(model, LastLayers(layers=1, batch=4, lr=1e-2), ids(8).numpy(), 256, directory=tmp_path).model
    changed = {n for n, p in healed.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "layers.2." in n or n == "model.norm.weight"}
    assert all(p.requires_grad for p in healed.parameters())


def test_a_head_of_its_own_learns_too(tiny_models: dict[str, Any]) -> None:
    model = tiny_models["qwen2"].model
    assert "lm_head.weight" in LastLayers(layers=1).begin(Setup(model, ids().numpy())).parameters()
    assert "lm_head.weight" not in LastLayers(layers=1, head=False).begin(Setup(model, ids().numpy())).parameters()
    with pytest.raises(ConfigError, match="3 of 2 layers"):
        LastLayers().begin(Setup(model, ids().numpy()))


# What healing is for


RECIPES = [
    Full(lr=3e-3),
    Distill(lr=3e-3),
    Distill(lr=3e-3, ce_weight=1, hidden="cosine"),
    Distill(lr=3e-3, keep_fraction=0.3),
    Lora(lr=2e-2),
    Lora(lr=2e-2, ranks="importance"),
    LastLayers(lr=3e-3, layers=2),
    Perp(lr=2e-2, adapter=None),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.kind)
def test_healing_closes_part_of_the_gap(tiny_trained: Any, tmp_path: Path, recipe: Any) -> None:
    teacher, tokenizer, held_out = tiny_trained
    blocks = pack([e.ids for e in tokenizer.encode_batch(sentences(200))], 64, 0)
    model = copy.deepcopy(teacher)
    Width(ratio=0.4, importance="random").apply(model, Calibration.of_blocks(model, blocks[:4]))
    dense, cut = lm_loss(teacher, held_out), lm_loss(model, held_out)
    quick = recipe.model_copy(update={"batch": 8, "evaluate_every": 1000})
    healed = heal(model, quick, blocks, 14 * 8 * 64, directory=tmp_path, teacher=teacher)
    assert cut > dense + 0.1
    assert lm_loss(healed.model, held_out) < cut - (0.25 if recipe.kind != "perp" else 0.05) * (cut - dense)


@pytest.mark.parametrize("adapter", ["masklora", "scalelora", "lora_prune", None])
def test_healing_a_sparse_model_closes_part_of_the_gap(tiny_trained: Any, tmp_path: Path, adapter: Any) -> None:
    teacher, tokenizer, held_out = tiny_trained
    blocks = pack([e.ids for e in tokenizer.encode_batch(sentences(200))], 64, 0)
    model, masks = copy.deepcopy(teacher), {}
    for name, p in model.named_parameters():
        if p.ndim == 2 and "layers" in name:
            masks[name] = p.detach().abs() > p.detach().abs().flatten().kthvalue(int(0.7 * p.numel())).values
            p.data.mul_(masks[name])
    dense, cut = lm_loss(teacher, held_out), lm_loss(model, held_out)
    recipe = Perp(adapter=adapter, lr=2e-2, batch=8)
    healed = heal(model, recipe, blocks, 14 * 8 * 64, directory=tmp_path, masks=masks)
    assert lm_loss(healed.model, held_out) < cut - 0.25 * (cut - dense)
    assert all(not healed.model.get_parameter(n)[~m].any() for n, m in masks.items())


def test_reconstruction_pays_for_no_head() -> None:
    """Full: forward and backward of the student's blocks and the teacher's forward. Without an adapter no gradients of
    matrices are taken."""
    from pipeline.compare.arms import per_token
    from pipeline.compare.flops import ModelShape

    model = student()
    shape, head = ModelShape.of(model), model.get_output_embeddings().weight.numel()
    blocks = shape.forward(16) - 2 * head
    cost = Perp(reconstruct=True, rank=2).cost(model)
    assert per_token(cost, shape, shape, 16, 64) == pytest.approx(4 * blocks + cost.step / 64)
    cost = Perp(reconstruct=True, adapter=None).cost(model)
    assert per_token(cost, shape, shape, 16, 64) == pytest.approx(3 * blocks + 6 * cost.trained)
