"""`tamis compress` as its user runs it: a small model, cut and healed on a curated run."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from pipeline.compress import compression, folder
from pipeline.compress.compression import compress
from pipeline.compress.config import METHODS, Compress, methods
from pipeline.compress.data import sources
from pipeline.config import parse_as
from pipeline.corpus.storage import Store
from pipeline.errors import ConfigError, RunLocked, TamisError
from pipeline.lock import RunLock

SHAPE = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 64, "vocab": 300, "context": 32}


def configured(run: str, directory: Path, **changes: Any) -> Compress:
    corpus = str(Path(run).parent / "corpus.parquet")
    base = {
        "model": {"train_on": corpus, "shape": SHAPE, "steps": 200, "batch": 8, "lr": 5e-3},
        "data": run,
        "steps": [{"method": "llm_pruner", "ratio": 0.4}],
        "recover": {"kind": "full", "lr": 1e-3, "batch": 8},
        "calibration": {"rows": 8},
        "tokens": 10_000,
        "length": 32,
        "held_out": 0.1,
        "run": str(directory),
    }
    return parse_as(Compress, base | changes)


@pytest.fixture(scope="module")
def done(tiny_run: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Compress, Any]:
    config = configured(tiny_run, tmp_path_factory.mktemp("compress"))
    return config, compress(config)


def test_it_is_smaller_and_healing_makes_up_for_it(done) -> None:
    _, result = done
    before, after = result.parameters
    assert after < 0.8 * before
    assert result.dense < result.cut
    assert result.healed < result.cut


def test_the_folder_loads_and_says_what_went(done) -> None:
    config, result = done
    model, tokenizer = folder.load(Path(result.folder))
    ids = tokenizer("oak pine", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4
    card = (Path(result.folder) / "README.md").read_text()
    assert "weights of the layers' matrices" in card
    assert "unseen texts" in card
    report = json.loads(Path(result.report).read_text())
    assert report["steps"][0]["of_prunable"] == pytest.approx(0.4, abs=0.1)
    assert report["passes"]["backward"] == 8 * 32
    assert report["config"]["data"] == config.data


def test_a_second_call_cuts_and_trains_nothing(done, monkeypatch: pytest.MonkeyPatch) -> None:
    config, result = done

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it was done before")

    monkeypatch.setattr(compression, "shrink", never)
    before = (Path(config.run) / "recover" / "metrics.jsonl").read_bytes()
    again = compress(config)
    assert again.healed == result.healed
    assert (Path(config.run) / "recover" / "metrics.jsonl").read_bytes() == before


def test_what_is_measured_on_is_not_trained_on(tiny_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.compress.parent import parent_folder

    packed: list[tuple[set[str], np.ndarray]] = []
    pack = compression.pack_blocks

    def watched(texts: Any, *rest: Any) -> np.ndarray:
        packed.append((set(texts.to_pylist()), pack(texts, *rest)))
        return packed[-1][1]

    monkeypatch.setattr(compression, "pack_blocks", watched)
    config = configured(tiny_run, tmp_path)
    _, tokenizer = folder.load(parent_folder(config.model, tmp_path / "parent", config.held_out, config.seed))
    blocks = compression.gather(config, sources(config.data, config), tokenizer)
    (calibration, _), (recovery, _), (held_out, _) = packed
    assert calibration
    assert recovery
    assert held_out
    assert not (calibration | recovery) & held_out
    for (_, of), given in zip(packed, (blocks.calibration, blocks.recovery, blocks.held_out), strict=True):
        assert np.array_equal(of, given)
    # Few blocks of other texts are alike nonetheless: in this language a word has but two successors.
    seen = {tuple(row) for part in (blocks.calibration, blocks.recovery) for row in part.tolist()}
    assert sum(tuple(row) in seen for row in blocks.held_out.tolist()) <= 0.05 * len(blocks.held_out)
    assert blocks.recovery.size <= config.tokens


def test_the_draw_that_stays_closest_is_taken(tiny_run: str, tmp_path: Path) -> None:
    config = configured(
        tiny_run, tmp_path, recover=None, calibration={"rows": 4, "by": ["random", "length"], "draws": 2}
    )
    report = json.loads(Path(compress(config).report).read_text())
    tried = report["calibration"]["tried"]
    assert [(t["by"], t["seed"]) for t in tried] == [("random", 0), ("random", 1), ("length", 0)]
    assert report["calibration"]["kl"] == min(t["kl"] for t in tried) > 0
    # Three trials and the cut itself, each of 4 rows of 32 tokens; and two models' passes over the probe a trial.
    assert report["passes"]["backward"] == 4 * 4 * 32


def test_a_score_that_the_run_has_not_is_named(tiny_run: str, tmp_path: Path) -> None:
    with pytest.raises(TamisError, match=r"tamis\.quality"):
        compress(configured(tiny_run, tmp_path, calibration={"by": "quality"}))


def test_scores_need_a_curated_run(tiny_run: str, tmp_path: Path) -> None:
    corpus = str(Path(tiny_run).parent / "corpus.parquet")
    with pytest.raises(ConfigError, match="only a curated run"):
        compress(configured(tiny_run, tmp_path, data=corpus, calibration={"by": "length"}))


def test_parquet_will_do_for_data(tiny_run: str, tmp_path: Path) -> None:
    corpus = str(Path(tiny_run).parent / "corpus.parquet")
    result = compress(configured(tiny_run, tmp_path, data=corpus, recover=None))
    assert result.healed is None
    assert result.dense < result.cut


def test_steps_follow_each_other(tiny_run: str, tmp_path: Path) -> None:
    steps = [{"method": "shortgpt", "ratio": 0.5}, {"method": "maw", "ratio": 0.25}]
    result = compress(configured(tiny_run, tmp_path, steps=steps, recover=None))
    model, _ = folder.load(Path(result.folder))
    assert model.config.num_hidden_layers == 1
    assert model.config.intermediate_size == 48


def test_masks_are_kept_through_the_recovery(tiny_run: str, tmp_path: Path) -> None:
    steps = [{"method": "wanda", "pattern": {"keep": 2, "of": 4}}]
    result = compress(configured(tiny_run, tmp_path, steps=steps))
    model, _ = folder.load(Path(result.folder))
    masks = folder.masks(Path(result.folder))
    parameters = dict(model.named_parameters())
    assert len(masks) == 2 * 7
    for name, mask in masks.items():
        assert mask.float().mean() == 0.5
        assert (parameters[name][~mask] == 0).all()
        assert (parameters[name][mask] != 0).float().mean() > 0.99
    assert result.healed < result.cut


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": [{"method": "flop", "ratio": 0.2}]}, "unknown method 'flop'"),
        ({"steps": [{"kind": "width", "ratio": 1.5, "importance": "maw"}]}, "less than 1"),
        ({"steps": []}, "nothing makes the model smaller"),
        ({"recover": None, "schedules": [{"kind": "soft_shrinkage", "ratio": 0.5}]}, "name how"),
        ({"recover": {"kind": "fall"}}, "unknown kind 'fall'; did you mean 'full'"),
        ({"tokns": 5}, "did you mean 'tokens'"),
    ],
)
def test_mistakes_are_told_before_anything_is_done(tiny_run: str, tmp_path: Path, change: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        configured(tiny_run, tmp_path, **change)


def test_a_run_on_an_object_store_is_refused(tiny_run: str) -> None:
    with pytest.raises(ConfigError, match="a file system"):
        compress(configured(tiny_run, Path("x")).model_copy(update={"run": "s3://bucket/run"}))


def test_two_at_once_are_refused(tiny_run: str, tmp_path: Path) -> None:
    lock = RunLock(Store(str(tmp_path)))
    lock.acquire()
    try:
        with pytest.raises(RunLocked):
            compress(configured(tiny_run, tmp_path))
    finally:
        lock.release()


@pytest.mark.parametrize("name", methods())
def test_every_method_is_a_step_and_says_where_it_is_from(name: str) -> None:
    assert files(METHODS).joinpath(f"{name}.yaml").read_text().startswith("# ")
    data = {"model": "hf://org/x", "data": "y", "run": "z"}
    given = {"method": name}
    if name != "armor":
        given["ratio"] = 0.25
    parse_as(Compress, data | {"steps": [given]})


def test_blocks_of_the_small_model_do_not_hold_what_is_measured_on(tiny_run: str, tmp_path: Path) -> None:
    from pipeline.compress.config import Small
    from pipeline.compress.parent import parent_folder

    small = Small(train_on=str(Path(tiny_run).parent / "corpus.parquet"), shape=SHAPE, steps=4, batch=2)
    first = parent_folder(small, tmp_path, 0.1, 0)
    assert parent_folder(small, tmp_path, 0.1, 0) == first
    assert parent_folder(small, tmp_path, 0.2, 0) != first  # another share is another model


def test_divergence_is_zero_for_the_same_and_positive_for_another(tiny_trained) -> None:
    from copy import deepcopy

    from pipeline.compress.choice import divergence
    from pipeline.compress.steps.width import Width

    model, _, blocks = tiny_trained
    assert divergence(model, model, blocks[:4]) == 0
    from pipeline.compress.calibration import Calibration

    cut = Width(ratio=0.3, importance="random").apply(deepcopy(model), Calibration.of_blocks(model, blocks[:2])).model
    assert divergence(model, cut, blocks[:4]) > 1e-3


def test_divergence_has_the_specifications_number() -> None:
    """p = softmax(2, 1, 0) against uniform: 0.266217 nats (data-for-pruning.md, section 3)."""
    import torch

    from pipeline.compress.choice import divergence

    class Says(torch.nn.Module):
        def __init__(self, logits: list[float]) -> None:
            super().__init__()
            self.logits = torch.nn.Parameter(torch.tensor(logits))

        def forward(self, input_ids: Any, use_cache: bool) -> Any:
            logits = self.logits.expand(*input_ids.shape, -1)
            return type("Output", (), {"logits": logits})()

    found = divergence(Says([2.0, 1.0, 0.0]), Says([1.0, 1.0, 1.0]), np.zeros((2, 3), np.int32))
    assert found == pytest.approx(0.266217, abs=1e-6)


def test_a_trimmed_vocabulary_is_healed_in_its_own_tokens(tiny_run: str, tmp_path: Path) -> None:
    steps = [{"kind": "vocab", "coverage": 0.5}, {"method": "maw", "ratio": 0.25}]
    recover = {"kind": "distill", "lr": 1e-3, "batch": 8}
    result = compress(configured(tiny_run, tmp_path, steps=steps, recover=recover))
    model, tokenizer = folder.load(Path(result.folder))
    assert model.config.vocab_size == len(tokenizer) < SHAPE["vocab"]
    assert tokenizer.decode(tokenizer("oak pine żółw", add_special_tokens=False).input_ids) == "oak pine żółw"
    assert result.healed < result.cut
