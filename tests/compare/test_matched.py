"""`tamis compare` as its user runs it, on a model of a few thousand parameters."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

pytest.importorskip("torch")

from pipeline.cli import app
from pipeline.compare import matched
from pipeline.compare.arms import DESIGNS, by_chance, counts, from_scratch
from pipeline.compare.config import Matched
from pipeline.compare.flops import ModelShape, hessian, hessian_solve, layerwise, statistics
from pipeline.compare.matched import compare_matched
from pipeline.compare.material import gather, sieve_of
from pipeline.compare.measures.language import bits_per_byte
from pipeline.compare.measures.suite import Suite
from pipeline.compare.planning import importance_cost, takes_gram
from pipeline.compare.results import Results
from pipeline.compress import folder
from pipeline.compress.calibration import Calibration
from pipeline.compress.steps.sparse import Sparse
from pipeline.compress.steps.stun import Stun
from pipeline.config import parse, parse_as
from pipeline.curation import curate
from pipeline.errors import ConfigError
from pipeline.models.training import Shape, pack, save_lm, train_lm, train_tokenizer
from tests.tiny_chat import END, START, answering
from tests.tiny_lm import sentences, trained
from tests.tiny_run import make_chat_run, make_run

ROOT = Path(__file__).parents[2]
SHAPE = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 64, "vocab": 300, "context": 32}
SMALL = {"kind": "full", "lr": 1e-3, "batch": 4}


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_run(tmp_path_factory.mktemp("tiny_run"))


def described(run: str, directory: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": {
            "train_on": str(Path(run).parent / "corpus.parquet"), "shape": SHAPE, "steps": 100, "batch": 8, "lr": 5e-3,
        },
        "curated": run,
        "steps": [{"method": "llm_pruner", "ratio": 0.5}],
        "recover": SMALL,
        "distill": SMALL | {"kind": "distill"},
        "calibration": {"rows": 4},
        "tokens": 6400,
        "length": 32,
        "seeds": 2,
        "held_out": 0.1,
        "evaluate": {"items": 8, "made": ["retrieval"], "max_chars": 200},
        "latency": {"repeats": 1, "batches": [1], "prompt": 8},
        "engine": {"address": "inline"},
        "run": str(directory),
    } | changes  # fmt: skip


def configured(run: str, directory: Path, **changes: Any) -> Matched:
    return parse_as(Matched, described(run, directory, **changes))


@pytest.fixture(scope="module")
def done(tiny_run: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Matched, Results, list[Any]]:
    config = configured(tiny_run, tmp_path_factory.mktemp("matched"), keep=["C"])
    plans: list[Any] = []
    return config, compare_matched(config, quiet=True, show=plans.append), plans


def test_every_arm_spends_the_budget(done) -> None:
    _, results, plans = done
    assert len(plans) == 1  # before anything was trained
    assert list(results.ledgers) == list(DESIGNS)
    for ledger in results.ledgers.values():
        assert ledger.spent() == pytest.approx(results.budget, rel=0.01)
        assert not ledger.invalid(results.budget)


def test_what_comes_before_training_comes_off_its_tokens(done) -> None:
    _, results, _ = done
    tokens = results.plan.tokens
    assert tokens["E"] > tokens["F"] >= tokens["C"]  # scoring, then importance
    assert tokens["C"] > tokens["D"]  # and the teacher
    assert tokens["E"] > tokens["A"]  # the dense model is dearer a token
    charged = {name: {c.kind for c in ledger.charges} for name, ledger in results.ledgers.items()}
    assert "scoring" in charged["A'"]
    assert "scoring" not in charged["B"]
    assert {"importance", "scoring"} <= charged["C"]
    assert "importance" not in charged["R"]


def test_what_every_arm_takes_to_store_and_to_run(done) -> None:
    config, results, _ = done
    page, kept = Path(results.page).read_text(), Path(config.run) / "arms" / "C-0" / "model"
    told = json.loads((Path(config.run) / "compare" / "matched.json").read_text())
    for name, arm in results.arms.items():
        assert set(arm.cost) == {"prefill@1", "decode@1", "peak_memory", "file_size"}
        assert min(arm.cost.values()) > 0
        assert told["arms"][name]["cost"] == arm.cost
        assert not arm.zeros
    size = sum(f.stat().st_size for f in kept.glob("*.safetensors")) / 1e6
    assert results.arms["C"].cost["file_size"] == pytest.approx(size)
    assert (
        results.arms["C"].cost["file_size"] == results.arms["E"].cost["file_size"] < results.arms["A"].cost["file_size"]
    )
    heads, lines = results.used()
    assert heads[5:] == ["prefill@1, tokens/s", "decode@1, ms a token", "peak_memory, MB", "file_size, MB"]
    for line in lines:
        cells = "".join(f'<td class="n">{cell}</td>' for cell in line[5:])
        assert cells in page
    assert not (Path(config.run) / "arms" / "B-0" / "model").exists()  # it was there for its size


def test_students_have_one_shape_whatever_they_were_calibrated_on(done) -> None:
    config, _, _ = done
    found = {ModelShape.of(folder.load(p)[0]).digest for p in Path(config.run).glob("students/*-*")}
    assert len(found) == 1
    assert len(list(Path(config.run).glob("students/*-*"))) == 3 * config.seeds


def test_measures_effects_and_interaction(done) -> None:
    _, results, _ = done
    assert set(results.arms) == {"parent", "cut", *DESIGNS}
    c = results.arms["C"].measures["bits_per_byte.curated"]
    assert c.values.shape == (2, 8)
    cut = results.arms["cut"].measures["bits_per_byte.curated"]
    assert c.mean < cut.mean  # healing helps
    assert results.arms["parent"].kl == pytest.approx(0, abs=1e-6)
    assert results.arms["D"].kl < results.arms["C"].kl  # who is taught stays closer to the teacher
    assert results.arms["E"].measures["bits_per_byte.pool"].mean > results.arms["B"].measures["bits_per_byte.pool"].mean
    assert {"bits_per_byte.pool", "bits_per_byte.curated"} <= results.interactions.keys()
    effect = next(e for e in results.effects if (e.arm, e.over, e.measure) == ("B", "E", "bits_per_byte.pool"))
    expected = (
        results.arms["E"].measures["bits_per_byte.pool"].mean - results.arms["B"].measures["bits_per_byte.pool"].mean
    )
    assert effect.items.mean == pytest.approx(expected)  # positive: fewer bits


def test_domains_are_those_of_the_corpus_and_nobody_trained_on_them(done) -> None:
    config, results, _ = done
    names = {m for m, axis, _ in results.measures() if axis == "language"}
    assert {"bits_per_byte.pool, trees", "bits_per_byte.pool, birds"} <= names
    _, tokenizer = folder.load(next(Path(config.run).glob("students/*-0")))
    held = [t for f in Path(config.run).glob("held_out/*.parquet") for t in pq.read_table(f)["text"].to_pylist()]
    trained = "".join(
        tokenizer.decode(np.load(f).ravel().tolist()) for f in sorted(Path(config.run).glob("blocks/*.npy"))
    )
    whole = [t for t in held if len(t) > 60]
    assert whole
    assert not [t for t in whole if t in trained]


def test_the_page_and_the_tables(done) -> None:
    config, results, _ = done
    page = Path(results.page).read_text()
    assert "<script" not in page
    assert "interaction (C - B) - (F - E)" in page
    assert page.count("<svg") >= 3
    told = (Path(config.run) / "compare" / "matched.md").read_text()
    assert re.search(r"\| C \| cut, curated data \|", told)
    found = json.loads((Path(config.run) / "compare" / "matched.json").read_text())
    assert found["arms"]["C"]["measures"]["bits_per_byte.pool"]["seeds"]


def test_a_second_call_trains_nothing(done, monkeypatch: pytest.MonkeyPatch) -> None:
    config, results, _ = done

    def never(*args: Any) -> None:
        raise AssertionError("it was trained before")

    monkeypatch.setattr(matched, "_train", never)
    again = compare_matched(config, quiet=True)
    assert again.as_json()["effects"] == results.as_json()["effects"]


def test_kept_models_load(done) -> None:
    config, _, _ = done
    model, _ = folder.load(Path(config.run) / "arms" / "C-0" / "model")
    assert model.config.num_hidden_layers == 2
    assert not (Path(config.run) / "arms" / "B-0" / "model").exists()


def test_only_the_plan(tiny_run: str, tmp_path: Path) -> None:
    results = compare_matched(configured(tiny_run, tmp_path), quiet=True, only_plan=True)
    assert results.plan.tokens["E"] == 6400
    assert not (tmp_path / "arms").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokens": 320}, "more than 1 %|exceed the budget"),
        ({"length": 64}, "length: 64 tokens a block, where the model takes 32"),
        (
            {"steps": [{"method": "wanda", "ratio": 0.5}], "recover": {"kind": "perp"}, "arms": ["A", "B"]},
            "arm A: recover: perp: masklora corrects sparse matrices",
        ),
        ({"curated": "nowhere"}, "tamis curate"),
    ],
)
def test_what_cannot_be_matched_is_refused_before_training(
    tiny_run: str, tmp_path: Path, change: Any, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        compare_matched(configured(tiny_run, tmp_path, **change), quiet=True)
    assert not (tmp_path / "arms").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"arms": ["A", "Z"]}, "no arm is called 'Z'"),
        ({"flops": 1e9}, "name the budget once"),
        ({"calibration": {"by": "length"}}, "draws rows at random"),
        ({"distill": SMALL}, "learns from no teacher"),
        ({"recover": SMALL | {"kind": "distill"}}, "which is what arm D is: name `distill`"),
        ({"seeds": 1}, "seeds"),
        ({"steps": []}, "nothing makes the student smaller"),
        ({"schedules": [{"kind": "soft_shrinkage", "ratio": 0.5}]}, r"leave them out: arms: \[A, A', B, C, Cr, D\]"),
        ({"model": "./nowhere"}, "there is no folder './nowhere'"),
        ({"model": "hf://name"}, "is written hf://org/name"),
    ],
)
def test_mistakes_are_told_at_the_door(tiny_run: str, tmp_path: Path, change: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        configured(tiny_run, tmp_path, **change)


def test_from_scratch_is_new_and_of_the_seed(tiny_run: str) -> None:
    import torch

    from pipeline.models.training import new_lm

    model = new_lm(Shape(**SHAPE), 0)
    first, same, other = (from_scratch(model, seed) for seed in (1, 1, 2))
    assert ModelShape.of(first).digest == ModelShape.of(model).digest
    for (name, a), b, c, old in zip(
        first.named_parameters(), same.parameters(), other.parameters(), model.parameters(), strict=True
    ):
        assert torch.equal(a, b)
        if a.ndim > 1:
            assert not torch.equal(a, c)
            assert not torch.equal(a, old)
            assert float(a.detach().std()) == pytest.approx(0.02, rel=0.2), name
        else:
            assert (a == 1).all()


def test_from_scratch_nothing_of_a_mixture_is_the_parents() -> None:
    import torch

    from tests.compress.test_experts import make

    model = make("glm4_moe")
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("correction_bias"))]:
            tensor.fill_(7)
    fresh = from_scratch(model, 0)
    named = {n: t for n, t in [*fresh.named_parameters(), *fresh.named_buffers()] if "inv_freq" not in n}
    assert any(n.endswith("correction_bias") for n in named)
    assert not any((t == 7).any() for t in named.values())
    assert float(named["model.layers.1.mlp.experts.down_proj"].detach().std()) == pytest.approx(0.02, rel=0.2)


def test_random_rows_are_deduplicated_where_the_curated_ones_were(tmp_path: Path) -> None:
    texts = [text for text in sentences(60) for _ in range(3)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "corpus.parquet")
    sieved = parse(
        {
            "corpus": {"path": str(tmp_path / "corpus.parquet")},
            "scores": [{"kind": "length"}, {"kind": "exact_duplicates", "keep": "best", "by": "length"}],
            "select": {"budget": {"rows": 40}, "floors": {"exact_duplicates": 0}, "weights": {"length": 1}},
            "output": {"path": str(tmp_path / "elsewhere")},
            "engine": {"address": "inline"},
            "run": str(tmp_path / "run"),
        }
    )
    curate(sieved, quiet=True)
    kept = pq.read_table(tmp_path / "elsewhere")
    config = configured(str(tmp_path / "run"), tmp_path / "matched", held_out=0.2)
    found = gather(config, sieve_of(config.curated), tmp_path / "matched", quiet=True)
    for rows in found.random:
        assert len(rows) == len(rows.unique()) > 0
    assert not found.random[0].equals(found.random[1])
    assert pq.read_table(tmp_path / "elsewhere").equals(kept)  # and what was curated is where it was


def test_gram_matrices_and_what_a_recovery_measures_are_charged(tiny_run: str) -> None:
    from pipeline.compress.steps.width import Width
    from pipeline.models.training import new_lm

    shape, passes = ModelShape.of(new_lm(Shape(**SHAPE), 0)), {"forward": 1000}
    plain = importance_cost([Width(ratio=0.5, importance="wifv")], passes, shape, 32)
    assert plain == 1000 * statistics(shape, 32)
    refit = importance_cost([Width(ratio=0.5, importance="wifv", compensation="refit")], passes, shape, 32)
    assert refit - plain == pytest.approx(1000 * (hessian(shape, 32) - layerwise(shape, 32)) + hessian_solve(shape))


def test_depth_by_chance_takes_as_many_blocks(tiny_run: str, tmp_path: Path) -> None:
    steps = [{"kind": "depth", "method": "bi", "ratio": 0.5}]
    config = configured(tiny_run, tmp_path, steps=steps, arms=["B", "R"], seeds=2)
    compare_matched(config, quiet=True, only_plan=True)
    found = [folder.load(p)[0].config.num_hidden_layers for p in sorted(tmp_path.glob("students/*-*"))]
    assert found == [1] * 6  # curated, random and chance, two seeds each


def test_counts_fix_a_shape_and_chance_keeps_it() -> None:
    from pipeline.compress.steps.width import Width

    step = Width(ratio=0.5, importance="maw")
    fixed = counts(step, {"kept": {"0.neuron": "7 of 12"}})
    assert fixed.allocation.kept == {"0.neuron": 7}
    chance = by_chance([fixed], 3)[0]
    assert (chance.importance.kind, chance.importance.seed) == ("random", 3)
    assert chance.allocation == fixed.allocation


def test_gram_matrices_are_charged_to_whatever_step_takes_them() -> None:
    for method in ("sparsegpt", "wanda"):
        for step in (Sparse.model_validate({"ratio": 0.5, "method": method}), Stun.model_validate({"method": method})):
            assert takes_gram(step) == (method == "sparsegpt")
    assert takes_gram(Sparse.model_validate({"ratio": 0.5, "method": "wanda", "refit": True}))


def test_stun_by_chance_draws_experts_and_weights() -> None:
    (chance,) = by_chance([Stun(ratio=0.5, experts=0.25)], 7)
    assert isinstance(chance, Stun)
    assert (chance.criterion, chance.seed, chance.method.kind) == ("random", 7, "random")
    assert (chance.ratio, chance.experts) == (0.5, 0.25)


@pytest.mark.parametrize("low_rank", [None, {}, {"fold": True}])
def test_counts_of_weights_are_given_unless_a_low_rank_part_filled_them(low_rank: Any) -> None:
    from tests.compress.conftest import make_tiny

    removed = []
    step = Sparse.model_validate({"ratio": 0.5, "method": "wanda", "allocation": "erk", "low_rank": low_rank})
    for _ in range(2):
        tiny = make_tiny("llama")
        before = {name: p.detach().clone() for name, p in tiny.model.named_parameters()}
        report = step.apply(tiny.model, Calibration(tiny.model, [tiny.batch])).report
        after = dict(tiny.model.named_parameters())
        removed.append([int((after[name] != p).sum()) for name, p in before.items()])
        step = counts(step, report)
    assert sum(removed[0]) > 0
    assert removed[0] == removed[1]


# What cuts or masks while it trains, what trims a vocabulary: the same run directory, where random rows are drawn once.


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ways")


def compared(run: str, directory: Path, **changes: Any) -> Results:
    small = {"tokens": 3840, "evaluate": {"items": 4, "made": ["retrieval"], "max_chars": 100}, "latency": None}
    return compare_matched(configured(run, directory, **small | changes), quiet=True)


def check_spending(results: Results) -> None:
    for line in results.plan.lines:
        ledger = results.ledgers[line.arm.name]
        assert ledger.spent() == pytest.approx(line.spent, rel=1e-12)  # what was planned is what was spent
        assert ledger.spent() == pytest.approx(results.budget, rel=0.01)
        assert ledger.tokens == pytest.approx(line.tokens)
    assert not results.invalid


def test_a_model_that_is_cut_while_it_trains_pays_for_every_shape(tiny_run: str, directory: Path) -> None:
    step = {"kind": "width", "ratio": 0.5, "importance": "taylor", "allocation": {"kind": "adapt", "amplitude": 0.1}}
    schedule = {"kind": "adapt_pruner", "step": step, "rounds": 4, "rows": 4}
    results = compared(tiny_run, directory, steps=[], schedules=[schedule], arms=["B", "E", "R"], keep=["B", "E", "R"])
    check_spending(results)
    kept = [folder.load(p / "model")[0] for p in sorted(directory.glob("arms/[BER]-?"))]
    assert len(kept) == 6
    assert len({ModelShape.of(model).digest for model in kept}) == 1
    arms = {line.arm.name: line for line in results.plan.lines}
    assert arms["R"].tokens > arms["B"].tokens  # what Taylor measures comes off
    assert arms["E"].tokens > arms["R"].tokens  # and the larger shapes on the way
    charged = [c for c in results.ledgers["B"].charges if c.kind == "training"]
    assert len(charged) == 4  # a shape each, the first cut before the first step
    lines = [json.loads(line) for line in (directory / "arms" / "B-0" / "metrics.jsonl").read_text().splitlines()]
    cuts = [(line["tokens"], line["shapes"]) for line in lines if "shapes" in line] + [(lines[-1]["tokens"], {})]
    by_hand = 0.0
    for (begin, shapes), (end, _) in pairwise(cuts):
        layers = shapes["layers"].values()
        heads = sum(layer["num_attention_heads"] + layer["num_key_value_heads"] for layer in layers)
        matrices = 32 * (8 * 2 * heads + 3 * sum(layer["intermediate_size"] for layer in layers) + 300)
        attention = 4 * 32 * 8 * sum(layer["num_attention_heads"] for layer in layers)
        by_hand += (end - begin) * 3 * (2 * matrices + attention)
    assert sum(c.flops for c in charged) == pytest.approx(by_hand, rel=1e-12)
    cut = results.arms["cut"]
    assert cut.parameters == results.arms["B"].parameters < results.arms["parent"].parameters
    assert cut.measures["bits_per_byte.pool"].mean > results.arms["B"].measures["bits_per_byte.pool"].mean


def test_masks_that_grow_are_charged_as_dense(tiny_run: str, directory: Path) -> None:
    schedule = {"kind": "gradual_magnitude", "ratio": 0.5, "events": 4}
    results = compared(tiny_run, directory, steps=[], schedules=[schedule], arms=["A", "B"], keep=["B"])
    check_spending(results)
    a, b = results.plan.lines
    assert a.tokens == b.tokens  # B costs what the dense model does
    assert b.warnings == ("masks save no FLOPs: charged as dense",)
    assert "masks save no FLOPs" in Path(results.page).read_text()
    assert results.arms["B"].zeros == results.arms["cut"].zeros > 0.3
    assert results.arms["A"].zeros == results.arms["parent"].zeros == 0
    place = directory / "arms" / "B-0" / "model"
    model, masks = folder.load(place)[0], folder.masks(place)
    assert masks
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any()


def test_a_trimmed_vocabulary_and_masks_that_were_there_before(tiny_run: str, directory: Path) -> None:
    steps = [{"kind": "vocab", "coverage": 0.8}, {"method": "wanda", "ratio": 0.5}]
    arms = ["A", "B", "D", "E", "R"]
    results = compared(tiny_run, directory, steps=steps, arms=arms, keep=["B", "E", "R"])
    check_spending(results)
    kept = {name: directory / "arms" / f"{name}-0" / "model" for name in ("B", "E", "R")}
    dense = folder.load(next(directory.glob("parent/*")))
    models = {name: folder.load(place) for name, place in kept.items()}
    (_, whole), sizes = dense, {len(tokenizer) for _, tokenizer in models.values()}
    assert len(sizes) == 1
    assert sizes < {len(whole)} or max(sizes) < len(whole)
    assert ModelShape.of(models["B"][0]).forward(32) < ModelShape.of(dense[0]).forward(32)
    masks = {name: folder.masks(place) for name, place in kept.items()}
    assert all(masks["B"][name].equal(mask) for name, mask in masks["E"].items())  # the same mask, other weights
    assert {n: int(m.sum()) for n, m in masks["R"].items()} == {n: int(m.sum()) for n, m in masks["B"].items()}
    assert not all(masks["B"][name].equal(mask) for name, mask in masks["R"].items())
    assert results.ledgers["E"].spent("full") > results.ledgers["E"].spent()  # its mask comes from the parent
    assert {c.kind for c in results.ledgers["E"].charges} == {"importance", "training", "pretraining"}
    assert results.arms["B"].kl is None  # other tokens; bytes compare
    assert results.arms["A"].kl is not None
    language = {name: arm.measures["bits_per_byte.pool"].mean for name, arm in results.arms.items()}
    assert language["B"] < language["R"] < language["E"]
    counted = pq.read_table(directory / "students" / "counted.parquet")["text"]
    held = pq.read_table(directory / "held_out" / "00.parquet")["text"].to_pylist()
    assert not set(counted.to_pylist()) & set(held)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of eight experts a layer, two for a token, trained on the corpus's language."""
    from tests.compress.test_experts import make

    texts, place = sentences(300), tmp_path_factory.mktemp("mixture")
    tokenizer, model = train_tokenizer(texts, 300), make("qwen3_moe", vocab_size=300)
    train_lm(model, pack([e.ids for e in tokenizer.encode_batch(texts)], 32, 0), 100, 8, 5e-3, 0)
    save_lm(model, tokenizer, place)
    return place


@pytest.mark.parametrize(
    "step",
    [{"method": "reap", "ratio": 0.5, "least": 1}, {"method": "stun", "ratio": 0.5, "experts": 0.25, "least": 1}],
)
def test_mixtures_of_experts(tiny_run: str, mixture: Path, tmp_path: Path, step: dict[str, Any]) -> None:
    arms = ["A", "B", "E", "R"]
    results = compared(tiny_run, tmp_path, model=str(mixture), steps=[step], arms=arms, keep=arms[1:])
    check_spending(results)
    left = 4 if step["method"] == "reap" else 6
    for name in arms[1:]:
        model, _ = folder.load(tmp_path / "arms" / f"{name}-0" / "model")
        assert model.config.num_experts == left
        assert results.arms[name].parameters == results.arms["cut"].parameters < results.arms["A"].parameters
        if step["method"] == "stun":
            assert results.arms[name].zeros == pytest.approx(results.arms["cut"].zeros, abs=1e-6)
    language = {name: arm.measures["bits_per_byte.pool"].mean for name, arm in results.arms.items()}
    assert language["B"] < language["cut"]
    assert language["B"] < language["E"]  # new weights have learnt little by now


def test_zeros_with_factors_of_low_rank_beside_them(tiny_run: str, directory: Path) -> None:
    steps, arms = [{"method": "slim", "ratio": 0.5}], ["A", "B", "R"]
    results = compared(tiny_run, directory, steps=steps, arms=arms, keep=["B"])
    check_spending(results)
    lines = {line.arm.name: line for line in results.plan.lines}
    assert lines["B"].tokens < lines["A"].tokens  # factors are more to multiply, and what Wanda measures comes off
    assert results.arms["B"].parameters > results.arms["A"].parameters
    names = [n for n, _ in folder.load(directory / "arms" / "B-0" / "model")[0].named_parameters()]
    assert any(name.endswith(".left") for name in names)
    language = {name: arm.measures["bits_per_byte.pool"].mean for name, arm in results.arms.items()}
    assert language["B"] < language["cut"]


def test_conversations_are_compared_by_their_responses(tmp_path: Path) -> None:
    parent, directory, place = answering(tmp_path / "parent"), tmp_path / "compare", tmp_path / "chat"
    place.mkdir()
    run = make_chat_run(place, str(parent))
    steps = [{"kind": "vocab", "coverage": 0.95, "tokenizer": str(parent)}, {"method": "llm_pruner", "ratio": 0.5}]
    asked = {
        "steps": steps,
        "arms": ["A", "B", "C", "D"],
        "keep": ["C"],
        "evaluate": {"items": 16, "made": ["retrieval"]},
    }
    results = compared(run, directory, model=str(parent), **asked)
    check_spending(results)
    domains = {name.partition(".")[2] for name in results.arms["C"].measures if name.startswith("bits_per_byte.")}
    assert domains == {"curated", "pool", "pool, first", "pool, second"}
    language = {name: arm.measures["bits_per_byte.pool"].mean for name, arm in results.arms.items()}
    assert max(language["B"], language["C"], language["D"]) < language["cut"]
    for data in ("curated", "random"):
        blocks = np.load(directory / "blocks" / f"{data}-0.npy", allow_pickle=False)
        assert 0.2 < (blocks >= 0).mean() < 0.8  # prompts are read
    pool = Suite(domains={"pool": (str(directory / "held_out" / "01.parquet"),)}, conversations=("pool",), items=16)
    again = bits_per_byte(*folder.load(parent), pool.documents("pool"), "pool")[0]
    assert again.mean == pytest.approx(language["parent"], rel=1e-5)
    assert {START, END} <= set(folder.load(directory / "arms" / "C-0" / "model")[1].get_vocab())


def test_own_parent_chosen_arms_and_seeds_from_the_command_line(tiny_run: str, tmp_path: Path) -> None:
    parent = trained(tmp_path / "parent", sentences(200), Shape(**SHAPE))
    own = {"model": str(parent), "arms": ["B", "C"], "keep": ["C"], "latency": None, "tokens": 3840}
    asked = described(tiny_run, tmp_path / "out", **own) | {"evaluate": {"items": 4, "made": ["retrieval"]}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(asked))
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "c.yaml"), "--set", "seeds=3", "--quiet"])
    assert done.exit_code == 0, done.output
    assert re.search(r"^B +cut, random data", done.output, re.MULTILINE)
    assert not re.search(r"^[ADEFR] ", done.output, re.MULTILINE)
    assert "data, cut (C - B)" in done.output
    assert "interaction" not in done.output
    found = json.loads((tmp_path / "out" / "compare" / "matched.json").read_text())
    assert list(found["arms"]) == ["parent", "cut", "B", "C"]
    assert len(found["arms"]["C"]["measures"]["bits_per_byte.pool"]["seeds"]) == 3
    assert {e["about"] for e in found["effects"]} == {"data, cut"}
    assert not (tmp_path / "out" / "parent").exists()  # it is read where it is
    assert len(list((tmp_path / "out" / "arms").glob("C-*/model"))) == 3


@pytest.mark.parametrize("command", ["compress", "compare"])
def test_a_hub_that_cannot_be_reached_is_told_before_work_starts(tiny_run: str, tmp_path: Path, command: str) -> None:
    asked = {"model": "hf://org/name", "steps": [{"method": "flap", "ratio": 0.2}], "tokens": 6400, "run": "out"}
    asked |= {"data": tiny_run} if command == "compress" else {"curated": tiny_run}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(asked))
    told = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", command, "c.yaml"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert told.returncode == 1
    assert "Traceback" not in told.stderr
    assert "tamis: cannot fetch hf://org/name" in told.stderr
    assert "HF_HUB_OFFLINE" in told.stderr
    assert "give its folder as `model`" in told.stderr
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
