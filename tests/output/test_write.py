"""Writing kept rows: what is in the files, in which order and cut, and that bytes depend on nothing else."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.shards import MIB, Piece, Shard
from pipeline.corpus.storage import Store
from pipeline.engine.parts import part_name
from pipeline.errors import ConfigError, TamisError
from pipeline.output import write
from pipeline.output.curated import write_curated
from pipeline.output.write import FileUnit, Subset, WriteTask, hex_keys, plan_files
from pipeline.run import Run
from pipeline.select.stage import Selection

Sieve = Callable[..., tuple[Run, Selection]]
Documents = Callable[[int, int], pa.Table]
FEW = {"output": {"scores": False, "file_mb": 0.05, "row_group_rows": 100}}


def kept_rows(run: Run, corpus: Path) -> pa.Table:
    """The source's rows with the keep flag: what the files must hold, in this order."""
    flags = [pq.read_table(run.store.at("columns", "select", part_name(s.index)))["keep"] for s in run.live]
    table = ds.dataset(corpus).to_table()
    return table.filter(pc.fill_null(pa.chunked_array([c for f in flags for c in f.chunks]), False))


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.glob("*.parquet"))}


def stored(directory: Store, files: list[dict[str, Any]]) -> pa.Table:
    return pa.concat_tables([pq.read_table(directory.at(f["file"])) for f in files]).replace_schema_metadata(None)


def test_rows_schema_and_order_are_the_sources_over_files_and_row_groups(sieved: Sieve, corpus: Path) -> None:
    run, selection = sieved(corpus, **FEW)
    directory, files = write_curated(run, selection)
    assert stored(directory, files).equals(kept_rows(run, corpus))
    assert sum(f["rows"] for f in files) == selection.rows == 2000
    assert [f["file"] for f in files] == [f"part-{i:05d}.parquet" for i in range(len(files))]
    assert len(files) > 3
    for file in files:
        footer = pq.read_metadata(directory.at(file["file"]))
        groups = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
        assert sum(groups) == file["rows"]
        assert groups[:-1] == [100] * (len(groups) - 1)
        assert footer.row_group(0).column(1).compression == "ZSTD"


def test_a_file_comes_from_the_row_groups_that_its_lineage_names(sieved: Sieve, corpus: Path) -> None:
    run, selection = sieved(corpus, **FEW)
    directory, files = write_curated(run, selection)
    named = [
        (o["file"], g) for f in files for o in f["from"] for g in range(o["row_groups"][0], o["row_groups"][1] + 1)
    ]
    assert sorted(set(named)) == [(str(p), g) for p in sorted(corpus.iterdir()) for g in range(8)]
    for file in files:
        sources = [
            pq.ParquetFile(o["file"]).read_row_groups(range(o["row_groups"][0], o["row_groups"][1] + 1))
            for o in file["from"]
        ]
        ids = set(pa.concat_tables(sources)["id"].to_pylist())
        assert ids >= set(pq.read_table(directory.at(file["file"]))["id"].to_pylist())


def test_columns_of_every_kind_come_through(sieved: Sieve, tmp_path: Path) -> None:
    rows = 60
    moment = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    columns = {
        "id": pa.array([str(i) for i in range(rows)]),
        "text": pa.array([f"text number {i}" for i in range(rows)], pa.large_string()),
        "label": pa.array(["good", None, "bad"] * 20).dictionary_encode(),
        "tags": pa.array([["a", "b"], [], None] * 20, pa.list_(pa.string())),
        "meta": pa.array([{"lang": "en", "scores": [0.5, None]}, None, {"lang": None, "scores": []}] * 20),
        "when": pa.array([moment] * rows, pa.timestamp("us", "UTC")),
        "price": pa.array([Decimal("1.50")] * rows, pa.decimal128(9, 2)),
        "raw": pa.array([b"\x00\xff", b""] * 30),
        "small": pa.array(np.arange(rows), pa.int8()),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(2 * rows), pa.float32()), 2),
    }
    source = tmp_path / "corpus"
    source.mkdir()
    table = pa.table(columns)
    pq.write_table(table, source / "a.parquet", row_group_size=20)
    strict = pa.schema([f.with_nullable(f.name != "text") for f in table.schema])
    pq.write_table(pa.table(columns).cast(strict), source / "b.parquet")
    run, selection = sieved(source, output={"scores": False})
    directory, files = write_curated(run, selection)
    got = stored(directory, files)
    assert got.schema == table.schema
    assert got.to_pylist() == kept_rows(run, source).to_pylist()
    assert got.num_rows == rows


def test_the_struct_column_has_id_and_scores_of_its_own_row(sieved: Sieve, corpus: Path) -> None:
    run, selection = sieved(corpus, scores=["random", "length"], output={"file_mb": 0.05})
    directory, files = write_curated(run, selection)
    got = stored(directory, files)
    assert got.schema.field("tamis").type == pa.struct(
        [("id", pa.string()), ("random", pa.float32()), ("length", pa.float32())]
    )
    parts = {
        name: pa.concat_tables(pq.read_table(run.store.at("columns", name, part_name(s.index))) for s in run.live)
        for name in ("row", "random", "length")
    }
    values = zip(parts["random"]["score"].to_pylist(), parts["length"]["score"].to_pylist(), strict=True)
    expected = dict(zip([k.hex() for k in parts["row"]["key"].to_pylist()], values, strict=True))
    assert all(expected[t["id"]] == (t["random"], t["length"]) for t in got["tamis"].to_pylist())
    assert len({t["id"] for t in got["tamis"].to_pylist()}) == got.num_rows


def test_a_curated_set_can_be_curated_again(sieved: Sieve, corpus: Path) -> None:
    run, selection = sieved(corpus)
    first, _ = write_curated(run, selection)
    again, selection = sieved(Path(first.path), "again")
    directory, files = write_curated(again, selection)
    got = stored(directory, files)
    assert got.column_names == ["id", "text", "tamis"]
    assert got.num_rows == 1000


def test_tiny_files_and_shards_that_keep_nothing(sieved: Sieve, tmp_path: Path, documents: Documents) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    for i in range(40):
        pq.write_table(documents(3 * i, 1 + i % 3), source / f"{i:02d}.parquet")
    budget = {"select": {"budget": {"rows": 5}}, "output": {"scores": False}}
    run, selection = sieved(source, corpus={"path": str(source), "id": "id", "shard_mb": 1e-6}, **budget)
    assert len(run.shards) == 40
    directory, files = write_curated(run, selection)
    assert stored(directory, files).equals(kept_rows(run, source))
    assert [f["rows"] for f in files] == [5]


def test_a_row_group_in_which_nothing_is_kept_is_not_read(sieved: Sieve, tmp_path: Path, documents: Documents) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    groups = [documents(0, 100), pa.table({"id": ["short"] * 100, "text": ["ab"] * 100}), documents(100, 100)]
    pq.write_table(pa.concat_tables(groups), source / "a.parquet", row_group_size=100, compression="none")
    long = {"scores": ["length"], "select": {"budget": {"rows": 200}}, "output": {"scores": False}}
    run, selection = sieved(source, corpus={"path": str(source)}, **long)
    middle = pq.read_metadata(source / "a.parquet").row_group(1).column(1)
    with open(source / "a.parquet", "r+b") as file:
        file.seek(middle.dictionary_page_offset or middle.data_page_offset)
        file.write(b"\xff" * middle.total_compressed_size)
    directory, files = write_curated(run, selection)
    assert stored(directory, files).equals(pa.concat_tables([documents(0, 100), documents(100, 100)]))


def test_quarantined_rows_are_never_written(sieved: Sieve, tmp_path: Path, documents: Documents) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    table = documents(0, 200)
    texts = [None if i in (0, 70, 199) else t for i, t in enumerate(table["text"].to_pylist())]
    pq.write_table(table.set_column(1, "text", pa.array(texts)), source / "a.parquet", row_group_size=40)
    run, selection = sieved(source, select={"budget": {"fraction": 1.0}}, output={"scores": False})
    directory, files = write_curated(run, selection)
    assert stored(directory, files)["text"].to_pylist() == [t for t in texts if t is not None]


def test_bytes_depend_neither_on_the_order_of_units_nor_on_earlier_tries(sieved: Sieve, corpus: Path) -> None:
    run, selection = sieved(corpus, **FEW)
    directory, _ = write_curated(run, selection)
    once = contents(Path(directory.path))
    task, units = planned(run, row_group_rows=100)
    for unit in reversed(units):
        task(unit, attempt=3)
    again = contents(Path(task.subset.directory.path))
    assert {name: body(content) for name, content in again.items()} == {name: body(c) for name, c in once.items()}


def planned(run: Run, **options: Any) -> tuple[WriteTask, list[FileUnit]]:
    """A task and its units that write what is selected once more, elsewhere."""
    subset = Subset("select", run.store.child("again"), "part-{:05d}.parquet", ("id", "text"), **options)
    flags = [pq.read_table(run.store.at("columns", "select", part_name(s.index)))["keep"] for s in run.live]
    units = plan_files(run.live, np.array([pc.sum(f).as_py() for f in flags]), 0.05 * MIB, "")
    return WriteTask(run.layout, subset, subset.schema(run), ("scratch", "sift")), units


def body(file: bytes) -> bytes:
    """All but the footer, which has the fingerprint."""
    return file[: -8 - int.from_bytes(file[-8:-4], "little")]


def test_sifting_first_gives_the_same_bytes(sieved: Sieve, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"select": {"budget": {"fraction": 0.05}}}
    run, selection = sieved(corpus, "direct", **few)
    directly, _ = write_curated(run, selection)
    monkeypatch.setattr(write, "SIFT_BYTES", 0)
    run, selection = sieved(corpus, "sifted", **few)
    sifted, _ = write_curated(run, selection)
    assert contents(Path(sifted.path)) == contents(Path(directly.path))
    assert "sift write" in [p["pass"] for p in run.manifest["passes"]]
    assert not run.store.files("scratch", recursive=True)


def test_only_files_that_gather_from_much_more_than_they_hold_are_sifted() -> None:
    shards = [Shard(i, (Piece(f"/{i}", 0, f"{i}", 0, (100,), 64 * MIB),)) for i in range(200)]

    def sifted(kept: int, number: int, file_mb: float) -> set[bool]:
        """Of the first shards, with so many of 100 rows kept in each."""
        return {u.sifted for u in plan_files(shards[:number], np.full(number, kept), file_mb * MIB, "")}

    assert sifted(kept=1, number=200, file_mb=256) == {True}  # one file of 128 MiB from 12.5 GiB
    assert sifted(kept=1, number=8, file_mb=256) == {False}  # from 512 MiB, which one worker reads soon enough
    assert sifted(kept=60, number=50, file_mb=1024) == {False}  # it holds more than half of what it reads
    assert sifted(kept=5, number=200, file_mb=8) == {False}  # so many files that all workers read


def test_a_second_call_writes_nothing_and_a_lost_file_comes_back_alone(sieved: Sieve, corpus: Path) -> None:
    run, selection = sieved(corpus, **FEW)
    directory, files = write_curated(run, selection)
    place = Path(directory.path)
    once, times = contents(place), {p.name: p.stat().st_mtime_ns for p in place.glob("*.parquet")}
    assert write_curated(run, selection) == (directory, files)
    (place / "part-00001.parquet").unlink()
    (place / "part-00002.parquet").write_bytes(once["part-00002.parquet"][:1000])
    write_curated(run, selection)
    assert contents(place) == once
    assert {p.name for p in place.glob("*.parquet") if p.stat().st_mtime_ns != times[p.name]} == {
        "part-00001.parquet",
        "part-00002.parquet",
    }


def test_another_selection_leaves_no_file_of_the_old_one_and_no_other_file_is_touched(
    sieved: Sieve, corpus: Path, tmp_path: Path, documents: Documents
) -> None:
    place = tmp_path / "out"
    place.mkdir()
    pq.write_table(documents(0, 3), place / "mine.parquet")
    (place / "notes.txt").write_text("mine")
    output = {"path": str(place), "file_mb": 0.05}
    run, selection = sieved(corpus, "one", output=output)
    _, before = write_curated(run, selection)
    run, selection = sieved(corpus, "two", output=output, select={"budget": {"fraction": 0.1}})
    _, after = write_curated(run, selection)
    assert len(after) < len(before)
    assert {p.name for p in place.iterdir()} == {f["file"] for f in after} | {"mine.parquet", "notes.txt"}
    assert sum(pq.read_metadata(place / f["file"]).num_rows for f in after) == 400


def test_what_others_wrote_is_not_overwritten(
    sieved: Sieve, corpus: Path, tmp_path: Path, documents: Documents
) -> None:
    place = tmp_path / "out"
    place.mkdir()
    pq.write_table(documents(0, 3), place / "part-00000.parquet")
    run, selection = sieved(corpus, output={"path": str(place)})
    with pytest.raises(ConfigError, match=r"part-00000\.parquet was not written by Tamis"):
        write_curated(run, selection)
    assert pq.read_metadata(place / "part-00000.parquet").num_rows == 3


def test_the_corpus_is_not_overwritten(sieved: Sieve, corpus: Path) -> None:
    before = contents(corpus)
    run, selection = sieved(corpus, output={"path": f"{corpus}/"})
    with pytest.raises(ConfigError, match="holds the corpus itself"):
        write_curated(run, selection)
    assert contents(corpus) == before


def test_a_source_that_changes_meanwhile_is_an_error(sieved: Sieve, tmp_path: Path, documents: Documents) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    pq.write_table(documents(0, 300), source / "a.parquet")
    run, selection = sieved(source)
    pq.write_table(documents(1, 301), source / "a.parquet")
    with pytest.raises(TamisError, match="has changed since it was listed"):
        write_curated(run, selection)
    assert not list(Path(run.store.path, "curated").glob("*.parquet*"))


def test_flags_that_no_longer_match_the_plan_are_an_error(sieved: Sieve, corpus: Path) -> None:
    run, _ = sieved(corpus)
    task, units = planned(run)
    for error, wrong in (("fewer rows", units[0].kept[0] + 1), ("more rows", units[0].kept[0] - 1)):
        with pytest.raises(TamisError, match=error):
            task(replace(units[0], kept=(wrong, *units[0].kept[1:])), attempt=0)


def test_polars_pyarrow_and_datasets_load_it(sieved: Sieve, corpus: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    run, selection = sieved(corpus, output={"file_mb": 0.05})
    directory, files = write_curated(run, selection)
    expected = kept_rows(run, corpus)["text"].to_pylist()
    place = Path(directory.path)
    assert ds.dataset([str(place / f["file"]) for f in files]).to_table()["text"].to_pylist() == expected
    assert pl.read_parquet(place / "*.parquet")["text"].to_list() == expected
    for path, options in (("parquet", {"data_files": str(place / "*.parquet")}), (str(place), {})):
        loaded = datasets.load_dataset(path, **options, split="train", cache_dir=str(tmp_path / "cache"))
        assert loaded["text"][:] == expected
        assert set(loaded.features["tamis"]) == {"id", "random"}


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50), st.integers(1, 10_000)), min_size=1, max_size=30),
    st.integers(1, 30_000),
    st.integers(0, 3),
)
def test_a_plan_holds_every_kept_row_once_and_in_order(
    corpus: list[tuple[int, int, int]], file_bytes: int, first: int
) -> None:
    shards = [Shard(i, (Piece(f"/{i}", 1, str(i), 0, (n,), size),)) for i, (n, _, size) in enumerate(corpus)]
    kept = np.array([min(n, wanted) for n, wanted, _ in corpus])
    units = plan_files(shards, kept, file_bytes, "x", first)
    assert [s.index for u in units for s in u.shards] == np.flatnonzero(kept).tolist()
    assert [n for u in units for n in u.kept] == kept[kept > 0].tolist()
    assert all(min(u.cuts()) >= 1 and sum(u.cuts()) == u.rows and len(u.cuts()) == u.files for u in units)
    assert [u.first for u in units] == np.cumsum([first, *(u.files for u in units)])[: len(units)].tolist()
    assert len({u.fingerprint for u in units}) == len(units)
    for unit in units:
        size = sum(s.bytes * n / s.rows for s, n in zip(unit.shards, unit.kept, strict=True))
        assert len(unit.shards) == 1 or size <= file_bytes
        assert unit.files == 1 or len(unit.shards) == 1


@given(st.lists(st.binary(min_size=16, max_size=16), max_size=20), st.integers(0, 5))
def test_keys_are_written_as_hex(keys: list[bytes], start: int) -> None:
    array = pa.array(keys, pa.binary(16)).slice(min(start, len(keys)))
    assert hex_keys(array).to_pylist() == [k.hex() for k in keys[start:]]
    assert hex_keys(array).type == pa.string()
