"""Tars of samples: read in place, row by row what was put in, and nothing of a hostile archive believed."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus import tar_index
from pipeline.corpus.shards import read_source
from pipeline.corpus.storage import Store
from pipeline.corpus.tar import FAULT, _cuts, index_place, take_from_tar
from pipeline.corpus.tar_index import index_tar, sample_of
from pipeline.engine.reading import REASON, read_shard
from pipeline.errors import ConfigError, CorpusError
from pipeline.report.rows import read_rows
from tests.corpus.samples import member, pairs, tar_of, write_tar

COLUMNS = ["key", "image", "text", "json"]
PAIRS = {"image": "image", "text": "text"}


def indexed(content: bytes, ahead: int = 1 << 14) -> tar_index.Indexed:
    return index_tar(pa.BufferReader(content), len(content), ahead)


def rows_of(run: Any, columns: list[str] = COLUMNS, batch_rows: int = 1024) -> list[dict[str, Any]]:
    return [r for s in run.live for b in read_source(s, columns, batch_rows) for r in b.to_pylist()]


def unusable(run: Any, *roles: str) -> dict[int, str]:
    """Reasons by row."""
    reasons = [r for s in run.live for b in read_shard(run.layout, s, roles, 1024) for r in b[REASON].to_pylist()]
    return {i: reason for i, reason in enumerate(reasons) if reason}


def some_samples(rows: int, size: int = 700, seed: int = 0) -> dict[str, dict[str, bytes]]:
    rng = np.random.default_rng(seed)
    return {
        f"part/{i:04d}": {
            "jpg": rng.bytes(int(rng.integers(1, size))),
            "txt": f"caption {i}".encode(),
            "json": json.dumps({"n": i, "caption": f"said {i}"}).encode(),
        }
        for i in range(rows)
    }


def as_rows(samples: dict[str, dict[str, bytes]]) -> list[dict[str, Any]]:
    return [
        {"key": key, "image": s.get("jpg"), "text": s["txt"].decode(), "json": s["json"].decode()}
        for key, s in samples.items()
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0001.jpg", ("0001", "jpg")),
        ("./a.b/0001.seg.PNG", ("a.b/0001", "seg.png")),
        ("a/._0001.jpg", None),
        ("a/README", None),
        (".hidden", None),
    ],
)
def test_keys_and_extensions_are_those_of_webdataset(name: str, expected: tuple[str, str] | None) -> None:
    assert sample_of(name) == expected


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("batch_rows", [1, 7, 1024])
def test_what_was_put_in_comes_out(
    tmp_path: Path, open_run: Any, monkeypatch: pytest.MonkeyPatch, format: int, batch_rows: int
) -> None:
    monkeypatch.setattr(tar_index, "GROUP_BYTES", 2500)
    samples = some_samples(20)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.tar").write_bytes(tar_of(pairs(samples), format))
    with open_run(tmp_path / "data", corpus_options=PAIRS) as run:
        assert run.rows == 20
        assert 3 < len(run.shards) < 20
        assert rows_of(run, batch_rows=batch_rows) == as_rows(samples)
        assert rows_of(run, ["text"]) == [{"text": r["text"]} for r in as_rows(samples)]
        assert unusable(run, "image", "text") == {}
        held = {s.index: [p.rows for p in s.pieces] for s in run.shards}
        assert sum(sum(rows) for pieces in held.values() for rows in pieces) == 20
    with open_run(tmp_path / "data" / "*.tar", name="other", corpus_options=PAIRS) as run:
        assert {s.index: [p.rows for p in s.pieces] for s in run.shards} == held


@settings(max_examples=15)
@given(st.data())
def test_an_index_does_not_depend_on_how_much_is_read_at_a_time(data: st.DataObject) -> None:
    names = st.sampled_from(["a.jpg", "a.txt", "b.png", "b.json", "c.jpg", "x/" + "long" * 40 + ".jpg", "README"])
    chosen = data.draw(st.lists(names, max_size=8, unique=True))
    content = tar_of([member(n, bytes(data.draw(st.integers(0, 1500)))) for n in chosen])
    one, two = indexed(content, 512), indexed(content, 1 << 20)
    assert (one.table.to_pylist(), one.identity) == (two.table.to_pylist(), two.identity)
    assert one.cut is None
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:  # the standard library finds the same bytes
        found = {(m.offset_data, m.size) for m in archive if sample_of(m.name)}
    cells = {(r[f"{c}_at"], r[f"{c}_size"]) for r in one.table.to_pylist() for c in tar_index.ROLES}
    assert cells - {(None, None)} == found


def test_members_of_a_sample_may_lie_apart(tmp_path: Path, open_run: Any) -> None:
    samples = some_samples(5)
    members = pairs(samples)
    (tmp_path / "a.tar").write_bytes(tar_of(members[::3] + members[2::3] + members[1::3]))
    with open_run(tmp_path / "a.tar", corpus_options=PAIRS) as run:
        assert rows_of(run) == as_rows(samples)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(format: int) -> None:
    name = "/".join(["deep" * 20] * 5) + "/ключ.jpg"
    found = indexed(tar_of([member(name, b"x")], format)).table.to_pylist()
    assert [(r["key"], r["image_size"], r["fault"]) for r in found] == [(name.removesuffix(".jpg"), 1, None)]


def test_a_hostile_archive_loses_its_samples_to_quarantine_and_nothing_else(tmp_path: Path, open_run: Any) -> None:
    link = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd", "size": 0}
    members = [
        *pairs({"good1": {"jpg": b"1", "txt": b"one"}}),
        *pairs({"../../etc/up": {"jpg": b"2", "txt": b"two"}}),
        *pairs({"/etc/abs": {"jpg": b"3", "txt": b"three"}}),
        *pairs({"C:\\win": {"jpg": b"4", "txt": b"four"}}),
        member("linked.jpg", **link),
        member("linked.txt", b"five"),
        member("hard.jpg", type=tarfile.LNKTYPE, linkname="good1.jpg", size=0),
        member("device.jpg", type=tarfile.CHRTYPE, size=0),
        member("fifo", type=tarfile.FIFOTYPE, size=0),
        member("odd.jpg", b"6" * 600, type=b"Z"),
        *pairs({"twice": {"jpg": b"7", "png": b"8", "txt": b"seven"}}),
        member("same.jpg", b"9"),
        member("same.jpg", b"0"),
        member("folder.jpg", type=tarfile.DIRTYPE),
        member("README", b"left alone"),
        *pairs({"nopicture": {"txt": b"ten"}, "notext": {"jpg": b"11"}, "empty": {"jpg": b"", "txt": b"x"}}),
        *pairs({"latin": {"jpg": b"12", "txt": "café".encode("latin-1")}}),
        *pairs({"good2": {"JPEG": b"13", "caption": b"last"}}),
    ]
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(members))
    before = path.stat()
    with open_run(path, corpus_options=PAIRS) as run:
        keys = [r["key"] for r in rows_of(run, ["key"])]
        reasons = {keys[i]: why for i, why in unusable(run, "image", "text").items()}
        assert reasons == {
            "../../etc/up": "name climbs out of the archive",
            "/etc/abs": "name is absolute",
            "C:\\win": "name is absolute",
            "linked": "member is a symbolic link",
            "hard": "member is a hard link",
            "device": "member is a device",
            "fifo": "member is a pipe",
            "odd": "member is of an unknown type",
            "twice": "two members hold its image",
            "same": "two members hold its image",
            "nopicture": "caption without image",
            "notext": "image without caption",
            "empty": "empty image",
            "latin": "text is not UTF-8",
        }
        batches = [b for s in run.live for b in read_shard(run.layout, s, ["image", "text"], 1024)]
        values = zip(keys, *(batches[0].column(i).to_pylist() for i in range(2)), strict=True)
        good = [v for v in values if v[0] not in reasons]
        assert good == [("good1", b"1", "one"), ("good2", b"13", "last")]
        assert run.failures == []
        linked = take_from_tar(run.shards[0].pieces[0], 0, np.array([keys.index("linked")]), COLUMNS, 99)
        assert linked.to_pylist() == [{"key": "linked", "image": None, "text": None, "json": None}]
    after = path.stat()
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)


def test_without_an_image_role_the_reason_of_a_fault_is_still_told(tmp_path: Path, open_run: Any) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(pairs({"a": {"txt": b"x"}, "../b": {"txt": b"y"}, "c": {"jpg": b"z"}})))
    with open_run(tmp_path / "a.tar") as run:
        assert unusable(run, "text") == {1: "name climbs out of the archive", 2: "null text"}


def test_sparse_members_are_refused_and_what_follows_is_found() -> None:
    old = bytearray(tar_of([member("a.jpg", b"x" * 700, type=tarfile.GNUTYPE_SPARSE)])[:512])
    old[482] = 1  # one more block of the sparse map before the data
    old[148:156] = b"%06o\0 " % (256 + sum(old[:148]) + sum(old[156:]))
    body = bytes(old) + bytes(512) + b"x" * 700 + bytes(324)
    new = tar_of([member("b.jpg", b"y", pax_headers={"GNU.sparse.major": "1"})], tarfile.PAX_FORMAT).rstrip(b"\0")
    new += bytes(-len(new) % 512)
    found = indexed(body + new + tar_of([member("c.jpg", b"z")]))
    assert [(r["key"], r["fault"]) for r in found.table.to_pylist()] == [
        ("a", "member is sparse"),
        ("b", "member is sparse"),
        ("c", None),
    ]
    assert found.cut is None


def test_pax_headers_are_believed_for_names_and_sizes_of_one_member_alone() -> None:
    rest = tar_of([member("a.jpg", b"x"), member("c.jpg", b"y")])
    for headers, fault in (({"path": "b"}, "a global PAX header sets path for every member"), ({"comment": "x"}, None)):
        everywhere = io.BytesIO()
        tarfile.open(fileobj=everywhere, mode="w", format=tarfile.PAX_FORMAT, pax_headers=headers).close()
        found = indexed(everywhere.getvalue()[:1024] + rest).table.to_pylist()
        assert [r["fault"] for r in found] == [fault] * 2

    damaged = bytearray(tar_of([member("é" * 80 + ".jpg", b"x"), member("d.jpg", b"y")], tarfile.PAX_FORMAT))
    damaged[512:515] = b"999"
    found = indexed(bytes(damaged)).table.to_pylist()
    assert [r["fault"] for r in found] == ["a PAX header is damaged", None]


def test_a_header_of_a_giant_name_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_index, "HEADER_BYTES", 1000)
    content = tar_of([member("n" * 3000 + ".jpg", b"x"), member("b.jpg", b"y")])
    found = indexed(content).table.to_pylist()
    assert [r["fault"] for r in found] == ["a header is too large", None]
    monkeypatch.undo()
    assert [r["fault"] for r in indexed(content).table.to_pylist()] == [None, None]
    assert indexed(tar_of([member("n" * 5000 + ".jpg", b"x")])).table["fault"].to_pylist() == ["name is too long"]


@settings(max_examples=60)
@given(st.integers(1, 12_000))
def test_a_tar_that_is_cut_anywhere_gives_what_is_whole(length: int) -> None:
    content = tar_of(pairs(some_samples(4)))
    samples = indexed(content).table.to_pylist()
    length = min(length, len(content))
    try:
        found = indexed(content[:length])
    except CorpusError:
        assert length < 512
        return
    end = content.rstrip(b"\0")
    assert (found.cut is None) == (length >= -(-len(end) // 512) * 512 + 512)
    for row, whole in zip(found.table.to_pylist(), samples, strict=False):
        cells = {f"{c}_at": whole[f"{c}_at"] for c in tar_index.ROLES}
        held = {n: at for n, at in cells.items() if at + whole[n.replace("at", "size")] <= length}
        assert {n: row[n] for n in cells if row[n] is not None} == held
        assert row["fault"] in (None, "cut off")


def test_a_cut_tar_is_used_and_listed_and_mended_later(tmp_path: Path, open_run: Any) -> None:
    samples = some_samples(6)
    whole = tar_of(pairs(samples))
    at = whole.index(b"caption 3")
    (tmp_path / "a.tar").write_bytes(whole[: at + 4])
    with open_run(tmp_path / "a.tar", corpus_options=PAIRS) as run:
        assert run.rows == 4
        assert rows_of(run)[:3] == as_rows(samples)[:3]
        assert unusable(run, "image", "text") == {3: "cut off"}
        assert [f["file"] for f in run.failures] == [str(tmp_path / "a.tar")]
        assert "the last member is not whole" in run.failures[0]["reason"]
        run.finish()
        assert run.manifest["status"] == "finished with failed shards"
    (tmp_path / "a.tar").write_bytes(whole)
    with open_run(tmp_path / "a.tar", corpus_options=PAIRS) as run:
        assert (run.rows, run.failures) == (6, [])
        assert len(run.store.files("corpus", "tar")) <= 2
    (tmp_path / "a.tar").write_bytes(tar_of(pairs(some_samples(6, seed=1))))
    with open_run(tmp_path / "a.tar", corpus_options=PAIRS) as run:
        assert len(run.store.files("corpus", "tar")) == len(run.listing)  # no index of what is forgotten


def test_a_size_that_lies_ends_the_archive_where_it_lies() -> None:
    content = bytearray(tar_of(pairs(some_samples(3))))
    header = content.index(b"part/0001.txt")
    content[header + 124 : header + 136] = b"77777777777\0"
    block = bytes(content[header : header + 512])
    content[header + 148 : header + 156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:]))
    found = indexed(bytes(content))
    assert [(r["key"], r["fault"]) for r in found.table.to_pylist()] == [("part/0000", None), ("part/0001", "cut off")]
    assert found.cut is not None
    assert "or its size is not true" in found.cut

    content = bytearray(tar_of(pairs(some_samples(3))))
    header = content.index(b"part/0001.txt")
    content[header + 5] ^= 1
    found = indexed(bytes(content))
    assert found.cut == f"cut at byte {header:,}: bad checksum; what comes before is used"


def test_joined_archives_are_listed_as_cut() -> None:
    one = tar_of(pairs(some_samples(1)))
    found = indexed(one + one)
    assert len(found.table) == 1
    assert found.cut is not None
    assert "data follow" in found.cut
    assert indexed(one + bytes(100_000)).cut is None


def test_compressed_tars_and_other_files_are_refused_with_advice(tmp_path: Path, open_run: Any) -> None:
    content = tar_of(pairs(some_samples(2)))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.tar").write_bytes(content)
    (tmp_path / "d" / "b.tar.gz").write_bytes(gzip.compress(content))
    (tmp_path / "d" / "c.tar").write_bytes(gzip.compress(content))
    (tmp_path / "d" / "d.tar").write_bytes(b"no tar at all " * 100)
    (tmp_path / "d" / "e.tar").write_bytes(b"")
    with open_run(tmp_path / "d", corpus_options=PAIRS) as run:
        reasons = {Path(f["file"]).name: f["reason"] for f in run.failures}
        assert run.rows == 2
    assert "unpack it to a plain .tar" in reasons["b.tar.gz"]
    assert "compressed (gzip)" in reasons["c.tar"]
    assert "not a tar" in reasons["d.tar"]
    assert "an empty file" in reasons["e.tar"]
    with pytest.raises(CorpusError, match=r"none of the 1 files can be read .*unpack it"):
        open_run(tmp_path / "d" / "b.tar.gz", name="gz", corpus_options=PAIRS).__enter__()


def test_members_above_the_limit_are_not_read(tmp_path: Path, open_run: Any) -> None:
    samples = {"a": {"jpg": b"x" * 2049, "txt": b"one"}, "b": {"jpg": b"y" * 2048, "txt": b"two"}}
    samples["c"] = {"jpg": b"z", "txt": b"three", "json": b" " * 3000}
    write_tar(tmp_path / "a.tar", samples)
    tight = PAIRS | {"max_image_mb": 2048 / (1 << 20)}
    with open_run(tmp_path / "a.tar", corpus_options=tight) as run:
        reasons = unusable(run, "image", "text")
        assert reasons == {0: "image is larger than corpus.max_image_mb", 2: "json is larger than corpus.max_image_mb"}
        limited = run._reference("text")
    with open_run(tmp_path / "a.tar", corpus_options=PAIRS) as run:  # the index is the same
        assert unusable(run, "image", "text") == {}
        assert run._reference("text") != limited


def test_a_huge_sample_is_alone_in_its_row_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_index, "GROUP_BYTES", 4096)
    samples = {"a": {"jpg": b"x"}, "b": {"jpg": bytes(9000)}, "c": {"jpg": b"x"}, "d": {"jpg": b"x"}}
    assert indexed(tar_of(pairs(samples))).rows == [1, 1, 2]


def test_a_tar_is_indexed_once_and_known_again_when_it_moves(
    tmp_path: Path, open_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "data" / "a.tar", some_samples(3))
    with open_run(path, corpus_options=PAIRS) as run:
        shards = [s.fingerprint for s in run.shards]
        stat = path.stat()
        assert run.store.exists(*index_place(str(path), stat.st_size, stat.st_mtime_ns))
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.corpus.tar.index_tar", lambda *_: pytest.fail("indexed again"))
        with open_run(path, corpus_options=PAIRS) as run:
            assert len(rows_of(run)) == 3
    path.rename(tmp_path / "moved.tar")
    with open_run(tmp_path / "moved.tar", name="other", corpus_options=PAIRS) as run:
        assert [s.fingerprint for s in run.shards] == shards
    run.store.remove("corpus", "tar")
    with pytest.raises(CorpusError, match=r"the index of .* cannot be read"):
        rows_of(run)


def test_indexing_is_shared_out_where_there_is_much(
    tmp_path: Path, open_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.corpus.listing.TAR_BYTES_A_UNIT", 1)
    for i in range(3):
        write_tar(tmp_path / "data" / f"{i}.tar", some_samples(2, seed=i))
    with open_run(tmp_path / "data", corpus_options=PAIRS) as run:
        assert [(p["pass"], p["units"]) for p in run.manifest["passes"]] == [("list", 3)]
        assert run.rows == 6
        assert not run.store.exists("scratch", "listing")


def test_a_changed_tar_is_noticed(tmp_path: Path, open_run: Any) -> None:
    path = write_tar(tmp_path / "a.tar", some_samples(3))
    with open_run(path, corpus_options=PAIRS) as run:
        path.write_bytes(path.read_bytes() + bytes(512))
        with pytest.raises(CorpusError, match="has changed since it was listed"):
            rows_of(run)


def test_fields_of_the_documents_are_columns(tmp_path: Path, open_run: Any) -> None:
    documents = {
        "a": {"caption": "one", "n": 1, "deep": {"er": True}},
        "b": {"caption": 2.5, "n": None},
        "c": ["no", "object"],
        "d": {"caption": {"not": "text"}},
        "e": {"caption": "half \ud800 pair"},
    }
    samples = {k: {"jpg": b"x", "json": json.dumps(d).encode()} for k, d in documents.items()}
    samples |= {"f": {"jpg": b"x", "json": b"{broken"}, "g": {"jpg": b"x", "json": b"[" * 100_000}, "h": {"jpg": b"x"}}
    write_tar(tmp_path / "a.tar", samples)
    options = {"image": "image", "text": "json.caption", "id": "key", "columns": ["key"]}
    with open_run(tmp_path / "a.tar", corpus_options=options) as run:
        assert run.schema.names == [*COLUMNS, "json.caption"]
        found = [r["json.caption"] for r in rows_of(run, ["json.caption"])]
        assert found == ["one", "2.5", None, None, "half ? pair", None, None, None]
        nested = [r["json.deep.er"] for r in rows_of(run, ["json.deep.er"])]
        assert nested == ["true", *[None] * 7]
        assert set(unusable(run, "image", "text").values()) == {"image without caption"}
        shown = read_rows(run.shards, [(0, 0), (0, 1)], ["json.caption"])
        assert shown == {(0, 0): ["one"], (0, 1): ["2.5"]}


def test_conversations_of_documents(tmp_path: Path, open_run: Any) -> None:
    documents = [{"q": "one?", "a": "Eins."}, {"q": "two?"}]
    write_tar(tmp_path / "a.tar", {f"{i}": {"json": json.dumps(d).encode()} for i, d in enumerate(documents)})
    options = {"prompt": "json.q", "response": "json.a", "id": "key", "source": "json.q"}
    with open_run(tmp_path / "a.tar", corpus_options=options) as run:
        assert run.schema.names == [*COLUMNS, "json.q", "json.a"]
        found = [b["text"].to_pylist() for s in run.live for b in read_shard(run.layout, s, ["text"], 1024)]
        assert found == [["one?\n\nEins.", None]]
        assert unusable(run, "text") == {1: "no response"}
        before = run.identity("text")
    with open_run(tmp_path / "a.tar", name="2", corpus_options=options | {"max_image_mb": 1}) as run:
        assert run.identity("text") != before  # a document may now be too large


def test_documents_that_are_not_utf8_spoil_no_file(tmp_path: Path, open_run: Any) -> None:
    write_tar(tmp_path / "a.tar", {"a": {"txt": b"a", "json": b'{"n": "\xff"}'}, "b": {"txt": b"b", "json": b"{}"}})
    with open_run(tmp_path / "a.tar") as run:
        batches = [b for s in run.live for b in read_source(s, ["json", "json.n"], 1024)]
        assert [b.to_pylist() for b in batches] == [[{"json": None, "json.n": None}, {"json": "{}", "json.n": None}]]


def test_fields_of_documents_are_of_tars_alone(tmp_path: Path, open_run: Any) -> None:
    pq.write_table(pa.Table.from_pylist(as_rows(some_samples(2)), tar_index.SCHEMA), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"no column 'json.caption'"):
        open_run(tmp_path / "a.parquet", corpus_options={"text": "json.caption"}).__enter__()


def test_batches_hold_as_many_bytes_as_they_may() -> None:
    size = pa.array([3, 3, 3, 9, 3, None, 3])
    index = pa.table({"text_size": size, "fault": pa.array([None] * 4 + ["bad"] + [None] * 2, pa.string())})
    assert list(_cuts(index, ["text"], 100, 6)) == [(0, 2), (2, 3), (3, 4), (4, 7)]
    assert list(_cuts(index, ["text"], 2, 100)) == [(0, 2), (2, 4), (4, 6), (6, 7)]


def test_columns_that_a_tar_does_not_have(tmp_path: Path, open_run: Any) -> None:
    write_tar(tmp_path / "a.tar", some_samples(1))
    with pytest.raises(ConfigError, match=r"corpus.text: the corpus has no column 'caption'; it has key, image, text"):
        open_run(tmp_path / "a.tar", corpus_options={"text": "caption"}).__enter__()
    with pytest.raises(ConfigError, match=r"corpus.image: column 'key' is string|no column"):
        open_run(tmp_path / "a.tar", corpus_options={"image": "nothing"}).__enter__()


def test_rows_are_shown_by_their_address_and_only_their_start_is_read(tmp_path: Path, open_run: Any) -> None:
    samples = {
        f"{i}": {"jpg": b"x", "txt": b"%d" % i * 9000, "json": json.dumps({"pad": "x" * 9000, "n": i}).encode()}
        for i in range(5)
    }
    write_tar(tmp_path / "a.tar", samples)
    with open_run(tmp_path / "a.tar", corpus_options=PAIRS) as run:
        shown = read_rows(run.shards, [(0, 3), (0, 1)], ["text", "key"])
        assert shown == {(0, 1): ["1" * 4096, "1"], (0, 3): ["3" * 4096, "3"]}
        taken = take_from_tar(run.shards[0].pieces[0], 0, np.array([4]), ["text", "json.n", FAULT], 3)
        assert taken.to_pylist() == [{"text": "444", "json.n": "4", FAULT: None}]  # a document is read whole


def test_a_tar_beside_the_curated_parquet_of_another(tmp_path: Path, open_run: Any) -> None:
    samples = some_samples(3)
    write_tar(tmp_path / "data" / "a.tar", samples)
    pq.write_table(pa.Table.from_pylist(as_rows(some_samples(2, seed=1))), tmp_path / "data" / "b.parquet")
    both = {**PAIRS, "path": [str(tmp_path / "data" / "a.tar"), str(tmp_path / "data" / "b.parquet")]}
    with open_run("", corpus_options=both) as run:
        assert (run.rows, run.failures) == (5, [])
        assert rows_of(run) == as_rows(samples) + as_rows(some_samples(2, seed=1))
        assert unusable(run, "image", "text") == {}


def test_an_index_is_a_thin_table(tmp_path: Path, open_run: Any) -> None:
    path = write_tar(tmp_path / "a.tar", some_samples(1000, size=9000))
    with open_run(path, corpus_options=PAIRS) as run:
        size = sum(Store(run.store.uri).files("corpus", "tar").values())
        assert size < 40 * 1000
        assert run.rows == 1000
