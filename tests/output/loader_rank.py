"""What a spawned rank runs; a module of its own, so that the process imports no more than it needs."""

from __future__ import annotations

import json
from pathlib import Path

from torch import distributed

from pipeline.output.loader import CuratedDataset, CuratedLoader


def read(rank: int, world: int, directory: str, data: CuratedDataset) -> None:
    """All ranks add up what they read, batch by batch, which hangs if one has a batch more."""
    distributed.init_process_group("gloo", init_method=f"file://{directory}/group", rank=rank, world_size=world)
    totals = []
    for tensors in CuratedLoader(data):
        total = tensors["number"].sum()
        distributed.all_reduce(total)
        totals.append(int(total))
    Path(directory, f"{rank}.json").write_text(json.dumps(totals))
    distributed.destroy_process_group()
