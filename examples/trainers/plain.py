"""A plain training loop on a curated run, one process or several, that goes on where it was broken off.

    python examples/trainers/plain.py runs/my best_fit-1024 ./model ./out
    torchrun --nproc-per-node 8 examples/trainers/plain.py runs/my best_fit-1024 ./model ./out

The second command may continue what the first began: batches are the same, whoever reads them. Without its cache a
model of transformers keeps the documents of a packed sequence apart, see docs/loader.md.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from pipeline.output.loader import CuratedDataset, CuratedLoader


def train(
    run: str, packed: str, model: str, out: str, steps: int = 1000, batch: int = 16, workers: int = 0
) -> list[float]:
    """Train for `steps` steps in all; returns the loss of every step of this process, on its part of the batch."""
    parallel = "WORLD_SIZE" in os.environ
    if parallel:
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    loader = CuratedLoader(CuratedDataset(run, batch, packed=packed), workers)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    lm = AutoModelForCausalLM.from_pretrained(model, use_cache=False).to(device).train()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-3)
    checkpoint = Path(out, "checkpoint.pt")
    step, losses = 0, []
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        lm.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])
        step = saved["step"]
    wrapped = DistributedDataParallel(lm) if parallel else lm
    while step < steps:
        for tensors in loader:  # what is left of an epoch
            loss = wrapped(**{name: values.to(device) for name, values in tensors.items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            step += 1
            if step == steps:
                break
    if not parallel or distributed.get_rank() == 0:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        saved = {"model": lm.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(saved | {"loader": loader.state_dict(), "step": step}, checkpoint)
    if parallel:
        distributed.destroy_process_group()
    return losses


if __name__ == "__main__":
    train(*sys.argv[1:5])
