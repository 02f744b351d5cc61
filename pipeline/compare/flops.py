"""FLOPs of a decoder and of all that is done with it: what an arm of a comparison is charged.

A multiply-add counts 2. Forward, a token of a sequence of T costs `2 N_mm + 4 T sum_l H_l dh_l`: every entry of a
matrix once (the head too, tied or not; looking up an embedding is free), and scores and values of the attention over
all T positions, as kernels do that skip nothing above the diagonal. Exact to the last FLOP against torch's
FlopCounterMode with eager attention, on Llama, Qwen2, Qwen3, GPT-2 and mixtures of experts, whole and cut; backward is
twice forward. Norms, activations, softmax and rotations are not counted, by neither.

The usual `6 N D` is not good enough to match arms: of SmolLM2-135M's training it misses 11.6 % at T = 512 and 34.5 % at
T = 2048, and removing heads changes what it misses while removing neurons does not. Masks save nothing here: only a
smaller matrix does.

What it trades away: decoders alone (a pooler or a patch convolution runs once a sequence or patch), and model FLOPs,
not hardware FLOPs: activation checkpointing recomputes a forward pass, and `full(..., recompute=True)` says so, but
arms are matched without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from pipeline.compress.architecture import anatomy
from pipeline.errors import ConfigError
from pipeline.recipe import fingerprint

if TYPE_CHECKING:
    from torch import nn

FAST_FILTER = (2e2, 2e3)
"""FLOPs a token of n-gram, fastText and heuristic scorers, from and to; 2e3 is what a plan charges."""
MINHASH = (1e3, 1e4)
"""Integer operations a token of MinHash with 128 permutations; listed beside the FLOPs, not among them."""
ADAM = 12
"""FLOPs a parameter of one step of Adam: below 1 % of the training once a batch has more than 200 tokens."""


@dataclass(frozen=True)
class LayerShape:
    """One block. No attention: 0 heads; no MLP: width 0."""

    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    width: int = 0
    matrices: int = 3
    """Of the MLP: 3 with a gate, 2 without."""
    experts: int = 0
    """MLPs of `width` that a router chooses from; 0 where there is one and no router."""
    chosen: int = 1
    """Experts that a token goes through."""
    extra: int = 0
    """Entries of further matrices that every token goes through: shared experts, low-rank factors, adapters."""
    qkv_bias: bool = False
    mlp_bias: bool = False
    """Whether the matrices before the activation have a bias."""
    vectors: int = 0
    """Entries of norms and of biases that are as long as the residual stream."""

    @property
    def attention_width(self) -> int:
        """Entries of all query heads, H dh."""
        return self.heads * self.head_dim

    def linears(self, hidden: int) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the attention's and the MLP's matrices, the experts that a token goes through
        included."""
        q, kv = self.attention_width, self.kv_heads * self.head_dim
        found = [(hidden, q), (hidden, kv), (hidden, kv), (q, hidden)] if q else []
        if self.width:
            mlp = [*[(hidden, self.width)] * (self.matrices - 1), (self.width, hidden)]
            found += [*mlp * self.chosen, (hidden, self.experts)] if self.experts else mlp
        return tuple(found)

    def matmul(self, hidden: int) -> int:
        """Entries of matrices that a token is multiplied with."""
        return sum(i * o for i, o in self.linears(hidden)) + self.extra

    def parameters(self, hidden: int) -> int:
        idle = max(0, self.experts - self.chosen) * self.matrices * hidden * self.width
        biases = self.qkv_bias * (self.heads + 2 * self.kv_heads) * self.head_dim
        biases += self.mlp_bias * (self.matrices - 1) * self.width
        return self.matmul(hidden) + idle + biases + self.vectors


@dataclass(frozen=True)
class ModelShape:
    """A decoder's sizes, layer by layer: enough to count its parameters and its FLOPs."""

    hidden: int
    vocab: int
    layers: tuple[LayerShape, ...]
    tied: bool = True
    head: bool = True
    vectors: int = 0
    """Entries outside of layers that multiply nothing: the last norm, learned positions."""

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """From the modules, so that it holds for a model that was cut. Raises ConfigError for what is no decoder."""
        body = anatomy(model)
        if body.family in ("bert", "vit"):
            raise ConfigError(f"FLOPs are counted for decoders only, not for {body.family!r}")
        sizes = {name: p.shape for name, p in model.named_parameters()}  # a tied matrix once, under its first name
        layers = tuple(_layer(model, layer, body.hidden, sizes) for layer in body.layers)
        modules = dict(model.named_modules())
        table = modules[body.embedding].weight
        tied = not body.head or modules[body.head].weight is table
        inside = sum(layer.parameters(body.hidden) for layer in layers)
        rest = sum(s.numel() for s in sizes.values()) - inside - table.numel() * (1 if tied else 2)
        return cls(body.hidden, table.shape[0], layers, tied, bool(body.head), rest)

    @classmethod
    def of_config(cls, config: Any) -> Self:
        """Of the causal model that a configuration (of transformers) describes, without any weights."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return cls.of(AutoModelForCausalLM.from_config(config))

    def cut(self, heads: int | None = None, kv_heads: int | None = None, width: int | None = None) -> Self:
        """The same with other sizes in every layer that has the branch: a student, before there is one."""
        layers = tuple(
            replace(
                layer,
                heads=heads if heads is not None and layer.heads else layer.heads,
                kv_heads=kv_heads if kv_heads is not None and layer.heads else layer.kv_heads,
                width=width if width is not None and layer.width else layer.width,
            )
            for layer in self.layers
        )
        return replace(self, layers=layers)

    def resized(self, told: Mapping[str, Any]) -> Self:
        """The same at sizes that a training notes when it cuts (`pipeline.compress.recover._shapes`), for its FLOPs:
        norms and biases are not counted anew."""
        layers = []
        for layer, sizes in zip(self.layers, told["layers"].values(), strict=True):
            heads, kv_heads = sizes.get("num_attention_heads", 0), sizes.get("num_key_value_heads", 0)
            width = sizes.get("intermediate_size", sizes.get("moe_intermediate_size", 0))
            dim, experts = sizes.get("head_dim", 0), sizes.get("num_experts", 0)
            layers.append(
                replace(layer, heads=heads, kv_heads=kv_heads, head_dim=dim, width=width, experts=experts)
            )  # fmt: skip
        return replace(self, hidden=int(told["hidden_size"]), layers=tuple(layers))

    @property
    def digest(self) -> str:
        """32 hex digits, the same for the same shape."""
        return fingerprint("model shape", asdict(self))

    @cached_property
    def parameters(self) -> int:
        """All of them; a tied matrix once."""
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        return sum(layer.parameters(self.hidden) for layer in self.layers) + tables + self.vectors

    @cached_property
    def matmul_parameters(self) -> int:
        """N_mm: entries of the matrices that a token is multiplied with; the head counts even where it is tied."""
        return sum(layer.matmul(self.hidden) for layer in self.layers) + self.vocab * self.hidden * self.head

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the layers' matrices."""
        return tuple(linear for layer in self.layers for linear in layer.linears(self.hidden))

    def forward(self, length: int | Sequence[int], causal: bool = False, window: int | None = None) -> float:
        """FLOPs a token, forward.

        `length`: tokens of a sequence, or of the documents packed into one behind block masks. `causal`: a kernel that
        skips what lies above the diagonal. `window`: of sliding attention.
        """
        attention = 4 * sum(layer.attention_width for layer in self.layers)
        return 2 * self.matmul_parameters + attention * keys(length, causal, window)

    def top(self, layers: int) -> Self:
        """The last so many layers, with the head."""
        if not 0 < layers <= len(self.layers):
            raise ConfigError(f"the last {layers} of {len(self.layers)} layers cannot be trained")
        return replace(self, layers=self.layers[-layers:])


def keys(length: int | Sequence[int], causal: bool = False, window: int | None = None) -> float:
    """Positions that a query is multiplied with, on average: T, (T + 1) / 2 below the diagonal, at most the window.

    Several documents count by their tokens: sum T^2 / sum T.
    """
    documents = [length] if isinstance(length, int) else list(length)
    if not documents or min(documents) < 1:
        raise ConfigError(f"length {length}: a sequence has one token at least")
    seen = sum(_pairs(t, min(t, window or t), causal) for t in documents)
    return seen / sum(documents)


def _pairs(length: int, window: int, causal: bool) -> int:
    return window * (window + 1) // 2 + (length - window) * window if causal else length * window


def _layer(model: nn.Module, layer: Any, hidden: int, sizes: dict[str, Any]) -> LayerShape:
    """Sizes of one layer; what it holds beside the matrices that anatomy names counts by its number of axes."""
    modules = dict(model.named_modules())
    own = {n: s for n, s in sizes.items() if n.startswith(f"{layer.name}.")}
    found = LayerShape()
    known: set[str] = set()
    if (a := layer.attention) is not None:
        found = replace(
            found, heads=a.heads, kv_heads=a.kv_heads, head_dim=a.head_dim,
            qkv_bias=getattr(modules[a.query], "bias", None) is not None,
        )  # fmt: skip
        known |= {f"{n}.weight" for n in (a.query, a.key, a.value, a.output)}
    if (m := layer.mlp) is not None:
        found = replace(
            found, width=m.width, matrices=len(m.inputs) + 1,
            mlp_bias=getattr(modules[m.inputs[0]], "bias", None) is not None,
        )  # fmt: skip
        known |= {f"{n}.weight" for n in (*m.inputs, m.output)}
    if (e := layer.experts) is not None:
        found = replace(found, width=e.width, experts=e.count, chosen=min(e.chosen, e.count))
        known |= {f"{e.stack}.gate_up_proj", f"{e.stack}.down_proj", f"{e.router}.weight"}
    further = {n: s for n, s in own.items() if n not in known}
    found = replace(found, extra=sum(s.numel() for s in further.values() if len(s) == 2))
    return replace(found, vectors=sum(s.numel() for s in own.values()) - found.parameters(hidden))


# What is done with a model, in FLOPs a token of the sequence (a token of the pool where data are scored).


def full(shape: ModelShape, length: int, recompute: bool = False) -> float:
    """Training of all weights: 3 f; with activation checkpointing 4 f of hardware, which is not what arms are matched
    by."""
    return (4 if recompute else 3) * shape.forward(length)


def adapter_parameters(shape: ModelShape, rank: int) -> int:
    """Of LoRA on every matrix of the layers."""
    return sum(rank * (i + o) for i, o in shape.linears)


def lora(shape: ModelShape, length: int, rank: int) -> float:
    """LoRA on every matrix of the layers: 2 f + 6 N_lora, for no gradient of a frozen matrix is taken.

    .683 of full training for SmolLM2-135M, rank 8, T = 512.
    """
    return 2 * shape.forward(length) + 6 * adapter_parameters(shape, rank)


def last_layers(shape: ModelShape, length: int, layers: int) -> float:
    """Training of the last layers and the head: forward through all, backward through these."""
    return shape.forward(length) + 2 * shape.top(layers).forward(length)


def distillation(shape: ModelShape, teacher: ModelShape, length: int, cached: bool = False) -> float:
    """Full training with a teacher's forward pass: 3 f + f_t. Cached logits: 3 f here, f_t once, where they are
    made."""
    return full(shape, length) + (0 if cached else teacher.forward(length))


def soft_prompt(shape: ModelShape, length: int, prompt: int) -> float:
    """Training of `prompt` vectors before the text: 2 f over all positions, per token of text."""
    return 2 * shape.forward(length + prompt) * (length + prompt) / length


def statistics(shape: ModelShape, length: int) -> float:
    """A forward pass that sums what every matrix reads (Wanda, FLAP, Minitron, block influence)."""
    return shape.forward(length) + 2 * sum(i for i, _ in shape.linears)


def layerwise(shape: ModelShape, length: int) -> float:
    """Layer by layer, each run again once it is pruned: 2 f."""
    return 2 * shape.forward(length)


def hessian(shape: ModelShape, length: int) -> float:
    """Layer by layer with X^T X of every matrix: 2 f + 2 sum in^2; `hessian_solve` comes once on top."""
    return layerwise(shape, length) + 2 * sum(i * i for i, _ in shape.linears)


def hessian_solve(shape: ModelShape) -> float:
    """In all, not per token: in^3 to factorise and out in^2 to sweep, every matrix."""
    return float(sum(i**3 + o * i * i for i, o in shape.linears))


def gradients(shape: ModelShape, length: int) -> float:
    """Forward and backward for importance (Taylor, GBLM, NIRVANA, LoRAPrune): 3 f."""
    return 3 * shape.forward(length)


def zeroth_order(shape: ModelShape, length: int, groups: int, draws: int) -> float:
    """Two forward passes for each group of weights and draw of noise."""
    return 2 * shape.forward(length) * groups * draws


def search(candidates: Iterable[ModelShape], length: int) -> float:
    """One forward pass of every candidate."""
    return sum(c.forward(length) for c in candidates)


def scoring(length: int, *scorers: ModelShape) -> float:
    """A forward pass of every model that scores the pool: the dense one for its perplexity, dense and pruned for
    PASER."""
    return sum(s.forward(length) for s in scorers)


def adam_step(shape: ModelShape) -> float:
    """One update, in all."""
    return float(ADAM * shape.parameters)
