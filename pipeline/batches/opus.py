"""OPUS: in every step, the rows whose *optimizer update* goes where a proxy of the target wants the model to go.

Wang et al. 2026, "OPUS: Towards Efficient and Principled Data Selection in Large Language Model Pre-training in Every
Iteration" (arXiv 2602.05400, v2). Of a buffer of N rows K = floor(rows * N) are drawn one by one, without replacement,

    p(z) ~ exp(U_z / tau),    U_z = <u_z, g_p> - <u_z, sum over the drawn y of u_y>,    u_z = P g_z

with g_z the gradient of a row's mean loss over its first `score_tokens` tokens, g_p that of a few rows of the proxy,
drawn anew for every step, and P what the optimizer makes of a gradient in this step:

| optimizer | P |
| --- | --- |
| Adam, AdamW | lr (1 - b1) / (1 - b1^t) / (sqrt(vhat_{t-1}) + eps), elementwise |
| Muon | lr' (1 - mu^2) S, S = a I + b A + c A A, A = q q^T, q the momentum over its Frobenius norm |
| SGD, and weights that were never stepped | lr |

The second term is a Taylor expansion's with the identity for the Hessian: a near-duplicate of what was drawn loses. All
products are of linear layers' weights in CountSketches of `sketch` buckets a layer (a layer with no more weights is
taken as it is); the same forward and backward pass serves rows and proxy.

Where it differs from the paper:
- `standardise` (our default) divides U by the standard deviation of its first term in the buffer, before anything is
  drawn. With a fixed tau, exp(U / tau) becomes uniform as gradients shrink, and the choice silently random. Even so
  Gumbel noise of 1.154 stands against a signal of 1 at tau 0.9: the fact `effective` is exp of the entropy of the first
  draw.
- The learning rate counts once, inside of u; a factor 1 / sqrt(weights of a layer) of the authors' code is not here.
- `score_tokens` of 512 and a buffer twice the batch cost a large share of a step unless rows are far longer: about
  (1 / rows) * score_tokens / T of it. `last` looks at the last linear layers alone, in the model's order, and the
  backward pass ends there. The head is left out unless `head` is set: of a small model it is the largest layer.

Memory: gradients of `CHUNK_VALUES` weights at a time, and 12 bytes for every weight that is sketched. Dropout is off in
the scoring pass. The first `warmup` batches are drawn uniformly, without scoring. A row whose gradient is not finite is
never chosen, and counted; one with nothing to learn among the tokens looked at has utility 0. Draws come from a
generator of its own. Take the proxy from training splits: test splits would contaminate.

Measured as a share of a step's CPU seconds on rows of 1,024 tokens, 16 out of 32 (bench/in_the_loop.py cost): 116 % at
512 tokens, 13.6 % at 64, 8.4 % at 32; of the last quarter of the layers alone 6.3 % at 64 and 3.7 % at 32. On short
trainings of that model no gain over random rows was shown, nor one of drawing over the greedy choice
(bench/in_the_loop.md).

Published: average of tasks 41.75 against 40.29 for random rows and 40.49 for the greedy choice (GPT-2 XL, Muon, 30 B
tokens of FineWeb), without a spread over seeds; overhead 4.7 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from pipeline.batches.base import (
    BatchOperator,
    Choice,
    Operator,
    Setup,
    enough,
    keep_all,
    measuring,
    row_losses,
)
from pipeline.errors import ConfigError
from pipeline.models.gradients import linear_layers, outer, tapped
from pipeline.models.projection import CountSketch

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.batches.base import Batch

CHUNK_VALUES = 1 << 22
"""Weights whose gradients, row by row, are held at a time."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
SCORED = ("input_ids", "position_ids", "labels")


class Opus(BatchOperator):
    """Rows by the utility of their updates."""

    claim = "steps towards a proxy of the target: rows whose updates help it, and not the same way twice"
    cost = "about (1 / rows) * score_tokens / T of a step, less with `last`"
    source = "Wang et al. 2026, arXiv 2602.05400"
    kind: Literal["opus"] = "opus"
    rows: float = Field(0.5, gt=0, le=1, description="share of a buffer's rows to keep")
    tau: float = Field(0.9, ge=0, description="temperature of the draw; 0 is the greedy choice")
    standardise: bool = Field(True, description="divide utilities by their spread in the buffer")
    score_tokens: int = Field(512, ge=2, description="first tokens of a row that are looked at")
    proxy_rows: int = Field(8, ge=1, description="rows of the proxy a step")
    sketch: int = Field(8192, ge=1, description="buckets a layer")
    last: int | None = Field(None, ge=1, description="linear layers to look at, from the last one; null: all")
    head: bool = Field(False, description="look at the head as well, the layer from hidden states to logits")
    warmup: int = Field(100, ge=0, description="batches that are drawn uniformly before the first choice")
    seed: int = Field(42, ge=0, description="of draws and sketches")

    def begin(self, setup: Setup) -> Operator:
        if setup.proxy is None:
            raise ConfigError("opus: needs a proxy: rows of what the model should become good at (Setup.proxy)")
        if len(setup.proxy["labels"]) < self.proxy_rows:
            raise ConfigError(
                f"opus: the proxy has {len(setup.proxy['labels'])} rows, {self.proxy_rows} are drawn at a time: "
                "give more, or lower proxy_rows"
            )
        layers = linear_layers(setup.model)
        own = getattr(setup.model, "get_output_embeddings", lambda: None)()
        layers = {name: layer for name, layer in layers.items() if self.head or layer is not own}
        names = list(layers)[-self.last :] if self.last else list(layers)
        if not names:
            raise ConfigError("opus: the model has no linear layer but its head: set head: true")
        return _Opus(self, setup, {name: layers[name] for name in names})


class _Opus(Operator):
    def __init__(self, recipe: Opus, setup: Setup, layers: Mapping[str, nn.Linear]) -> None:
        assert setup.proxy is not None
        self.recipe, self.model, self.proxy, self.layers = recipe, setup.model, setup.proxy, layers
        self.geometry = Geometry(setup.optimizers, [layer.weight for layer in layers.values()])
        self.projection = CountSketch(recipe.sketch, recipe.seed)
        self.rng = np.random.default_rng(recipe.seed)
        self.seen = 0

    def __call__(self, batch: Batch) -> Choice:
        import torch

        size, labels = enough(self.recipe.kind, batch, 1), batch["labels"]
        count = max(1, math.floor(self.recipe.rows * size + 1e-9))
        self.seen += 1
        if count >= size:
            return keep_all(batch)
        if self.seen <= self.recipe.warmup:
            drawn = self.rng.permutation(size)[:count]
            facts = {"effective": float(size), "not_finite": 0.0}
        else:
            aligned, products = self.utilities(batch)
            usable = np.flatnonzero(np.isfinite(aligned) & np.isfinite(products.diagonal()))
            if not len(usable):
                nothing = torch.zeros(0, dtype=torch.int64, device=labels.device)
                return Choice(nothing, None, nothing.float(), {"not_finite": float(size)})
            aligned, products = aligned[usable], products[np.ix_(usable, usable)]
            if self.recipe.standardise and (spread := aligned.std()) > 0:
                aligned, products = aligned / spread, products / spread
            first = chances(aligned, self.recipe.tau)
            drawn = usable[draw(aligned, products, count, self.recipe.tau, self.rng)]
            facts = {
                "effective": float(np.exp(-(first * np.log(np.maximum(first, 1e-300))).sum())),
                "redundancy": float(products.mean() * count),  # of a row with what is drawn, in units of U
                "not_finite": float(size - len(usable)),
            }
        rows = torch.from_numpy(np.sort(drawn)).to(labels.device)
        return Choice(rows, None, torch.ones(len(rows), device=labels.device), facts)

    def utilities(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """<u_z, g_p> of the B rows (B,) and <u_z, u_y> (B, B); float64, NaN for rows whose loss is not finite."""
        import torch

        size, proxy_size = len(batch["labels"]), self.recipe.proxy_rows
        drawn = np.sort(self.rng.choice(len(self.proxy["labels"]), proxy_size, replace=False))
        joined = self._join(
            batch, {name: torch.as_tensor(self.proxy[name][drawn]) for name in SCORED if name in self.proxy}
        )
        aligned = torch.zeros(size, dtype=torch.float64)
        products = torch.zeros(size, size, dtype=torch.float64)

        def take(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
            u, g = self._sketches(name, a[..., : self.layers[name].in_features], b, size)
            aligned.add_((u @ g).double().cpu())
            products.add_((u @ u.T).double().cpu())

        learns = [(p, p.requires_grad) for p in self.model.parameters()]
        try:
            self.model.requires_grad_(False)  # no weight's gradient is computed
            with torch.enable_grad(), measuring(self.model), tapped(self.layers, take):
                loss, _ = row_losses(self.model, joined)
                loss.sum().backward()
        finally:
            for parameter, learned in learns:
                parameter.requires_grad_(learned)
        aligned[~loss[:size].detach().isfinite().cpu()] = math.nan
        return aligned.numpy(), products.numpy()

    def _join(self, batch: Batch, proxy: Batch) -> dict[str, torch.Tensor]:
        """Rows and proxy rows as one batch of their first tokens. Padding stands at the ends, so no mask is needed."""
        import torch

        device, width = batch["labels"].device, self.recipe.score_tokens
        width = min(width, batch["input_ids"].shape[1], proxy["input_ids"].shape[1])
        names = [name for name in SCORED if name in batch or name in proxy]
        plain = {"position_ids": torch.arange(width)[None]}
        parts = [
            {n: v.expand(len(part["labels"]), -1) for n, v in plain.items()} | dict(part) for part in (batch, proxy)
        ]
        return {name: torch.cat([p[name][:, :width].to(device, torch.int64) for p in parts]) for name in names}

    def _sketches(self, name: str, a: torch.Tensor, b: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a layer: u of the first `size` rows (size, s), the mean gradient of the others (s,)."""
        import torch

        weight = self.layers[name].weight
        elementwise, left, scale = self.geometry.of(weight)
        proxy = torch.einsum("nto,nti->oi", b[size:], a[size:]).flatten() / (len(b) - size)
        rows = b[:size] @ left if left is not None else b[:size]
        sums = torch.zeros(size + 1, self.recipe.sketch, device=a.device)
        exact = weight.numel() <= self.recipe.sketch
        step = max(1, CHUNK_VALUES // weight.numel())
        for start in range(0, size, step):
            part = outer(a[:size][start : start + step], rows[start : start + step])
            if elementwise is not None:
                part = part * elementwise.flatten()
            self._add(name, exact, part * scale, sums[start : start + len(part)])
        self._add(name, exact, proxy[None], sums[size:])
        return sums[:size], sums[size]

    def _add(self, name: str, exact: bool, gradients: torch.Tensor, sums: torch.Tensor) -> None:
        if exact:
            sums[:, : gradients.shape[1]] = gradients
        else:
            self.projection.add(name, gradients, sums)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.rng.bit_generator.state = state["seen"], state["rng"]


class Geometry:
    """What optimizers make of a gradient of the weights that they step."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], weights: Sequence[nn.Parameter]) -> None:
        found = {p: (o, group) for o in optimizers for group in o.param_groups for p in group["params"]}
        self.known: dict[nn.Parameter, tuple[torch.optim.Optimizer, dict[str, Any]]] = {}
        for weight in weights:
            if weight not in found:
                raise ConfigError("opus: no optimizer steps some of the linear layers it looks at: give all in Setup")
            self.known[weight] = found[weight]
            optimizer, group = found[weight]
            if not ("betas" in group or "ns_coefficients" in group or type(optimizer).__name__ == "SGD"):
                raise _unknown(optimizer)

    def of(self, weight: nn.Parameter) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
        """P: a factor for every entry, a matrix (d_out, d_out) from the left, and a number; None for none."""
        optimizer, group = self.known[weight]
        state, lr = optimizer.state.get(weight, {}), float(group["lr"])
        if "exp_avg_sq" in state:
            return adam(state["exp_avg_sq"], int(state["step"]), lr, group["betas"], group["eps"]), None, 1.0
        if "ns_coefficients" in group and "momentum_buffer" in state:
            rate = lr * muon_rate(group.get("adjust_lr_fn"), *weight.shape) * (1 - group["momentum"] ** 2)
            return None, muon(state["momentum_buffer"], group["ns_coefficients"]), rate
        if state and "betas" in group:  # another family with moments of its own
            raise _unknown(optimizer)
        return None, None, lr


def _unknown(optimizer: torch.optim.Optimizer) -> ConfigError:
    return ConfigError(f"opus: knows the updates of Adam(W), Muon and SGD, not of {type(optimizer).__name__}")


def adam(v: torch.Tensor, steps: int, lr: float, betas: tuple[float, float], eps: float) -> torch.Tensor:
    """P of the step behind `steps` steps, from their second moment v."""
    b1, b2 = betas
    return lr * (1 - b1) / (1 - b1 ** (steps + 1)) / ((v.float() / (1 - b2**steps)).sqrt() + eps)


def muon(momentum: torch.Tensor, coefficients: tuple[float, float, float] = NEWTON_SCHULZ) -> torch.Tensor:
    """S = a I + b A + c A A of a momentum (d_out, d_in): one step of Newton-Schulz, as a matrix."""
    import torch

    q = momentum.float() / momentum.float().norm().clamp_min(1e-7)
    gram, (a, b, c) = q @ q.T, coefficients
    return a * torch.eye(len(gram), device=gram.device) + b * gram + c * gram @ gram


def muon_rate(adjust: str | None, rows: int, columns: int) -> float:
    """Factor that torch's Muon gives the learning rate of a matrix."""
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    if adjust == "spectral_unclamped":
        return math.sqrt(rows / columns)
    return math.sqrt(max(1, rows / columns)) if adjust in (None, "original") else 1.0


def chances(utility: np.ndarray, tau: float) -> np.ndarray:
    """Softmax of U / tau (n,); at tau 0 all is with the largest."""
    if tau == 0:
        return np.eye(len(utility))[np.argmax(utility)] if len(utility) else utility
    shifted = np.exp((utility - utility.max(initial=-np.inf)) / tau)
    return np.asarray(shifted / shifted.sum())


def draw(aligned: np.ndarray, products: np.ndarray, count: int, tau: float, rng: np.random.Generator) -> np.ndarray:
    """Indices of up to `count` of n rows in the order of their draw; `aligned` (n,) and `products` (n, n) as in U."""
    utility, chosen = aligned.astype(np.float64), []
    for _ in range(min(count, len(utility))):
        noise = tau * rng.gumbel(size=len(utility)) if tau else 0.0
        z = int(np.argmax(utility + noise))  # the largest of U / tau + Gumbel is a draw of the softmax
        chosen.append(z)
        utility = utility - products[z]
        utility[chosen] = -np.inf
    return np.asarray(chosen, np.int64)
