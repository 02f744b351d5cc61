"""What allocations that give one ratio to a block share: its linears, and the way from blocks to parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.compress._weights import matrix
from pipeline.compress.allocation._fill import free
from pipeline.compress.allocation.base import Evidence, Target
from pipeline.compress.calibration import Turns
from pipeline.compress.surgery import axes
from pipeline.compress.units import Part, Units
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from pipeline.compress.architecture import Anatomy


def linears(body: Anatomy) -> list[tuple[str, ...]]:
    """Full names of every block's linear modules that all tokens pass, without a mixture's; none twice (a fused one
    serves query, key and value)."""
    blocks = []
    for layer in body.layers:
        a, mlp = layer.attention, layer.mlp
        names = [a.query, a.key, a.value, a.output] if a else []
        names += [*mlp.inputs, mlp.output] if mlp else []
        blocks.append(tuple(dict.fromkeys(names)))
    return blocks


def matrices(body: Anatomy) -> list[tuple[str, ...]]:
    """Names (`_weights.place`) of all matrices of every block whose weights can go: the linears, and of a mixture those
    of each expert and of the shared ones. Routers, and the gate of shared experts, are none."""
    blocks = []
    for layer, names in zip(body.layers, linears(body), strict=True):
        if e := layer.experts:
            names += tuple(name for name in e.shared if not name.endswith("_gate"))
            names += tuple(f"{e.stack}.{own}.{i}" for i in range(e.count) for own in ("gate_up_proj", "down_proj"))
        blocks.append(names)
    return blocks


def outward(body: Anatomy, name: str) -> torch.Tensor:
    """A matrix's weight (out, in), float32, whichever way round its module stores it."""
    return matrix(body, name).float()


def by_block(
    parts: Sequence[Part],
    target: Target,
    statistic: np.ndarray,
    rule: Callable[[np.ndarray, np.ndarray, float], np.ndarray],
) -> np.ndarray:
    """Shares of removal per part, (parts,), from a statistic per block, (layers,).

    `rule(statistic, parameters, share)` gives the shares of the blocks that may lose something. Parts of no block (the
    residual stream's channels) take the target's own share.
    """
    open_ = free(parts, target)
    layer = np.array([part.layer for part in parts], np.int64)
    size = np.array([part.parameters for part in parts], np.float64)
    blocks = np.unique(layer[open_ & (layer >= 0)])
    shares = np.full(len(parts), target.share)
    if len(blocks):
        weight = np.array([size[open_ & (layer == block)].sum() for block in blocks])
        at = rule(np.asarray(statistic, np.float64)[blocks], weight, target.share)
        shares[layer >= 0] = 0
        for block, share in zip(blocks, at, strict=True):
            shares[layer == block] = share
    return shares


def turns(evidence: Evidence, kind: str, what: str) -> np.ndarray:
    """Mean `cosine` or `angle` (half turns) by which each block turns the residual stream, (layers,) float64."""
    if evidence.calibration is None:
        raise ConfigError(f"allocation {kind}: looks at activations and needs calibration data")
    sums = evidence.calibration.measure(Turns(evidence.body.blocks))
    if not (sums["turn.tokens"] > 0).all():
        raise ConfigError(f"allocation {kind}: no token of the calibration data counts: rows need at least two tokens")
    mean: np.ndarray = (sums[f"turn.{what}"] / sums["turn.tokens"]).numpy()
    return mean


def parameters_of(body: Anatomy, part: Part) -> list[torch.Tensor]:
    """What holds a part, each once: a matrix's weight (out, in), or weights and biases of the members of units; views
    that write through."""
    if not isinstance(part, Units):
        return [matrix(body, part.name)]
    held = {id(p): p for m in part.members for p, _ in axes(body.modules[m.module], m.side)}
    return list(held.values())
