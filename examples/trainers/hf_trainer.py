"""Hugging Face's Trainer on a curated run.

    python examples/trainers/hf_trainer.py runs/my best_fit-1024 ./model ./out

The Trainer would split the data set among ranks once more and, to resume, read again what it had read. So it takes our
loader as it is, and a callback keeps the loader's place beside every checkpoint.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from pipeline.output.loader import CuratedDataset, CuratedLoader


class CuratedTrainer(Trainer):
    """A Trainer whose batches come from a CuratedLoader; pass `ignore_data_skip=True` in its arguments."""

    def __init__(self, loader: CuratedLoader, **options: Any) -> None:
        super().__init__(train_dataset=loader.data, callbacks=[KeepPlace(loader)], **options)
        self.loader = loader

    def get_train_dataloader(self) -> CuratedLoader:
        return self.loader


class KeepPlace(TrainerCallback):
    """Saves the loader's place with every checkpoint, and goes there when a training resumes from it."""

    def __init__(self, loader: CuratedLoader) -> None:
        self.loader = loader

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._file(args, state).write_text(json.dumps(self.loader.state_dict()))

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:
            self.loader.load_state_dict(json.loads(self._file(args, state).read_text()))

    def _file(self, args: TrainingArguments, state: Any) -> Path:
        return Path(args.output_dir, f"checkpoint-{state.global_step}", "loader.json")


def train(
    run: str, packed: str, model: str, out: str, steps: int = 1000, batch: int = 16, resume: bool = False
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=out,
        max_steps=steps,
        save_steps=max(1, steps // 2),
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        ignore_data_skip=True,
    )
    loader = CuratedLoader(CuratedDataset(run, batch, packed=packed))
    trainer = CuratedTrainer(loader, model=AutoModelForCausalLM.from_pretrained(model, use_cache=False), args=arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    train(*sys.argv[1:5])
