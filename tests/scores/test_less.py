"""LESS: the Adam step by its numbers, and a target of birds in a corpus of trees and birds."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

pytest.importorskip("torch")

import torch
from two_domains import MASKED, Domains, two_domains

from pipeline.errors import TamisError
from pipeline.models.causal import load_causal
from pipeline.models.gradients import linear_layers, token_losses
from pipeline.models.training import lm_loss, pack, train_lm
from pipeline.scores._influence import Target, pooled, unit
from pipeline.scores.less import Less, _rate, adam_direction, adapt

SMALL = {"kind": "less", "rank": 4, "alpha": 16, "epochs": 2, "lr": 1e-3, "warmup": 0.3, "size": 512}


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Domains:
    return two_domains(tmp_path_factory.mktemp("less"))


@pytest.fixture(scope="module")
def scored(domains: Domains) -> pa.Table:
    return domains.run("run", SMALL | {"model": str(domains.model)})


def test_toy_of_the_adam_direction() -> None:
    m, v, g = torch.tensor([0.1, 0]), torch.tensor([0.04, 0.01]), torch.tensor([[1.0, -1.0]])
    np.testing.assert_allclose(adam_direction(g, m, v).numpy(), [[0.938801, -0.953896]], atol=1e-6)


def test_epsilon_is_inside_the_root() -> None:
    # Outside, as torch has it, the step of so small a gradient would be 2.4.
    step = adam_direction(torch.tensor([[1e-6]]), torch.zeros(1), torch.zeros(1))
    assert step.item() == pytest.approx(1e-7 / np.sqrt(1e-15 + 1e-8), rel=1e-4)


def test_the_step_is_torchs_but_for_its_bias_correction() -> None:
    weight = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=1e-3)
    steps = [torch.randn(3, generator=torch.Generator().manual_seed(i)) for i in range(10)]
    for weight.grad in steps[:-1]:
        optimizer.step()
    moments, before = optimizer.state[weight], weight.detach().clone()
    direction = adam_direction(steps[-1][None], moments["exp_avg"], moments["exp_avg_sq"])[0]
    weight.grad = steps[-1]
    optimizer.step()
    corrected = direction * (1 - 0.999**10) ** 0.5 / (1 - 0.9**10)
    torch.testing.assert_close(before - weight.detach(), 1e-3 * corrected, rtol=1e-4, atol=1e-8)


def test_learning_rate_rises_and_falls_to_nothing() -> None:
    rates = [_rate(100, 3, step) for step in range(100)]
    np.testing.assert_allclose(rates[:4], [1 / 3, 2 / 3, 1, 1])
    assert rates[-1] == pytest.approx(1 / 97)
    assert _rate(1, 1, 0) == 1


def test_adapters_start_as_nothing_and_are_seen_as_layers(domains: Domains) -> None:
    model, _ = load_causal(domains.model)
    ids = torch.arange(10)[None]
    before = token_losses(model, ids)
    adapters = adapt(model, rank=2, alpha=4, dropout=0, seed=0)
    torch.testing.assert_close(token_losses(model, ids), before)
    assert len(linear_layers(adapters)) == 2 * 2 * 4  # layers, q k v o, down and up
    for pair in adapters.values():
        torch.nn.init.ones_(pair["up"].weight)
    assert (token_losses(model, ids) - before).abs().max() > 1e-3


def test_the_best_tenth_is_of_the_target_and_lowers_its_loss_more_than_random(
    domains: Domains, scored: pa.Table
) -> None:
    keep = scored["keep"].to_numpy()
    assert domains.birds[keep].mean() > 0.9
    tokenizer = load_causal(domains.model)[1].backend_tokenizer
    held = pack([e.ids for e in tokenizer.encode_batch(pq.read_table(domains.target)["text"].to_pylist())], 32, 0)

    def loss_after(rows: np.ndarray) -> float:
        model, _ = load_causal(domains.model)
        train_lm(model, pack([tokenizer.encode(domains.texts[i]).ids for i in rows], 32, 0), 30, 4, 1e-3, 0)
        return lm_loss(model, held)

    draws = [np.random.default_rng(seed).choice(160, 16, replace=False) for seed in range(2)]
    assert loss_after(np.flatnonzero(keep)) < min(loss_after(rows) for rows in draws)


def test_a_row_of_one_token_scores_nothing_and_says_so(scored: pa.Table) -> None:
    score, rule = scored["score"].to_numpy(), np.array(scored["rule"].to_pylist())
    masked = np.isin(np.arange(160), MASKED)
    assert (score[masked] == 0).all()
    assert (rule[masked] == "no token counts").all()
    assert (rule[~masked] == "").all()
    assert (score[~masked] != 0).all()


def test_shards_do_not_matter_and_neither_does_a_second_run(domains: Domains, scored: pa.Table) -> None:
    other = domains.run("other", SMALL | {"model": str(domains.model)}, shard_mb=64)
    np.testing.assert_allclose(other["score"].to_numpy(), scored["score"].to_numpy(), atol=2e-5)
    before = (domains.folder / "run/artifacts/less-warmup/artifact.json").stat().st_mtime_ns
    domains.run("run", SMALL | {"model": str(domains.model), "pool": "mean"})
    assert (domains.folder / "run/artifacts/less-warmup/artifact.json").stat().st_mtime_ns == before


def test_warm_up_is_kept_with_its_rates(domains: Domains, scored: pa.Table) -> None:
    facts = json.loads((domains.folder / "run/artifacts/less-warmup/warmup.json").read_text())
    assert facts["rows"] in range(46, 49)  # 48 drawn, of which at most two are masked
    assert facts["rates"][0] > facts["rates"][1] > 0
    assert facts["losses"][1] < facts["losses"][0]


@pytest.mark.parametrize("projection", ["countsketch", "rademacher"])
def test_subtasks_prompts_and_projections(domains: Domains, projection: str) -> None:
    options = {"model": str(domains.model), "subtask": "task", "pool": "top2", "prompt": "before", "epochs": 1}
    found = domains.run(projection, SMALL | options | {"projection": projection, "warmup": 0.1})
    assert domains.birds[found["keep"].to_numpy()].mean() > 0.9
    targets = np.load(domains.folder / projection / "artifacts/less-target/targets.npy")
    assert targets.shape == (1, 2, 512)
    assert (np.linalg.norm(targets, axis=2) <= 1 + 1e-5).all()
    assert (found["rule"].to_numpy() == "").all()  # behind a prompt, one token counts


def test_a_prompt_that_fills_the_window_masks_the_row(domains: Domains) -> None:
    options = {"model": str(domains.model), "prompt": "before", "max_tokens": 4, "epochs": 1, "warmup": 0.1}
    with pytest.raises(TamisError, match="does a token count: raise max_tokens"):
        domains.run("full", SMALL | options)


def test_one_example_is_a_target_set(domains: Domains, tmp_path: Path) -> None:
    pq.write_table(pq.read_table(domains.target).slice(0, 1), tmp_path / "one.parquet")
    options = {"model": str(domains.model), "target": str(tmp_path / "one.parquet"), "warmup": 0.1, "epochs": 1}
    found = domains.run("one", SMALL | options)
    assert domains.birds[found["keep"].to_numpy()].mean() > 0.9


def test_a_target_in_the_corpus_is_warned_of(
    domains: Domains, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in.txt").write_text(domains.texts[7] + "\n")
    options = {"model": str(domains.model), "target": str(tmp_path / "in.txt"), "warmup": 0.1, "epochs": 1}
    with caplog.at_level(logging.WARNING):
        found = domains.run("inside", SMALL | options)
    assert "less.target: 1 rows of the corpus are target texts themselves" in caplog.text
    assert found["score"].to_numpy().argmax() == 7


@pytest.mark.parametrize(
    ("content", "says"),
    [("\n \n", "the target set is empty"), ("x\n", "no token counts in the examples of subtask ''")],
)
def test_targets_that_say_nothing(domains: Domains, tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "bad.txt").write_text(content)
    options = {"model": str(domains.model), "target": str(tmp_path / "bad.txt"), "warmup": 0.1, "epochs": 1}
    with pytest.raises(TamisError, match=says):
        domains.run("run-bad", SMALL | options)


def test_weights_that_are_not_finite_are_an_error_of_the_target(domains: Domains, tmp_path: Path) -> None:
    model, tokenizer = load_causal(domains.model)
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    with pytest.raises(TamisError, match="gradient of an example is not finite"):
        domains.run("broken", SMALL | {"model": str(tmp_path / "broken"), "warmup": 0.1, "epochs": 1})


def test_pools_and_units() -> None:
    scores = np.array([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0]])
    assert pooled(scores, "max").tolist() == [3, 0]
    assert pooled(scores, "mean").tolist() == [2, -1]
    assert pooled(scores, "top2").tolist() == [2.5, -0.5]
    assert pooled(scores[:, :1], "top2").tolist() == [1, 0]
    assert unit(np.array([[3.0, 4.0], [0, 0]])).tolist() == [[0.6, 0.8], [0, 0]]


def test_target_files_keep_their_columns_in_step(tmp_path: Path) -> None:
    lines = [{"text": "a", "p": "x", "t": 1}, {"text": " ", "p": "y", "t": 2}, {"text": "c", "p": None, "t": 2}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    examples = Target((str(tmp_path / "t.jsonl"),), "text", "p", "t", "less.target").read()
    assert examples.texts.to_pylist() == ["a", "c"]
    assert examples.prompts is not None
    assert examples.prompts.to_pylist() == ["x", ""]
    assert [examples.names[i] for i in examples.subtask] == ["1", "2"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"target": "t"}, "model"),
        ({"target": "t", "model": "nowhere"}, "no folder 'nowhere'"),
        ({"target": "t", "model": "hf://a/b", "size": 100}, "multiple of 64"),
    ],
)
def test_errors_at_the_door(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Less.model_validate(fields)
