"""Where the units of a model sit: Llama-like decoders, mixtures of experts, GPT-2, BERT, ViT as transformers has them.

`anatomy(model)` reads sizes from the modules, not from the configuration, so it tells the truth of a model that was cut
before, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipeline.compress.units import Kind, Member, Units
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

LLAMA_LIKE = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3"})
MIXTURES = frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe"})
"""Llama-like, with experts stacked in 3-D parameters, as transformers 5 has them. Torch multiplies such stacks only
where widths are multiples of 16 bytes, so channels of the stream want to go in fours (float32) or eights (bfloat16)."""

WIDTH_OVER_HEADS = frozenset({"gpt2", "bert"})
"""Families whose modules take a head's size to be d / H, and read no `head_dim`."""

BranchName = Literal["attention", "mlp"]


@dataclass(frozen=True, kw_only=True)
class Branch:
    """What a block adds to the residual stream. All modules by their full names.

    `removable`: the modules that make room for one which gives zeros when the branch goes. `norm`: the one that only
    this branch reads through; empty where the norm stands behind the branch (BERT).
    """

    name: str
    removable: tuple[str, ...]
    norm: str


@dataclass(frozen=True, kw_only=True)
class Attention(Branch):
    """Sizes in heads, and entries of a head. `fused`: query, key and value are one module."""

    query: str
    key: str
    value: str
    output: str
    heads: int
    kv_heads: int
    head_dim: int
    fused: bool = False
    joint_norm: bool = False
    """Whether a norm runs over all heads together (OLMoE), so that none can go without changing the others."""

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, kw_only=True)
class Mlp(Branch):
    """`inputs` are gate and up, or the one matrix before the activation; `output` the one after it."""

    inputs: tuple[str, ...]
    output: str
    width: int


@dataclass(frozen=True, kw_only=True)
class Experts(Branch):
    """`count` MLPs of `width`, stacked in the module `stack`, of which `router` chooses `chosen` for a token.

    `groups`: the router chooses among so many equal runs of them. `shared`: linear modules that every token goes
    through beside its experts.
    """

    stack: str
    router: str
    count: int
    chosen: int
    width: int
    groups: int = 1
    shared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """One block of the residual stream; None where a branch was removed, and where the MLP is a mixture or is none."""

    name: str
    attention: Attention | None
    mlp: Mlp | None
    experts: Experts | None = None

    def branch(self, name: BranchName) -> Branch | None:
        return self.attention if name == "attention" else self.mlp or self.experts


@dataclass(frozen=True)
class Anatomy:
    """What a model is made of. `stream`: every member of the residual stream's channels; `head`: the module that makes
    logits of tokens, where there is one; `embedding`: of tokens."""

    family: str
    blocks: str
    """Full name of the ModuleList of blocks."""
    layers: tuple[Layer, ...]
    hidden: int
    stream: tuple[Member, ...]
    norms: tuple[str, ...]
    """Full names of the norms over the residual stream."""
    rms: bool
    """Whether these divide by the root mean square alone, so that a cut of channels can be corrected exactly."""
    embedding: str
    head: str
    modules: dict[str, Any]
    """`named(model)` of the model as it was when it was looked at."""

    def units(self, *kinds: Kind) -> list[Units]:
        """The units of some kinds, in the order of the layers. Raises ConfigError for kinds that exclude each other."""
        if {"kv_group", "query_head"} <= set(kinds):
            raise ConfigError("units: kv_group and query_head both remove heads: name one of them")
        found: list[Units] = []
        for i, layer in enumerate(self.layers):
            if "kv_group" in kinds and layer.attention:
                found.append(self._kv_groups(i, layer.attention))
            if "query_head" in kinds and layer.attention:
                found.append(self._query_heads(i, layer.attention))
            if "neuron" in kinds and layer.mlp:
                found.append(self._neurons(i, layer.mlp))
            if "expert" in kinds and layer.experts:
                found.append(self._experts(i, layer.experts))
        if "hidden" in kinds:
            found.append(self._units(-1, "hidden", self.hidden, self.stream))
        if not found:
            raise ConfigError(f"units: a model of {self.family!r} has no {' or '.join(kinds)}")
        return found

    def _kv_groups(self, i: int, a: Attention) -> Units:
        _separable(i, a)
        own, shared = a.head_dim, a.group * a.head_dim
        starts = (a.heads * own, (a.heads + a.kv_heads) * own) if a.fused else (0, 0)
        members = (
            Member(a.query, "out", shared),
            Member(a.key, "out", own, starts[0]),
            Member(a.value, "out", own, starts[1]),
            Member(a.output, "in", shared),
        )
        return self._units(i, "kv_group", a.kv_heads, members, a.output, shared)

    def _query_heads(self, i: int, a: Attention) -> Units:
        _separable(i, a)
        if a.group == 1:
            raise ConfigError(
                f"units: query_head: layer {i} has a key/value head for every query head; use kv_group there"
            )
        members = (Member(a.query, "out", a.head_dim), Member(a.output, "in", a.head_dim))
        return self._units(i, "query_head", a.heads, members, a.output, a.head_dim, a.kv_heads)

    def _neurons(self, i: int, mlp: Mlp) -> Units:
        members = (*(Member(name, "out") for name in mlp.inputs), Member(mlp.output, "in"))
        return self._units(i, "neuron", mlp.width, members, mlp.output)

    def _experts(self, i: int, e: Experts) -> Units:
        members = (Member(e.stack, "expert"), Member(e.router, "out"))
        return self._units(i, "expert", e.count, members, groups=e.groups)

    def _units(
        self,
        layer: int,
        kind: Kind,
        count: int,
        members: tuple[Member, ...],
        consumer: str = "",
        width: int = 1,
        groups: int = 1,
    ) -> Units:
        cost = sum(self._entries(m) for m in members)
        name = kind if layer < 0 else f"{layer}.{kind}"
        return Units(name, layer, count, cost, kind, members, consumer, width, groups)

    def _entries(self, member: Member) -> int:
        """Parameters of a unit in a member."""
        from torch import nn

        from pipeline.compress.surgery import axes

        found = axes(self.modules[member.module], member.side)
        return sum(member.size * p.numel() // p.shape[axis] for p, axis in found if isinstance(p, nn.Parameter))


def anatomy(model: nn.Module) -> Anatomy:
    """Of a model of transformers. Raises ConfigError that names the architecture where it is not known."""
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    readers: dict[str, Callable[[nn.Module, str], Anatomy]] = {
        **dict.fromkeys(LLAMA_LIKE | MIXTURES, _llama),
        "gpt2": _gpt2,
        "bert": _bert,
        "vit": _vit,
    }
    if family not in readers:
        raise ConfigError(
            f"the architecture {family!r} is not known: units can be removed from {', '.join(sorted(readers))}"
        )
    return readers[family](model, family)


def named(model: nn.Module) -> dict[str, Any]:
    """Modules and their parameters by full names; a tied parameter under the name of each module that holds it."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_modules())


def _separable(i: int, attention: Attention) -> None:
    if attention.joint_norm:
        raise ConfigError(
            f"units: a norm runs over all heads of layer {i} together, so single heads cannot go; remove neurons, "
            "experts or whole branches"
        )


def _body(modules: dict[str, Any], name: str) -> str:
    """Prefix of the body's names: `model.` in a model with a head, nothing in a bare one."""
    return f"{name}." if name in modules else ""


def _llama(model: nn.Module, family: str) -> Anatomy:
    modules = named(model)
    body = _body(modules, "model")
    layers = []
    for i in range(len(modules[f"{body}layers"])):
        at = f"{body}layers.{i}"
        a, m = f"{at}.self_attn", f"{at}.mlp"
        attention, mlp, experts = None, None, None
        if f"{a}.q_proj" in modules:
            dim = modules[a].head_dim
            attention = Attention(
                name=a, removable=(a,), norm=f"{at}.input_layernorm",
                query=f"{a}.q_proj", key=f"{a}.k_proj", value=f"{a}.v_proj", output=f"{a}.o_proj",
                heads=modules[f"{a}.q_proj"].out_features // dim,
                kv_heads=modules[f"{a}.k_proj"].out_features // dim,
                head_dim=dim, joint_norm=family == "olmoe",
            )  # fmt: skip
        if f"{m}.experts" in modules:
            experts = _stacked(modules, m, f"{at}.post_attention_layernorm")
        elif f"{m}.down_proj" in modules:
            mlp = Mlp(
                name=m, removable=(m,), norm=f"{at}.post_attention_layernorm",
                inputs=(f"{m}.gate_proj", f"{m}.up_proj"), output=f"{m}.down_proj",
                width=modules[f"{m}.down_proj"].in_features,
            )  # fmt: skip
        layers.append(Layer(at, attention, mlp, experts))
    return _assemble(
        family, modules, f"{body}layers", layers, [Member(f"{body}embed_tokens", "out")], [f"{body}norm"],
        rms=True, embedding=f"{body}embed_tokens", head="lm_head",
    )  # fmt: skip


def _stacked(modules: dict[str, Any], m: str, norm: str) -> Experts:
    router, stack = modules[f"{m}.gate"], modules[f"{m}.experts"]
    return Experts(
        name=m, removable=(m,), norm=norm, stack=f"{m}.experts", router=f"{m}.gate",
        count=stack.down_proj.shape[0], chosen=router.top_k, width=stack.down_proj.shape[2],
        groups=getattr(router, "num_group", 1),
        shared=tuple(
            name
            for kind in ("shared_expert", "shared_experts")
            for name in (f"{m}.{kind}.gate_proj", f"{m}.{kind}.up_proj", f"{m}.{kind}.down_proj", f"{m}.{kind}_gate")
            if name in modules
        ),
    )  # fmt: skip


def _gpt2(model: nn.Module, family: str) -> Anatomy:
    modules = named(model)
    body = _body(modules, "transformer")
    layers = []
    for i in range(len(modules[f"{body}h"])):
        at = f"{body}h.{i}"
        a, m = f"{at}.attn", f"{at}.mlp"
        attention, mlp = None, None
        if f"{a}.c_attn" in modules:
            dim, qkv = modules[a].head_dim, f"{a}.c_attn"
            heads = modules[f"{a}.c_proj"].weight.shape[0] // dim
            attention = Attention(
                name=a, removable=(a,), norm=f"{at}.ln_1", query=qkv, key=qkv, value=qkv, output=f"{a}.c_proj",
                heads=heads, kv_heads=heads, head_dim=dim, fused=True,
            )  # fmt: skip
        if f"{m}.c_fc" in modules:
            mlp = Mlp(
                name=m, removable=(m,), norm=f"{at}.ln_2", inputs=(f"{m}.c_fc",), output=f"{m}.c_proj",
                width=modules[f"{m}.c_fc"].weight.shape[1],
            )  # fmt: skip
        layers.append(Layer(at, attention, mlp))
    tables = [Member(f"{body}wte", "out"), Member(f"{body}wpe", "out")]
    return _assemble(
        family, modules, f"{body}h", layers, tables, [f"{body}ln_f"], embedding=f"{body}wte", head="lm_head"
    )


def _bert(model: nn.Module, family: str) -> Anatomy:
    modules = named(model)
    body = _body(modules, "bert")
    tables = f"{body}embeddings"
    layers, norms = [], [f"{tables}.LayerNorm"]
    for i in range(len(modules[f"{body}encoder.layer"])):
        at = f"{body}encoder.layer.{i}"
        a, inner = f"{at}.attention.self", f"{at}.intermediate"
        attention, mlp = None, None
        if f"{a}.query" in modules:
            dim, out = modules[a].attention_head_size, f"{at}.attention.output.dense"
            heads = modules[f"{a}.query"].out_features // dim
            attention = Attention(
                name=a, removable=(a, out), norm="", query=f"{a}.query", key=f"{a}.key", value=f"{a}.value",
                output=out, heads=heads, kv_heads=heads, head_dim=dim,
            )  # fmt: skip
        if f"{inner}.dense" in modules:
            out = f"{at}.output.dense"
            mlp = Mlp(
                name=inner, removable=(inner, out), norm="", inputs=(f"{inner}.dense",), output=out,
                width=modules[f"{inner}.dense"].out_features,
            )  # fmt: skip
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
        layers.append(Layer(at, attention, mlp))
    # The pooler and the transform before the vocabulary are as wide as the stream, so they lose the same channels on
    # both sides: the decoder that reads the transform is tied to the embedding.
    stream = [Member(f"{tables}.{n}_embeddings", "out") for n in ("word", "position", "token_type")]
    transform = "cls.predictions.transform"
    for square in (f"{body}pooler.dense", f"{transform}.dense"):
        stream += [Member(square, "in"), Member(square, "out")]
    stream += [Member(f"{transform}.LayerNorm", "out"), Member("classifier", "in")]
    stream += [Member("cls.seq_relationship", "in"), Member("qa_outputs", "in")]
    return _assemble(
        family, modules, f"{body}encoder.layer", layers, stream, norms,
        embedding=f"{tables}.word_embeddings", head="cls.predictions.decoder",
    )  # fmt: skip


def _vit(model: nn.Module, family: str) -> Anatomy:
    modules = named(model)
    body = _body(modules, "vit")
    layers = []
    for i in range(len(modules[f"{body}layers"])):
        at = f"{body}layers.{i}"
        a, m = f"{at}.attention", f"{at}.mlp"
        attention, mlp = None, None
        if f"{a}.q_proj" in modules:
            dim = modules[a].head_dim
            heads = modules[f"{a}.q_proj"].out_features // dim
            attention = Attention(
                name=a, removable=(a,), norm=f"{at}.layernorm_before",
                query=f"{a}.q_proj", key=f"{a}.k_proj", value=f"{a}.v_proj", output=f"{a}.o_proj",
                heads=heads, kv_heads=heads, head_dim=dim,
            )  # fmt: skip
        if f"{m}.fc1" in modules:
            mlp = Mlp(
                name=m, removable=(m,), norm=f"{at}.layernorm_after", inputs=(f"{m}.fc1",), output=f"{m}.fc2",
                width=modules[f"{m}.fc1"].out_features,
            )  # fmt: skip
        layers.append(Layer(at, attention, mlp))
    patches = f"{body}embeddings"
    names = ("cls_token", "mask_token", "position_embeddings", "patch_embeddings.projection")
    stream = [Member(f"{patches}.{name}", "out") for name in names]
    stream += [Member(name, "in") for name in ("classifier", f"{body}pooler.dense", "decoder.0")]
    return _assemble(family, modules, f"{body}layers", layers, stream, [f"{body}layernorm"])


def _assemble(
    family: str,
    modules: dict[str, Any],
    blocks: str,
    layers: Iterable[Layer],
    outside: Iterable[Member],
    norms: Iterable[str],
    rms: bool = False,
    embedding: str = "",
    head: str = "",
) -> Anatomy:
    """The whole from its layers and from what lies outside of them: members and norms of the residual stream, of which
    those that this model has not are left out."""
    layers = tuple(layers)
    stream = [member for member in outside if member.module in modules]
    norms = list(norms)
    for layer in layers:
        for branch in (layer.attention, layer.mlp, layer.experts):
            if branch is not None:
                stream += _ends(branch)
                norms += [branch.norm] if branch.norm else []
    head = head if head in modules else ""
    table = modules[embedding].weight if embedding else None
    if head and modules[head].weight is not table:
        stream.append(Member(head, "in"))
    stream += [Member(norm, "out") for norm in norms]
    hidden = modules[norms[0]].weight.shape[0]
    return Anatomy(
        family, blocks, layers, hidden, tuple(stream), tuple(norms), rms, embedding, head, modules
    )  # fmt: skip


def _ends(branch: Branch) -> list[Member]:
    """Where a branch reads from the residual stream and where it adds to it."""
    if isinstance(branch, Attention):
        return [*(Member(n, "in") for n in _once(branch.query, branch.key, branch.value)), Member(branch.output, "out")]
    if isinstance(branch, Mlp):
        return [*(Member(n, "in") for n in branch.inputs), Member(branch.output, "out")]
    assert isinstance(branch, Experts)
    shared = [Member(n, "out" if n.endswith("down_proj") else "in") for n in branch.shared]
    return [Member(branch.router, "in"), Member(branch.stack, "in"), Member(branch.stack, "out"), *shared]


def _once(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
