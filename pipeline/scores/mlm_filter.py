"""MLM-Filter: an instruction-tuned model judges a pair from 0 to 100.

Source: Wang et al. 2024, "Finetuned Multimodal Language Models Are High-Quality Image-Text Data Filters", arXiv
2403.02677; in Open-Qwen2VL (Wang et al. 2025, arXiv 2504.00595) rows of a semantic understanding of 85 and more join
those that a data filtering network keeps. The judge there is a multimodal model that was fine-tuned on GPT-4's verdicts
(mlm-filter-qwen2.5-1.5b-gpt4o). Four metrics: image-text matching, object detail fulfilment, caption text quality and
semantic understanding (names from memory, unverified; the wording of the prompts is ours).

`model` is a causal language model, which reads the caption and sees no image: of the metrics it can judge the last two,
and those only as far as the words go. The other two need a judge that sees: `judge: my_package.module:MyJudge`, a class
with the interface of `pipeline.models.judge.Judge` and `needs_images = True`, which gets the encoded images beside the
prompts. No multimodal model comes along or was tried here. A tiny one will not do: SmolLM2-135M-Instruct answered 100,
or nothing that parses, to six captions out of six, noise among them, by either metric.

The score is the first number in the answer. An answer without one from 0 to 100 has no score: the row is in quarantine
as `judge_parse`, never a 0. Judges like round numbers, so a limit falls on thousands of equal scores: give the budget a
second score to rank by. A limit of one judge means nothing to another: choose it by quantile. The judge inherits the
taste of whoever taught it, and a caption may talk to it ("answer 100"): special tokens in a caption are taken out,
persuasion is not.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from pipeline.engine import threads
from pipeline.errors import ConfigError
from pipeline.models.causal import check_model, model_source
from pipeline.models.files import folder_digest, folder_of
from pipeline.models.judge import Judge, TextJudge, number_in
from pipeline.recipe import QUARANTINE, Column, Resources, Transform, fingerprint
from pipeline.scores._pairs import check_pairs
from pipeline.scores.base import Score

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.run import Run

FIELDS = pa.schema([("score", pa.float32()), (QUARANTINE, pa.string())])
UNPARSED = "judge_parse"
CAPTION = "{text}"
_SCALE = "Answer with one whole number from 0 (worst) to 100 (best) and nothing else."
PROMPTS = {
    "caption_text_quality": f"Rate the text quality of this image caption: grammar, fluency, no noise.\n"
    f"Caption: {CAPTION}\n{_SCALE}",
    "semantic_understanding": f"Rate how much this image caption tells beyond naming objects: relations, actions, "
    f"context, knowledge.\nCaption: {CAPTION}\n{_SCALE}",
    "image_text_matching": f"Rate how well this caption matches the image.\nCaption: {CAPTION}\n{_SCALE}",
    "object_detail_fulfillment": f"Rate how fully this caption describes the objects in the image and their "
    f"attributes.\nCaption: {CAPTION}\n{_SCALE}",
}
SEEN = ("image_text_matching", "object_detail_fulfillment")
"""Metrics that nobody can judge who does not see the image."""


class MlmFilter(Score):
    """A judge's number, in [0, 100]."""

    claim = "a language model that was told what to look for finds it good"
    cost = "2 N FLOPs a token of the prompt and the answer, N parameters of the judge"
    source = "Wang et al. 2024 (MLM-Filter), arXiv 2403.02677"
    kind: Literal["mlm_filter"] = "mlm_filter"
    model: str | None = Field(None, description="folder of an instruction-tuned causal model, or hf://org/name")
    judge: str | None = Field(None, description="instead of `model`: a judge of yours, my_package.module:MyJudge")
    metric: Literal[
        "semantic_understanding", "caption_text_quality", "image_text_matching", "object_detail_fulfillment"
    ] = "semantic_understanding"
    prompt: str | None = Field(None, description="what is asked instead, with {text} where the caption goes")
    max_chars: int = Field(2000, ge=1, description="characters of a caption that the judge reads")
    max_tokens: int = Field(1024, ge=32, description="tokens of a prompt; what is too much is cut off in front")
    max_new_tokens: int = Field(8, ge=1, description="tokens of an answer")

    @model_validator(mode="after")
    def _one_judge(self) -> Self:
        if (self.model is None) == (self.judge is None):
            raise ValueError("give either `model` (a causal language model) or `judge` (a class of yours)")
        if self.prompt is not None and CAPTION not in self.prompt:
            raise ValueError(f"`prompt` has no {CAPTION}: the judge would not see the caption")
        if self.model is not None:
            check_model(self.kind, self.model)
            if self.prompt is None and self.metric in SEEN:
                raise ValueError(f"{self.metric} is about the image, which `model` does not see: give a `judge`")
        elif self.judge is not None:
            _judge_class(self.judge)
        return self

    def column(self, run: Run) -> Column:
        engine = run.config.engine
        inputs: Sequence[str] = ("text",)
        source, known = None, [self.judge]
        if self.model is not None:
            source = model_source(run, self.model)
            known = [folder_digest(folder_of(source))]
        elif self.judge is not None and getattr(_judge_class(self.judge), "needs_images", False):
            check_pairs(run, self.column_name)
            inputs = ("image", "text")
        precision = "bfloat16" if engine.gpus else "float32"
        asked = self.model_dump(exclude={"name", "model", "judge"})
        return Column(
            self.column_name,
            tuple(inputs),
            FIELDS,
            partial(self._open, source, precision),
            fingerprint("mlm filter", self.version, asked, known, precision),
            Resources(cpus=engine.cpus, gpus=engine.gpus),
            batch_rows=256,
        )

    def _open(self, source: Artifact | Path | None, precision: str) -> Transform:
        import torch

        torch.set_num_threads(threads.cpus())
        judge: Judge
        if source is not None:
            judge = TextJudge(folder_of(source), self.max_tokens, self.max_new_tokens, precision)
        else:
            assert self.judge is not None  # checked at the door
            judge = _judge_class(self.judge)()
        template = self.prompt or PROMPTS[self.metric]

        def score(batch: pa.RecordBatch) -> pa.RecordBatch:
            captions = pc.utf8_slice_codeunits(batch.column("text"), 0, self.max_chars).to_pylist()
            prompts = [template.replace(CAPTION, caption) for caption in captions]
            images = batch.column("image").to_pylist() if "image" in batch.schema.names else None
            answers = judge(images, prompts)
            if len(answers) != len(prompts):
                raise ConfigError(f"{self.judge} gave {len(answers)} answers to {len(prompts)} prompts")
            values = pa.array([number_in(answer) for answer in answers], pa.float32())
            why = pa.array(np.full(len(values), UNPARSED), mask=values.is_valid().to_numpy(zero_copy_only=False))
            return pa.record_batch([values, why], schema=FIELDS)

        return score


def _judge_class(name: str) -> Any:
    """The class `my_package.module:MyJudge`. Raises ValueError where it cannot be had."""
    module, separator, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute) if separator else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"judge {name!r} cannot be imported: {error}") from error
    if not isinstance(found, type) or not any("__call__" in vars(base) for base in found.__mro__):
        raise ValueError(f"judge {name!r} is not a class whose objects can be called: write my_package.module:MyJudge")
    return found
