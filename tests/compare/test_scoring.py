"""What curating cost, in FLOPs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("torch")

from pipeline.compare.flops import ModelShape, full
from pipeline.compare.scoring import scoring_cost
from pipeline.compress import folder
from pipeline.compress.architecture import anatomy
from pipeline.compress.surgery import cut
from pipeline.config import parse
from pipeline.curation import curate
from pipeline.errors import ConfigError
from pipeline.models.training import Shape, new_lm
from tests.tiny_lm import sentences, trained

SHAPE = {"hidden": 16, "layers": 2, "heads": 2, "kv_heads": 1, "mlp": 32, "vocab": 300, "context": 32}


def test_rules_cost_little_and_models_what_they_run(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": sentences(60)}), tmp_path / "corpus.parquet")
    training = {"shape": SHAPE, "steps": 3, "batch": 2}
    config = parse(
        {
            "corpus": {"path": str(tmp_path / "corpus.parquet")},
            "scores": [{"kind": "heuristics"}, {"kind": "perplexity", "max_tokens": 16, "train": training}],
            "select": {"budget": {"rows": 30}},
            "engine": {"address": "inline"},
            "run": str(tmp_path / "run"),
        }
    )
    curate(config, quiet=True)
    found = scoring_cost(config.run, config)
    shape = ModelShape.of(new_lm(Shape(**SHAPE), 0))
    assert found.flops["heuristics"] == 2000 * found.pool_tokens
    trained = full(shape, 32) * 3 * 2 * 32
    assert found.flops["perplexity"] == pytest.approx(shape.forward(16) * found.pool_tokens + trained)
    assert found.total == sum(found.flops.values())


def test_a_run_that_did_not_finish_is_refused(tmp_path: Path) -> None:
    config = parse(
        {
            "corpus": {"path": "x"},
            "scores": ["random"],
            "select": {"budget": {"rows": 1}},
            "run": str(tmp_path),
        }
    )
    with pytest.raises(ConfigError, match="not a finished run"):
        scoring_cost(config.run, config)


def test_a_model_whose_layers_differ_costs_what_is_left_of_it(tmp_path: Path) -> None:
    text = sentences(60)
    pq.write_table(pa.table({"text": text}), tmp_path / "corpus.parquet")
    place = trained(tmp_path / "dense", text, Shape(**SHAPE), steps=3)
    model, tokenizer = folder.load(place)
    cut(model, anatomy(model).units("neuron"), {"0.neuron": np.arange(10)})
    folder.save(model, tokenizer, tmp_path / "cut", {})
    config = parse(
        {
            "corpus": {"path": str(tmp_path / "corpus.parquet")},
            "scores": [{"kind": "perplexity", "max_tokens": 16, "model": str(tmp_path / "cut")}],
            "select": {"budget": {"rows": 30}},
            "engine": {"address": "inline"},
            "run": str(tmp_path / "run"),
        }
    )
    curate(config, quiet=True)
    found = scoring_cost(config.run, config)
    assert found.flops["perplexity"] == pytest.approx(ModelShape.of(model).forward(16) * found.pool_tokens)
