"""The run directory: what is stale is computed again and nothing else; locks, artifacts, manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toys

from pipeline.artifact import Artifact
from pipeline.corpus.rows import row_column
from pipeline.corpus.storage import Store
from pipeline.engine.pool import Pool
from pipeline.errors import ConfigError, CorpusError, DiskFull, TamisError
from pipeline.recipe import Column, Resources
from pipeline.run import Run


def parts(run: Run, column: str) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(Path(run.store.path, "columns", column).iterdir())}


def computed(run: Run, *columns: Column) -> dict[str, int]:
    """Fill columns; how many parts of each had to be computed."""
    run.materialize(columns)
    return {c.name: run.manifest["columns"][c.name]["computed"] for c in columns}


def texts(run: Run) -> list[str]:
    """The rows of the live shards, in their order, as the engine sees them."""
    from pipeline.corpus.shards import read_source

    return [t for s in run.live for b in read_source(s, ["text"], 100) for t in b.column(0).to_pylist()]


LENGTH = toys.column("len", toys.length)
DOUBLE = toys.column("double", toys.double, "len.score", inputs=("len.score",))
OTHER = toys.column("other", toys.length, 3.0)


def test_a_second_run_computes_nothing(write_corpus: Any, open_run: Any, any_pool: Callable[[], Pool]) -> None:
    corpus = write_corpus()
    with open_run(corpus, any_pool) as run:
        assert computed(run, LENGTH, DOUBLE) == {"len": 6, "double": 6}
        before = parts(run, "double")
    with open_run(corpus, any_pool) as run:
        assert computed(run, LENGTH, DOUBLE) == {"len": 0, "double": 0}
        assert run.manifest["passes"] == []
        assert parts(run, "double") == before


@pytest.mark.parametrize("harm", ["delete", "truncate", "empty", "garbage", "of another shard"])
def test_a_part_that_is_not_true_is_made_again(write_corpus: Any, open_run: Any, harm: str) -> None:
    corpus = write_corpus()
    with open_run(corpus) as run:
        run.materialize([LENGTH])
        before = parts(run, "len")
        part = Path(run.store.path, "columns/len/part-00003.parquet")
        content = part.read_bytes()
        if harm == "delete":
            part.unlink()
        else:
            other = {"truncate": content[:-20], "empty": b"", "garbage": b"x" * 500}
            part.write_bytes(other.get(harm, before["part-00002.parquet"]))
        assert computed(run, LENGTH) == {"len": 1}
        assert parts(run, "len") == before


def test_a_changed_recipe_makes_stale_what_depends_on_it(write_corpus: Any, open_run: Any) -> None:
    corpus = write_corpus()
    with open_run(corpus) as run:
        assert computed(run, LENGTH, DOUBLE, OTHER) == {"len": 6, "double": 6, "other": 6}
    with open_run(corpus) as run:
        changed = toys.column("len", toys.length, 2.0)
        assert computed(run, changed, DOUBLE, OTHER) == {"len": 6, "double": 6, "other": 0}
        assert computed(run, changed, DOUBLE, OTHER) == {"len": 0, "double": 0, "other": 0}


def test_an_added_file_makes_new_shards_alone(write_corpus: Any, open_run: Any) -> None:
    corpus = write_corpus(files=3)
    with open_run(corpus) as run:
        run.materialize([LENGTH])
        before = parts(run, "len")
    pq.write_table(pa.table({"id": ["n"], "text": ["new"]}), corpus / "a_first_by_name.parquet")
    with open_run(corpus) as run:
        assert computed(run, LENGTH) == {"len": 1}
        assert {k: v for k, v in parts(run, "len").items() if k in before} == before
        assert texts(run)[-1] == "new"


def test_a_removed_file_takes_its_shards_alone(write_corpus: Any, open_run: Any) -> None:
    corpus = write_corpus(files=4, rows_of=bad_rows)
    bad = toys.column("len", toys.refusing, "BAD")
    with open_run(corpus, max_bad_fraction=0.5) as run:
        run.materialize([bad])
        before, rows = parts(run, "len"), texts(run)
        assert len(list(Path(run.store.path, "quarantine/len").iterdir())) == 4
    (corpus / "f01.parquet").unlink()
    with open_run(corpus, max_bad_fraction=0.5) as run:
        assert computed(run, bad) == {"len": 0}
        assert texts(run) == rows[:20] + rows[40:]
        assert run.rows == 60
        gone = {"part-00002.parquet", "part-00003.parquet"}
        assert parts(run, "len") == {k: v for k, v in before.items() if k not in gone}
        assert len(list(Path(run.store.path, "quarantine/len").iterdir())) == 3
        assert run.failures == []
        assert run.manifest["corpus"]["files"] == 3


def bad_rows(file: int, rows: int) -> dict[str, Any]:
    return {"text": [f"{'BAD' if i == 0 else 'fine'} {file} {i}" for i in range(rows)]}


@pytest.mark.parametrize("in_place", [True, False])
def test_a_changed_file_is_computed_again_alone(write_corpus: Any, open_run: Any, in_place: bool) -> None:
    corpus = write_corpus(files=4, rows_of=lambda f, n: {"text": [f"{f} {i:03d}" for i in range(n)]})
    path = corpus / "f01.parquet"
    plain = {"compression": "none", "use_dictionary": False, "row_group_size": 10}
    pq.write_table(pq.read_table(path), path, **plain)
    with open_run(corpus) as run:
        run.materialize([LENGTH])
        before, rows = parts(run, "len"), texts(run)
    changed = [t.replace("1 005", "1 006" if in_place else "one and five") for t in rows[20:40]]
    if in_place:  # size and footer stay what they were
        path.write_bytes(path.read_bytes().replace(b"1 005", b"1 006"))
    else:
        pq.write_table(pa.table({"text": changed}), path, **plain)
    with open_run(corpus) as run:
        assert computed(run, LENGTH) == {"len": 2}
        assert texts(run) == rows[:20] + rows[40:] + changed
        assert all(parts(run, "len")[k] == before[k] for k in list(before)[:2] + list(before)[4:])


def test_a_file_that_comes_back_is_the_file_that_was(write_corpus: Any, open_run: Any, tmp_path: Path) -> None:
    corpus = write_corpus(files=3)
    with open_run(corpus) as run:
        run.materialize([LENGTH])
        rows, fingerprints = texts(run), [s.fingerprint for s in run.live]
    (corpus / "f01.parquet").rename(tmp_path / "aside")
    with open_run(corpus) as run:
        run.materialize([LENGTH])
    (tmp_path / "aside").rename(corpus / "f01.parquet")
    with open_run(corpus) as run:
        assert computed(run, LENGTH) == {"len": 2}
        assert texts(run) == rows
        assert [s.fingerprint for s in run.live] == fingerprints


def test_small_files_share_shards_and_a_removed_one_costs_its_shard(write_corpus: Any, open_run: Any) -> None:
    corpus = write_corpus(files=12, rows=10, groups=1)
    size = pq.read_metadata(corpus / "f00.parquet").row_group(0)
    group = sum(size.column(i).total_compressed_size for i in range(size.num_columns))
    options = {"shard_mb": 3.5 * group / (1 << 20)}
    with open_run(corpus, corpus_options=options) as run:
        held = [len(s.pieces) for s in run.live]
        assert sum(held) == 12
        assert max(held) > 1
        run.materialize([LENGTH])
    (corpus / "f01.parquet").unlink()
    with open_run(corpus, corpus_options=options) as run:
        assert [len(s.pieces) for s in run.live] == [held[0] - 1, *held[1:]]
        assert computed(run, LENGTH) == {"len": 1}


def test_a_moved_corpus_is_the_same_corpus(write_corpus: Any, open_run: Any, tmp_path: Path) -> None:
    corpus = write_corpus()
    with open_run(corpus) as run:
        run.materialize([LENGTH])
    corpus.rename(tmp_path / "elsewhere")
    for file in (tmp_path / "elsewhere").iterdir():
        os.utime(file, (0, 0))
    with open_run(tmp_path / "elsewhere") as run:
        assert computed(run, LENGTH) == {"len": 0}


def test_a_corpus_that_grows_a_lot_is_cut_anew(write_corpus: Any, open_run: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("pipeline.corpus.shards.MIB", 2000)
    corpus = write_corpus(files=2, rows=100)
    with open_run(corpus, corpus_options={"shard_mb": None}) as run:
        first = run.manifest["shard_bytes"]
    write_corpus(files=4, rows=100)
    with open_run(corpus, corpus_options={"shard_mb": None}) as run:
        assert run.manifest["shard_bytes"] == first
    write_corpus(files=100, rows=1000)
    with open_run(corpus, corpus_options={"shard_mb": None}) as run:
        assert run.manifest["shard_bytes"] > 4 * first


def test_an_artifact_is_built_once_for_an_identity(write_corpus: Any, open_run: Any, tmp_path: Path) -> None:
    built = tmp_path / "built"

    def build(content: str, directory: Path) -> None:
        (directory / "sub").mkdir()
        (directory / "sub" / "x.txt").write_text(content)
        with built.open("a") as file:
            file.write(content)

    with open_run(write_corpus()) as run:
        for content in ("a", "a", "b"):
            artifact = run.artifact("thing", content, partial(build, content))
            assert (artifact.local() / "sub/x.txt").read_text() == content
        assert built.read_text() == "ab"
        assert run.manifest["artifacts"] == {"thing": "b"}
        (Path(run.store.path) / "artifacts/thing/artifact.json").unlink()  # as after a crash in the middle
        run.artifact("thing", "b", partial(build, "b"))
        assert built.read_text() == "abb"
        assert not run.artifact("none", "x", lambda d: None).local().joinpath("sub").exists()


def test_an_artifact_that_cannot_be_built_says_why(write_corpus: Any, open_run: Any) -> None:
    def build(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise ValueError("no such luck")

    with open_run(write_corpus()) as run:
        with pytest.raises(TamisError, match=r"fit thing failed: ValueError: no such luck \(at test_run.py:"):
            run.artifact("thing", "1", build)
        assert not Artifact("thing", "1", run.store.child("artifacts", "thing")).stored()


def test_identity_follows_values_and_shards(write_corpus: Any, open_run: Any) -> None:
    corpus = write_corpus(files=2)
    seen = set()
    with open_run(corpus) as run:
        run.plan(LENGTH)
        seen |= {run.identity("len.score"), run.identity("text"), run.identity("len.score", "text")}
        run.plan(toys.column("len", toys.length, 2.0))
        seen.add(run.identity("len.score"))
        run.failed[1] = "lost"
        seen.add(run.identity("len.score"))
        with pytest.raises(TamisError, match=r"'no.score' is read before column 'no' is planned"):
            run.identity("no.score")
        with pytest.raises(ConfigError, match=r"reads column 'author'; the corpus has id, text"):
            run.identity("corpus.author")
        with pytest.raises(CorpusError, match=r"corpus.id names no column"):
            run.identity("id")
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"text": "body"}, ConfigError, r"corpus.text: the corpus has no column 'body'; it has id, text"),
        ({"id": "key"}, ConfigError, r"corpus.id: the corpus has no column 'key'"),
        ({"text": "n"}, ConfigError, r"corpus.text: column 'n' is int64, not text"),
        ({"path": "/nowhere/at/all"}, CorpusError, r"no Parquet file at '/nowhere/at/all'; `tamis ingest` makes"),
        ({"columns": ["no"]}, CorpusError, r"the corpus has no column 'no'"),
    ],
)
def test_what_is_wrong_with_the_corpus_is_said_at_the_door(
    write_corpus: Any, open_run: Any, options: dict[str, Any], error: type[TamisError], says: str
) -> None:
    rows = {"n": [1]} if options.get("text") == "n" else {}
    corpus = write_corpus(files=1, rows=1, groups=1, rows_of=lambda f, n: {"id": ["a"], "text": ["b"]} | rows)
    with pytest.raises(error, match=says), open_run(corpus, corpus_options=options):
        pass


def test_no_rows_at_all_is_an_error(write_corpus: Any, open_run: Any) -> None:
    corpus = write_corpus(files=2, rows=0, rows_of=lambda f, n: {"text": pa.array([], pa.string())})
    with pytest.raises(CorpusError, match="the corpus has no rows in 2 files"), open_run(corpus):
        pass


def test_unreadable_and_strange_files_are_listed(write_corpus: Any, open_run: Any) -> None:
    corpus = write_corpus(files=5)
    whole = (corpus / "f01.parquet").read_bytes()
    (corpus / "f01.parquet").write_bytes(whole[: len(whole) // 2])
    (corpus / "f02.parquet").write_bytes(b"not Parquet at all")
    pq.write_table(pa.table({"id": ["a"], "text": [1]}), corpus / "f03.parquet")
    with open_run(corpus) as run:
        assert run.rows == 40
        reasons = {Path(f["file"]).name: f["reason"] for f in run.failures}
        assert set(reasons) == {"f01.parquet", "f02.parquet", "f03.parquet"}
        assert reasons["f01.parquet"].startswith("unreadable: ")
        assert reasons["f03.parquet"] == "schema: column 'text' is int64, in the first file string"
        assert computed(run, LENGTH) == {"len": 4}
        run.finish()
        assert run.manifest["status"] == "finished with failed shards"
    (corpus / "f01.parquet").write_bytes(whole)  # mended: only it is new
    with open_run(corpus) as run:
        assert computed(run, LENGTH) == {"len": 2}
        assert {Path(f["file"]).name for f in run.failures} == {"f02.parquet", "f03.parquet"}


def test_a_file_that_changes_under_the_run_fails_its_shards(write_corpus: Any, open_run: Any) -> None:
    corpus = write_corpus(files=2)
    with open_run(corpus) as run:
        pq.write_table(pa.table({"id": ["a"], "text": ["b"]}), corpus / "f01.parquet")
        run.materialize([LENGTH])
        assert {f["reason"] for f in run.failures} == {
            f"len: {corpus}/f01.parquet has changed since it was listed: run again with --refresh"
        }


def test_the_manifest_says_what_was_done(write_corpus: Any, open_run: Any) -> None:
    with open_run(write_corpus()) as run:
        run.materialize([LENGTH])
        assert json.loads(Path(run.store.path, "manifest.json").read_text())["status"] == "running"
        run.finish()
    manifest = json.loads(Path(run.store.path, "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert {k: manifest["corpus"][k] for k in ("files", "shards", "rows")} == {"files": 3, "shards": 6, "rows": 60}
    assert manifest["columns"]["len"] | {"fingerprint": ""} == {
        "fingerprint": "",
        "parts": 6,
        "computed": 6,
        "quarantined": 0,
    }
    (entry,) = manifest["passes"]
    assert entry.pop("bytes") > 0
    assert entry.pop("seconds") >= 0
    assert entry == {"pass": "len", "units": 6, "failed": 0, "rows": 60, "workers_lost": 0}


def test_an_error_ends_in_the_manifest(write_corpus: Any, open_run: Any) -> None:
    with pytest.raises(RuntimeError, match="stop"), open_run(write_corpus()) as run:
        raise RuntimeError("stop")
    manifest = json.loads(Path(run.store.path, "manifest.json").read_text())
    assert (manifest["status"], manifest["error"]) == ("failed", "stop")
    assert not Path(run.store.path, "lock.json").exists()


def test_a_broken_manifest_is_written_anew(write_corpus: Any, open_run: Any) -> None:
    corpus = write_corpus()
    with open_run(corpus) as run:
        run.materialize([LENGTH])
    Path(run.store.path, "manifest.json").write_text('{"half')
    with open_run(corpus) as run:
        assert computed(run, LENGTH) == {"len": 0}


def test_a_run_directory_that_cannot_be_is_an_error(write_corpus: Any, open_run: Any, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError, match=r"run: cannot write to .*/run: "), open_run(write_corpus()):
        pass


def test_what_cannot_fit_is_refused_before_work(write_corpus: Any, open_run: Any, monkeypatch: Any) -> None:
    wide = pa.schema([("vector", pa.list_(pa.float16(), 1 << 20))])
    with open_run(write_corpus(rows=2000)) as run:
        column = toys.column("embed", toys.absent, fields=wide)
        monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10**9))
        with pytest.raises(DiskFull, match=r"embed: at least 12.6 GB will be written to .*, where 1.0 GB are free"):
            run.materialize([column])
        run.materialize([LENGTH])


class Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_actors_get_what_the_recipe_wishes_or_the_configuration_gives(write_corpus: Any, open_run: Any) -> None:
    asked: list[Resources] = []

    class Asking:
        lost = 0

        def map(self, task: Any, units: Any, resources: Resources) -> Any:
            asked.append(resources)
            return iter(())

        def close(self) -> None: ...

    with open_run(write_corpus(), Asking, cpus=2, memory_gb=1) as run:
        list(run.map("x", lambda unit, attempt: {}, [1]))
        list(run.map("x", lambda unit, attempt: {}, [1], Resources(cpus=3, gpus=1, memory=5)))
    assert asked == [Resources(2, 0, 1 << 30), Resources(3, 1, 5)]


def test_an_inline_artifact_pickles_and_opens(write_corpus: Any, open_run: Any) -> None:
    with open_run(write_corpus()) as run:
        artifact = run.artifact("numbers", "1", save_numbers, None)
        assert np.load(artifact.local() / "n.npy").tolist() == [0, 1, 2]
        assert artifact == Artifact("numbers", "1", Store(f"{run.store.uri}/artifacts/numbers"))


def save_numbers(directory: Path) -> None:
    np.save(directory / "n.npy", np.arange(3))


def test_base_column_by_id_and_by_text(write_corpus: Any, open_run: Any) -> None:
    corpus = write_corpus(files=1, rows=4, groups=1, rows_of=lambda f, n: {"id": [7, 8, 7, None], "text": ["a"] * 4})
    with open_run(corpus, corpus_options={"id": "id"}, max_bad_fraction=1.0) as run:
        run.materialize([row_column(True, None)])
        keys = pq.read_table(Path(run.store.path, "columns/row"))["key"].to_pylist()
        assert keys[0] == keys[2] != keys[1]
        assert keys[3] is None
        (bad,) = pq.read_table(Path(run.store.path, "quarantine/row")).to_pylist()
        assert (bad["row"], bad["reason"]) == (3, "null id")
