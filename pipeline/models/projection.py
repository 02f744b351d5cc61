"""Random projections of gradients onto a few hundred numbers that keep inner products, by matrices that nobody stores.

Entries come from hashes of (seed, layer, index), so every worker projects alike, whatever it has seen before.

- `CountSketch` (Charikar, Chen and Farach-Colton 2002): component i goes with a sign into one bucket of s. p additions
  a row, and <S(u), S(v)> is unbiased with variance (|u|^2 |v|^2 + <u,v>^2 - 2 sum u_i^2 v_i^2) / s. The default.
- `Rademacher` (LESS, TRAK): a dense matrix of signs over sqrt(s). s p multiply-adds a row, the same variance, and
  better behaved where a few components hold all of the norm: no two of them can meet in one bucket.

Measured on one core, 64 rows of 229,376 components onto 1,024: forward, backward and projection together took ten times
as long with signs as with CountSketch (bench/gradients.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline.hashing import mix64
from pipeline.recipe import fingerprint

if TYPE_CHECKING:
    import torch

Kind = Literal["countsketch", "rademacher"]
BLOCK = 1 << 22
"""Signs of a dense projection that are made at once: 16 MB as float32."""


class CountSketch:
    """Projection of layers of any length onto `size` buckets; buckets and signs of a layer are kept, 12 bytes each."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, layer: str, gradients: torch.Tensor, sums: torch.Tensor) -> None:
        """Add the projections of (n, p) gradients of a layer to `sums`, (n, size) float32."""
        if layer not in self._known:
            hashes = _hashes(self.seed, layer, 0, gradients.shape[1])
            self._known[layer] = (
                _tensor(((hashes >> np.uint64(32)) * np.uint64(self.size) >> np.uint64(32)).astype(np.int64), sums),
                _tensor((hashes & np.uint64(1)).astype(np.float32) * 2 - 1, sums),
            )
        buckets, signs = self._known[layer]
        sums.index_add_(1, buckets, gradients * signs)


class Rademacher:
    """Projection by signs over sqrt(`size`), a multiple of 64; the signs are made anew for every batch."""

    def __init__(self, size: int, seed: int) -> None:
        if size % 64:
            raise ValueError(f"a Rademacher projection has a multiple of 64 components, not {size}")
        self.size, self.seed = size, seed

    def add(self, layer: str, gradients: torch.Tensor, sums: torch.Tensor) -> None:
        """Add the projections of (n, p) gradients of a layer to `sums`, (n, size) float32."""
        words, step = self.size // 64, max(1, BLOCK // self.size)
        for start in range(0, gradients.shape[1], step):
            part = gradients[:, start : start + step]
            hashes = _hashes(self.seed, layer, start * words, part.shape[1] * words).astype("<u8")
            bits = np.unpackbits(hashes.view(np.uint8)).reshape(-1, self.size)
            signs = (bits.astype(np.float32) * 2 - 1) / np.float32(np.sqrt(self.size))
            sums.addmm_(part, _tensor(signs, sums))


def projection(kind: Kind, size: int, seed: int) -> CountSketch | Rademacher:
    """The projection of a name."""
    return CountSketch(size, seed) if kind == "countsketch" else Rademacher(size, seed)


def _hashes(seed: int, layer: str, start: int, count: int) -> np.ndarray:
    """Hashes of the indices `start` to `start + count` of a layer; uint64 (count,)."""
    salt = np.uint64(int(fingerprint(seed, layer)[:16], 16))
    with np.errstate(over="ignore"):  # arithmetic is modulo 2**64
        return mix64(np.arange(start, start + count, dtype=np.uint64) + salt)


def _tensor(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.from_numpy(values).to(like.device)
