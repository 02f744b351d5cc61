"""PASER: its toys, the pieces it is made of, and a whole run on a pair of tiny models."""

from __future__ import annotations

import json
import shutil
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_lm import BIRDS, TINY, TREES, sentences, trained

from pipeline import curate
from pipeline.config import parse
from pipeline.errors import ConfigError
from pipeline.models.causal import load_causal
from pipeline.models.training import lm_loss, pack, train_lm
from pipeline.scores._divergence import between, jsd, kl
from pipeline.scores._keyphrases import english, key_phrases
from pipeline.scores._s2ric import s2ric
from pipeline.scores.paser import conflicts, efficiency, joined, quotients, shares
from pipeline.select.quotas import whole

LN2 = np.log(2)


def logs(*p: float) -> torch.Tensor:
    return torch.tensor([p]).log()


def test_divergence_of_two_coins() -> None:
    found = float(jsd(logs(0.5, 0.5), logs(0.9, 0.1)))
    assert found == pytest.approx(0.101749, abs=1e-6)
    assert found / LN2 == pytest.approx(0.146793, abs=1e-6)
    assert float(jsd(logs(0.9, 0.1), logs(0.5, 0.5))) == pytest.approx(found, abs=1e-7)
    assert float(jsd(logs(0.5, 0.5), logs(0.5, 0.5))) == 0
    assert float(jsd(logs(1, 0), logs(0, 1))) == pytest.approx(LN2)  # 0 ln 0 is 0


@given(st.integers(0, 10**6))
@settings(max_examples=20)
def test_divergence_is_symmetric_and_bounded(seed: int) -> None:
    torch.manual_seed(seed)
    p, q = (10 * torch.randn(2, 4, 50)).log_softmax(-1)
    assert torch.allclose(jsd(p, q), jsd(q, p), atol=1e-6)
    assert ((jsd(p, q) >= 0) & (jsd(p, q) <= LN2 + 1e-6)).all()
    assert (kl(p, q) >= -1e-6).all()


def test_efficiency() -> None:
    """The paper's logarithm has no guard: the same but for 1 / cost, and infinite at a cost of one."""
    np.testing.assert_allclose(0.101749 / np.log([20**2, 2000**2]), [0.016982, 0.006693], atol=1e-6)
    ours = efficiency(np.full(2, 0.101749), np.array([20**2, 2000**2]))
    np.testing.assert_allclose(ours, [0.016982, 0.006693], rtol=1e-3)
    with np.errstate(divide="ignore"):
        assert np.isinf(0.1 / np.log(1))
    assert np.isfinite(efficiency(np.array([0.1]), np.array([1])))


def test_budget_by_degradation() -> None:
    """The best B rows hold what the largest remainder gives, for B = 100 and, within one row, for any B."""
    share = shares(np.full(3, 500), np.array([0.335, 0.335, 0.23]))
    np.testing.assert_allclose(100 * share, [37.22, 37.22, 25.56], atol=0.005)
    assert np.floor(100 * share).sum() == 99
    capability = np.repeat(np.arange(3), 500)
    score = np.concatenate([quotients(np.zeros(500, bool), float(s)) for s in share])
    order = capability[np.argsort(-score, kind="stable")]
    assert np.bincount(order[:100]).tolist() == [37, 37, 26]
    nothing, everything = np.zeros(3, np.int64), np.full(3, 500)
    for budget in (*range(3, 200, 7), 1000):
        wanted = whole(budget * share, nothing, everything, budget)
        assert abs(np.bincount(order[:budget], minlength=3) - wanted).max() <= 1


def test_a_capability_that_runs_out_leaves_its_room() -> None:
    score = np.concatenate([quotients(np.zeros(n, bool), s) for n, s in ((10, 0.8), (100, 0.15), (100, 0.05))])
    best = np.repeat(np.arange(3), (10, 100, 100))[np.argsort(-score, kind="stable")][:50]
    assert np.bincount(best).tolist() == [10, 30, 10]


def test_what_is_turned_away_comes_last_in_its_order() -> None:
    away = np.array([False, True, False, True, False])
    score = quotients(away, 0.5)
    np.testing.assert_allclose(score, [1.0, -7.0, 1 / 3, -9.0, 0.2], rtol=1e-6)
    assert quotients(np.array([True]), 0.0)[0] < 0 < quotients(np.array([False]), 0.0)[0]


def test_shares_where_nothing_has_degraded_are_those_of_the_rows() -> None:
    np.testing.assert_allclose(shares(np.array([3, 0, 1]), np.zeros(3)), [0.75, 0, 0.25])


def test_conflicts() -> None:
    a, b, c, d, e = range(5)
    rows = [[a, b], [c, d], [a, c], [a, e], [a, b], [e, b], []]
    # {a, c}: both known, never together. {a, e}: e is new. {e, b}: e came with a, not with b.
    assert conflicts(rows).tolist() == [False, False, True, False, False, True, False]


@pytest.mark.parametrize("seed", range(4))
def test_two_blobs_are_two_capabilities(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.repeat([[1.0, 0, 0], [0, 1.0, 0]], 50, axis=0) + 0.05 * rng.standard_normal((100, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    label, error = s2ric(x.astype(np.float32), 2, seed)
    assert len(set(label[:50])) == len(set(label[50:])) == 1
    assert label[0] != label[50]
    assert error < 0.1


def test_clusters_of_copies_and_of_few_vectors() -> None:
    x = np.repeat(np.eye(3, dtype=np.float32), 5, axis=0)
    label, _ = s2ric(x, 10, 0)
    assert len(set(label)) == 3
    assert (label.reshape(3, 5) == label.reshape(3, 5)[:, :1]).all()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 4)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    twice, _ = s2ric(np.concatenate([x, x]), 3, 0)
    np.testing.assert_array_equal(twice[:60], twice[60:])
    np.testing.assert_array_equal(twice[:60], s2ric(x, 3, 0)[0])


def phrases(text: str, most: int = 16) -> list[int]:
    return list(key_phrases(pa.array([text]), english(), most)[0].as_py())


def one(phrase: str) -> int:
    (digest,) = phrases(phrase)
    return digest


def test_key_phrases_are_rakes() -> None:
    """The abstract of Rose et al. 2010, section 1.2.1: the longest runs of content words come first."""
    text = "Compatibility of systems of linear constraints over the set of natural numbers. Criteria of compatibility."
    # linear constraints and natural numbers score 2 + 2; compatibility, systems, set and criteria 1
    found = phrases(text)
    assert found == [one("linear constraints"), one("natural numbers"), one("compatibility")]  # a third of 8 words
    assert phrases(text, 2) == found[:2]
    assert phrases("Linear CONSTRAINTS")[0] == one("linear constraints")


def test_key_phrases_of_nothing_and_across_texts() -> None:
    texts = pa.array(["", "the of and", "12 34", "neural networks, it's neural networks", "x\ny", "neural networks"])
    found = key_phrases(texts, english(), 5).to_pylist()
    assert found[:3] == [[], [], []]
    assert found[3] == found[5] == [one("neural networks")]
    assert found[4] == [one("x")]  # a line end parts phrases; a third of two words is one


@given(st.lists(st.text(max_size=60), min_size=1, max_size=8))
@settings(max_examples=40)
def test_key_phrases_do_not_depend_on_the_texts_beside(texts: list[str]) -> None:
    clean = [t.encode(errors="ignore").decode() for t in texts]
    together = key_phrases(pa.array(clean, pa.string()), english(), 3).to_pylist()
    assert together == [phrases(t, 3) for t in clean]


def test_prompts_and_texts_are_joined_and_cut() -> None:
    head, bounds = np.array([1, 2, 3, 4, 5]), np.array([0, 2, 2, 5])
    ids, offsets = np.array([10, 11, 12, 20, 30]), np.array([0, 3, 4, 5])
    out, ends, begin = joined(head, bounds, ids, offsets, 3)
    assert [out[a:b].tolist() for a, b in pairwise(ends)] == [[1, 2, 10], [20], [3, 4, 5]]
    assert begin.tolist() == [2, 1, 3]  # the last row's prompt fills all: nothing of its text is predicted


def maimed(folder: Path, steps: int) -> tuple[Path, Path]:
    """A model of trees and birds, and the same with the embeddings of what only birds are made of destroyed."""
    whole = trained(folder / "original", sentences(300) + sentences(300, 1, BIRDS), steps=steps)
    model, tokenizer = load_causal(whole)
    birds, trees = ({i for word in words for i in tokenizer(" " + word)["input_ids"]} for words in (BIRDS, TREES))
    with torch.no_grad():
        model.model.embed_tokens.weight[torch.tensor(sorted(birds - trees))] = 0
    model.save_pretrained(folder / "pruned")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(whole / file, folder / "pruned" / file)
    return whole, folder / "pruned"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return maimed(tmp_path_factory.mktemp("models"), 120)


def test_divergence_between_models_is_that_of_whole_distributions(models: tuple[Path, Path]) -> None:
    (p, tokenizer), (q, _) = map(load_causal, models)
    rows = [tokenizer(t)["input_ids"][:60] for t in sentences(5, 7, BIRDS)]
    ids, offsets = np.concatenate(rows), np.append(0, np.cumsum([len(r) for r in rows]))
    found, lost = between(p, q, ids, offsets, jsd)
    assert not lost.any()
    for row, start in zip(rows, offsets, strict=False):
        with torch.inference_mode():
            a, b = (m(torch.tensor([row])).logits[0].log_softmax(-1).numpy().astype(np.float64) for m in (p, q))
        m = np.log((np.exp(a) + np.exp(b)) / 2)
        expected = ((np.exp(a) * (a - m)).sum(-1) + (np.exp(b) * (b - m)).sum(-1)) / 2
        np.testing.assert_allclose(found[start + 1 : start + len(row)], expected[:-1], atol=1e-5)
        assert found[start] == 0
    same, _ = between(p, p, ids, offsets, jsd)
    assert abs(same).max() < 1e-7
    (whole_kl, _), (own_kl, _) = between(p, q, ids, offsets, kl), between(p, p, ids, offsets, kl)
    assert abs(own_kl).max() < 1e-7 < whole_kl.mean()


def test_a_cut_vocabulary_is_compared_on_what_both_have(models: tuple[Path, Path]) -> None:
    p, _ = load_causal(models[0])
    q, _ = load_causal(models[0])
    q.resize_token_embeddings(290)
    ids, offsets = np.arange(20, 40), np.array([0, 20])
    found, lost = between(p, q, ids, offsets, jsd)
    assert abs(found).max() < 1e-6  # renormalised, they are the same
    with torch.inference_mode():
        mass = p(torch.from_numpy(ids)[None]).logits[0].softmax(-1)[:, 290:].sum(-1).numpy()
    np.testing.assert_allclose(lost[1:], mass[:-1], atol=1e-5)


def corpus(directory: Path, rows: int = 200) -> Path:
    """Rows about trees and, every third, about birds; vectors tell them apart."""
    rng = np.random.default_rng(0)
    bird = np.arange(rows) % 3 == 0
    texts = [
        (birds if b else trees)
        for b, trees, birds in zip(bird, sentences(rows, 3), sentences(rows, 4, BIRDS), strict=True)
    ]
    vectors = np.where(bird[:, None], [1.0, 0, 0, 0], [0, 1.0, 0, 0]) + 0.1 * rng.standard_normal((rows, 4))
    table = {
        "text": texts,
        "vector": list(vectors.astype(np.float32)),
        "bird": bird,
        "prompt": [t[:20] for t in sentences(rows, 5)],
    }
    (directory / "corpus").mkdir()
    for half in (0, 1):
        part = pa.table(table).slice(half * rows // 2, rows // 2)
        pq.write_table(part, directory / "corpus" / f"{half}.parquet", row_group_size=40)
    return directory / "corpus"


def configuration(place: Path, run: Path, models: tuple[Path, Path], **fields: Any) -> dict[str, Any]:
    paser = {"kind": "paser", "original": str(models[0]), "pruned": str(models[1]), "capabilities": 2, "sample": 100}
    return {
        "corpus": {"path": str(place), "shard_mb": 1e-6},
        "embed": {"kind": "precomputed", "column": "vector"},
        "scores": [paser | fields],
        "select": {"budget": {"rows": 60}},
        "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
        "engine": {"address": "inline"},
        "run": str(run),
    }


def column(run: Path, name: str) -> pl.DataFrame:
    return pl.read_parquet(run / f"columns/{name}/*.parquet")


def test_the_budget_goes_to_what_the_pruned_model_forgot(tmp_path: Path, models: tuple[Path, Path]) -> None:
    place = corpus(tmp_path)
    result = curate(parse(configuration(place, tmp_path / "run", models, phrases=0)), quiet=True)
    kept = pl.concat([pl.read_parquet(f) for f in sorted(Path(result.path).glob("*.parquet"))])
    assert result.rows_kept == 60
    assert kept["bird"].mean() > 0.6  # a third of the corpus
    rows = column(tmp_path / "run", "paser")
    bird = pl.read_parquet(place / "*.parquet")["bird"]
    by = (
        rows.with_columns(bird=bird)
        .group_by("capability")
        .agg(pl.col("bird").n_unique(), pl.len(), pl.col("jsd").mean())
    )
    assert by["bird"].to_list() == [1, 1]  # a capability is one of the two
    table = json.loads((tmp_path / "run/artifacts/paser-degradation/degradation.json").read_text())
    assert sorted(table["rows"]) == sorted(by["len"].to_list())
    np.testing.assert_allclose(sorted(table["cds"]), sorted(by["jsd"].to_list()), rtol=1e-5)
    assert sum(table["share"]) == pytest.approx(1)
    for (k,), of_k in rows.group_by("capability"):
        in_order = of_k.sort("score", descending=True)
        ies = efficiency(in_order["jsd"].to_numpy(), in_order["cost"].to_numpy())
        assert (np.diff(ies) <= 1e-9).all()
        expected = table["share"][k] / (np.arange(of_k.height) + 0.5)
        np.testing.assert_allclose(in_order["score"], expected, rtol=1e-6)


@pytest.mark.slow
def test_what_it_chooses_heals_what_was_lost_and_spares_the_rest(tmp_path: Path) -> None:
    """Ten gentle steps on 60 rows. Three times as many at three times the rate make it forget trees, which random rows
    keep: the less of a skill is in the set, the gentler the recipe has to be."""
    models = maimed(tmp_path, 800)
    place = corpus(tmp_path, 400)
    result = curate(parse(configuration(place, tmp_path / "run", models, phrases=0)), quiet=True)
    chosen = pl.concat([pl.read_parquet(f) for f in sorted(Path(result.path).glob("*.parquet"))])
    assert chosen["bird"].mean() > 0.6
    loss = partial(healed, models[1])
    before = loss(None)
    ours = [loss(chosen, seed) for seed in range(3)]
    random = [loss(pl.read_parquet(place / "*.parquet").sample(60, seed=seed), seed) for seed in range(3)]
    (birds, trees), (random_birds, _) = np.mean(ours, axis=0), np.mean(random, axis=0)
    assert birds < random_birds - 0.3 < before[0] - 1
    assert trees < before[1] + 0.05
    assert healed(models[1], chosen, 0, steps=30, lr=3e-3)[1] > before[1] + 0.3


def healed(folder: Path, rows: pl.DataFrame | None, seed: int = 0, steps: int = 10, lr: float = 1e-3) -> list[float]:
    """Losses on birds and on trees held out, after training on some rows."""
    model, tokenizer = load_causal(folder)

    def blocks(texts: list[str]) -> np.ndarray:
        return pack([tokenizer(t)["input_ids"] for t in texts], TINY.context, 0)

    if rows is not None:
        train_lm(model, blocks(rows["text"].to_list()), steps, 4, lr, seed)
    return [lm_loss(model, blocks(sentences(60, 77, words))) for words in (BIRDS, TREES)]


def test_conflicts_come_last_and_a_floor_drops_them(tmp_path: Path, models: tuple[Path, Path]) -> None:
    place = corpus(tmp_path)
    stop = {"stop_words": ["alder", "crane"], "phrases": 3}
    config = configuration(place, tmp_path / "run", models, **stop)
    config["select"] |= {"budget": {"fraction": 1.0}, "floors": {"paser": 0}}
    result = curate(parse(config), quiet=True)
    rows = column(tmp_path / "run", "paser")
    away = rows["conflict"].to_numpy()
    assert 0 < away.sum() < 200
    assert ((rows["score"].to_numpy() < 0) == away).all()
    assert result.rows_kept == 200 - away.sum()


def test_shards_do_not_show_and_a_prompt_is_not_measured(tmp_path: Path, models: tuple[Path, Path]) -> None:
    place = corpus(tmp_path, 60)
    config = configuration(place, tmp_path / "run", models, prompt="prompt")
    curate(parse(config), quiet=True)
    config |= {"run": str(tmp_path / "whole"), "corpus": {"path": str(place)}}
    curate(parse(config), quiet=True)
    split, whole_ = column(tmp_path / "run", "paser"), column(tmp_path / "whole", "paser")
    assert split.drop("jsd", "score").equals(whole_.drop("jsd", "score"))
    np.testing.assert_allclose(split["jsd"], whole_["jsd"], atol=1e-6)
    config |= {"run": str(tmp_path / "alone")}
    del config["scores"][0]["prompt"]
    curate(parse(config), quiet=True)
    alone = column(tmp_path / "alone", "paser")
    assert (split["cost"].to_numpy() >= alone["cost"].to_numpy()).all()
    assert not np.allclose(split["jsd"], alone["jsd"], atol=1e-4)


def test_rows_that_cannot_be_measured_say_why(tmp_path: Path, models: tuple[Path, Path]) -> None:
    table = pl.DataFrame(
        {
            "text": ["elm fir oak", "x", "oak elm", "fir fir oak", "elm oak"],
            "vector": [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.5], [0.2, 1.0]],
            "prompt": [b"elm", b"", b"elm " * 60, None, b"\xff\xfe"],
        }
    )
    (tmp_path / "corpus").mkdir()
    table.write_parquet(tmp_path / "corpus/a.parquet")
    config = configuration(tmp_path / "corpus", tmp_path / "run", models, prompt="prompt", max_tokens=16)
    config["engine"]["max_bad_fraction"] = 1.0
    config["select"]["budget"] = {"fraction": 1.0}
    assert curate(parse(config), quiet=True).rows_kept == 1
    folder = next(p for p in (tmp_path / "run/quarantine").iterdir() if p.name.startswith("jsd-"))
    said = pl.read_parquet(folder / "*.parquet").sort("shard_row")
    nothing = "no token of the text is predicted within 16 tokens"
    expected = [(1, nothing), (2, nothing), (3, "corpus.prompt is null"), (4, "prompt is not UTF-8")]
    assert list(zip(said["shard_row"], said["reason"], strict=True)) == expected


def test_two_equal_models_leave_shares_to_the_rows(tmp_path: Path, models: tuple[Path, Path]) -> None:
    place = corpus(tmp_path, 60)
    curate(parse(configuration(place, tmp_path / "run", (models[0], models[0]))), quiet=True)
    table = json.loads((tmp_path / "run/artifacts/paser-degradation/degradation.json").read_text())
    np.testing.assert_allclose(table["share"], np.array(table["rows"]) / 60)


def test_models_of_two_tokenizers_are_refused(tmp_path: Path, models: tuple[Path, Path]) -> None:
    other = trained(tmp_path / "other", sentences(50, 2, BIRDS), TINY, steps=1)
    config = configuration(corpus(tmp_path, 60), tmp_path / "run", (models[0], other))
    with pytest.raises(ConfigError, match=r"the tokenizers of .* differ"):
        curate(parse(config), quiet=True)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": "no"}, "paser.prompt: the corpus has no column 'no'"),
        ({"prompt": "vector"}, "paser.prompt: column 'vector' is list.*not text"),
        ({"pruned": "nowhere"}, "there is no folder 'nowhere'"),
        ({"phrases": 0, "stop_words": ["a"]}, "switches the filter off"),
    ],
)
def test_errors_at_the_door(tmp_path: Path, models: tuple[Path, Path], fields: dict[str, Any], says: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=says):
        curate(parse(configuration(corpus(tmp_path, 60), tmp_path / "run", models, **fields)), quiet=True)
