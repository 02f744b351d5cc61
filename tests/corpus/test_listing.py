"""The listing: which files, in which order, known by what, and what is wrong with them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus.listing import LISTING, File, expand, list_corpus, read_footers, reference_schema
from pipeline.corpus.storage import Store
from pipeline.errors import CorpusError


def write(path: Path, table: pa.Table | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": ["a", "b"]}) if table is None else table, path, **options)
    return path


def read(chunks: list[list[File]]) -> Iterable[pa.Table]:
    return [read_footers(chunk) for chunk in chunks]


def listed(path: Path | list[Path], run: Path, columns: list[str] | None = None) -> pa.Table:
    paths = [str(p) for p in (path if isinstance(path, list) else [path])]
    return list_corpus(paths, Store(str(run)), columns, False, read)


def names(table: pa.Table) -> list[str]:
    return [Path(u).name for u in table["uri"].to_pylist()]


# ---- paths


def test_a_directory_a_file_a_glob_and_a_list(tmp_path: Path) -> None:
    for name in ("b/2.parquet", "a/1.parquet", "a/deep/3.parquet", "a/_hidden/4.parquet", ".tmp/5.parquet", "a/x.json"):
        write(tmp_path / name)

    def found(*paths: str) -> list[str]:
        return [str(Path(uri).relative_to(tmp_path)) for uri, _, _ in expand([str(tmp_path / p) for p in paths])]

    assert found("") == ["a/1.parquet", "a/deep/3.parquet", "b/2.parquet"]
    assert found("b", "a") == ["b/2.parquet", "a/1.parquet", "a/deep/3.parquet"]
    assert found("a", "a/1.parquet") == ["a/1.parquet", "a/deep/3.parquet"]
    assert found("a/x.json") == ["a/x.json"]  # who names a file means it
    assert found("*/*.parquet") == [".tmp/5.parquet", "a/1.parquet", "b/2.parquet"]
    assert found("**/*.parquet")[-3:] == ["a/_hidden/4.parquet", "a/deep/3.parquet", "b/2.parquet"]
    assert found("a/[0-9].parquet") == ["a/1.parquet"]
    assert found("?/2.parquet") == ["b/2.parquet"]


def test_a_home_directory_and_a_file_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "1.parquet")
    assert expand(["~"])[0][0] == expand([f"file://{tmp_path}"])[0][0] == str(path)


def test_a_name_with_brackets_is_a_name_where_it_exists(tmp_path: Path) -> None:
    path = write(tmp_path / "part[1].parquet")
    assert [uri for uri, _, _ in expand([str(path)])] == [str(path)]


@pytest.mark.parametrize("path", ["nothing", "nothing/*.parquet", "empty"])
def test_a_path_that_matches_nothing_is_an_error(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=rf"corpus.path: no Parquet file at '{tmp_path}/{path[:5]}"):
        expand([str(tmp_path / path)])


def test_an_unknown_scheme_is_an_error() -> None:
    with pytest.raises(CorpusError, match="cannot list 'nosuch://x'"):
        expand(["nosuch://x"])


# ---- footers


def test_a_footer_says_rows_bytes_and_schema(tmp_path: Path) -> None:
    table = pa.table({"text": [f"{i}" for i in range(100)], "n": range(100)})
    path = write(tmp_path / "1.parquet", table, row_group_size=30)
    listing = read_footers([(str(path), path.stat().st_size, 7)])
    (row,) = listing.to_pylist()
    assert row["rows"] == [30, 30, 30, 10]
    groups = [pq.read_metadata(path).row_group(i) for i in range(4)]
    assert row["bytes"] == [sum(g.column(c).total_compressed_size for c in range(2)) for g in groups]
    assert (row["mtime"], row["error"], row["gone"]) == (7, None, False)
    assert reference_schema(listing).equals(table.schema)
    assert listing.schema == LISTING


def test_a_long_footer_is_read_whole(tmp_path: Path) -> None:
    table = pa.table({f"column_with_a_long_name_{i}": ["x"] for i in range(700)})
    path = write(tmp_path / "wide.parquet", table)
    assert pq.read_metadata(path).serialized_size > 1 << 16
    (row,) = read_footers([(str(path), path.stat().st_size, 0)]).to_pylist()
    assert (row["error"], row["rows"]) == (None, [1])


@pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 100, b"x" * 100_000, b"PAR1" + b"\xff" * 50 + b"PAR1"])
def test_what_is_not_parquet_is_unreadable(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "1.parquet"
    path.write_bytes(content)
    (row,) = read_footers([(str(path), len(content), 0)]).to_pylist()
    assert row["error"].startswith("unreadable: ")
    assert (row["identity"], row["rows"]) == (None, None)


def test_a_file_that_has_vanished_is_unreadable(tmp_path: Path) -> None:
    (row,) = read_footers([(str(tmp_path / "no.parquet"), 10, 0)]).to_pylist()
    assert "No such file" in row["error"]


def test_identity_is_of_the_content(tmp_path: Path) -> None:
    def identity(path: Path) -> str:
        return str(read_footers([(str(path), path.stat().st_size, 0)])["identity"][0])

    one = write(tmp_path / "a.parquet")
    same = write(tmp_path / "elsewhere/b.parquet")
    other = write(tmp_path / "c.parquet", pa.table({"text": ["a", "c"]}))
    assert identity(one) == identity(same) != identity(other)


# ---- the table


def test_known_files_are_not_read_again(tmp_path: Path) -> None:
    corpus, run, asked = tmp_path / "corpus", tmp_path / "run", []

    def noting(chunks: list[list[File]]) -> Iterable[pa.Table]:
        asked.append([Path(uri).name for chunk in chunks for uri, _, _ in chunk])
        return read(chunks)

    def again() -> list[str]:
        return names(list_corpus([str(corpus)], Store(str(run)), None, False, noting))

    write(corpus / "b.parquet")
    write(corpus / "c.parquet")
    assert again() == again() == ["b.parquet", "c.parquet"]
    assert asked == [["b.parquet", "c.parquet"]]
    write(corpus / "a.parquet")
    assert again() == again() == ["b.parquet", "c.parquet", "a.parquet"]  # addresses do not change
    (corpus / "d.parquet").write_bytes(b"broken")
    again()
    write(corpus / "d.parquet")
    assert again() == ["b.parquet", "c.parquet", "a.parquet", "d.parquet"]
    assert asked[1:] == [["a.parquet"], ["d.parquet"], ["d.parquet"]]


def test_many_files_are_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.corpus.listing.FOOTERS_A_UNIT", 3)
    for i in range(8):
        write(tmp_path / "corpus" / f"{i}.parquet")
    sizes = []

    def noting(chunks: list[list[File]]) -> Iterable[pa.Table]:
        sizes.append([len(chunk) for chunk in chunks])
        return read(chunks)

    listing = list_corpus([str(tmp_path / "corpus")], Store(str(tmp_path / "run")), None, False, noting)
    assert sizes == [[3, 3, 2]]
    assert names(listing) == [f"{i}.parquet" for i in range(8)]
    assert listing["schema"].combine_chunks().dictionary.to_pylist() != []
    assert len(listing["schema"].combine_chunks().dictionary) == 1  # one schema, however many files


def test_a_gap_keeps_its_place_until_most_is_gone(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    for i in range(4):
        write(corpus / f"{i}.parquet", pa.table({"text": [f"{i}"]}))
    listed(corpus, tmp_path / "run")
    (corpus / "1.parquet").unlink()
    table = listed(corpus, tmp_path / "run")
    assert (names(table), table["gone"].to_pylist()) == (
        [f"{i}.parquet" for i in range(4)],
        [False, True, False, False],
    )
    for i in (0, 2):
        (corpus / f"{i}.parquet").unlink()
    table = listed(corpus, tmp_path / "run")
    assert (names(table), table["gone"].to_pylist()) == (["3.parquet"], [False])


def test_a_touched_file_is_another_one_and_a_new_run_sees_the_same(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / "corpus" / f"{i}.parquet", pa.table({"text": [f"{i}"]}))
    before = listed(tmp_path / "corpus", tmp_path / "run")
    os.utime(tmp_path / "corpus/1.parquet", (1, 1))
    after = listed(tmp_path / "corpus", tmp_path / "run")
    assert names(after) == ["0.parquet", "1.parquet", "2.parquet", "1.parquet"]
    assert after["gone"].to_pylist() == [False, True, False, False]
    assert after["identity"][3] != before["identity"][1]
    fresh = listed(tmp_path / "corpus", tmp_path / "another run")
    assert fresh["identity"].to_pylist() == before["identity"].to_pylist()


def test_another_path_keeps_what_it_shares(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name / f"{name}.parquet", pa.table({"text": [name]}))
    listed(tmp_path / "b", tmp_path / "run")
    table = listed([tmp_path / "a", tmp_path / "b"], tmp_path / "run")
    assert names(table) == ["b.parquet", "a.parquet"]


def test_files_of_another_schema_are_named(tmp_path: Path) -> None:
    tables = [
        pa.table({"text": ["a"], "n": [1]}),
        pa.table({"text": ["a"]}),
        pa.table({"text": ["a"], "n": ["1"]}),
        pa.table({"text": ["a"], "n": [1], "more": [2.0]}),
        pa.table({"n": [1], "text": ["a"]}),  # the order of columns is no difference
    ]
    for i, table in enumerate(tables):
        write(tmp_path / "corpus" / f"{i}.parquet", table)
    assert listed(tmp_path / "corpus", tmp_path / "run")["error"].to_pylist() == [
        None,
        "schema: no column 'n', which the first file has",
        "schema: column 'n' is string, in the first file int64",
        "schema: column 'more' is not in the first file (list `corpus.columns` to leave it out)",
        None,
    ]
    assert listed(tmp_path / "corpus", tmp_path / "run", ["text"])["error"].to_pylist() == [None] * 5


def test_no_readable_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "1.parquet").write_bytes(b"no")
    with pytest.raises(CorpusError, match=r"none of the 1 files can be read \(.*1.parquet: unreadable"):
        listed(tmp_path, tmp_path / "run")
