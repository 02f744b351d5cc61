"""Q-Tuning as a column: the example's batch as a corpus, masks, a run over instructions beside a slow definition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from tiny_lm import BIRDS, sentences, trained

from pipeline.batches.q_tuning import QTuning as Dynamic
from pipeline.config import parse
from pipeline.curation import curate
from pipeline.engine.pool import InlinePool
from pipeline.errors import ConfigError
from pipeline.models.causal import load_causal
from pipeline.scores.q_tuning import PLANE, QTuning, _draw_plane, masks, place

PERPLEXITY = np.array([2, 3, 4, 5, 6, 8, 9, 20.0])
ENTROPY = np.array([0.5, 1.6, 0.9, 1.8, 1.0, 0.6, 1.9, 0.7])


@pytest.mark.parametrize(("share", "kept"), [(0.25, [1, 7]), (0.5, [1, 3, 5, 7]), (0.75, [1, 2, 3, 5, 6, 7])])
def test_the_batch_of_the_example_as_a_corpus(tmp_path: Path, share: float, kept: list[int]) -> None:
    nats = np.log(PERPLEXITY).astype(np.float32)
    _draw_plane({"nats": nats, "entropy": ENTROPY.astype(np.float32)}, "nats", "entropy", share, tmp_path)
    facts = json.loads((tmp_path / PLANE).read_text())
    score, perplexity, quadrant = place(nats, ENTROPY.astype(np.float32), facts)
    np.testing.assert_allclose(perplexity, PERPLEXITY, rtol=1e-6)
    support = [0, 0.7302, 0.1746, 0.7619, 0.1349, 0.2619, 0.6111, 0.8571]
    np.testing.assert_allclose(score - np.isin(quadrant, (2, 4)), support, atol=5e-5)
    assert sorted(np.argsort(-score)[: int(share * 8)]) == kept


def test_the_ends_of_the_axes_are_not_those_of_an_outlier(tmp_path: Path) -> None:
    nats, entropy = np.linspace(1, 2, 1000, dtype=np.float32), np.linspace(3, 4, 1000, dtype=np.float32)
    nats[-1], entropy[-1] = 19, 90
    _draw_plane({"nats": nats, "entropy": entropy}, "nats", "entropy", 0.25, tmp_path)
    facts = json.loads((tmp_path / PLANE).read_text())
    np.testing.assert_allclose(facts["perplexity"], np.exp(nats[[9, 989]]), rtol=1e-6)
    np.testing.assert_allclose(facts["entropy"], entropy[[9, 989]], rtol=1e-6)


def test_tokens_of_confident_mistakes_are_ranked_and_those_of_others_stay() -> None:
    nats = np.log([1, 9, 1, 2, 10]).tolist()
    logp = pa.array([[-x for x in nats], [-5.0, -1.0], [-9.0, *(-x for x in nats)]], pa.list_(pa.float32()))
    target = np.array([True] * 7 + [False] + [True] * 5)  # a prompt of one token before the third
    mistake = np.array([True, False, True])
    found = masks(Dynamic(tokens=0.6), logp, target, mistake).to_pylist()
    assert found == [
        [False, True, False, True, True, False],
        [False, True, True],
        [False, False, True, False, True, True, False],
    ]
    assert masks(Dynamic(), logp, None, np.zeros(3, bool)).to_pylist()[2] == [False] + [True] * 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("q-tuning-lm"), sentences(200), steps=20)


def run(directory: Path, table: pa.Table, corpus: dict[str, Any], fields: dict[str, Any], **more: Any) -> pa.Table:
    """Stored score column of a run over a table; the curated rows are in `run/curated`."""
    pq.write_table(table, directory / "corpus.parquet", row_group_size=max(1, len(table) // 3))
    config = {
        "corpus": {"path": str(directory / "corpus.parquet"), "id": "id", "shard_mb": 1e-6, **corpus},
        "scores": [{"kind": "q_tuning", **fields}],
        "select": {"budget": {"fraction": 0.5}},
        "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
        "engine": {"max_bad_fraction": 1},
        "run": str(directory / "run"),
    }
    curate(parse(config | more), pool=InlinePool, quiet=True)
    parts = sorted((directory / "run/columns/q_tuning").glob("*.parquet"))
    return pa.concat_tables(pq.read_table(p) for p in parts)


def test_a_run_over_instructions(tmp_path: Path, model: Path) -> None:
    import torch

    prompts = [" ".join(p.split()[:3]) for p in sentences(24, 1)]
    prompts[5] = sentences(1, 4)[0] * 9  # its response begins behind what is read
    responses = [*sentences(16, 2), *sentences(8, 3, BIRDS)]
    table = pa.table({"id": [f"{i}" for i in range(24)], "prompt": prompts, "response": responses})
    fields = {"model": str(model), "rows": 0.5, "max_tokens": 48}
    found = run(tmp_path, table, {"prompt": "prompt", "response": "response"}, fields)

    lm, tokenizer = load_causal(model)
    there = [i for i, row in enumerate(found["score"].to_pylist()) if row is not None]
    assert there == [i for i in range(24) if i != 5]
    for i in there:
        encoded = tokenizer(f"{prompts[i]}\n\n{responses[i]}", return_offsets_mapping=True)
        ids = torch.tensor([encoded["input_ids"][:48]])
        with torch.no_grad():
            logp = lm(ids).logits[0].log_softmax(-1)
        begin = len(prompts[i]) + 2
        at = [t for t in range(1, ids.shape[1]) if encoded["offset_mapping"][t][1] > begin]
        nats = -logp[[t - 1 for t in at], ids[0, at]]
        entropy = -(logp.exp() * logp).sum(-1)[[t - 1 for t in at]]
        assert found["perplexity"][i].as_py() == pytest.approx(float(nats.mean().exp()), rel=1e-4)
        assert found["entropy"][i].as_py() == pytest.approx(float(entropy.mean()), rel=1e-4)
        mask = found["mask"][i].as_py()
        counted = {t for t, counts in enumerate(mask) if counts}
        assert len(mask) == ids.shape[1]
        if found["quadrant"][i].as_py() == 2:
            assert counted < set(at)
            assert len(counted) == max(1, len(at) // 2)
        else:
            assert counted == set(at)
    assert {2, 4} & set(found["quadrant"].to_pylist())

    (file,) = (tmp_path / "run/curated").glob("*.parquet")
    kept = pq.read_table(file)
    along = kept["tamis"].combine_chunks()
    rows = [int(i) for i in kept["id"].to_pylist()]
    assert along.field("q_tuning_mask").to_pylist() == [found["mask"][i].as_py() for i in rows]
    assert along.field("q_tuning_quadrant").to_pylist() == [found["quadrant"][i].as_py() for i in rows]
    least = min(found["score"][i].as_py() for i in rows)
    assert all(found["score"][i].as_py() <= least for i in there if i not in rows)


def test_a_corpus_of_texts_and_what_cannot_be(tmp_path: Path, model: Path) -> None:
    table = pa.table({"id": ["0", "1", "2"] * 4, "text": [*sentences(11, 1), "x"]})
    found = run(tmp_path, table, {}, {"model": str(model)})
    assert found["score"].null_count == 1  # one token
    assert [len(m) for m in found["mask"].to_pylist()[:2]] == [
        min(64, len(load_causal(model)[1](t)["input_ids"])) for t in table["text"].to_pylist()[:2]
    ]
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match=r"output\.rewrite shortens them"):
        run(
            tmp_path / "other",
            table,
            {},
            {"model": str(model)},
            output={"rewrite": {"kind": "sentences", "rules": ["c4"], "unit": "line"}},
        )


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rows": 0}, "greater than 0"),
        ({"model": "hf://a/b", "train": {"steps": 3}}, "trained already"),
        ({"model": "no/where"}, "there is no folder"),
    ],
)
def test_errors_at_the_door(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        QTuning.model_validate(fields)
