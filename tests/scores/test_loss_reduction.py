"""Loss reduction: the numbers of the unigram example, its properties, a planted domain, pairs that cannot be."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_lm import BIRDS, TINY, TREES, sentences, trained

from pipeline.config import parse
from pipeline.curation import curate
from pipeline.engine.pool import InlinePool
from pipeline.errors import ConfigError
from pipeline.models.causal import ONE_TOKEN, row_losses
from pipeline.scores._proxy import bigram_loss
from pipeline.scores.loss_reduction import LossReduction, reduction
from pipeline.words import hashed_words

P, Q = {"a": 0.5, "b": 0.5}, {"a": 0.8, "b": 0.2}
MIXED = TREES[::2] + BIRDS[::2]
SMALL = {"shape": vars(TINY), "steps": 60, "batch": 8, "sample": 300}


def unigram(rows: list[str], prior: dict[str, float], conditional: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and token counts of rows under two unigram models, every token with a loss."""
    losses = [
        row_losses(pa.array([[math.log(model[c]) for c in row] for row in rows], pa.list_(pa.float32())))
        for model in (prior, conditional)
    ]
    (before, tokens), (after, _) = losses
    return reduction(before, after, tokens), tokens


def test_the_unigram_example() -> None:
    scores, tokens = unigram(["a", "b", "aab", "aaab", "bb"], P, Q)
    np.testing.assert_allclose(scores, [0.470004, -0.916291, 0.007906, 0.123430, -0.916291], atol=1e-6)
    assert tokens.tolist() == [1, 1, 3, 4, 2]
    expected = [sum(model[c] * score for c, score in zip("ab", scores[:2], strict=True)) for model in (Q, P)]
    assert expected == pytest.approx([0.192745, -0.223144], abs=1e-6)  # KL(q || p) and -KL(p || q)


@given(st.lists(st.text("ab", min_size=1, max_size=20), min_size=2, max_size=5), st.floats(0.05, 0.95))
def test_it_is_antisymmetric_and_additive_in_tokens(rows: list[str], q: float) -> None:
    conditional = {"a": q, "b": 1 - q}
    scores, tokens = unigram(rows, P, conditional)
    np.testing.assert_allclose(unigram(rows, conditional, P)[0], -scores, atol=1e-12)
    whole, length = unigram(["".join(rows)], P, conditional)
    assert length[0] * whole[0] == pytest.approx((tokens * scores).sum(), abs=1e-5)


def test_short_rows_shrink() -> None:
    one, tokens = np.ones(3), np.array([1, 32, 992])
    np.testing.assert_allclose(reduction(one, one - 1, tokens, 32), [1 / 33, 0.5, 992 / 1024])
    np.testing.assert_array_equal(reduction(one, one - 1, tokens), 1)


def run_score(
    directory: Path, texts: list[str | None], fields: dict[str, Any], budget: dict[str, Any] | None = None, **more: Any
) -> tuple[pa.Table, list[str]]:
    """Stored score column of a run over texts, and the ids of what was kept."""
    rows = pa.table({"id": [f"row {i}" for i in range(len(texts))], "text": texts})
    pq.write_table(rows, directory / "corpus.parquet", row_group_size=max(1, len(texts) // 3))
    config = {
        "corpus": {"path": str(directory / "corpus.parquet"), "id": "id", "shard_mb": 1e-6},
        "scores": [{"kind": "loss_reduction", **fields}],
        "select": {"budget": budget or {"rows": 1}},
        "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
        "engine": {"max_bad_fraction": 1},
        "run": str(directory / "run"),
    }
    result = curate(parse(config | more), pool=InlinePool, quiet=True)
    kept = pa.concat_tables(pq.read_table(f, columns=["id"]) for f in sorted(Path(result.path).glob("*.parquet")))
    parts = sorted((directory / "run/columns/loss_reduction").glob("*.parquet"))
    return pa.concat_tables(pq.read_table(p) for p in parts), kept["id"].to_pylist()


def quarantined(run: Path) -> list[str]:
    """Reasons for which models refused rows."""
    found = [pq.read_table(directory)["reason"].to_pylist() for directory in (run / "quarantine").glob("lm-*")]
    return [reason for reasons in found for reason in reasons]


def test_a_planted_domain_comes_first(tmp_path: Path) -> None:
    """Three domains that share half of their words, the target a twentieth of the rows: the best 32nd is of it."""
    texts = sentences(380, 1, TREES) + sentences(380, 2, MIXED) + sentences(40, 3, BIRDS)
    texts = [texts[i] for i in np.random.default_rng(0).permutation(800)]
    (tmp_path / "target.txt").write_text("\n".join(sentences(100, 4, BIRDS)))
    fields = {"target": str(tmp_path / "target.txt"), "train": SMALL, "tune_steps": 40, "shrink": 8}
    table, kept = run_score(tmp_path, texts, fields, {"fraction": 1 / 32})

    planted = set(sentences(40, 3, BIRDS))
    right = [texts[int(row.removeprefix("row "))] in planted for row in kept]
    assert len(right) == 25
    assert np.mean(right) > 0.9

    # A model of these 25 rows expects unseen text of the target better than one of four times as many random rows.
    unseen = sentences(40, 5, BIRDS)
    words, offsets = hashed_words(pa.array([*texts, *unseen], pa.large_string()), 4096, 1000)
    bits, held_out = bigram_loss(words, offsets, 4096), 800 + np.arange(40)
    rows = np.array([int(row.removeprefix("row ")) for row in kept])
    random = [bits(np.random.default_rng(seed).permutation(800)[:100], held_out) for seed in range(3)]
    assert bits(rows, held_out) < min(random)

    usable = table.filter(table["score"].is_valid())
    expected = pc.subtract(usable["loss_prior"], usable["loss_conditional"])
    tokens = usable["tokens"].to_numpy()
    np.testing.assert_allclose(usable["score"], expected.to_numpy() * tokens / (tokens + 8), atol=1e-6)

    facts = json.loads((tmp_path / "run/artifacts/loss_reduction-conditional/conditional.json").read_text())
    losses = dict(facts["held_out_losses"])
    assert facts["held_out_texts"] == 10
    assert losses[facts["step"]] == min(losses.values()) < losses[0]
    for name in ("prior", "conditional"):
        assert (tmp_path / f"run/artifacts/loss_reduction-{name}/model.safetensors").is_file()
        assert (tmp_path / f"run/artifacts/loss_reduction-{name}/tokenizer.json").is_file()


def test_no_tuning_is_all_zeros_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "target.txt").write_text("\n".join(sentences(20, 4, BIRDS)))
    fields = {"target": str(tmp_path / "target.txt"), "train": SMALL | {"steps": 2}, "tune_steps": 0}
    with caplog.at_level(logging.WARNING):
        table, _ = run_score(tmp_path, sentences(30), fields)
    assert set(table["score"].to_pylist()) == {0.0}
    assert "every score will be 0" in caplog.text


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two models with one tokenizer."""
    from pipeline.models.causal import load_causal
    from pipeline.models.training import pack, save_lm, train_lm

    folder = tmp_path_factory.mktemp("pair")
    trained(folder / "prior", sentences(200), steps=20)
    model, tokenizer = load_causal(folder / "prior")
    texts = sentences(100, words=BIRDS)
    blocks = pack([e.ids for e in tokenizer.backend_tokenizer.encode_batch(texts)], TINY.context, 0)
    train_lm(model, blocks, 10, 8, 1e-3, 0)
    save_lm(model, tokenizer.backend_tokenizer, folder / "conditional")
    return str(folder / "prior"), str(folder / "conditional")


def test_a_pair_of_models_either_way(tmp_path: Path, pair: tuple[str, str]) -> None:
    scores = []
    for i, (prior, conditional) in enumerate((pair, pair[::-1], (pair[0], pair[0]))):
        (tmp_path / str(i)).mkdir()
        fields = {"prior": prior, "conditional": conditional}
        table, _ = run_score(tmp_path / str(i), [*sentences(20, 9), "x", None], fields)
        scores.append(table["score"].to_numpy())
    assert np.isnan(scores[0]).nonzero()[0].tolist() == [20, 21]
    np.testing.assert_array_equal(scores[0][:20], -scores[1][:20])
    assert np.ptp(scores[0][:20]) > 0.01
    np.testing.assert_array_equal(scores[2][:20], 0)
    assert quarantined(tmp_path / "0/run") == [ONE_TOKEN] * 2  # by each of the models


def test_tokenizers_that_differ_are_an_error(tmp_path: Path, pair: tuple[str, str]) -> None:
    other = trained(tmp_path / "other", sentences(50, words=BIRDS), steps=1)
    with pytest.raises(ConfigError, match=r"different tokenizers.*fine-tuned from the prior"):
        run_score(tmp_path, sentences(10), {"prior": pair[0], "conditional": str(other)})


def test_a_model_that_gives_no_number_is_quarantined(tmp_path: Path, pair: tuple[str, str]) -> None:
    import torch

    from pipeline.models.causal import NOT_FINITE, load_causal
    from pipeline.models.training import save_lm

    model, tokenizer = load_causal(Path(pair[1]))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    save_lm(model, tokenizer.backend_tokenizer, tmp_path / "broken")
    config = {"prior": pair[0], "conditional": str(tmp_path / "broken")}
    with pytest.raises(Exception, match="no row"):
        run_score(tmp_path, sentences(6), config)
    assert quarantined(tmp_path / "run") == [NOT_FINITE] * 6


def test_target_texts_in_the_corpus_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = sentences(12, 4, BIRDS)
    (tmp_path / "target.txt").write_text("\n".join(target))
    corpus = [*sentences(20), target[3].upper(), "  " + target[5] + "\n"]
    fields = {"target": str(tmp_path / "target.txt"), "train": SMALL | {"steps": 2}, "tune_steps": 2}
    with caplog.at_level(logging.WARNING):
        run_score(tmp_path, corpus, fields)
    assert "row 20, row 21" in caplog.text


def test_another_column_of_the_target_tunes_another_model(tmp_path: Path) -> None:
    target = tmp_path / "target.parquet"
    pq.write_table(pa.table({"text": sentences(12, 4, BIRDS), "other": sentences(12, 5, MIXED)}), target)
    fields = {"target": str(target), "train": SMALL | {"steps": 2}, "tune_steps": 2, "holdout": 0}
    found = [run_score(tmp_path, sentences(20), fields | {"target_text": name})[0] for name in ("text", "other")]
    assert found[0]["loss_prior"] == found[1]["loss_prior"]
    assert found[0]["loss_conditional"] != found[1]["loss_conditional"]


@pytest.mark.parametrize("holdout", [0.1, 0.0])
def test_one_target_text_is_a_clear_error_or_tuned_without_looking(tmp_path: Path, holdout: float) -> None:
    target = tmp_path / "target.txt"
    target.write_text("\n".join(["oak pine rowan willow oak pine"] * 3))
    fields = {"target": str(target), "train": SMALL | {"steps": 5}, "tune_steps": 5, "holdout": holdout}
    if holdout:
        with pytest.raises(ConfigError, match="one distinct text, so none can be held out"):
            run_score(tmp_path, sentences(20), fields)
    else:
        table, _ = run_score(tmp_path, sentences(20), fields)
        assert table["score"].null_count == 0
        facts = json.loads((tmp_path / "run/artifacts/loss_reduction-conditional/conditional.json").read_text())
        assert (facts["step"], facts["texts"], facts["held_out_losses"]) == (5, 1, [])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "give either"),
        ({"prior": "here"}, "give either"),
        ({"target": "t.txt", "prior": "p", "conditional": "c"}, "trains the pair"),
        ({"prior": "hf://o/p", "conditional": "hf://o/c", "tune_steps": 3}, "trained already: remove tune_steps"),
        ({"prior": "hf://o/p", "conditional": "nowhere"}, "there is no folder 'nowhere'"),
        ({"prior": "hf://o", "conditional": "hf://o/c"}, "hf://org/name"),
        ({"target": "t.txt", "train": {"shape": {"width": 3}}}, "width"),
        ({"target": "t.txt", "holdout": 1}, "less than 1"),
    ],
)
def test_errors_at_the_door(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        LossReduction.model_validate(fields)


def test_a_missing_target_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss_reduction.target: no such file: nowhere.txt"):
        run_score(tmp_path, sentences(5), {"target": "nowhere.txt"})
