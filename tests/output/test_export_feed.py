"""`tamis feed`, and what the commands make of a run directory, a file and options."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline.errors import ConfigError
from pipeline.output.commands import (
    asked,
    feed,
    make_export,
    make_order,
    make_packed,
    say_export,
    say_order,
    say_packed,
)
from pipeline.output.feeding import CuratedSet
from pipeline.output.order.base import StoredOrder
from tests.output.feeding_runs import curated, kept, opened, ordinals

ROOT = Path(__file__).parents[2]
INLINE = {"address": "inline"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return curated(tmp_path_factory.mktemp("feed"))


def fed(run: str, order: str | None = None, columns: list[str] | None = None, limit: int | None = None) -> list[dict]:
    sink = io.BytesIO()
    count = feed(run, order, columns, sink, limit)
    found = [json.loads(line) for line in sink.getvalue().splitlines()]
    assert len(found) == count
    return found


def test_rows_come_as_they_lie_or_in_an_order(run: str) -> None:
    make_order(asked(run, "order", "shuffled", ["seed=4"], engine=INLINE), quiet=True)
    with opened(run) as active:
        order = ordinals(active, StoredOrder.at(run, "shuffled", active.curated))
    lying = kept(run)["n"].to_pylist()
    assert [r["n"] for r in fed(run, None, ["n"])] == lying
    assert [r["n"] for r in fed(run, "shuffled", ["n", "text"])] == [lying[i] for i in order]
    assert set(fed(run, limit=3)[2]) == {"n", "text", "topic", "vector", "tamis"}
    assert len(fed(run, limit=3)) == 3


def test_a_reader_that_leaves_ends_it_without_a_word(tmp_path: Path) -> None:
    """More than a pipe holds, to a reader that takes one line."""
    import pyarrow as pa

    table = pa.table({"text": [f"{i} " + "word " * 400 for i in range(400)]})
    run = curated(tmp_path, table)
    code = f"from pipeline.output.commands import feed_command; feed_command({run!r}, None, None, None)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert "text" in json.loads(process.stdout.readline())
    process.stdout.close()
    assert process.wait(60) == 141  # as a program that SIGPIPE ended
    assert process.stderr.read() == b""
    process.stderr.close()


def test_what_is_not_there_is_named(run: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no order 'curriculum'"):
        fed(run, "curriculum")
    with pytest.raises(ConfigError, match="no column 'nothing'"):
        fed(run, columns=["nothing"])
    with pytest.raises(ConfigError, match="run `tamis curate` first"):
        fed(str(tmp_path / "nowhere"))


def test_a_file_says_what_is_fed_and_options_change_it(run: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "feed.yaml"
    order = {"kind": "curriculum", "by": "random", "stages": 4}
    export = {"kind": "jsonl", "columns": ["n"]}
    file.write_text(
        yaml.safe_dump({"run": run, "order": order, "export": export, "to": str(tmp_path / "out"), "engine": INLINE})
    )
    wanted = asked(str(file), "order", None, ["stages=2", "name=halves"])
    assert wanted.order is not None
    assert wanted.order.model_dump()["stages"] == 2
    described = make_order(wanted, quiet=True)
    say_order(described, wanted.run)
    written = make_export(asked(str(file), "export", None), quiet=True)
    say_export(written)
    assert written["order"] == "curriculum"
    assert written["rows"] == 200
    said = capsys.readouterr().out
    assert f"Order    {run}/order/halves" in said
    assert f"Exported {tmp_path / 'out'}" in said


def test_packing_says_what_it_cost(run: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"</s>": 0, "x": 1}, unk_token="x")).save(str(tmp_path / "tokenizer.json"))
    settings = [f"tokenizer={tmp_path}/tokenizer.json", "end=</s>", "length=7"]
    described = make_packed(asked(run, "pack", "concat", settings, engine=INLINE), quiet=True)
    say_packed(described, run)
    assert described["about"]["tokens"] == 400  # a word and an end a row
    used = 400 / sum(7 * -(-2 * f.rows // 7) for f in CuratedSet.at(run).files)
    assert f"utilisation {used:.2%}, cropped 0.00% of the tokens" in capsys.readouterr().out


def test_a_curations_file_names_its_run(run: str, tmp_path: Path) -> None:
    file = tmp_path / "curation.yaml"
    file.write_text(
        yaml.safe_dump({"corpus": {"path": "x"}, "scores": ["random"], "select": {"budget": {"rows": 1}}, "run": run})
    )
    assert asked(str(file), "order", "source").run == run


@pytest.mark.parametrize(
    ("settings", "kind", "why"),
    [
        (["k=3"], "shuffled", "order.k: unknown key"),
        (["k"], "in_context", "write key=value"),
        ([], "nothing", "unknown kind 'nothing'"),
        ([], None, "say which, such as --kind shuffled"),
    ],
)
def test_bad_options_say_what_to_change(run: str, settings: list[str], kind: str | None, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        make_order(asked(run, "order", kind, settings), quiet=True)


def test_the_published_configuration_runs_on_the_sample(tmp_path: Path) -> None:
    from pipeline.curation import curate

    changes = [
        f"corpus.path={ROOT}/examples/sample/part-0.parquet",
        "scores=[random]",
        "select={budget: {rows: 300}}",
        "cluster.k=6",
    ]
    run = curate(
        str(ROOT / "configs/quickstart.yaml"), [*changes, "engine.address=inline"], str(tmp_path / "run"), quiet=True
    )
    wanted = asked(str(ROOT / "configs/in_context.yaml"), "order", None, run=run.run, engine=INLINE)
    described = make_order(wanted, quiet=True)
    assert described["rows"] == 300
    assert described["about"]["regions"] == 6
    source = CuratedSet.at(run.run)
    order = StoredOrder.at(run.run, "in_context", source)
    assert sorted(np.concatenate([order.addresses(i)["row"].to_numpy() for i in range(len(order.parts))])) == list(
        range(300)
    )
    assert (tmp_path / "run" / "order" / "in_context" / "rows" / "part-00000.parquet").exists()
