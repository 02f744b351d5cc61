"""Verified quality: clean seeds beat noisy ones beat irrelevant ones, and the winner's classifier scores the corpus."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score

from pipeline.curation import curate
from pipeline.errors import TamisError
from pipeline.scores.verified_quality import VerifiedQuality, doubt

pytest.importorskip("torch")

SMALL = {
    "keep": 0.2,
    "share": 0.5,
    "anneal_steps": 10,
    "repeats": 1,
    "fasttext": {"dim": 8, "bucket": 20_000, "lr": 0.5},
    "prior": {
        "shape": {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 2, "mlp": 64, "vocab": 400, "context": 48},
        "steps": 50,
        "batch": 8,
        "sample": 400,
    },
}


def written(path: Path, texts: list[str]) -> str:
    pq.write_table(pa.table({"text": texts}), path)
    return str(path)


def run(directory: Path, corpus: Path, target: str, **fields: Any) -> dict[str, Any]:
    curate(
        {
            "corpus": {"path": str(corpus)},
            "scores": [{"kind": "verified_quality", "target": target, **SMALL, **fields}],
            "select": {"budget": {"fraction": 0.3}},
            "engine": {"address": "inline"},
            "run": str(directory),
        },
        quiet=True,
    )
    found: dict[str, Any] = json.loads((directory / "artifacts/verified_quality/verification.json").read_text())
    return found


@pytest.fixture(scope="module")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A corpus of encyclopaedia, medicine and novels; seeds that are clean, noisy and irrelevant for the first."""
    directory = tmp_path_factory.mktemp("real")
    table = ds.dataset(shared_data / "text_corpus/parts").to_table(columns=["text", "source"])
    kinds = np.array(table["source"].to_pylist())

    def texts(source: str, start: int, end: int | None) -> list[str]:
        rows = np.flatnonzero(kinds == source)[start:end]
        return [t[:1000] for t in table["text"].take(pa.array(rows)).to_pylist()]

    (directory / "corpus").mkdir()
    sources = ("wikipedia_passage", "nih_web", "book")
    written(directory / "corpus/p.parquet", [t for s in sources for t in texts(s, 0, 300)])
    clean, irrelevant = texts("wikipedia_passage", 300, 500), texts("book", 300, 500)
    pools = {"clean": clean, "noisy": clean[:100] + irrelevant[:100], "irrelevant": irrelevant}
    files = {name: {"positives": written(directory / f"{name}.parquet", seeds)} for name, seeds in pools.items()}
    target = written(directory / "target.parquet", texts("wikipedia_passage", -100, None))
    found = run(directory / "run", directory / "corpus", target, pools=files, sample=450)
    return {"found": found, "directory": directory, "is_wiki": np.arange(900) < 300, "pools": files, "target": target}


def test_pools_rank_clean_noisy_irrelevant_at_a_fifth_of_the_cost_of_a_model(real: dict[str, Any]) -> None:
    found = real["found"]
    by_name = {line["pool"]: line for line in found["pools"]}
    assert by_name["clean"]["loss"] < by_name["noisy"]["loss"] < by_name["irrelevant"]["loss"]
    assert (found["kept"], found["better_than_usual"]) == ("clean", True)
    assert "Beware" not in (real["directory"] / "run/README.md").read_text()
    assert by_name["clean"]["gain"] == pytest.approx(found["usual"]["loss"] - by_name["clean"]["loss"])
    assert by_name["clean"]["gain_error"] is None  # one repeat
    assert 5 * found["steps"]["anneal"] <= found["steps"]["prior"]


def test_the_winners_classifier_scores_the_corpus(real: dict[str, Any]) -> None:
    score = ds.dataset(real["directory"] / "run/columns/verified_quality").to_table()["score"].to_numpy()
    assert ((score >= 0) & (score <= 1)).all()
    assert roc_auc_score(real["is_wiki"], score) > 0.85
    artifact = real["directory"] / "run/artifacts/verified_quality"
    assert {f.name for f in artifact.iterdir()} == {"artifact.json", "model.bin", "model.json", "verification.json"}


def test_a_second_round_refines_the_winner_and_repeats_give_an_error(real: dict[str, Any], tmp_path: Path) -> None:
    pools = {"clean": real["pools"]["clean"]}
    more = {"pools": pools, "sample": 450, "rounds": 2, "repeats": 2, "anneal_steps": 3, "target_blocks": 20}
    found = run(tmp_path, real["directory"] / "corpus", real["target"], **more)
    assert found["target_blocks"] == 20
    assert [line["pool"] for line in found["pools"]] == ["clean", "clean refined in round 2"]
    first, second = found["pools"]
    assert second["trained_on"]["positives"] > first["trained_on"]["positives"]
    assert found["kept"] == min(found["pools"], key=lambda line: line["loss"])["pool"]
    gains = np.array(found["usual"]["losses"]) - first["losses"]
    assert first["gain_error"] == pytest.approx(gains.std(ddof=1) / np.sqrt(2))


def test_seeds_themselves_may_be_verified_and_none_better_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "corpus").mkdir()
    rng = np.random.default_rng(0)
    rows = [" ".join(rng.choice(["plain", "words", "of", "every", "day"], 20)) for _ in range(120)]
    written(tmp_path / "corpus/p.parquet", rows)
    target = written(tmp_path / "target.parquet", rows[:5])
    pools = {"symbols": {"positives": written(tmp_path / "s.parquet", [f"#{i} $% ^&* @! {i}" * 8 for i in range(30)])}}
    with caplog.at_level(logging.WARNING):
        found = run(tmp_path / "run", tmp_path / "corpus", target, pools=pools, sample=60, verify="seeds", share=1.0)
    assert (found["kept"], found["better_than_usual"]) == ("symbols", False)
    said = (
        r"verified_quality: no pool taught the model more than the usual mix did, the best \(symbols\) -\d\.\d{4} nats"
    )
    assert re.search(said, caplog.text)
    assert re.search(f"## Beware\n\n- {said}", (tmp_path / "run/README.md").read_text())
    before = (tmp_path / "run/artifacts/verified_quality/artifact.json").stat().st_mtime_ns
    with pytest.raises(TamisError, match=f"{said}.*lift `require_better`"):
        run(
            tmp_path / "run",
            tmp_path / "corpus",
            target,
            pools=pools,
            sample=60,
            verify="seeds",
            share=1.0,
            require_better=True,
        )
    after = (tmp_path / "run/artifacts/verified_quality/artifact.json").stat().st_mtime_ns
    assert before == after  # the verification is not made again
    assert "verified_quality.target: 5 rows of the corpus are target texts" in caplog.text


@pytest.mark.parametrize(("gain", "error", "says"), [(0.2, 0.05, ""), (0.2, None, ""), (0.2, 0.15, "may be chance")])
def test_a_gain_within_its_error_is_doubted(gain: float, error: float | None, says: str) -> None:
    pools = [{"pool": "a", "gain": gain, "gain_error": error}]
    found = doubt("verified_quality", {"kept": "a", "better_than_usual": True, "pools": pools})
    assert says in found
    assert bool(says) == bool(found)


def test_a_pool_with_one_class_is_named(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    written(tmp_path / "corpus/p.parquet", [f"row {i} of some text" for i in range(30)])
    same = written(tmp_path / "same.parquet", ["one and the same text"])
    pools = {"odd": {"positives": same, "negatives": same}}
    fields = {"pools": pools, "sample": 15, "anneal_steps": 1, "prior": SMALL["prior"] | {"steps": 1}}
    with pytest.raises(TamisError, match=r"verified_quality\.pools\.odd: quality: nothing to tell apart"):
        run(tmp_path / "run", tmp_path / "corpus", same, **fields)


def test_errors_at_the_door(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="pools"):
        VerifiedQuality.model_validate({"pools": {}, "target": "t.txt"})
    with pytest.raises(ValidationError, match="String should match pattern"):
        VerifiedQuality.model_validate({"pools": {"../x": {"positives": "a.txt"}}, "target": "t.txt"})
    (tmp_path / "corpus").mkdir()
    written(tmp_path / "corpus/p.parquet", ["a", "b"])
    with pytest.raises(TamisError, match=r"verified_quality\.pools\.a\.positives: no such file: nowhere\.txt"):
        run(tmp_path / "run", tmp_path / "corpus", "t.txt", pools={"a": {"positives": "nowhere.txt"}}, sample=10)
