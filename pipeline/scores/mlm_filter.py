"""MLM-Filter: an instruction-tuned model judges a pair from 0 to 100.

Source: Wang et al. 2024, "Finetuned Multimodal Language Models Are High-Quality Image-Text Data Filters", arXiv
2403.02677; in Open-Qwen2VL (Wang et al. 2025, arXiv 2504.00595) rows of a semantic understanding of 85 and more join
those that a data filtering network keeps. The judge there is a multimodal model that was fine-tuned on GPT-4's verdicts
(mlm-filter-qwen2.5-1.5b-gpt4o). Four metrics: image-text matching, object detail fulfilment, caption text quality and
semantic understanding (names from memory, unverified; the wording of the prompts is ours).

`model` is a model of images and texts (LLaVA, Qwen-VL, SmolVLM and so on), or a causal language model, which reads the
caption and sees no image: of the metrics it can judge the last two, and those only as far as the words go. Anything
else is a `judge: my_package.module:MyJudge`, a class with the interface of `pipeline.models.judge.Judge`; with
`needs_images = True` it gets the images beside the prompts, decoded to RGB and of at most `max_pixels`. Of models that
see, tiny ones were tried here: a LLaVA that had learned to tell whether a caption names the colour of its image, and
untrained Qwen2-VL, Idefics3 and Gemma 3, for the ways that images go in. A small one that was not taught the question
will not do: SmolLM2-135M-Instruct answered 100, or nothing that parses, to six captions out of six, noise among them,
by either metric.

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

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from pipeline.engine import threads
from pipeline.errors import ConfigError
from pipeline.models.causal import check_model, model_source
from pipeline.models.files import check_installed, existing, folder_digest, folder_of, is_hub
from pipeline.models.image_text import BATCH_ROWS
from pipeline.models.images import pictures
from pipeline.models.judge import BATCH, ImageJudge, Judge, TextJudge, number_in, sees
from pipeline.recipe import QUARANTINE, Column, Resources, Transform, fingerprint
from pipeline.scores._pairs import check_pairs
from pipeline.scores.base import Score

if TYPE_CHECKING:
    from PIL.Image import Image

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
    cost = "2 N FLOPs a token of the image, the prompt and the answer, N parameters of the judge"
    source = "Wang et al. 2024 (MLM-Filter), arXiv 2403.02677"
    kind: Literal["mlm_filter"] = "mlm_filter"
    model: str | None = Field(
        None, description="folder of an instruction-tuned model, of images and texts or causal, or hf://org/name"
    )
    judge: str | None = Field(None, description="instead of `model`: a judge of yours, my_package.module:MyJudge")
    metric: Literal[
        "semantic_understanding", "caption_text_quality", "image_text_matching", "object_detail_fulfillment"
    ] = "semantic_understanding"
    prompt: str | None = Field(None, description="what is asked instead, with {text} where the caption goes")
    max_chars: int = Field(2000, ge=1, description="characters of a caption that the judge reads")
    max_pixels: int = Field(
        1 << 20, ge=1 << 10, description="pixels that the judge is shown; a larger image is reduced"
    )
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
            if not is_hub(self.model):
                self._check_sight(Path(self.model).expanduser())
        elif self.judge is not None:
            _judge_class(self.judge)
        return self

    def _check_sight(self, folder: Path) -> bool:
        """Whether a model takes images. Raises ValueError where it would have to, and where it lacks the means."""
        seeing = sees(folder)
        if seeing:
            check_installed(f"scores.{self.kind}", "vision", "torchvision", "PIL")
            existing(str(folder), "*processor_config.json")
        elif self.prompt is None and self.metric in SEEN:
            raise ValueError(f"{self.metric} is about the image, which `model` does not see: give one that does")
        return seeing

    def column(self, run: Run) -> Column:
        engine = run.config.engine
        source, known = None, [self.judge]
        if self.model is not None:
            source = model_source(run, self.model)
            known = [folder_digest(folder_of(source))]
            try:
                seeing = self._check_sight(folder_of(source))
            except ValueError as error:
                raise ConfigError(f"scores.{self.column_name}: {error}") from error
        else:
            seeing = getattr(_judge_class(str(self.judge)), "needs_images", False)
        if seeing:
            check_pairs(run, self.column_name)
        precision = "bfloat16" if engine.gpus else "float32"
        asked = self.model_dump(exclude={"name", "model", "judge"})
        return Column(
            self.column_name,
            ("image", "text") if seeing else ("text",),
            FIELDS,
            partial(self._open, source, precision, seeing),
            fingerprint("mlm filter", self.version, asked, known, precision),
            Resources(cpus=engine.cpus, gpus=engine.gpus),
            batch_rows=BATCH_ROWS,
        )

    def _open(self, source: Artifact | Path | None, precision: str, seeing: bool) -> Transform:
        import torch

        torch.set_num_threads(threads.cpus())
        judge: Judge
        if source is not None:
            kind = ImageJudge if seeing else TextJudge
            judge = kind(folder_of(source), self.max_tokens, self.max_new_tokens, precision)
        else:
            assert self.judge is not None  # checked at the door
            judge = _judge_class(self.judge)()
        template = self.prompt or PROMPTS[self.metric]

        def score(batch: pa.RecordBatch) -> pa.RecordBatch:
            captions = pc.utf8_slice_codeunits(batch.column("text"), 0, self.max_chars).to_pylist()
            prompts = [template.replace(CAPTION, caption) for caption in captions]
            numbers: list[float | None] = [None] * len(prompts)
            why: list[str | None] = [UNPARSED] * len(prompts)

            def ask(rows: Sequence[int], images: list[Image] | None) -> None:
                answers = judge(images, [prompts[row] for row in rows])
                if len(answers) != len(rows):
                    raise ConfigError(f"{self.judge} gave {len(answers)} answers to {len(rows)} prompts")
                for row, answer in zip(rows, answers, strict=True):
                    numbers[row] = number_in(answer)

            if seeing:
                for rows, images, refused in pictures(batch.column("image"), self.max_pixels, BATCH, threads.cpus()):
                    for row, reason in refused.items():
                        why[row] = reason
                    if rows:
                        ask(rows, images)
            else:
                ask(range(len(prompts)), None)
            values = pa.array(numbers, pa.float32())
            reasons = pc.if_else(values.is_null(), pa.array(why, pa.string()), pa.scalar(None, pa.string()))
            return pa.record_batch([values, reasons], schema=FIELDS)

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
