"""What a model does on calibration data: sums of what its modules read, turns of its residual stream, gradients.

Every statistic is a set of sums over rows (sequences, images), so batches, shards and workers add up, in float64
(conventions.md, section 6). A `Probe` hangs hooks into the model and stages what one batch adds; a batch that gives a
value which is not finite is run again row by row, and the rows at fault are dropped and counted; more than one in a
hundred stop the work. Padding (`attention_mask` 0) counts nowhere. What several parts of a method ask for is measured
in one pass (`Calibration.measure`), and once.

The sums cost little beside the forward pass: entries are summed in float32 while the cache still holds them, a batch's
sums in float64. bench/compress_scoring.py measures it.

`Calibration.passes` counts tokens that went forward and backward: the ledger charges them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.compress.documents import read_tensor
from pipeline.errors import TamisError

if TYPE_CHECKING:
    import torch
    from torch import nn

Batch = Mapping[str, "torch.Tensor"]
"""What a model takes, by the names of its arguments; the first axis of each is the rows. `labels`, where not all tokens
are to be predicted, are the ids of those that are, and -100."""

LABELS = "labels"

Sums = dict[str, "torch.Tensor"]
"""Sums over rows, float64; each probe names its own. `rows` and `tokens` are always there."""

RowLoss = Callable[["nn.Module", Batch], "torch.Tensor"]
"""Every row's loss, (rows,), from a model and a batch."""

DROPPED = 0.01
"""Share of rows that may be dropped because a value is not finite."""

GRADIENT, SQUARE = "gradient", "square of gradient"

CHUNK = 64
"""Tokens whose entries are summed at a time: 64 x 1,536 float32 stay in a core's cache."""


class Stage(dict[str, "torch.Tensor"]):
    """What one batch has given a probe so far; `mask`: its tokens that count (rows, length), None where all do."""

    def __init__(self, mask: torch.Tensor | None = None) -> None:
        super().__init__()
        self.mask = mask

    def tokens(self, values: torch.Tensor) -> torch.Tensor:
        """The values (rows, length, n) or (rows * length, n) of tokens that count, a row a token, float32. Other shapes
        have no padding."""
        flat = values.detach().flatten(0, -2)
        if self.mask is not None and self.mask.numel() == len(flat):
            flat = flat[self.mask.flatten()]
        return flat.float()


class Probe(Protocol):
    """Something to sum over a forward pass; a frozen dataclass, equal to another that asks for the same."""

    def hooks(self, model: nn.Module, stage: Stage) -> Iterable[Any]:
        """Hang hooks into a model that add (`stage_add`) what one batch gives; returns their handles."""


@dataclass(frozen=True)
class InputMoments:
    """Of what modules read, entry by entry: `NAME.count`, `NAME.sum`, `NAME.square`; with `gram`, `NAME.gram` = X^T X.

    X has a row a token. Shapes (), (in,), (in,), the Gram matrix (in, in).
    """

    modules: tuple[str, ...]
    gram: bool = False

    def hooks(self, model: nn.Module, stage: Stage) -> Iterable[Any]:
        found = dict(model.named_modules())

        def see(name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = stage.tokens(inputs[0])
            for key, value in zip(("count", "sum", "square"), moments(x), strict=True):
                stage_add(stage, f"{name}.{key}", value)
            if self.gram:
                stage_add(stage, f"{name}.gram", x.T @ x)

        return [found[name].register_forward_pre_hook(partial(see, name)) for name in self.modules]


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Number of rows, sum and sum of squares of each column of x (n, width) float32; float64.

    Squares are taken of deviations from the mean of the first rows and put back in float64, so that a variance does not
    drown where the mean is large: as exact as merging means and squared deviations (conventions, section 6), and sums
    that add.
    """
    import torch

    about = x[:16].mean(0) if len(x) else x.new_zeros(x.shape[1])
    total, squares = torch.zeros_like(about), torch.zeros_like(about)
    for part in x.split(CHUNK):
        deviation = part - about
        total += deviation.sum(0)
        squares += deviation.square_().sum(0)
    n, c, d = torch.tensor(float(len(x)), dtype=torch.float64), about.double(), total.double()
    return n, d + n * c, squares.double() + 2 * c * d + n * c * c


def variance(sums: Sums, name: str) -> torch.Tensor:
    """Of every entry that a module reads (in,), float64, with n - 1; 0 where there is one token."""
    n, total, square = (sums[f"{name}.{key}"] for key in ("count", "sum", "square"))
    return (square - total.square() / n).clamp_min(0) / (n - 1).clamp_min(1)


@dataclass(frozen=True)
class Turns:
    """How far each block turns the residual stream: `turn.cosine` and `turn.angle` (arccos / pi), (layers,), sums over
    tokens but the first of each row (a sink that dominates), and `turn.tokens` (1,).
    """

    blocks: str

    def hooks(self, model: nn.Module, stage: Stage) -> Iterable[Any]:
        import torch

        layers = model.get_submodule(self.blocks)
        mask = None if stage.mask is None else (stage.mask & (stage.mask.cumsum(1) > 1))[:, 1:]

        def see(i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = (args[0] if args else kwargs["hidden_states"])[:, 1:].float()
            after = (output[0] if isinstance(output, tuple) else output)[:, 1:].float()
            norms = before.norm(dim=-1) * after.norm(dim=-1)
            counts = norms > 0 if mask is None else (norms > 0) & mask
            cosine = ((before * after).sum(-1) / norms).clamp(-1, 1)[counts]
            each = torch.zeros(len(layers), dtype=torch.float64)
            each[i] = 1
            stage_add(stage, "turn.cosine", each * float(cosine.double().sum()))
            stage_add(stage, "turn.angle", each * float((cosine.double().arccos() / torch.pi).sum()))
            stage_add(stage, "turn.tokens", each * cosine.numel())

        return [block.register_forward_hook(partial(see, i), with_kwargs=True) for i, block in enumerate(layers)]


def stage_add(stage: Sums, name: str, value: torch.Tensor) -> None:
    """Add to what was given so far, in float64: a module may run more than once."""
    import torch

    if name in stage:
        stage[name] += value
    else:
        stage[name] = value.to(torch.float64, copy=True)


def token_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of each row's next tokens, nats; (rows,) float32. Padding is neither read nor a target, and
    what is no label is read alone."""
    import torch

    ids = batch["input_ids"]
    # The last position stays, without a target: logits[:, :-1] would be a copy of the largest thing in memory.
    target = batch.get(LABELS, ids).roll(-1, 1)
    target[:, -1] = -100
    if "attention_mask" in batch:
        mask = batch["attention_mask"]
        target[(mask * mask.roll(-1, 1)) == 0] = -100
    logits = run(model, batch).logits.flatten(0, 1).float()
    losses = torch.nn.functional.cross_entropy(logits, target.flatten(), reduction="none").view(ids.shape)
    return losses.sum(1) / (target != -100).sum(1).clamp_min(1)


@dataclass
class Calibration:
    """A model, batches to run it on, and what was measured so far.

    `loss` gives every row's loss, (rows,). Whoever changes the model's weights calls `forget`.
    """

    model: nn.Module
    batches: Sequence[Batch]
    loss: RowLoss = token_loss
    passes: Counter[str] = field(default_factory=Counter)
    """Tokens that went `forward` (without a backward pass after it) and `backward` (with the forward before it)."""
    dropped: int = 0
    _measured: dict[Any, Sums] = field(default_factory=dict)

    @classmethod
    def of_blocks(cls, model: nn.Module, blocks: np.ndarray, batch: int = 8) -> Calibration:
        """Of a causal LM on token ids (n, length), none of them padding, of which some may say that they are not to be
        predicted (`documents.read_ids`)."""
        import torch

        device = next(model.parameters()).device
        ids = torch.from_numpy(np.asarray(blocks, np.int64)).to(device)
        return cls(model, [batch_of(part) for part in ids.split(batch)])

    @property
    def rows(self) -> int:
        return sum(_rows(batch) for batch in self.batches)

    def forget(self) -> None:
        """Drop what was measured: the model is another one now."""
        self._measured.clear()

    def measure(self, *probes: Probe) -> Sums:
        """The sums of all probes; those that were not measured yet are, together, in one forward pass."""
        missing = [p for p in dict.fromkeys(probes) if p not in self._measured]
        if missing:
            found: dict[Any, Sums] = {p: {} for p in missing}
            self.each_batch(lambda batch: self._forward(missing, batch), found)
            self._measured.update(found)
        return {name: value for p in probes for name, value in self._measured[p].items()}

    def gradients(self, loss: RowLoss | None = None) -> Sums:
        """Gradient of the mean loss over rows by every parameter that a row's loss depends on, by name, float32.

        `loss`: another one than the calibration's own.
        """
        loss = loss or self.loss
        if (GRADIENT, loss) not in self._measured:
            self._differentiate(loss, squares=False)
        return self._measured[GRADIENT, loss]

    def squared_gradients(self, loss: RowLoss | None = None) -> Sums:
        """Mean over rows of the squares of a row's gradient, by name, float32. Every row is a pass of its own."""
        loss = loss or self.loss
        if (SQUARE, loss) not in self._measured:
            self._differentiate(loss, squares=True)
        return self._measured[SQUARE, loss]

    def _differentiate(self, loss: RowLoss, squares: bool) -> None:
        """Measure the mean gradient of a loss and, row by row, its mean square."""
        found: dict[Any, Sums] = {kind: {} for kind in ((GRADIENT, SQUARE) if squares else (GRADIENT,))}

        def give(batch: Batch) -> dict[Any, Sums]:
            if not squares:
                return {GRADIENT: self._backward(loss, batch)}
            given: dict[Any, Sums] = {GRADIENT: {}, SQUARE: {}}
            for i in range(_rows(batch)):
                for name, gradient in self._backward(loss, _row(batch, i)).items():
                    g = gradient.float()
                    if name in given[GRADIENT]:
                        given[GRADIENT][name] += g
                        given[SQUARE][name].addcmul_(g, g)
                    else:
                        given[GRADIENT][name], given[SQUARE][name] = g.clone(), g.square()
            return given

        self.each_batch(give, found)
        for kind, sums in found.items():
            rows = sums.pop("rows")
            self._measured[kind, loss] = {n: (g / rows).float() for n, g in sums.items() if n != "tokens"}

    def each_batch(self, give: Callable[[Batch], dict[Any, Sums]], into: dict[Any, Sums]) -> None:
        """Add what every batch gives; rows whose values are not finite are dropped.

        Raises TamisError without rows, for too many bad ones, and where a batch does not fit in memory: with the size
        that does.
        """
        if not self.rows:
            raise TamisError("calibration: there are no rows to run the model on")
        dropped = 0
        for batch in self.batches:
            for part in [batch, *(_row(batch, i) for i in range(_rows(batch)))] if _rows(batch) > 1 else [batch]:
                try:
                    given = give(part)
                except (MemoryError, RuntimeError) as error:
                    if not out_of_memory(error):
                        raise
                    given = None
                if given is None:  # outside the handler, which would hold on to what the batch took
                    raise TamisError(_advice(give, part))
                finite = all(bool(v.isfinite().all()) for sums in given.values() for v in sums.values())
                if not finite:
                    dropped += _rows(part) == 1
                    continue
                for key, sums in given.items():
                    for name, value in (sums | _sizes(part)).items():
                        stage_add(into[key], name, value)
                if part is batch:
                    break
        self.dropped += dropped
        if dropped > DROPPED * self.rows:
            raise TamisError(
                f"{dropped} of {self.rows} calibration rows give values that are not finite: look at the model "
                "(float16 overflows; load it in float32) and at the data"
            )

    def _forward(self, probes: Sequence[Probe], batch: Batch) -> dict[Any, Sums]:
        import torch

        mask = batch.get("attention_mask")
        mask = None if mask is None or bool(mask.all()) else mask.bool()
        staged: dict[Any, Stage] = {p: Stage(mask) for p in probes}
        handles = [h for p in probes for h in p.hooks(self.model, staged[p])]
        try:
            with torch.no_grad():
                run(self.model.eval(), batch)
        finally:
            for handle in handles:
                handle.remove()
        self.passes["forward"] += tokens_of(batch)
        return dict(staged)

    def _backward(self, loss: RowLoss, batch: Batch) -> Sums:
        import torch

        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        with torch.enable_grad():
            total = loss(self.model.eval(), batch).sum()
            given = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        self.passes["backward"] += tokens_of(batch)
        return {n: g for n, g in zip(parameters, given, strict=True) if g is not None}


def batch_of(ids: torch.Tensor) -> Batch:
    """Ids (rows, length) that say what is to be predicted, as a batch."""
    if not bool((ids < 0).any()):
        return {"input_ids": ids}
    return {"input_ids": read_tensor(ids), LABELS: ids.where(ids >= 0, -100)}


def run(model: nn.Module, batch: Batch) -> Any:
    """A model's output, without a cache of keys and values where it would keep one. Labels are ours to count."""
    causal = getattr(getattr(model, "config", None), "use_cache", None) is not None and "input_ids" in batch
    read = {name: value for name, value in batch.items() if name != LABELS}
    return model(**read, use_cache=False) if causal else model(**read)


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out: torch has a class for GPUs, and for CPUs a message."""
    import torch

    said = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _advice(give: Callable[[Batch], object], batch: Batch) -> str:
    """What to change so that a batch fits: half as many rows, and half again, until they do."""
    rows = _rows(batch)
    fits = rows // 2
    while fits:
        try:
            give({name: value[:fits] for name, value in batch.items()})
            break
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        fits //= 2
    said = f"calibration: a batch of {rows} rows does not fit in memory"
    return f"{said}; {fits} fit: set batch to {fits}" if fits else f"{said}, nor does one row: shorten the rows"


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _row(batch: Batch, i: int) -> Batch:
    return {name: value[i : i + 1] for name, value in batch.items()}


def tokens_of(batch: Batch) -> int:
    """Tokens of a batch that count; rows, where it has none."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return batch["input_ids"].numel() if "input_ids" in batch else _rows(batch)


def _sizes(batch: Batch) -> Sums:
    import torch

    return {"rows": torch.tensor(float(_rows(batch))), "tokens": torch.tensor(float(tokens_of(batch)))}
