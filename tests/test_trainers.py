"""The trainer examples on a tiny model and a packed run: they train, and resume as if they had not been broken off."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.engine.pool import InlinePool
from pipeline.output.feeding import feeding
from pipeline.output.loader import CuratedDataset
from pipeline.output.pack.base import write_packed
from pipeline.output.pack.best_fit import BestFit
from tests.scripts import script
from tests.tiny_lm import sentences, trained
from tests.tiny_run import make_run

BATCH, STEPS = 4, 6


class Material(NamedTuple):
    run: str
    packed: str
    model: str


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """A curated run of 200 texts, packed to 32 tokens, and a model of 20 thousand weights."""
    directory = tmp_path_factory.mktemp("trainers")
    run = make_run(directory)
    model = trained(directory / "model", sentences(50), steps=1)
    with feeding(run, lambda _: InlinePool(), quiet=True) as fed:
        packed = write_packed(fed, BestFit(length=32, tokenizer=str(model)), None)
    return Material(run, packed["name"], str(model))


def example(name: str) -> ModuleType:
    return script(f"examples/trainers/{name}.py")


@pytest.fixture(scope="module")
def expected(material: Material, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the plain loop that is not broken off."""
    losses: list[float] = example("plain").train(*material, str(tmp_path_factory.mktemp("plain")), STEPS, BATCH)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    return losses


def test_plain_loop_resumes(material: Material, expected: list[float], tmp_path: Path) -> None:
    train = example("plain").train
    first = train(*material, str(tmp_path), STEPS // 2, BATCH)
    assert first + train(*material, str(tmp_path), STEPS, BATCH, workers=1) == expected


def test_lightning_trains_on_the_same_batches_and_resumes(
    material: Material, expected: list[float], tmp_path: Path
) -> None:
    train = example("lightning_trainer").train
    first = train(*material, str(tmp_path), STEPS // 2, BATCH)
    second = train(*material, str(tmp_path), STEPS, BATCH, resume=str(tmp_path / "last.ckpt"))
    np.testing.assert_allclose(first.losses + second.losses, expected, rtol=1e-5)


def test_hugging_face_trainer_resumes(material: Material, tmp_path: Path) -> None:
    train = example("hf_trainer").train
    whole = train(*material, str(tmp_path), STEPS, BATCH)
    weights = load_file(tmp_path / f"checkpoint-{STEPS}/model.safetensors")
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    resumed = train(*material, str(tmp_path), STEPS, BATCH, resume=True)
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, resumed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
    again = load_file(tmp_path / f"checkpoint-{STEPS}/model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_attention_stays_inside_a_document(material: Material) -> None:
    """Without an attention mask and a cache, transformers finds the documents of a packed sequence by its positions."""
    lm = AutoModelForCausalLM.from_pretrained(material.model, use_cache=False).eval()
    batch = next(
        b for b in CuratedDataset(material.run, 1, packed=material.packed) if (b["position_ids"] == 0).sum() == 2
    )
    second = int((batch["position_ids"][0] == 0).nonzero()[1])
    with torch.no_grad():
        packed = lm(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[:, second:]
        alone = lm(input_ids=batch["input_ids"][:, second:]).logits
    torch.testing.assert_close(packed, alone)
