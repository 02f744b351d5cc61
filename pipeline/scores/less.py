"""LESS: rows whose Adam step points where the gradients of a target set point, as a warmed-up LoRA model sees it.

1. Warm-up: LoRA on q, k, v and o over a random sample, a checkpoint with its Adam moments an epoch.
2. A row's step: (b1 m + (1 - b1) g) / sqrt(b2 v + (1 - b2) g^2 + eps), eps inside the root, no bias correction.
3. An example's gradient: plain g. Both are projected alike and scaled to unit length, without which short rows win.
4. Score by subtask: sum over checkpoints of weight x mean over examples of the product; weights are the epochs' mean
   learning rates, normalised. `pool` makes one score of the subtasks'; one with few odd examples can dominate a max.

Source: Xia et al. 2024, arXiv 2402.04333, `princeton-nlp/LESS`. The paper's: rank 128, alpha 512, dropout 0.1, learning
rate 2e-5 with 3 % warm-up and linear decay, 4 epochs over 5 % of the rows, 32 rows a step, 2,048 tokens, 8,192
components, top 5 % kept. Ours: CountSketch for its dense Rademacher matrix (`projection: rademacher` is the paper's,
at `size` times the work), `warmup_rows` to bound the sample, float32 sketches that are used at once and not stored.

What it trades away: moments are those of the warm-up, not of the training that follows; rows alike score alike, so a
diversity stage should follow; targets that stand in the corpus get the top scores (a warning lists them).
"""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from pipeline.artifact import Artifact
from pipeline.errors import ConfigError
from pipeline.models.causal import MAX_CHARS, check_model, model_source
from pipeline.models.files import folder_digest, folder_of
from pipeline.models.gradients import linear_layers, token_losses
from pipeline.models.projection import Kind, projection
from pipeline.recipe import Column, State, Transform, fingerprint
from pipeline.sample import Sample, draw, needs_fit, sampled
from pipeline.scores._influence import (
    BATCH_ROWS,
    FIELDS,
    Influence,
    Lens,
    Reader,
    Target,
    engine_resources,
    pooled,
    scored,
    spoken,
    subtask_means,
    unit,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.run import Run

log = logging.getLogger(__name__)

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
STEP_ROWS, WARM = 32, 0.03


class Less(Influence):
    """Cosine between a row's Adam step and the target's gradients, summed over the checkpoints of a LoRA warm-up."""

    claim = "a step on it would lower the loss on the target set"
    cost = "checkpoints x about 4N FLOPs a token, N parameters"
    source = "Xia et al. 2024, arXiv 2402.04333"
    kind: Literal["less"] = "less"
    model: str = Field(description="causal LM: folder with config.json, tokenizer and safetensors, or hf://org/name")
    warmup: float = Field(0.05, gt=0, le=1, description="share of the rows to warm up on")
    warmup_rows: int = Field(10_000, ge=1, description="rows to warm up on, at the most")
    epochs: int = Field(4, ge=1, description="epochs of the warm-up, and checkpoints")
    lr: float = Field(2e-5, gt=0, description="learning rate of the warm-up")
    rank: int = Field(128, ge=1, description="rank of the adapters")
    alpha: float = Field(512, gt=0, description="adapters count alpha / rank times")
    dropout: float = Field(0.1, ge=0, lt=1)
    projection: Kind = Field("countsketch", description="how gradients are made shorter; rademacher is the paper's")
    size: int = Field(8192, ge=64, multiple_of=64, description="components of a projected gradient")

    @model_validator(mode="after")
    def _there(self) -> Self:
        check_model("less", self.model)
        return self

    def fit(self, run: Run) -> None:
        self._fitted(run)

    def column(self, run: Run) -> Column:
        warm, aims = self._fitted(run)
        source, inputs = model_source(run, self.model), self.inputs(run)
        resources, precision = engine_resources(run)
        opened = partial(_open, source, warm, aims, self._asked(run), self.pool, precision, inputs)
        identity = fingerprint("less", self.version, aims.fingerprint, self.pool)
        return Column(self.column_name, inputs, FIELDS, opened, identity, resources, BATCH_ROWS)

    def _asked(self, run: Run) -> dict[str, Any]:
        names = {"max_tokens", "epochs", "lr", "rank", "alpha", "dropout", "projection", "size"}
        return self.model_dump(include=names) | {"seed": self.seed_of(run)}

    def _fitted(self, run: Run) -> tuple[Artifact, Artifact]:
        """Checkpoints of the warm-up, and the target's projected gradients at each."""
        asked, source, inputs = self._asked(run), model_source(run, self.model), self.inputs(run)
        resources, precision = engine_resources(run)
        rows = min(self.warmup_rows, max(1, round(self.warmup * run.rows)))
        trained = {k: v for k, v in asked.items() if k not in ("projection", "size")}
        files = folder_digest(folder_of(source))
        name = f"{self.column_name}-warmup"
        identity = fingerprint("less", 1, files, trained, rows, precision, run.identity(*inputs))
        state: State = {}
        if needs_fit(run, name, identity):
            sample = Sample(inputs, rows, run.rows, asked["seed"], "text", max_bytes=MAX_CHARS * self.max_tokens)
            state = draw(run, sample)
        warm = run.artifact(name, identity, partial(_warm_up, source, state, inputs, asked, precision), resources)
        target = self.target_set(run)
        name = f"{self.column_name}-target"
        identity = fingerprint("less", 1, warm.fingerprint, target.identity, asked)
        if needs_fit(run, name, identity):
            self.warn_contained(run, target)
        aims = run.artifact(name, identity, partial(_aim, source, warm, target, asked, precision), resources)
        return warm, aims


def adam_direction(g: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The step that Adam with moments m and v (p,) takes on (n, p) gradients, but for the learning rate."""
    return (BETA1 * m + (1 - BETA1) * g) / (BETA2 * v + (1 - BETA2) * g * g + EPS).sqrt()


def adapt(model: nn.Module, rank: int, alpha: float, dropout: float, seed: int) -> nn.ModuleDict:
    """Hang low-rank adapters, B zero, on the attention's linear layers; returns their weights, by layer."""
    import torch
    from torch import nn

    adapters = nn.ModuleDict()

    def add(pair: Any, layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        low = pair["up"](pair["down"](pair["drop"](inputs[0].float())))
        return output + (low * (alpha / rank)).to(output.dtype)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, layer in linear_layers(model, *ADAPTED).items():
            down = nn.Linear(layer.in_features, rank, bias=False)
            up = nn.Linear(rank, layer.out_features, bias=False)
            nn.init.zeros_(up.weight)
            pair = nn.ModuleDict({"down": down, "up": up, "drop": nn.Dropout(dropout)}).to(layer.weight.device)
            adapters[name.replace(".", "/")] = pair
            layer.register_forward_hook(partial(add, pair))
    return adapters


def _warm_up(
    source: Artifact | Path,
    state: State,
    inputs: tuple[str, ...],
    asked: dict[str, Any],
    precision: str,
    directory: Path,
) -> None:
    """Train the adapters; write `checkpoint-<epoch>.safetensors` of weights and moments, and `warmup.json`."""
    import torch
    from safetensors.torch import save_file

    if not state:
        raise ConfigError("less: the corpus has no usable row to warm up on")
    reader = Reader(folder_of(source), asked["max_tokens"], precision)
    adapters = adapt(reader.model, asked["rank"], asked["alpha"], asked["dropout"], asked["seed"])
    tokens = reader.read(spoken(pa.record_batch([sampled(state, name) for name in inputs], [*inputs]), inputs))
    rows = np.flatnonzero(~tokens.masked)
    if not len(rows):
        raise ConfigError("less: in no row of the warm-up's sample does a token count: raise max_tokens")
    batches = [(where, ids, weight) for where, ids, weight in reader.batches(tokens)]
    steps = asked["epochs"] * -(-len(rows) // STEP_ROWS)
    optimizer = torch.optim.AdamW(adapters.parameters(), asked["lr"], (BETA1, BETA2), EPS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, steps, max(1, round(WARM * steps))))
    rng = np.random.default_rng(asked["seed"])
    rates, losses = [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(asked["seed"])
        adapters.train()
        for epoch in range(asked["epochs"]):
            step_of = np.full(tokens.rows, -1)
            step_of[rng.permutation(rows)] = np.arange(len(rows)) // STEP_ROWS
            here, seen = [], 0.0
            for step in range(-(-len(rows) // STEP_ROWS)):
                for where, ids, weight in batches:
                    mine = np.flatnonzero(step_of[where] == step)
                    if len(mine):
                        loss = (token_losses(reader.model, ids[mine]) * weight[mine]).sum()
                        (loss / (step_of == step).sum()).backward()
                        seen += loss.item()
                here.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            rates.append(float(np.mean(here)))
            losses.append(seen / len(rows))
            saved = {f"w.{name}": weight.detach() for name, weight in adapters.named_parameters()}
            for moment, known_as in (("m", "exp_avg"), ("v", "exp_avg_sq")):
                saved |= {f"{moment}.{n}": optimizer.state[w][known_as] for n, w in adapters.named_parameters()}
            save_file(saved, directory / f"checkpoint-{epoch}.safetensors")
    log.info("less: warm-up on %d rows, loss %.3f to %.3f nats a token", len(rows), losses[0], losses[-1])
    (directory / "warmup.json").write_text(json.dumps({"rates": rates, "losses": losses, "rows": len(rows)}, indent=2))


def _rate(steps: int, warm: int, step: int) -> float:
    """Share of the learning rate: linear up over `warm` steps, then linear down to 0."""
    return (step + 1) / warm if step < warm else max(0.0, (steps - step) / max(1, steps - warm))


def lenses(source: Artifact | Path, warm: Artifact, asked: dict[str, Any], precision: str) -> tuple[Reader, list[Lens]]:
    """The model, and one lens a checkpoint; they share it and its adapters."""
    from safetensors.torch import load_file

    reader = Reader(folder_of(source), asked["max_tokens"], precision)
    adapters = adapt(reader.model, asked["rank"], asked["alpha"], asked["dropout"], asked["seed"])
    adapters.requires_grad_(False).eval()
    layers = linear_layers(adapters)

    def lens(path: Path) -> Lens:
        saved = load_file(path, device=str(reader.device))
        weights = {name.removeprefix("w."): value for name, value in saved.items() if name.startswith("w.")}

        def direction(layer: str, g: torch.Tensor) -> torch.Tensor:
            m, v = (saved[f"{moment}.{layer}.weight"].flatten() for moment in "mv")
            return adam_direction(g, m, v)

        return Lens(reader, layers, direction, lambda: adapters.load_state_dict(weights))

    return reader, [lens(warm.local() / f"checkpoint-{epoch}.safetensors") for epoch in range(asked["epochs"])]


def _aim(
    source: Artifact | Path, warm: Artifact, target: Target, asked: dict[str, Any], precision: str, directory: Path
) -> None:
    """Write `targets.npy`: mean unit gradient of each subtask at each checkpoint, (checkpoints, subtasks, size)."""
    reader, views = lenses(source, warm, asked, precision)
    examples = target.read()
    tokens = reader.read(examples.spoken)
    project = projection(asked["projection"], asked["size"], asked["seed"])
    aims = [
        subtask_means(unit(view.sketches(tokens, project, plain=True)), examples, ~tokens.masked, target.role)
        for view in views
    ]
    np.save(directory / "targets.npy", np.stack(aims))
    (directory / "subtasks.json").write_text(json.dumps(examples.names))


def _open(
    source: Artifact | Path,
    warm: Artifact,
    aims: Artifact,
    asked: dict[str, Any],
    pool: str,
    precision: str,
    inputs: tuple[str, ...],
) -> Transform:
    reader, views = lenses(source, warm, asked, precision)
    rates = np.array(json.loads((warm.local() / "warmup.json").read_text())["rates"])
    targets = np.load(aims.local() / "targets.npy", allow_pickle=False)
    project = projection(asked["projection"], asked["size"], asked["seed"])

    def score(batch: pa.RecordBatch) -> pa.RecordBatch:
        tokens = reader.read(spoken(batch, inputs))
        scores = np.zeros((batch.num_rows, targets.shape[1]))
        for view, rate, aim in zip(views, rates / rates.sum(), targets, strict=True):
            scores += rate * (unit(view.sketches(tokens, project)) @ aim.T)
        return scored(pooled(scores, pool), tokens.masked)

    return score
