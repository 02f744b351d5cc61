"""PERP: a sparse model is healed by a few parameters, and stays sparse.

Zimmer et al. 2023 (arXiv 2312.15230; ZIB-IOL/PERP). Biases and gains of norms are trained, and of every sparse matrix a
correction of low rank that respects its mask M (section 3.2):

- `masklora`: W + (alpha / r) (B A) * M, in training and merged, exactly.
- `scalelora`: W * (B A), where B A = 1 at first. A kept weight that is 0 stays 0.
- `lora_prune`: W + (alpha / r) B A in training; the product is masked when it is merged, which costs accuracy.
- none (`adapter: null`): 0.01 % of the parameters, and at up to half of the weights gone a large part of the way back.

Of stacked experts each has a correction of its own. Low-rank parts that SLiM left beside matrices (`low_rank` of a
sparse step) are trained too: with `{adapter: null, norms: false, biases: false}` they alone, which is SLiM's
fine-tuning (arXiv 2410.09615).

`reconstruct: true` trains the same parameters for another end: every block is to put out what the dense model's puts
out, from what that reads, in squared error over the square of what is wanted. The blocks are problems of their own,
solved side by side; as AdamW does not see the scale of a loss, that is one training for each (but for the clipping of
their common gradient). It needs no labels, and the dense model in memory.

M comes from what pruned the model, not from W != 0 as in the authors' code, which freezes kept weights that happen to
be 0. Defaults (rank 16, alpha 32, rate 5e-4, linear decay, a tenth warm-up) are from memory, unverified.

The masked product needs the whole gradient of W: training costs 3 f but for the frozen head, not LoRA's 2 f, and
2 r in out FLOPs a matrix and pass on top. What is saved is the memory of AdamW's moments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pipeline.compress.architecture import anatomy
from pipeline.compress.recover.base import Cost, Recovery, Setup
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from pipeline.compress.recover._session import Session


class Perp(Recovery):
    """Biases, norms and masked low-rank corrections."""

    source: ClassVar[str] = "Zimmer et al. 2023, arXiv 2312.15230"
    kind: Literal["perp"] = "perp"
    adapter: Literal["masklora", "scalelora", "lora_prune"] | None = "masklora"
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    norms: bool = True
    biases: bool = True
    head: bool = Field(False, description="train the head as well, where it is not tied to the embedding")
    low_rank: bool = Field(True, description="train low-rank parts that stand beside matrices")
    reconstruct: bool = Field(False, description="learn the dense blocks' outputs instead of the next token")
    lr: float = Field(5e-4, gt=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    decay: Literal["cosine", "linear", "wsd", "constant"] = "linear"
    floor: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.reconstruct and self.head:
            raise ValueError("reconstruct is of blocks, which the head is none of: remove head")
        return self

    @property
    def needs_teacher(self) -> bool:
        return self.reconstruct

    def begin(self, setup: Setup) -> Session:
        import torch

        from pipeline.compress.recover._masked import MaskedSession
        from pipeline.compress.recover._reconstruct import ReconstructSession
        from pipeline.compress.recover._session import freeze

        if self.adapter and not setup.masks:
            raise ConfigError(
                f"recover: perp: {self.adapter} corrects sparse matrices, and no step left masks: "
                "use lora for a model that was cut, or `adapter: null` for biases and norms alone"
            )
        student = setup.student
        freeze(student)
        factors, inside = _factors(student), f"{anatomy(student).blocks}."
        for name, parameter in student.named_parameters():
            bias = name.endswith("bias")
            wanted = (bias and self.biases) or (parameter.ndim == 1 and not bias and self.norms)
            wanted = wanted or (name in factors and self.low_rank)
            parameter.requires_grad_(wanted and (name.startswith(inside) or not self.reconstruct))
        head = student.get_output_embeddings()
        if self.head:
            if head.weight is student.get_input_embeddings().weight:
                raise ConfigError("recover: perp: head: the head is tied to the embedding: leave it frozen")
            head.requires_grad_(True)
        trained = {id(p) for p in student.parameters() if p.requires_grad}
        whole = {n: m for n, m in setup.masks.items() if id(student.get_parameter(n)) in trained}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            sparse = {n: m for n, m in setup.masks.items() if n not in whole}
            scale = self.alpha / self.rank
            if self.reconstruct:
                session: MaskedSession = ReconstructSession(setup, sparse, self.adapter, self.rank, scale)
            else:
                session = MaskedSession(student, sparse, self.adapter, self.rank, scale)
        session.put_masks(whole)
        if not session.parameters():
            raise ConfigError("recover: perp: nothing is left to train: set an adapter, norms or biases")
        return session

    def cost(self, student: nn.Module, teacher: nn.Module | None = None) -> Cost:
        body = anatomy(student)
        vectors = sum(p.numel() for p in student.parameters() if p.ndim == 1)
        head = student.get_output_embeddings().weight.numel()
        taught = {"teacher": True} if self.reconstruct else {}
        if self.adapter is None:
            factors = sum(_factors(student).values()) if self.low_rank else 0
            unread = 6.0 * head if self.reconstruct else 0.0  # neither's head runs
            return Cost("adapters", trained=vectors, extra=2.0 * factors - unread, **taught)
        inside = [p for n, p in student.named_parameters() if p.ndim > 1 and n.startswith(f"{body.blocks}.")]
        unread = 8.0 * head if self.reconstruct else 0.0 if self.head else 2.0 * head  # no gradient of a frozen head
        return Cost("full", extra=-unread, step=6.0 * self.rank * sum(p.numel() for p in inside), **taught)


def _factors(model: nn.Module) -> dict[str, int]:
    """Sizes of the factors of low-rank parts, by parameter name."""
    from pipeline.compress.sparse._modules import LowRankPart

    parts = {name: m for name, m in model.named_modules() if isinstance(m, LowRankPart)}
    return {f"{name}.{own}": getattr(m, own).numel() for name, m in parts.items() for own in ("left", "right")}
