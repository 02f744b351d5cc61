"""The command line as people type it: real processes, exit codes, messages instead of tracebacks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parent.parent
TAMIS = str(Path(sys.executable).with_name("tamis"))


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*arguments], capture_output=True, text=True, cwd=cwd, timeout=300, check=False)


@pytest.fixture
def config(tmp_path: Path, write_corpus: Callable[..., Path]) -> Path:
    corpus = write_corpus(files=3, rows=40)
    file = tmp_path / "job.yaml"
    file.write_text(
        f"corpus: {{path: {corpus}, id: id}}\nscores: [length, random]\nselect: {{budget: {{rows: 30}}}}\n"
        f"engine: {{address: inline}}\nrun: {tmp_path / 'run'}\n"
    )
    return file


def test_help_imports_nothing_heavy() -> None:
    heavy = "pyarrow ray faiss torch polars"
    script = f"import sys, pipeline.cli; print([m for m in '{heavy}'.split() if m in sys.modules])"
    assert run(sys.executable, "-c", script).stdout.strip() == "[]"
    assert "curate" in run(TAMIS, "--help").stdout


def test_curate_show_status_plan(config: Path, tmp_path: Path) -> None:
    planned = run(TAMIS, "plan", str(config))
    assert planned.returncode == 0, planned.stderr
    assert not (tmp_path / "run").exists()

    done = run(TAMIS, "curate", str(config), "--set", "select.budget={rows: 25}")
    assert done.returncode == 0, done.stderr
    assert "25 of 120 rows" in done.stdout
    assert pq.read_table(tmp_path / "run" / "curated").num_rows == 25

    shown = run(TAMIS, "show", str(tmp_path / "run"), "--dropped", "--by", "length", "-n", "3")
    assert shown.returncode == 0, shown.stderr
    assert "below_threshold" in shown.stdout

    status = run(TAMIS, "status", str(tmp_path / "run"))
    assert status.returncode == 0, status.stderr
    assert "Done: 25 rows" in status.stdout


def test_a_mistake_is_one_message_and_exit_code_1(config: Path) -> None:
    config.write_text(config.read_text().replace("budget", "budgte"))
    failed = run(TAMIS, "curate", str(config))
    assert failed.returncode == 1
    assert f"{config}:3: select.budgte: unknown key; did you mean 'budget'?" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_mistake_shows_what_a_corpus_calls_its_columns_and_does_not_run_it(config: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"\x1b[31mred\x9b": ["a"]}), tmp_path / "hostile.parquet")
    failed = run(TAMIS, "curate", str(config), "--set", f"corpus.path={tmp_path / 'hostile.parquet'}")
    assert failed.returncode == 1
    assert "corpus.text: the corpus has no column 'text'; it has ␛[31mred\ufffd\n" in failed.stderr


def test_a_score_of_ones_own_lies_where_the_command_is_typed(config: Path, tmp_path: Path) -> None:
    (tmp_path / "my_scores.py").write_text(
        "import pyarrow as pa, pyarrow.compute as pc\n"
        "from pipeline.recipe import Column\n"
        "from pipeline.scores.base import Score\n"
        "FIELDS = pa.schema([('score', pa.float32())])\n"
        "class Bangs(Score):\n"
        "    kind: str = 'bangs'\n"
        "    def column(self, run):\n"
        "        return Column(self.column_name, ('text',), FIELDS, opened, self.identity())\n"
        "def opened():\n"
        "    def count(batch):\n"
        "        marks = pc.count_substring(batch.column('text'), '!')\n"
        "        return pa.record_batch([marks.cast(pa.float32())], schema=FIELDS)\n"
        "    return count\n"
    )
    config.write_text(config.read_text().replace("[length, random]", "[{kind: 'my_scores:Bangs'}]"))
    done = run(TAMIS, "curate", str(config), "-q", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "run" / "columns" / "bangs").num_rows == 120


def test_failed_shards_are_exit_code_2(config: Path, tmp_path: Path) -> None:
    victim = sorted((tmp_path / "corpus").glob("*.parquet"))[1]
    victim.write_bytes(victim.read_bytes()[:100])
    done = run(TAMIS, "curate", str(config), "-q")
    assert done.returncode == 2, done.stderr
    assert victim.name in done.stdout
    assert run(TAMIS, "status", str(tmp_path / "run")).returncode == 2


def test_the_schema_is_json() -> None:
    assert "corpus" in json.loads(run(TAMIS, "schema").stdout)["properties"]


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """A Ray head with its dashboard, as `ray start` makes it on a cluster."""
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    ray = str(Path(sys.executable).with_name("ray"))
    head = [ray, "start", "--head", f"--port={ports[0]}", f"--dashboard-port={ports[1]}", "--num-cpus=2"]
    head += ["--object-store-memory=100000000", "--block"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # as in an activated environment
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(head, env=os.environ | {"PATH": path}, start_new_session=True, **quiet)
    try:
        for _ in range(120):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", ports[1])) == 0:
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{ports[1]}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # this head alone: `ray stop` would take every Ray of the machine
        process.wait(60)


@pytest.mark.slow  # the head's job agent takes up to minutes to come up on a busy machine
def test_submit_follows_a_job_and_returns_its_code(config: Path, tmp_path: Path, dashboard: str) -> None:
    config.write_text(config.read_text().replace("engine: {address: inline}\n", ""))
    done = run(TAMIS, "submit", str(config), "--address", dashboard, "--run", str(tmp_path / "job-run"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "30 of 120 rows" in done.stdout
    assert pq.read_table(tmp_path / "job-run" / "curated").num_rows == 30

    failed = run(TAMIS, "submit", str(config), "--address", dashboard, "--set", "select.budget={rows: 1000}")
    assert failed.returncode == 1
    assert "more than the corpus has" in failed.stdout


def test_submit_refuses_what_would_mean_another_place(config: Path) -> None:
    refused = run(TAMIS, "submit", str(config), "--address", "http://127.0.0.1:1", "--run", "runs/here")
    assert refused.returncode == 1
    assert "is relative" in refused.stderr


def test_submit_says_when_nobody_answers(config: Path) -> None:
    refused = run(TAMIS, "submit", str(config), "--address", "http://127.0.0.1:1")
    assert refused.returncode == 1
    assert "cannot submit to http://127.0.0.1:1" in refused.stderr


def test_fit_makes_the_artifacts_of_a_score_and_scores_nothing(config: Path, tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("\n".join(f"word word {i}" for i in range(40)))
    small = "{kind: quality, positives: good.txt, dim: 4, bucket: 1000}"
    config.write_text(config.read_text().replace("[length, random]", f"[length, {small}]"))
    done = run(TAMIS, "fit", "quality", str(config), "--set", "seed=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    name, path = done.stdout.split()
    assert name == "quality"
    assert (Path(path) / "model.bin").is_file()
    assert not (tmp_path / "run" / "columns").exists()

    missing = run(TAMIS, "fit", "perplexity", str(config))
    assert missing.returncode == 1
    assert "none of kind 'perplexity'; it has length, quality" in missing.stderr
