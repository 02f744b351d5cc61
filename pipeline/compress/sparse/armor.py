"""ARMOR: a 2:4 core between two block-diagonal matrices, which turn the weight to where the pattern hurts less.

Source: Liu et al. 2025, "ARMOR: High-Performance Semi-Structured Pruning via Adaptive Matrix Factorization", arXiv
2510.05528. W^ = A (W' * M) B. Columns, then rows, are divided by their norms, which are folded back into B and A at
the end; A = B = I and M the best pattern by Wbar^2 D, D = diag(X^T X), is NoWag-P. Then, in turns, one Adam step on A,
B and W', and in every b x b block the exact best choice of one group's pattern and values, the group drawn by the L1
norm of its gradient. The loss sum_ij D_j (Wbar - W^)_ij^2 never rises in the second; Adam may raise it, so the best
state that was seen is returned and the result is never worse than NoWag-P.

`fold` (the default) writes the product into the dense weight: it loads anywhere and says how good ARMOR is, but
multiplies nothing faster and has no zeros to keep. Without it the module becomes A, core, B with
b (1/in + 1/out) of the matrix's size more to store and to multiply. Block 32, 3,000 iterations and the rest are the
released defaults (the paper: 128 and 20,000).
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.compress.sparse.base import Matrix, Needs, Pattern, Pruned, Pruner, Quota

if TYPE_CHECKING:
    import torch

EPS = 1e-9


class Armor(Pruner):
    """Alternates a gradient step on all factors with exact choices of single groups."""

    kind: Literal["armor"] = "armor"
    block: int = Field(32, ge=2, description="side of the blocks of A and B")
    iterations: int = Field(3000, ge=0)
    lr: float = Field(1e-4, gt=0)
    patience: int = Field(100, ge=1, description="iterations without a better loss after which it stops")
    fold: bool = Field(True, description="write A core B into the weight instead of keeping three factors")
    seed: int = 0
    needs: ClassVar[Needs] = "moments"
    source: ClassVar[str] = "Liu et al. 2025, arXiv 2510.05528"

    def fits(self, shape: tuple[int, int], pattern: Pattern | None) -> str:
        if pattern is None:
            return "ARMOR prunes to a pattern: set pattern, e.g. {keep: 2, of: 4}, instead of ratio"
        if shape[0] % self.block or shape[1] % self.block or self.block % pattern.of:
            return f"its sides {shape} must be multiples of block ({self.block}), and this one of {pattern.of}"
        return super().fits(shape, pattern)

    def prune(self, matrix: Matrix, quota: Quota) -> Pruned:
        import torch

        assert quota.pattern is not None
        weight, d = matrix.weight, matrix.seen["square"].float()
        usable = d.isfinite() & (d > 0)
        d = d.where(usable, d[usable].mean() if bool(usable.any()) else torch.ones_like(d[:1]))
        columns = weight.norm(dim=0).clamp_min(1e-30)
        rows = (weight / columns).norm(dim=1).clamp_min(1e-30)
        normal = weight / columns / rows[:, None]
        rng = np.random.default_rng([self.seed, zlib.crc32(matrix.name.encode())])
        state = Factors(normal, d / d.mean(), quota.pattern, self.block, int(rng.integers(2**62)))
        state.optimise(self.iterations, self.lr, self.patience)
        b = self.block
        left = state.left * rows.view(-1, b, 1)
        right = state.right * columns.view(-1, 1, b)
        core = state.core.where(state.mask, state.core.new_zeros(()))
        if self.fold:
            product = assemble(core, left, right)
            return Pruned(torch.ones_like(state.mask), product)
        return Pruned(state.mask, core, left=left, right=right)


def tiled(matrix: torch.Tensor, b: int) -> torch.Tensor:
    """(out, in) as (out / b, in / b, b, b)."""
    return matrix.unflatten(0, (-1, b)).unflatten(2, (-1, b)).transpose(1, 2)


def assemble(core: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A core B as one matrix (out, in)."""
    product = left[:, None] @ tiled(core, left.shape[1]) @ right[None]
    return product.transpose(1, 2).flatten(2).flatten(0, 1)


class Factors:
    """The three factors of a matrix and their loss; starts at NoWag-P.

    `left` (P, b, b), `right` (Q, b, b), `core` and `mask` (out, in) with P = out / b and Q = in / b.
    """

    def __init__(self, target: torch.Tensor, d: torch.Tensor, pattern: Pattern, block: int, seed: int) -> None:
        import torch

        from pipeline.compress.sparse._select import select

        self.target, self.d, self.b, self.m = target, d, block, pattern.of
        self.mask = select(target.square() * d, Quota(0, pattern), by_row=False)
        eye = torch.eye(block).to(target)
        self.left = eye.repeat(len(target) // block, 1, 1)
        self.right = eye.repeat(target.shape[1] // block, 1, 1)
        self.core = target.clone()
        self.choices = torch.combinations(torch.arange(pattern.of), pattern.keep).to(target.device)
        self.rng = torch.Generator(target.device).manual_seed(seed)

    def residual(self) -> torch.Tensor:
        """Wbar - W^, (out, in)."""
        return self.target - assemble(self.core * self.mask, self.left, self.right)

    def loss(self) -> float:
        return float((self.residual().square() * self.d).sum())

    def optimise(self, iterations: int, lr: float, patience: int, rtol: float = 1e-6) -> None:
        """Alternate both steps; ends with the best state seen."""
        import torch

        names = ("left", "right", "core", "mask")
        best, kept, since = self.loss(), [getattr(self, n).clone() for n in names], 0
        with torch.enable_grad():
            parameters = [self.left.requires_grad_(), self.right.requires_grad_(), self.core.requires_grad_()]
            optimizer = torch.optim.Adam(parameters, lr=lr)
            for _ in range(iterations):
                optimizer.zero_grad()
                core = self.core * self.mask
                core.retain_grad()
                product = assemble(core, self.left, self.right)
                ((self.target - product).square() * self.d).sum().backward()
                optimizer.step()
                with torch.no_grad():
                    self.choose(core.grad)
                    loss = self.loss()
                    since = 0 if loss < best * (1 - rtol) else since + 1
                    if loss < best:
                        best = loss
                        kept = [getattr(self, n).detach().clone() for n in names]
                if since >= patience:
                    break
        self.left, self.right, self.core, self.mask = kept

    def choose(self, gradient: torch.Tensor) -> None:
        """In every block the exact best pattern and values of one group, drawn by its gradient (out, in), in place."""
        import torch

        b, m = self.b, self.m
        strength = tiled(gradient.abs(), b).unflatten(3, (-1, m)).sum(-1).flatten(2)  # (P, Q, b * b / m)
        drawn = torch.multinomial(strength.flatten(0, 1) + 1e-30, 1, generator=self.rng).view(strength.shape[:2])
        row, group = drawn // (b // m), drawn % (b // m)
        p, q = torch.meshgrid(*(torch.arange(n, device=row.device) for n in row.shape), indexing="ij")
        root = self.d.sqrt().view(-1, 1, b)
        a = self.left[p, :, row]  # (P, Q, b)
        lines = self.right[q[..., None], group[..., None] * m + torch.arange(m, device=row.device)]
        lines = lines * root[q]  # (P, Q, m, b)
        at = (p * b + row)[..., None], (q * b + group * m)[..., None] + torch.arange(m, device=row.device)
        old = self.core[at] * self.mask[at]
        value, chosen = best_group(a, lines, tiled(self.residual(), b) * root[q], old, self.choices)
        self.core[at] = torch.zeros_like(old).scatter(-1, chosen, value)
        self.mask[at] = torch.zeros_like(old, dtype=torch.bool).scatter(-1, chosen, torch.ones_like(chosen).bool())


def best_group(
    a: torch.Tensor, lines: torch.Tensor, residual: torch.Tensor, old: torch.Tensor, choices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (..., keep) and positions (..., keep) of the group that explains most.

    `a` (..., b): the column of A behind the group's row; `lines` (..., m, b): its rows of B times sqrt(D); `residual`
    (..., b, b): of the block, times sqrt(D), with the group's `old` values (..., m) in; `choices` (c, keep): patterns.
    """
    import torch

    norm = a.square().sum(-1, keepdim=True).clamp_min(1e-30)
    gram = lines @ lines.transpose(-1, -2)
    # what the residual holds for the group, and what the group itself had explained
    f = (lines @ (residual.transpose(-1, -2) @ a[..., None]))[..., 0] / norm + (gram @ old[..., None])[..., 0]
    keep = choices.shape[1]
    sub = gram[..., choices[:, :, None], choices[:, None, :]] + EPS * torch.eye(keep).to(gram)
    picked = f[..., choices]
    values = torch.linalg.solve(sub, picked[..., None])[..., 0]
    best = (picked * values).sum(-1).argmax(-1)
    index = best[..., None, None].expand(*best.shape, 1, keep)
    return values.gather(-2, index)[..., 0, :], choices[best]
