"""The training that heals a model: `heal` spends a budget of tokens on a student, as a recovery says.

What it leaves in its directory: `metrics.jsonl`, a line a step (step, tokens, loss, lr, seconds; `held_out` now and
then; `shapes` where the model was cut), and checkpoints, of which the last holds the result.

What it promises. The budget is spent to within one block, and the learning rate ends with it. A step's gradient does
not depend on how its blocks are divided over workers and accumulated parts, but for float noise (and for losses that
weigh their terms by a part's own size, which say so). Blocks come in a new random order every epoch, told by the seed
and the epoch alone, and a training that is broken off goes on to the same losses: on a CPU bit for bit. bfloat16 on
GPUs, with weights in float32; float32 on CPUs.

Without an `engine`, or with `address: inline`, it runs in this process; else under Ray Train's TorchTrainer, with
`engine.workers` workers (default 1) that share the steps' blocks by DistributedDataParallel. A worker that dies is
replaced `engine.retries` times and goes on from the last checkpoint. `directory` must then lie where all see it.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.compress.recover import _checkpoint, _losses, _optimizer
from pipeline.compress.recover._admission import check, identity
from pipeline.compress.recover._shapes import Shapes, shapes, take
from pipeline.compress.recover._workers import under_ray
from pipeline.compress.recover.base import Recovery, Setup, rate
from pipeline.compress.schedule.base import Schedule
from pipeline.config import EngineConfig
from pipeline.errors import TamisError

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)

METRICS, BEST, CHECKPOINTS = "metrics.jsonl", "best.safetensors", "checkpoints"
HELD_OUT_BATCH = 16


@dataclass(frozen=True)
class Healed:
    """What a recovery gave.

    `model`: the student itself, changed. `losses`: of every step, nats a token (float64). `tokens`: trained on;
    `epochs`: how often all blocks were. `passes`: tokens that went `backward` (with the forward pass before it), and
    `forward` alone, to measure held-out loss; `schedule_backward`, `schedule_forward`: what schedules ran. `shapes`: of
    the model, from which token on, where it was cut on the way. `masks`: of weights that are 0.
    """

    model: nn.Module
    metrics: Path
    losses: np.ndarray
    tokens: int
    epochs: float
    stopped_early: bool
    passes: Counter[str]
    shapes: tuple[tuple[int, Shapes], ...]
    masks: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know."""

    recovery: Recovery
    setup: Setup
    tokens: int
    directory: Path
    schedules: tuple[Schedule, ...]
    identity: str


@dataclass(frozen=True)
class Place:
    """Where a worker runs: its device, its number, of how many."""

    device: str = "cpu"
    rank: int = 0
    world: int = 1


def heal(
    student: nn.Module,
    recovery: Recovery,
    blocks: np.ndarray | Path,
    tokens: int,
    *,
    directory: Path,
    teacher: nn.Module | None = None,
    masks: dict[str, torch.Tensor] | None = None,
    vocabulary: np.ndarray | None = None,
    held_out: np.ndarray | None = None,
    domains: np.ndarray | None = None,
    held_out_domains: np.ndarray | None = None,
    engine: EngineConfig | None = None,
    callbacks: Sequence[Schedule] = (),
) -> Healed:
    """Train a student in place on `tokens` tokens of blocks (n, T) of token ids; see `Setup` for the rest.

    A token that is read and not to be predicted, such as those of a prompt, has the id `~i` (`documents.read_ids`).
    Called again with the same arguments it goes on from the last checkpoint in `directory`, or returns what is done.
    Raises ConfigError where the recovery, the model and the data do not fit together, and TamisError for a loss that is
    not finite.
    """
    blocks = np.load(blocks, mmap_mode="r", allow_pickle=False) if isinstance(blocks, Path) else blocks
    setup = Setup(
        student.float(), blocks, teacher, dict(masks or {}), vocabulary, held_out,
        domains, held_out_domains,
    )  # fmt: skip
    check(setup, recovery, tokens)
    directory = Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    job = Job(recovery, setup, tokens, directory, tuple(callbacks), identity(recovery, setup, tokens, callbacks))
    if engine is None or engine.address == "inline":
        training = Training(job, Place("cuda" if engine and engine.gpus and _cuda() else "cpu"))
        training.run()
        return training.end()
    _checkpoint.newest(directory / CHECKPOINTS, job.identity)  # removes another training's before workers look
    under_ray(job, engine)
    return Training(job, Place()).end()  # what the workers left in the directory


class Training:
    """One worker's part of a training."""

    def __init__(self, job: Job, place: Place) -> None:
        self.job, self.place, self.recovery = job, place, job.recovery
        for model in (job.setup.student, job.setup.teacher):
            if model is not None:
                model.to(place.device)
        self.session = job.recovery.begin(job.setup)
        self.callbacks = [schedule.start(job.setup, self.session) for schedule in job.schedules]
        self.blocks = job.setup.blocks
        self.total = job.tokens // self.blocks.shape[1]
        """Blocks that the budget pays."""
        self.folder = job.directory / CHECKPOINTS
        self.progress = Progress()
        self.moments: dict[str, torch.Tensor] = {}
        """Of the optimizer that is made next."""
        if not (self._restore() or place.rank):
            (job.directory / METRICS).write_text("")
            (self.folder / BEST).unlink(missing_ok=True)
        self._prepare()

    @property
    def done(self) -> float:
        """Share of the budget that is spent."""
        return float(self.progress.blocks / self.total)

    @property
    def finished(self) -> bool:
        return self.progress.stopped or self.progress.blocks >= self.total

    def run(self) -> None:
        """Train until the budget is spent, or held-out loss has not improved for long enough."""
        if self.finished:
            return
        if self.progress.step == 0:
            self._log(self._between() | self._evaluate())
        while not self.finished:
            self._step()
        if self.place.rank == 0:
            self._save(last=True)

    def end(self) -> Healed:
        """Merge what was learned into the model. Raises TamisError for a training that others did not finish."""
        if not self.finished:
            raise TamisError(f"recovery: the training in {self.job.directory} did not come to its end: start it again")
        best = self.folder / BEST
        if self.recovery.patience and best.exists() and (found := _checkpoint.read(best)) is not None:
            self._load(found.part("weight/"))
        model = self.session.merge()
        for callback in self.callbacks:
            callback.merged(model)
        model.eval()
        lines = read_metrics(self.job.directory / METRICS)
        p = self.progress
        tokens = p.blocks * self.blocks.shape[1]
        passes = Counter(backward=tokens, forward=p.measured)
        for callback in self.callbacks:
            passes.update({f"schedule_{direction}": count for direction, count in callback.passes.items()})
        cuts = tuple((line["tokens"], line["shapes"]) for line in lines if "shapes" in line)
        losses = np.array([line["loss"] for line in lines if "loss" in line])
        epochs = p.blocks / len(self.blocks)
        masks = {**self.job.setup.masks, **self.session.masks}
        return Healed(model, self.job.directory / METRICS, losses, tokens, epochs, p.stopped, passes, cuts, masks)

    def _prepare(self) -> None:
        """Make what hangs on the parameters that are there now: the optimizer, and what shares gradients."""
        self.parameters = self.session.parameters()
        self.optimizer = _optimizer.adamw(self.recovery, self.parameters)
        _optimizer.restore(self.optimizer, self.parameters, self.moments)
        self.moments = {}
        self.shared = _Shared(self.session, self.place)

    def _step(self) -> None:
        import torch

        began = time.monotonic()
        p = self.progress
        count = min(self.recovery.batch, self.total - p.blocks)
        ids = np.asarray(self.blocks[self._rows(count)], np.int64)
        before, p.blocks = self.done, p.blocks + count
        lr = self.recovery.lr * rate(self.recovery, before, self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.session.model.train()
        loss = self._gradient(ids)
        self.session.mask_gradients()
        norm = torch.nn.utils.get_total_norm([q.grad for q in self.parameters.values() if q.grad is not None])
        self._check_finite("gradient", float(norm))
        for callback in self.callbacks:
            callback.gradients(self.session.model, self.done)
        torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.recovery.clip, norm)
        self.optimizer.step()
        p.step += 1
        line = {"loss": loss, "lr": lr} | self._between()
        self.optimizer.zero_grad(set_to_none=True)
        p.seconds += time.monotonic() - began
        if p.step % self.recovery.evaluate_every == 0 or p.blocks >= self.total:
            line |= self._evaluate()
        self._log(line)
        if self.place.rank == 0 and p.step % self.recovery.checkpoint_every == 0 and not self.finished:
            self._save()

    def _rows(self, count: int) -> np.ndarray:
        for callback in self.callbacks:
            if (chosen := callback.rows(count)) is not None:
                return chosen
        return epoch_rows(len(self.blocks), self.progress.blocks, count, self.recovery.seed)

    def _gradient(self, ids: np.ndarray) -> float:
        """Backward pass of this worker's share of a step's blocks (rows, T); the mean loss of all, nats a token."""
        import torch

        counted = int((ids[:, 1:] >= 0).sum())
        world, parts = self.place.world, self.recovery.accumulate
        mine = np.array_split(ids, world)[self.place.rank]
        pieces = [piece for piece in np.array_split(mine, min(parts, len(mine)) or 1) if len(piece)]
        idle = not pieces  # fewer blocks than workers: the gradient that the others wait for is 0
        pieces = pieces or [ids[:1]]
        total = torch.zeros((), dtype=torch.float64)
        with torch.random.fork_rng():
            torch.manual_seed(_seed(self.recovery.seed, self.progress.step, self.place.rank))
            for i, piece in enumerate(pieces):
                summed = self.shared(torch.from_numpy(piece).to(self.place.device), last=i == len(pieces) - 1)
                loss = summed * (0.0 if idle else world / max(1, counted))  # workers' gradients are averaged
                loss.backward()
                total += 0.0 if idle else summed.detach().double().cpu()
        mean = self.shared.sum(float(total)) / max(1, counted)
        self._check_finite("loss", mean)
        return mean

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise TamisError(
                f"recovery: the {what} of step {self.progress.step + 1} is not finite: lower lr "
                f"({self.recovery.lr:g}), raise warmup, or look at the model before it"
            )

    def _between(self) -> dict[str, Any]:
        """Let the schedules act, and follow what they changed; the new shapes, for the metrics."""
        before = self.progress.shapes
        for callback in self.callbacks:
            change = callback.after_step(self.session.model, self.done)
            if change is None:
                continue
            if change.masks is not None:
                self.session.put_masks(change.masks)
                _optimizer.mask(self.optimizer, self.parameters, self.session.masks)
                continue
            moments = _optimizer.state(self.optimizer, self.parameters)
            self.moments = _optimizer.cut(moments, change.lost) if change.lost is not None else {}
            self._prepare()
            self.progress.shapes = shapes(self.session.model)
            self.progress.best = math.inf  # that of a larger model does not count
        return {} if self.progress.shapes is before else {"shapes": self.progress.shapes}

    def _evaluate(self) -> dict[str, Any]:
        """Measure the loss on held-out blocks, for the metrics; note the best weights, and whether to stop."""
        if (held_out := self.job.setup.held_out) is None:
            return {}
        p = self.progress
        loss = self._held_out_loss(held_out)
        p.measured += held_out.size
        if self.recovery.patience is not None and loss < p.best:
            p.best, p.waited = loss, 0
            if self.place.rank == 0:
                _checkpoint.write(self.folder / BEST, self._weights(), {"identity": self.job.identity, "step": p.step})
        elif self.recovery.patience is not None:
            p.waited += 1
            p.stopped = p.waited >= self.recovery.patience
        return {"held_out": loss}

    def _held_out_loss(self, held_out: np.ndarray) -> float:
        mine = np.array_split(held_out, self.place.world)[self.place.rank]
        total, count = loss_sum(self.session.model, mine, self.place)
        return self.shared.sum(total) / max(1.0, self.shared.sum(count))

    def _weights(self) -> dict[str, torch.Tensor]:
        """What training changes: the trained parameters, and all of a model that was cut on the way."""
        named = dict(self.session.model.named_parameters()) if self.progress.shapes else {}
        return {f"weight/{name}": p for name, p in (named | self.parameters).items()}

    def _load(self, weights: dict[str, torch.Tensor]) -> None:
        import torch

        parameters = dict(self.session.model.named_parameters()) | self.session.parameters()
        with torch.no_grad():
            for name, weight in weights.items():
                parameters[name].copy_(weight)

    def _save(self, last: bool = False) -> None:
        tensors = self._weights()
        masks = {f"mask/{n}": m for n, m in self.session.masks.items()}
        states = {f"callback/{i}/{n}": _tensor(a) for i, c in enumerate(self.callbacks) for n, a in c.state().items()}
        moments = {} if last else _optimizer.state(self.optimizer, self.parameters)
        tensors |= masks | states | {f"moment/{n}": t for n, t in moments.items()}
        ran = [dict(callback.passes) for callback in self.callbacks]
        state = {"identity": self.job.identity, "passes": ran, **self.progress.state()}
        _checkpoint.write(self.folder / _checkpoint.name(self.progress.step), tensors, state)
        _checkpoint.remove_old(self.folder, 1 if last else _checkpoint.KEPT)

    def _restore(self) -> bool:
        if (found := _checkpoint.newest(self.folder, self.job.identity)) is None:
            return False
        self.progress = Progress.of(found.state)
        weights = found.part("weight/")
        if self.progress.shapes:
            device, own = self.place.device, dict(self.session.model.named_parameters())
            take(self.session.model, {n: w.to(device) for n, w in weights.items() if n in own})
        self._load(weights)
        self.session.put_masks(found.part("mask/"))
        self.moments = found.part("moment/")
        for i, callback in enumerate(self.callbacks):
            callback.passes = Counter(found.state["passes"][i])
            callback.restore(self.session.model, {n: t.numpy() for n, t in found.part(f"callback/{i}/").items()})
        if self.place.rank == 0:
            path = self.job.directory / METRICS
            lines = [line for line in read_metrics(path) if line["step"] <= self.progress.step]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return True

    def _log(self, values: dict[str, Any]) -> None:
        if self.place.rank == 0 and values:
            p = self.progress
            line = {"step": p.step, "tokens": p.blocks * self.blocks.shape[1], "seconds": round(p.seconds, 3)} | values
            with (self.job.directory / METRICS).open("a") as file:
                file.write(json.dumps(line) + "\n")


@dataclass
class Progress:
    """How far a training is; what a checkpoint says in JSON."""

    step: int = 0
    blocks: int = 0
    seconds: float = 0.0
    measured: int = 0
    """Tokens that held-out losses were measured on."""
    best: float = math.inf
    waited: int = 0
    stopped: bool = False
    shapes: Shapes = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        return vars(self) | {"best": None if math.isinf(self.best) else self.best}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Progress:
        known = {k: v for k, v in state.items() if k in cls.__dataclass_fields__}
        return cls(**known | {"best": math.inf if state["best"] is None else state["best"]})


class _Shared:
    """The session's loss, with gradients averaged over workers where there are several."""

    def __init__(self, session: Any, place: Place) -> None:
        self.session, self.place, self.wrapped = session, place, None
        if place.world > 1:
            from pipeline.compress.recover._parallel import wrap

            self.wrapped = wrap(session, place.device)

    def __call__(self, ids: torch.Tensor, last: bool) -> torch.Tensor:
        with ExitStack() as stack:
            stack.enter_context(_autocast(self.place))
            if self.wrapped is None:
                return self.session.loss(ids)
            if not last:
                stack.enter_context(self.wrapped.no_sync())
            return self.wrapped(ids)

    def sum(self, value: float) -> float:
        """Over workers."""
        if self.wrapped is None:
            return value
        import torch

        total = torch.tensor([value], dtype=torch.float64, device=self.place.device)
        torch.distributed.all_reduce(total)
        return float(total)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; what stands behind one that was cut off while it was written is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def epoch_rows(blocks: int, position: int, count: int, seed: int) -> np.ndarray:
    """Indices of the next `count` blocks after `position` of them: a new random order every epoch."""
    positions = np.arange(position, position + count)
    epochs = positions // blocks
    return np.concatenate([_order(blocks, seed, int(e))[positions[epochs == e] % blocks] for e in np.unique(epochs)])


@lru_cache(maxsize=2)
def _order(blocks: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(blocks)


def loss_sum(model: nn.Module, blocks: np.ndarray, place: Place = Place()) -> tuple[float, int]:
    """Sum of next-token losses over blocks (n, T), nats, and over how many positions; negative ids do not count."""
    import torch

    model.eval()
    total = 0.0
    with torch.no_grad(), _autocast(place):
        for start in range(0, len(blocks), HELD_OUT_BATCH):
            ids = torch.from_numpy(np.asarray(blocks[start : start + HELD_OUT_BATCH], np.int64)).to(place.device)
            total += float(_losses.cross_entropy(model, _losses.states(model, ids).last_hidden_state, ids[:, 1:]))
    return total, int((blocks[:, 1:] >= 0).sum())


def _tensor(array: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _autocast(place: Place) -> Any:
    """bfloat16 where there is hardware for it."""
    import torch

    return torch.autocast(place.device.partition(":")[0], torch.bfloat16, enabled=place.device.startswith("cuda"))
