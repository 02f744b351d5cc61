"""Lightning's Trainer on a curated run.

    python examples/trainers/lightning_trainer.py runs/my best_fit-1024 ./model ./out

Nothing is between them: Lightning keeps the state of a loader that has one in its checkpoints, and leaves alone what is
not a DataLoader of torch. Under several ranks make the data set in `train_dataloader`, when the ranks are known.
"""

from __future__ import annotations

import sys

import lightning
import torch
from transformers import AutoModelForCausalLM

from pipeline.output.loader import CuratedDataset, CuratedLoader


class CausalLM(lightning.LightningModule):
    """A causal model on the packed sequences of a curated run."""

    def __init__(self, run: str, packed: str, model: str, batch: int) -> None:
        super().__init__()
        self.run, self.packed, self.batch = run, packed, batch
        self.lm = AutoModelForCausalLM.from_pretrained(model, use_cache=False).train()
        self.losses: list[float] = []

    def train_dataloader(self) -> CuratedLoader:
        return CuratedLoader(CuratedDataset(self.run, self.batch, packed=self.packed))

    def training_step(self, batch: dict[str, torch.Tensor], number: int) -> torch.Tensor:
        loss: torch.Tensor = self.lm(**batch).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.lm.parameters(), lr=1e-3)


def train(
    run: str, packed: str, model: str, out: str, steps: int = 1000, batch: int = 16, resume: str | None = None
) -> CausalLM:
    """Train for `steps` steps in all and save `out/last.ckpt`; `resume` is a checkpoint to go on from."""
    module = CausalLM(run, packed, model, batch)
    trainer = lightning.Trainer(max_steps=steps, default_root_dir=out, logger=False, enable_checkpointing=False)
    trainer.fit(module, ckpt_path=resume)
    trainer.save_checkpoint(f"{out}/last.ckpt")
    return module


if __name__ == "__main__":
    train(*sys.argv[1:5])
