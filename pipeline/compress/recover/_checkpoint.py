"""Checkpoints of a training: one safetensors file each, tensors by name and a JSON state in its header.

A file appears whole or not at all: it is written beside its place, flushed to the disk and renamed. One that is cut off
all the same (a disk that lied, a copy that broke) is told by its length, is reported and passed over.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import DiskFull

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

KEPT = 2
"""Checkpoints that stay: the newest and, should that be broken, the one before."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: tensors by name, and what JSON can say."""

    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors whose names begin so, by the rest of their names."""
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}


def write(path: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Raises DiskFull."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    incoming = path.with_suffix(".incoming")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        on_cpu = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
        save_file(on_cpu, incoming, {"state": json.dumps(state, allow_nan=False)})
        with incoming.open("rb") as written:
            os.fsync(written.fileno())
        incoming.replace(path)
    except (SafetensorError, OSError) as error:
        incoming.unlink(missing_ok=True)
        if "No space left" in str(error) or "quota" in str(error):
            raise DiskFull(f"no space is left for a checkpoint in {path.parent}: free some, and start again") from error
        raise


def read(path: Path) -> Checkpoint | None:
    """None, and a warning, for a file that is not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            names = file.keys()  # no dict: it cannot be iterated itself
            return Checkpoint({n: file.get_tensor(n) for n in names}, json.loads(file.metadata()["state"]))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        log.warning("the checkpoint %s is not whole (%s): it is passed over", path, error)
        return None


def name(step: int) -> str:
    return f"step-{step:08d}.safetensors"


def newest(folder: Path, identity: str) -> Checkpoint | None:
    """The last whole checkpoint of a training. Those of another are removed, with a warning."""
    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        found = read(path)
        if found is None:
            continue
        if found.state["identity"] == identity:
            return found
        log.warning("%s holds checkpoints of another recovery (other settings, model or data): it begins anew", folder)
        for old in folder.glob("*.safetensors"):
            old.unlink()
        return None
    return None


def remove_old(folder: Path, kept: int = KEPT) -> None:
    for path in sorted(folder.glob("step-*.safetensors"))[:-kept]:
        path.unlink()
    for path in folder.glob("*.incoming"):
        path.unlink()
