"""A small convolutional network, trained on the kept images and their labels; what it gets wrong is measured on images
that no arm has trained on.

With `teacher` every arm is trained a second time from a teacher's answers, one network of the same shape that was
trained on all rows (Ben-Baruch et al. 2025, "Distilling the Knowledge in Data Pruning", arXiv 2403.07854): with it the
choice of rows should matter less, the fewer are kept the more. The loss is (1 - alpha) CE(y, p) + alpha KL(p_t, p)
with a weight by the kept share f, alpha = clip(1 - f / 2, 0.5, 1), which is ours, as the paper gives only the trend.

Three 3 x 3 convolutions of `width`, 2 and 4 times as many channels, each with batch normalisation, ReLU and a halving,
then the mean and one linear layer; SGD with Nesterov's momentum 0.9 and weight decay 5e-4, linear warm-up and cosine,
no augmentation (our choices, for CPUs). An example is an image; images of a corpus without texts count as one token.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline.compare.learners.base import Arrays, Learner, Result, Teacher
from pipeline.config import Config
from pipeline.engine import threads
from pipeline.errors import ConfigError, TamisError
from pipeline.hashing import hash64, row_keys
from pipeline.models.files import check_installed
from pipeline.models.image_text import BATCH_ROWS
from pipeline.models.training import rate
from pipeline.recipe import QUARANTINE, Column, State, Transform, fingerprint
from pipeline.run import Run
from pipeline.scores._head import as_labels, label_reference

if TYPE_CHECKING:
    import torch
    from torch import nn

NAME = "proxy-pixels"
WEIGHTS = "model.safetensors"
CHANNELS = 3
GROUP = 256
MOST_CLASSES = 1000


class Images(Learner):
    """A classifier on labelled images."""

    content: ClassVar[Literal["text", "image"]] = "image"
    measure: ClassVar[str] = "error"

    label: str = Field("label", description="column of the source that holds the class of an image")
    size: int = Field(
        28, ge=8, le=224, description="pixels that images are resized to; 2 steps * batch images are held in memory"
    )
    width: int = Field(16, ge=1, description="channels of the first convolution")
    batch: int = Field(64, ge=2, description="images a step")
    lr: float = Field(0.1, gt=0)
    eval_images: int = Field(10_000, ge=16, description="images to measure on, at the most")
    teacher: bool = Field(False, description="train every arm once more, taught by a network trained on all rows")

    @property
    def taught(self) -> tuple[bool, ...]:
        return (False, True) if self.teacher else (False,)

    @property
    def consumed(self) -> int:
        return self.steps * self.batch

    def check(self, config: Config) -> None:
        try:
            check_installed("tamis compare --proxy", "vision", "torch", "PIL", "safetensors")
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def columns(self, run: Run) -> list[Column]:
        reference = label_reference(run, self.label, "--with label")
        fields = pa.schema(
            [
                ("pixels", pa.list_(pa.uint8(), CHANNELS * self.size**2)),
                ("class", pa.uint64()),
                (QUARANTINE, pa.string()),
            ]
        )
        identity = fingerprint("proxy pixels", 1, self.size, self.label)
        opened = partial(_open, reference, fields, self.size)
        return [Column(NAME, ("image", reference), fields, opened, identity, batch_rows=BATCH_ROWS)]

    def kept(self, run: Run, flag: str, value: float, most: int | None, seed: int) -> KeptImages:
        return KeptImages(flag, value, self.eval_images if most is None else most, seed)

    def examples(self, state: State) -> tuple[Arrays, int]:
        return {"pixels": state["pixels"], "class": state["class"]}, len(state["class"])

    def measured(self, state: State, run: Run) -> Mapping[str, Arrays]:
        classes = np.unique(state["class"])
        if not 2 <= len(classes) <= MOST_CLASSES:
            raise ConfigError(
                f"--with label: {self.label!r} has {len(classes)} values in the {len(state['class']):,} images "
                f"that are measured on, where 2 to {MOST_CLASSES:,} are learnt: name another column, or raise held_out"
            )
        return {"mix": self.examples(state)[0]}

    def train(
        self, data: Arrays, held: Mapping[str, Arrays], steps: int, seed: int, directory: Path, teacher: Teacher | None
    ) -> Result:
        import torch
        from safetensors.torch import load_file, save_file

        classes = np.unique(np.concatenate([*(found["class"] for found in held.values())]))
        known = np.isin(data["class"], classes)  # a class that nothing is measured on is too rare to be learnt
        x, y = data["pixels"][known], np.searchsorted(classes, data["class"][known])
        if not len(x):
            raise TamisError("an arm keeps no image of a class that is measured on: raise the budget")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, taught = network(self.width, len(classes), seed).to(device), None
        started = time.monotonic()
        if teacher is not None:
            guide = network(self.width, len(classes), 0).to(device)
            guide.load_state_dict(load_file(teacher.folder / WEIGHTS))
            taught = (guide.eval(), teacher_weight(teacher.share))
        losses = self._fit(model, x.reshape(len(x), self.size, self.size, CHANNELS), y, steps, seed, taught)
        seconds = time.monotonic() - started
        save_file(model.state_dict(), directory / WEIGHTS)
        result: Result = {"seconds": seconds, "parameters": sum(p.numel() for p in model.parameters())}
        for metric, found in held.items():
            truth = np.searchsorted(classes, found["class"])
            said = np.concatenate([z.argmax(1).cpu().numpy() for z in logits(model, found["pixels"], self.size)])
            result[metric] = float(np.mean(said != truth))
        return result | {"train": float(np.mean(losses[-max(1, len(losses) // 20) :]))}

    def _fit(
        self,
        model: nn.Module,
        x: np.ndarray,
        y: np.ndarray,
        steps: int,
        seed: int,
        taught: tuple[nn.Module, float] | None,
    ) -> list[float]:
        """Train in place on images (n, size, size, 3) uint8 and classes (n,); the loss of every step."""
        import torch

        device = next(model.parameters()).device
        optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        warmup = max(1, steps // 20)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, warmup))
        rng, order, losses = np.random.default_rng(seed), np.empty(0, np.int64), []
        model.train()
        for _ in range(steps):
            while len(order) < self.batch:
                order = np.concatenate([order, rng.permutation(len(x))])
            rows, order = order[: self.batch], order[self.batch :]
            images = scaled(x[rows], device)
            loss = loss_of(model(images), torch.from_numpy(y[rows]).to(device), taught, images)
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        model.eval()
        return losses

    def describe(self, parameters: float) -> str:
        taught = "; taught arms learn from a network of the same shape that was trained on all rows" * self.teacher
        return (
            f"Convolutional network of {parameters / 1e3:.0f} k parameters on {self.size} x {self.size} pixels, "
            f"{self.steps:,} steps of {self.batch}: {self.consumed:,} images for every arm{taught}"
        )


def teacher_weight(share: float) -> float:
    """Weight of the teacher where a share of the rows is kept: grows as the share shrinks (our form of the trend)."""
    return float(np.clip(1 - share / 2, 0.5, 1))


def loss_of(
    logits: torch.Tensor, y: torch.Tensor, taught: tuple[nn.Module, float] | None, images: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy, or its mixture with the divergence from the teacher's probabilities; logits (n, classes)."""
    import torch
    from torch.nn import functional as F

    truth = F.cross_entropy(logits, y)
    if taught is None:
        return truth
    teacher, alpha = taught
    with torch.no_grad():
        told = F.log_softmax(teacher(images), 1)
    divergence = F.kl_div(F.log_softmax(logits, 1), told, reduction="batchmean", log_target=True)
    return (1 - alpha) * truth + alpha * divergence


def network(width: int, classes: int, seed: int) -> nn.Module:
    """The untrained network; its weights are drawn from the seed."""
    import torch
    from torch import nn

    def stage(fan_in: int, fan_out: int) -> list[nn.Module]:
        convolution = nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(fan_out), nn.ReLU(), nn.MaxPool2d(2)]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stages = [*stage(CHANNELS, width), *stage(width, 2 * width), *stage(2 * width, 4 * width)]
        return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


def scaled(pixels: np.ndarray, device: torch.device) -> torch.Tensor:
    """(n, size, size, 3) uint8 to (n, 3, size, size) float32 between -1 and 1."""
    import torch

    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def logits(model: nn.Module, pixels: np.ndarray, size: int) -> Sequence[torch.Tensor]:
    """Logits of images (n, 3 size^2) uint8, some at a time."""
    import torch

    device = next(model.parameters()).device
    images = pixels.reshape(len(pixels), size, size, CHANNELS)
    with torch.inference_mode():
        return [model(scaled(images[i : i + GROUP], device)) for i in range(0, len(images), GROUP)]


def _open(reference: str, fields: pa.Schema, size: int) -> Transform:
    from pipeline.models.images import Preprocess, stream

    preprocess = Preprocess(size, size, "squash", interpolation="bilinear")

    def transform(batch: pa.RecordBatch) -> pa.RecordBatch:
        images = batch.column("image")
        pixels = np.zeros((len(images), size, size, CHANNELS), np.uint8)
        reasons: dict[int, str] = {}
        for group in stream(images, preprocess, GROUP, threads.cpus()):
            pixels[group.rows] = group.pixels
            reasons |= group.refused
        why = np.full(len(images), "", dtype=object)
        why[list(reasons)] = list(reasons.values())
        bad = why != ""
        flat = pa.array(pixels.reshape(-1))
        lists = pa.FixedSizeListArray.from_arrays(flat, CHANNELS * size**2, mask=pa.array(bad))
        classes = hash64(row_keys(as_labels(batch.column(reference))), 0)
        return pa.record_batch(
            [lists, pa.array(classes, mask=bad), pa.array(why, pa.string(), mask=~bad)], schema=fields
        )

    return transform


@dataclass(frozen=True)
class KeptImages:
    """Statistic: images of the rows where `flag` is `value`, the `most` with the lowest hashes, in their order.

    State: `hash` (m,) uint64 ascending, `pixels` (m, 3 size^2) uint8, `class` (m,) uint64, the label's hash, `rows`
    (1,) int64: all rows where it is.
    """

    flag: str
    value: float
    most: int
    seed: int

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.flag, "row.key", f"{NAME}.pixels", f"{NAME}.class")

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        batch = batch.filter(pc.equal(batch.column(self.flag).cast(pa.float32()), self.value))
        pixels = batch.column(f"{NAME}.pixels")
        new = {
            "hash": hash64(batch.column("row.key"), self.seed),
            "pixels": pixels.flatten().to_numpy().reshape(len(pixels), pixels.type.list_size),
            "class": batch.column(f"{NAME}.class").to_numpy(),
            "rows": np.array([batch.num_rows]),
        }
        return self.merge([state, new] if state else [new])

    def merge(self, states: Sequence[State]) -> State:
        hashes = np.concatenate([s["hash"] for s in states])
        order = np.argsort(hashes, kind="stable")[: self.most]
        merged = {"hash": hashes[order], "rows": np.sum([s["rows"] for s in states], axis=0)}
        for name in ("pixels", "class"):  # copied into place: all states joined would be as large as they are again
            first, end = states[0][name], 0
            merged[name] = np.empty((len(order), *first.shape[1:]), first.dtype)
            for state in states:
                start, end = end, end + len(state["hash"])
                here = np.flatnonzero((start <= order) & (order < end))
                merged[name][here] = state[name][order[here] - start]
        return merged
