from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.compare.learners._tokens import Kept
from pipeline.compare.learners.language import Language
from pipeline.compare.proxy import compare_proxy, settings
from pipeline.compare.verdict import interval, judge
from pipeline.config import parse
from pipeline.curation import curate
from pipeline.engine.pool import InlinePool
from pipeline.errors import ConfigError

pytest.importorskip("torch")

WORDS = {
    "good": ["river", "stone", "lamp", "winter", "paper", "ladder", "green", "quiet"],
    "noise": ["qx", "zzv", "kkp", "wvx", "jq", "ppz", "xkk", "vvb"],
}


def documents(kind: str, rows: int, rng: np.random.Generator) -> list[str]:
    """Texts in which every word of a kind is followed by the next of its list, so that there is something to learn."""
    words = WORDS[kind]
    if kind == "noise":
        return [" ".join(rng.choice(words, 30)) for _ in range(rows)]
    return [" ".join(words[(s + i) % 8] for i in range(30)) for s in rng.integers(0, 8, rows)]


@pytest.fixture
def corpus(tmp_path: Path) -> dict[str, Any]:
    """120 good rows and 280 of noise, good ones marked by a longer text; a target of good texts."""
    rng = np.random.default_rng(0)
    texts = [f"{t} {i}" for i, t in enumerate([*documents("good", 120, rng), *documents("noise", 280, rng)])]
    order = rng.permutation(len(texts))
    pq.write_table(pa.table({"text": [texts[i] for i in order]}), tmp_path / "corpus.parquet", row_group_size=50)
    pq.write_table(pa.table({"text": documents("good", 30, rng)}), tmp_path / "target.parquet")
    return {
        "corpus": {"path": str(tmp_path / "corpus.parquet")},
        "scores": [
            {"kind": "length", "unit": "bytes"},
            {"kind": "length", "name": "short", "prefer": "short"},
            "random",
        ],
        "select": {"budget": {"fraction": 0.5}},
        "engine": {"address": "inline"},
        "run": str(tmp_path / "run"),
    }


SMALL = {
    "at": (0.2,),
    "seeds": 2,
    "steps": 4,
    "batch": 4,
    "lr": 1e-2,
    "held_out": 0.1,
    "eval_tokens": 512,
    "shape": {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 32, "vocab": 300, "context": 32},
}


def run_proxy(corpus: dict[str, Any], tmp_path: Path, **changes: Any) -> Any:
    learner = Language.model_validate(SMALL | {"target": str(tmp_path / "target.parquet")} | changes)
    return compare_proxy(parse(corpus), learner, InlinePool, quiet=True)


def test_the_selection_that_is_like_the_target_wins_and_the_one_that_is_not_loses(
    corpus: dict[str, Any], tmp_path: Path
) -> None:
    done = run_proxy(corpus, tmp_path, seeds=3, steps=12)
    lines = {line.arm: line for line in done.lines}
    assert list(lines) == ["random", "length", "short"]  # a random score of the configuration is no criterion
    assert lines["random"].verdict == "baseline"
    assert lines["length"].verdict == "better"
    assert lines["short"].verdict == "worse"
    assert lines["length"].target is not None
    assert lines["length"].target.mean < lines["random"].target.mean < lines["short"].target.mean
    assert lines["random"].cost == 0
    assert lines["length"].cost is not None

    report = json.loads(Path(done.json).read_text())
    assert report["proxy"]["steps"] == 12
    trained = {(t["arm"], t["seed"]): t["steps"] for t in report["trainings"]}
    assert len(trained) == 3 * 4  # three arms and random trained longer, three seeds each
    assert {steps for (arm, _), steps in trained.items() if arm != "random-x2"} == {12}
    assert trained["random-x2", 0] == 24
    page = Path(done.markdown).read_text()
    assert "1,536 tokens for every arm" in page  # 12 steps of 4 blocks of 32 tokens
    assert page.count("\n| ") == 2 + 3


def test_every_arm_keeps_the_same_budget_and_no_row_that_is_measured_on(corpus: dict[str, Any], tmp_path: Path) -> None:
    target = pq.read_table(tmp_path / "target.parquet")
    rows = pq.read_table(tmp_path / "corpus.parquet")
    pq.write_table(pa.concat_tables([rows, target]), tmp_path / "corpus.parquet", row_group_size=50)
    done = run_proxy(corpus, tmp_path)
    assert [line.rows > 0 for line in done.lines] == [True] * 3

    columns = tmp_path / "run" / "columns"
    held = pq.read_table(columns / "proxy-held-out")["score"].to_numpy()
    distinct = len(set(target["text"].to_pylist()))
    assert (held == -1).sum() == len(target) >= distinct
    assert 0 < (held == 0).sum() < 0.2 * len(held)
    keep = pq.read_table(columns / "select")["keep"].to_numpy(zero_copy_only=False)
    assert not keep[held != 1].any()
    size = pq.read_table(columns / "row")["tokens"].to_numpy()
    budget = int(0.2 * size[held == 1].sum())
    assert budget - size.max() < size[keep].sum() <= budget


def test_a_second_call_trains_nothing_and_says_the_same(corpus: dict[str, Any], tmp_path: Path) -> None:
    corpus |= {"scores": ["length"]}
    first = run_proxy(corpus, tmp_path)
    files = sorted((tmp_path / "run" / "artifacts").glob("proxy-*/result.json"))
    before = [f.stat().st_mtime_ns for f in files]
    assert len(files) == 6
    again = run_proxy(corpus, tmp_path)
    assert [f.stat().st_mtime_ns for f in files] == before
    assert again == first  # costs too: they are those of the first time
    more = run_proxy(corpus, tmp_path, steps=5)
    assert [f.stat().st_mtime_ns for f in files] != before
    assert more.lines[0].target != first.lines[0].target


def test_scores_that_were_there_before_have_no_cost(corpus: dict[str, Any], tmp_path: Path) -> None:
    corpus |= {"scores": ["length"]}
    curate(parse(corpus), quiet=True)
    line = run_proxy(corpus, tmp_path).lines[1]
    assert (line.arm, line.cost) == ("length", None)


def test_without_a_target_the_mix_decides(corpus: dict[str, Any], tmp_path: Path) -> None:
    done = run_proxy(corpus | {"scores": ["length"]}, tmp_path, target=None, at=(0.2, 0.4))
    assert [(line.arm, line.at) for line in done.lines] == [
        (arm, at) for at in (0.2, 0.4) for arm in ("random", "length")
    ]
    assert all(line.target is None for line in done.lines)
    assert "No target" in done.setting


def test_a_criterion_that_reads_another_finds_it(corpus: dict[str, Any], tmp_path: Path) -> None:
    longest = {"kind": "exact_duplicates", "keep": "best", "by": "length"}
    done = run_proxy(corpus | {"scores": ["length", longest]}, tmp_path)
    assert [line.arm for line in done.lines] == ["random", "length", "exact_duplicates"]
    assert all(line.cost is not None for line in done.lines)


@pytest.mark.parametrize(
    ("scores", "changes", "says"),
    [
        (["random"], {}, "nothing to compare"),
        ([{"kind": "length", "name": "random"}], {}, "another `name`"),
        (["length"], {"at": (1e-6,)}, "less than one token"),
        (["length"], {"target": "nowhere.parquet"}, "target: no such file"),
        (["length"], {"held_out": 1e-9}, "raise the share"),
    ],
)
def test_errors_before_anything_is_trained(
    corpus: dict[str, Any], tmp_path: Path, scores: list[Any], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        run_proxy(corpus | {"scores": scores}, tmp_path, **changes)
    assert not list((tmp_path / "run").glob("artifacts/proxy-*/result.json"))


def test_settings_of_the_command_line(corpus: dict[str, Any]) -> None:
    texts = parse(corpus)
    found = settings(texts, ["shape.layers=2", "steps=7"], target=["a.txt"], at=[0.5], seeds=None)
    assert isinstance(found, Language)
    assert (found.steps, found.shape.layers, found.shape.hidden, found.at, found.seeds) == (7, 2, 192, (0.5,), 3)
    for wrong, says in (("steps", "key=value"), ("steps.x=1", "key=value"), ("stepz=1", "stepz"), ("seeds=1", "seeds")):
        with pytest.raises(ConfigError, match=says):
            settings(texts, [wrong])


def test_kept_tokens_are_those_with_the_smallest_hashes_whatever_the_batches() -> None:
    rng = np.random.default_rng(1)
    ids = [list(map(int, rng.integers(1, 99, n))) for n in rng.integers(1, 9, 200)]
    keys = pa.array([rng.bytes(16) for _ in ids], pa.binary(16))
    batch = pa.record_batch(
        [pa.array(rng.random(200) < 0.7), keys, pa.array(ids, pa.list_(pa.int32()))],
        names=["select.keep", "row.key", "proxy-tokens.ids"],
    )
    kept = Kept("select.keep", 1, 100, seed=3)
    whole = kept.update({}, batch)
    parts = kept.merge([kept.update({}, batch.slice(i, 33)) for i in range(0, 200, 33)])
    for name in ("hash", "length", "ids", "rows"):
        np.testing.assert_array_equal(whole[name], parts[name])
    assert whole["length"].sum() >= 100 > whole["length"][:-1].sum()
    assert whole["rows"][0] == batch.column(0).true_count


def test_an_interval_is_students_t() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)  # t of 2 degrees, 0.975
    with pytest.raises(ValueError, match="two seeds"):
        interval([1.0])


LOSSES = {
    "random": {"mix": [4.0, 4.1, 4.2]},
    "random-x2": {"mix": [3.9, 4.0, 4.1]},  # twice the steps are worth 0.1 nats
    "good": {"mix": [3.95, 4.05, 4.151]},
    "best": {"mix": [3.0, 3.1, 3.201]},
    "bad": {"mix": [4.5, 4.6, 4.701]},
    "unclear": {"mix": [3.8, 4.3, 4.2]},
}


@pytest.mark.parametrize(
    ("arm", "verdict", "says"),
    [
        ("random", "baseline", "the baseline"),
        ("good", "better", "better, worth 1.41 times the compute: earns its cost where 49 times this training follows"),
        ("best", "better", "better, worth 2.00 times the compute or more: earns its cost where 20 times"),
        ("bad", "worse", "worse than random"),
        ("unclear", "no difference shown", "no difference shown"),
    ],
)
def test_the_verdict_follows_from_paired_differences(arm: str, verdict: str, says: str) -> None:
    line = judge(arm, 0.1, 10, 1.0, LOSSES, cost=200.0, seconds=10.0)
    assert line.verdict == verdict
    assert line.sentence().startswith(says)


def test_what_a_verdict_does_not_know_it_says() -> None:
    assert "what it cost is not known" in judge("good", 0.1, 10, 1.0, LOSSES, None, 10.0).sentence()
    assert judge("good", 0.1, 10, 1.0, LOSSES, 1.0, 10.0).sentence().endswith("earns its cost here")
    flat = LOSSES | {"random-x2": LOSSES["random"]}
    assert "its worth in compute is unknown" in judge("good", 0.1, 10, 1.0, flat, 1.0, 10.0).sentence()


def test_the_command(corpus: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps(corpus | {"scores": ["length"]}))
    asked = [f"--with=shape.{key}={value}" for key, value in SMALL["shape"].items()]
    asked += [f"--with={key}={SMALL[key]}" for key in ("batch", "lr", "held_out", "eval_tokens")]
    arguments = ["compare", "--proxy", str(file), "--target", str(tmp_path / "target.parquet"), "--at", "0.2"]
    done = CliRunner().invoke(app, [*arguments, "--seeds", "2", "--with", "steps=3", *asked, "--quiet"])
    assert done.exit_code == 0, done.output
    assert "384 tokens for every arm" in done.output  # 3 steps of 4 blocks of 32 tokens
    assert "the baseline" in done.output
