"""Distillation: the model before it was made smaller teaches the one after.

Minitron (Muralidharan et al. 2024, arXiv 2407.14679, section 3): `L = ce_weight CE + kl_weight L_logits + alpha L_is`,
with L_logits = T^2 mean over positions of KL(p_teacher || p_student), the forward KL. Theirs, and the defaults here: KL
alone at temperature 1 (LM loss 2.107; with CE 2.117, reverse KL 2.140), hidden states only after deep cuts of layers
(2.155 to 2.141). Others find CE beside KL better (arXiv 2605.08738): `ce_weight` 0.5 or 1.

`hidden: cosine` or `mse` is L_is: of the embeddings and of the state two blocks before the end, each after a layer norm
without gains, with one learned projection up to the teacher's width where widths differ. `hidden: normalised`
(LAPTOP-Diff, arXiv 2404.11098): squared distance of every block's state to that of the teacher's block at the same
relative depth, over the teacher's square. alpha is `hidden_weight` or, where that is null, L_logits / L_is without a
gradient.

`keep_fraction` f (Ben-Baruch et al. 2024, "Distilling the Knowledge in Data Pruning", arXiv 2403.07854): L = (1 - a) CE
+ a L_logits, where a grows as less of the data is kept. They give the trend and no formula; a(f) = clip(1 - f / 2, 0.5,
1) is ours. With a teacher, random rows do about as well as chosen ones: a criterion has to beat these.

3 f + f_t FLOPs a token. KL in float32, a few positions at a time. Of a student whose vocabulary was trimmed the
teacher's distribution is renormalised over the ids that are left, and positions whose label is gone do not count.
alpha is taken of each accumulated part by itself, and so are norms of features: only then does `accumulate` matter.
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


class Distill(Recovery):
    """Forward KL to the parent's next-token distribution, and what else is weighed in."""

    source: ClassVar[str] = "Muralidharan et al. 2024, arXiv 2407.14679; Ben-Baruch et al. 2024, arXiv 2403.07854"
    kind: Literal["distill"] = "distill"
    temperature: float = Field(1.0, gt=0)
    kl_weight: float = Field(1.0, ge=0)
    ce_weight: float = Field(0.0, ge=0)
    keep_fraction: float | None = Field(
        None, gt=0, le=1, description="share of the data that was kept; sets both weights"
    )
    hidden: Literal["none", "cosine", "mse", "normalised"] = "none"
    hidden_weight: float | None = Field(None, ge=0, description="of hidden states; null: L_logits / L_is")

    @model_validator(mode="after")
    def _weights(self) -> Self:
        if self.keep_fraction is not None and {"kl_weight", "ce_weight"} & self.model_fields_set:
            raise ValueError("keep_fraction sets kl_weight and ce_weight: remove them, or it")
        if not any(self.weights) and not (self.hidden != "none" and self.hidden_weight):
            raise ValueError("kl_weight, ce_weight and hidden_weight are all 0: nothing would be learned")
        if self.hidden != "none" and self.hidden_weight is None and not self.weights[1]:
            raise ValueError("hidden_weight null balances hidden states with L_logits, whose kl_weight is 0: set one")
        return self

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def weights(self) -> tuple[float, float]:
        """Of CE and of L_logits."""
        if self.keep_fraction is None:
            return self.ce_weight, self.kl_weight
        a = soft_share(self.keep_fraction)
        return 1 - a, a

    def begin(self, setup: Setup) -> Session:
        from pipeline.compress.recover._distill import DistillSession
        from pipeline.compress.recover._session import causal

        student, teacher = setup.student, setup.teacher
        assert teacher is not None  # the loop sees to it
        causal(teacher, "distill: the teacher")
        ours, theirs = (m.get_output_embeddings().weight.shape[0] for m in (student, teacher))
        known = theirs if setup.vocabulary is None else len(setup.vocabulary)
        if ours != known or (setup.vocabulary is not None and int(setup.vocabulary.max()) >= theirs):
            raise ConfigError(
                f"recover: distill: the student has {ours} token ids, the teacher {theirs}"
                + ("" if setup.vocabulary is None else f", and {known} are said to be kept")
                + ": they must share a tokenizer, or say which ids were kept"
            )
        return DistillSession(setup, self)

    def cost(self, student: nn.Module, teacher: nn.Module | None = None) -> Cost:
        body = anatomy(student)
        ours, theirs = body.hidden, anatomy(teacher).hidden if teacher is not None else body.hidden
        states = {"none": 0, "cosine": 2, "mse": 2, "normalised": len(body.layers)}[self.hidden]
        projections = 6.0 * states * ours * theirs if ours != theirs else 0.0
        return Cost(teacher=self.weights[1] > 0 or self.hidden != "none", extra=projections)


def soft_share(keep_fraction: float) -> float:
    """Weight of the teacher's distribution against that of the labels, by the share of the data that was kept."""
    return min(1.0, max(0.5, 1 - keep_fraction / 2))
