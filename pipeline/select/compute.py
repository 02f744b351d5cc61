"""How much to keep for a given compute: the quality-quantity trade-off of Goyal et al. 2024 (arXiv 2404.07177, "QQT").

The best tenth of a corpus is the best choice for a short training and, repeated over and over, the worst for a long
one. A law says where between them a compute falls. Buckets of tokens, best first, each have a utility b < 0 and a
half-life tau in epochs: with every epoch the utility of what was seen before halves by 1/tau. A pool of the first p
buckets, together E tokens, read for n tokens, ends at the error

    y(n) = A (a n_1 / 1e5)^b_0  *  prod_{k >= 1} (n_{k+1} / n_k)^b_k  +  d,        n_k = min(k E, n)
    b_k = sum_i w_i b_i 2^(-k / (tau_i / w_i)),                                  w_i = E_i / E

which is the form of the authors' code (`effective_utility`, `locuslab/scaling_laws_data_filtering`), the constant d
added last; in one function of that code it is scaled along with the first factor. With buckets of one size, w_i = 1/p
and the half-life is p tau_i; the weights for other sizes are ours. Of two pools of the same rows this makes the
half-life in tokens grow with p squared, the assumption that makes wide pools cheap.

a stands inside of the power, so a and b belong together: take both from one fit. All buckets then meet at 1e5 / a
tokens, with the error A + d; below, the law turns around and the bucket of least utility has the least error, so a
choice made there says that it means nothing. A is 1 in the code, the error rate of a model that guesses. It is a
parameter here because a loss has no such unit: take that of the untrained model (`proxies` do), or buckets that differ
in level cannot differ in slope.

n = compute / (6 params): a dense transformer's FLOPs a token, forward and backward. The paper's error is the share of
ImageNet or of 18 tasks that a CLIP model gets wrong; here it is whatever the law was fitted to, such as a held-out
loss. Half-lives of language models follow other laws, too (four epochs nearly free: Muennighoff et al. 2023).

`betr_percent` is what Mizrahi et al. 2025 (arXiv 2507.12466) found without any repeats, F_opt = 4e-5 C^0.25 percent of
tokens: another measurement of the same direction, shown beside the choice as a check.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import ConfigError

NORM = 1e5
"""Samples (here tokens) that `scale` counts in."""
FLOPS_A_WEIGHT = 6.0
EPOCHS = 4096
"""Epochs that are told apart; those after them go with the last."""
FITTED_EPOCHS = 10
"""The paper's fits saw no more; beyond it the law is an extrapolation."""
HALF_LIVES = (1.0, 10.0)
"""Half-lives that a fit looks at, as the code does. One at an end was not identified."""


class Law(BaseModel):
    """Utilities and half-lives of buckets, best bucket first."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    utility: tuple[float, ...] = Field(min_length=1, description="b of every bucket, below 0, the best bucket first")
    half_life: tuple[float, ...] = Field(description="tau of every bucket in epochs; one number for all of them")
    scale: float = Field(gt=0, allow_inf_nan=False, description="a, fitted together with the utilities")
    floor: float = Field(0.1, ge=0, allow_inf_nan=False, description="d, the error that no data undercuts")
    amplitude: float = Field(1.0, gt=0, allow_inf_nan=False, description="A: errors above d before any training")
    share: tuple[float, ...] = Field((0.1,), description="share of all tokens in every bucket; one number for all")
    notes: tuple[str, ...] = Field((), description="what a fit could not tell")

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        one = {k: (v,) for k, v in value.items() if k in ("half_life", "share") and isinstance(v, int | float)}
        return value | one

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if bad := [b for b in self.utility if not -math.inf < b < 0]:
            raise ValueError(
                f"utility: {bad[0]:g} is not below 0: a bucket that lowers no error has no use, leave it out"
            )
        for name in ("half_life", "share"):
            values = getattr(self, name)
            if len(values) not in (1, len(self.utility)):
                raise ValueError(f"{name}: {len(values)} values for {len(self.utility)} utilities; give one or as many")
            if bad := [v for v in values if not v > 0]:
                raise ValueError(f"{name}: {bad[0]:g} is not above 0")
        if sum(self.shares) > 1 + 1e-9:
            raise ValueError(f"share: the buckets hold {sum(self.shares):g} of all tokens, more than there are")
        return self

    @property
    def buckets(self) -> int:
        return len(self.utility)

    @property
    def shares(self) -> tuple[float, ...]:
        return self.share * (self.buckets // len(self.share))

    def error(self, seen: float, sizes: Sequence[float]) -> float:
        """Error after `seen` tokens of a pool of the first `len(sizes)` buckets, which hold `sizes` tokens."""
        size = np.asarray(sizes, np.float64)
        weight = size / size.sum()
        b = np.array(self.utility[: len(size)])
        half_life = np.array(self.half_life * (self.buckets // len(self.half_life)))[: len(size)] / weight
        ends = epoch_ends(seen, float(size.sum()))
        decayed = np.exp2(-np.arange(len(ends))[:, None] / half_life)
        powers = decayed @ (weight * b)
        steps = np.log(np.append(self.scale * ends[0] / NORM, ends[1:] / ends[:-1]))
        return float(self.amplitude * np.exp(powers @ steps) + self.floor)


def epoch_ends(seen: float, size: float) -> np.ndarray:
    """Tokens seen at the end of every epoch (n_1, n_2, ...), the last of them `seen`."""
    whole = min(math.ceil(seen / size), EPOCHS)
    return np.append(size * np.arange(1, whole), seen)


@dataclass(frozen=True)
class Pool:
    """One choice: the first `buckets`, which are `fraction` of all tokens, read `epochs` times."""

    buckets: int
    fraction: float
    tokens: int
    epochs: float
    error: float


@dataclass(frozen=True)
class Choice:
    """The pool of least error for a compute, and the pools that it was chosen from."""

    seen: float
    """Tokens that the training reads."""
    best: Pool
    curve: tuple[Pool, ...]
    notes: tuple[str, ...]

    def described(self) -> dict[str, Any]:
        """For selection.json and the hand-off: what a trainer's loader has to know."""
        return {
            "tokens_to_see": round(self.seen),
            "epochs": self.best.epochs,
            "predicted_error": self.best.error,
            "buckets": self.best.buckets,
            "fraction": self.best.fraction,
        }


def tokens_seen(compute: float, params: float) -> float:
    """Tokens that a training of so many FLOPs reads with a model of so many parameters."""
    return compute / (FLOPS_A_WEIGHT * params)


def betr_percent(compute: float) -> float:
    """BETR's compute-optimal share of tokens in percent, at the most 100."""
    return float(min(100.0, 4e-5 * compute**0.25))


def choose(law: Law, compute: float, params: float, available: float) -> Choice:
    """The number of buckets, best first, of least error, out of `available` tokens.

    The first pool of equal errors wins: fewer tokens to store. Raises ConfigError where a bucket would be empty.
    """
    seen = tokens_seen(compute, params)
    sizes = [share * available for share in law.shares]
    if min(sizes) < 1 or seen < 1:
        raise ConfigError(
            f"select.budget.law: a bucket would hold {min(sizes):.2g} of {available:,.0f} tokens and {seen:.2g} are "
            "seen: give larger shares, or more compute"
        )
    curve = []
    for p in range(1, law.buckets + 1):
        held = sum(sizes[:p])
        tokens = min(int(held + 1e-6), int(available))
        curve.append(Pool(p, sum(law.shares[:p]), tokens, seen / held, law.error(seen, sizes[:p])))
    best = min(curve, key=lambda pool: pool.error)
    return Choice(seen, best, tuple(curve), (*law.notes, *_notes(law, compute, seen, best)))


def _notes(law: Law, compute: float, seen: float, best: Pool) -> list[str]:
    percent = betr_percent(compute)
    notes = [
        f"for {compute:.3g} FLOPs the law keeps {best.fraction:.1%} of the tokens for {best.epochs:.3g} epochs; "
        f"BETR's rule, without repeats, would keep {percent:.3g} %"
    ]
    if best.epochs > FITTED_EPOCHS:
        notes.append(f"{best.epochs:.0f} epochs are more than the {FITTED_EPOCHS} that such a law was ever fitted to")
    if law.scale * min(seen, best.tokens / best.buckets) < NORM:
        notes.append(f"the law has no meaning below 1e5 / scale = {NORM / law.scale:.3g} tokens a bucket")
    if best.epochs < 1:
        notes.append(f"the training reads only {best.epochs:.0%} of what is kept: a smaller share would do")
    if best.buckets == law.buckets > 1 and sum(law.shares) < 1:
        notes.append("all buckets of the law are kept: it cannot say whether more would be better")
    return notes


def load_law(path: str) -> Law:
    """A law as `save_law` or a person wrote it. Raises ConfigError."""
    from pipeline.corpus.storage import resolve

    try:
        filesystem, inside = resolve(path)
        with filesystem.open_input_file(inside) as source:
            return Law.model_validate_json(source.read())
    except (OSError, ValidationError) as error:
        raise ConfigError(f"select.budget.law: {path} cannot be read as a law: {error}") from error


@dataclass(frozen=True)
class Measured:
    """Errors of trainings on one bucket alone: tokens seen and error, float64 of one length."""

    seen: np.ndarray
    error: np.ndarray


def fit_law(
    measured: Sequence[Measured],
    size: float,
    share: float,
    floor: float = 0.1,
    half_life: float | None = None,
    amplitude: float = 1.0,
) -> Law:
    """Fit a, b_i and tau_i to errors of single buckets of `size` tokens, best bucket first.

    d (`floor`) and A are given, a is shared, as in the code; its 100,000 random grid points are replaced by a search
    over log a and tau in ever finer grids, in which b is the least-squares solution for log((error - d) / A). The grid
    of a is wide, as losses of language models ask for values that the code's, made for error rates, does not hold.

    A bucket whose error does not fall ends the law: wider pools would hold it. With fewer than three points a bucket, b
    and tau cannot be told apart: give `half_life`. Raises ConfigError.
    """
    notes: list[str] = []
    useful = list(measured)
    for i, bucket in enumerate(measured):
        order = np.argsort(bucket.seen)
        if not np.isfinite(bucket.error).all() or (bucket.error <= floor).any():
            raise ConfigError(f"qqt: bucket {i + 1} has an error that is not above the floor of {floor:g}: lower it")
        if half_life is None and len(bucket.seen) < 3:
            raise ConfigError(f"qqt: bucket {i + 1} has {len(bucket.seen)} errors; three are needed, or a `half_life`")
        if bucket.error[order[-1]] >= bucket.error[order[0]]:
            notes.append(
                f"the error of bucket {i + 1} does not fall with training: it and those behind it are left out"
            )
            useful = useful[:i]
            break
    if not useful:
        raise ConfigError("qqt: the error of the best bucket does not fall: train longer, or use another score")
    scales = np.linspace(-30.0, 12.0, 169)
    for _ in range(5):
        loss, taus, bs = zip(
            *(_profile(bucket, size, floor, amplitude, scales, half_life) for bucket in useful), strict=True
        )
        at = int(np.sum(loss, axis=0).argmin())
        scale, tau, b = float(scales[at]), [t[at] for t in taus], [v[at] for v in bs]
        scales = scale + (scales[1] - scales[0]) * np.linspace(-1, 1, 41)
    for i, (t, value) in enumerate(zip(tau, b, strict=True)):
        if half_life is None and min(abs(t - edge) for edge in HALF_LIVES) < 1e-3:
            notes.append(f"the half-life of bucket {i + 1} was not identified: {t:.3g} is an end of what was searched")
        if value >= 0:
            raise ConfigError(f"qqt: the errors of bucket {i + 1} do not follow the law: no utility below 0 fits them")
    law = {"utility": b, "half_life": tau, "scale": NORM * math.exp(scale) / size, "share": share}
    return Law.model_validate(law | {"floor": floor, "amplitude": amplitude, "notes": tuple(notes)})


def _profile(
    bucket: Measured, size: float, floor: float, amplitude: float, scales: np.ndarray, half_life: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every log(a E / 1e5) the squared error of the best tau and b of a bucket, that tau, and that b.

    log((y - d) / A) = b (log(a E / 1e5) + L(tau, n)), L the decayed sum of the logs of n_1 / E, n_2 / n_1, ...
    """
    rows, target = np.arange(len(scales)), np.log((bucket.error - floor) / amplitude)
    first = np.linspace(*HALF_LIVES, 46) if half_life is None else np.array([half_life])
    tau, width = np.tile(first, (len(scales), 1)), 0.2
    while True:
        x = scales[:, None, None] + _decayed(bucket.seen, size, tau)
        b = np.minimum((x @ target) / np.maximum((x * x).sum(-1), 1e-12), 0.0)
        loss = ((b[..., None] * x - target) ** 2).sum(-1)
        best = loss.argmin(1)
        if half_life is not None or width < 1e-4:
            return loss[rows, best], tau[rows, best], b[rows, best]
        tau = np.clip(tau[rows, best, None] + np.linspace(-width, width, 21), *HALF_LIVES)
        width /= 10


def _decayed(seen: np.ndarray, size: float, tau: np.ndarray) -> np.ndarray:
    """L(tau, n) of `_profile`; float64 (scales, half-lives, points)."""
    sums = []
    for n in seen.tolist():
        ends = epoch_ends(n, size)
        steps = np.log(np.append(ends[0] / size, ends[1:] / ends[:-1]))
        sums.append(np.exp2(-np.arange(len(ends)) / tau[..., None]) @ steps)
    return np.stack(sums, -1)
