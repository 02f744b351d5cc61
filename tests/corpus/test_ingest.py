"""`tamis ingest` as a whole: what goes in comes out or is accounted for, once, however often it runs."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from pipeline.corpus.ingest import Ingested, ingest, ingest_command, parse_options
from pipeline.corpus.listing import expand
from pipeline.corpus.readers.base import IngestOptions
from pipeline.errors import ConfigError, CorpusError, MissingExtra, NoShardLeft


def jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def rows_of(output: Path) -> pa.Table:
    """The corpus as Tamis itself lists it: this must not find what is in quarantine."""
    return pa.concat_tables(pq.read_table(uri) for uri, _, _ in expand([str(output)]))


def quarantine_of(output: Path) -> list[dict[str, object]]:
    files = sorted((output / "_quarantine").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def contents(output: Path) -> dict[str, bytes]:
    return {str(p.relative_to(output)): p.read_bytes() for p in sorted(output.rglob("*.parquet"))}


@pytest.fixture(scope="module")
def documents(shared_data: Path) -> pa.Table:
    return pq.read_table(shared_data / "text_corpus" / "parts" / "part-00.parquet").slice(0, 1500)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".ndjson.zst"])
def test_jsonl_comes_out_as_it_went_in(documents: pa.Table, tmp_path: Path, ending: str) -> None:
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in documents.to_pylist())
    with pa.output_stream(tmp_path / f"docs{ending}", compression="detect") as sink:
        sink.write(lines)
    done = ingest(str(tmp_path / f"docs{ending}"), str(tmp_path / "out"))
    assert (done.rows, done.quarantined, done.exit_code) == (1500, 0, 0)
    assert done.bytes == sum(len(t.encode()) for t in documents["text"].to_pylist())
    assert rows_of(tmp_path / "out").select(documents.column_names).to_pylist() == documents.to_pylist()


def test_ids_are_the_users_or_the_hash_of_the_text(tmp_path: Path) -> None:
    rows = [{"id": 7, "text": "a"}, {"id": None, "text": "b"}, {"text": "c"}]
    ingest(str(jsonl(tmp_path / "x.jsonl", rows)), str(tmp_path / "out"))
    assert rows_of(tmp_path / "out")["id"].to_pylist() == ["7", *(xxhash.xxh3_128_hexdigest(t) for t in (b"b", b"c"))]


def test_other_names_for_text_and_id(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "x.jsonl", [{"url": "u", "content": "a", "lang": "en", "score": 1}])
    ingest(str(source), str(tmp_path / "out"), IngestOptions(text="content", id="url", fields=("score:string",)))
    assert rows_of(tmp_path / "out").to_pylist() == [{"id": "u", "text": "a", "score": "1"}]
    clash = jsonl(tmp_path / "y.jsonl", [{"content": "a", "text": "b"}])
    with pytest.raises(NoShardLeft, match=r"a field 'text' beside text=content.*fields="):
        ingest(str(clash), str(tmp_path / "out"), IngestOptions(text="content"))


def test_all_outputs_have_the_fields_of_all_inputs(tmp_path: Path) -> None:
    jsonl(tmp_path / "in/a.jsonl", [{"text": "a", "n": 1, "tag": "x", "both": 1}])
    jsonl(tmp_path / "in/deep/b.jsonl", [{"text": "b", "n": 1.5, "list": [1, 2], "both": "s", "map": {"k": [1]}}])
    (tmp_path / "in/c.csv").write_text("text,tag\nc,y\n")
    (tmp_path / "in/d.txt").write_text("d\n")
    (tmp_path / "in/notes.log").write_text("not data")
    done = ingest(str(tmp_path / "in"), str(tmp_path / "out"))
    assert (done.files, done.rows, done.ignored) == (4, 4, 1)
    table = rows_of(tmp_path / "out")
    kinds = dict(zip(table.schema.names, map(str, table.schema.types), strict=True))
    assert {n: kinds[n] for n in ("n", "tag", "both", "map")} == {
        "n": "double",
        "tag": "string",
        "both": "string",
        "map": "string",
    }
    assert table.schema.field("list").type.value_type == pa.int64()
    assert table["text"].to_pylist() == ["a", "c", "d\n", "b"]
    assert table["both"].to_pylist() == ["1", None, None, "s"]
    assert table["map"].to_pylist() == [None, None, None, '{"k": [1]}']


BAD = [
    (b'{"text": "good"}', None),
    (b'{"text": null}', "null text"),
    (b'{"other": 1}', "null text"),
    (b'{"text": " \\t\\n\\u00a0"}', "blank text"),
    (b'{"text": "caf\xe9"}', "not UTF-8: at byte 13"),
    (b'{"text": "cut off', "not JSON"),
    (b'["text"]', "not a JSON object"),
    (b'{"text": "a"}{"text": "b"}', "not JSON"),
    (b'{"text": "half \\ud83d"}', "half a surrogate pair"),
    (b'{"text": "whole \\ud83d\\ude00 and \\\\ud83d"}', None),
    (b'{"text": "nul \\u0000 stays"}', None),
    (b'{"text": "' + b"x" * 1_200_000 + b'"}', "record too large: above record_mb=1"),
    (b'{"text": "n", "n": "five"}', "cannot parse 'five'"),
    (b'{"text": "deep", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "DepthLimitExceeded"),
    (b'{"text": "also good", "n": 2}', None),
]


def test_bad_rows_are_quarantined_one_by_one(tmp_path: Path) -> None:
    lines = [b'{"text": "first", "n": 1}', b"", *(line for line, _ in BAD)]
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    done = ingest(str(tmp_path / "bad.jsonl"), str(tmp_path / "out"), IngestOptions(record_mb=1, fields=("n:int64",)))
    good = [json.loads(line)["text"] for line, reason in BAD if reason is None]
    assert rows_of(tmp_path / "out")["text"].to_pylist() == ["first", *good]
    found = sorted(quarantine_of(tmp_path / "out"), key=lambda row: row["record"])
    expected = [(3 + i, line, reason) for i, (line, reason) in enumerate(BAD) if reason]
    assert [row["record"] for row in found] == [number for number, _, _ in expected]
    for row, (_, line, reason) in zip(found, expected, strict=True):
        assert reason in row["reason"]
        assert row["file"] == str(tmp_path / "bad.jsonl")
        if row["offset"] is not None:
            assert b"\n".join(lines)[row["offset"] :].startswith(line)
            assert line.startswith(row["raw"])
    assert done.exit_code == 0
    assert done.rows + done.quarantined == len(BAD) + 1
    assert list(done.reasons.items())[:2] == [("not JSON", 3), ("null text", 2)]


def test_a_line_without_end_costs_that_line_only(tmp_path: Path) -> None:
    huge = b'{"text": "' + b"y" * (20 << 20) + b'"}'
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n' + huge + b'\n{"text": "b"}\n')
    ingest(str(tmp_path / "x.jsonl"), str(tmp_path / "out"), IngestOptions(record_mb=2))
    assert rows_of(tmp_path / "out")["text"].to_pylist() == ["a", "b"]
    (row,) = quarantine_of(tmp_path / "out")
    assert (row["record"], row["offset"], row["bytes"]) == (2, 14, len(huge) + 1)
    assert row["raw"] == huge[: 64 << 10]
    ingest(str(tmp_path / "x.jsonl"), str(tmp_path / "out"))
    assert len(rows_of(tmp_path / "out")["text"][1].as_py()) == 20 << 20
    assert quarantine_of(tmp_path / "out") == []


def test_an_unreadable_file_stops_no_other(documents: pa.Table, tmp_path: Path) -> None:
    rows = documents.select(["text"]).slice(0, 200).to_pylist()
    jsonl(tmp_path / "in/good.jsonl", [{"text": "a"}])
    whole = jsonl(tmp_path / "in/cut.jsonl.gz", rows).read_bytes()
    (tmp_path / "in/cut.jsonl.gz").write_bytes(whole[: len(whole) * 9 // 10])
    (tmp_path / "in/fake.jsonl.zst").write_bytes(b"no zstd at all")
    (tmp_path / "in/array.json").write_bytes(b'[{"text": "a"}]')
    (tmp_path / "in/pretty.json").write_bytes(b'{\n "text": "a"\n}\n')
    jsonl(tmp_path / "in/other.jsonl", [{"body": "a"}])
    jsonl(tmp_path / "in/number.jsonl", [{"text": 1}])
    done = ingest(str(tmp_path / "in"), str(tmp_path / "out"), IngestOptions(row_group_mb=0.01, file_mb=0.01))
    reasons = {Path(uri).name: reason for uri, reason in done.failed.items()}
    assert done.exit_code == 2
    assert rows_of(tmp_path / "out")["text"].to_pylist() == ["a"]
    for name, part in {
        "cut.jsonl.gz": "Truncated compressed stream",
        "fake.jsonl.zst": "ZSTD",
        "array.json": "a JSON array, not JSON lines",
        "pretty.json": "not JSON lines",
        "other.jsonl": "no field 'text': it has body; set text=NAME",
        "number.jsonl": "field 'text' holds int64, not text",
    }.items():
        assert part in reasons.pop(name)
    assert not reasons
    report = json.loads((tmp_path / "out/_ingest.json").read_text())
    assert report["failed"] == done.failed
    assert not [p for p in (tmp_path / "out").rglob("*") if ".tmp" in p.name]
    (tmp_path / "in/good.jsonl").unlink()
    with pytest.raises(NoShardLeft, match="none of the 6 files"):
        ingest(str(tmp_path / "in"), str(tmp_path / "out"))


def test_a_file_that_breaks_takes_its_rows_away(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in/x.jsonl", [{"text": "a"}, {"text": ""}])
    jsonl(tmp_path / "in/y.jsonl", [{"text": "b"}])
    ingest(str(tmp_path / "in"), str(tmp_path / "out"))
    source.write_bytes(b"[broken")
    assert ingest(str(tmp_path / "in"), str(tmp_path / "out")).exit_code == 2
    assert rows_of(tmp_path / "out")["text"].to_pylist() == ["b"]
    assert quarantine_of(tmp_path / "out") == []


def test_a_rerun_does_what_is_missing_or_changed(documents: pa.Table, tmp_path: Path) -> None:
    halves = documents.slice(0, 700), documents.slice(700)
    for name, half in zip("ab", halves, strict=True):
        jsonl(tmp_path / f"in/{name}.jsonl", half.to_pylist())
    options = IngestOptions(row_group_mb=0.25, file_mb=0.25)

    def run(options: IngestOptions = options) -> Ingested:
        return ingest(str(tmp_path / "in"), str(tmp_path / "out"), options)

    first = run()
    before = contents(tmp_path / "out")
    assert first.resumed == 0
    assert first.parts == len(before) > 4
    groups = [pq.read_metadata(tmp_path / "out" / name).num_row_groups for name in before]
    assert max(groups) > 1, "a part holds several row groups"

    again = run()
    assert (again.resumed, again.rows, again.parts) == (2, first.rows, first.parts)

    last = sorted(before)[-1]
    (tmp_path / "out" / last).unlink()  # as after a crash: parts without a last one
    assert run().resumed == 1
    assert contents(tmp_path / "out") == before, "the same bytes as undisturbed"

    jsonl(tmp_path / "in/b.jsonl", halves[1].slice(0, 10).to_pylist())
    changed = run()
    assert (changed.resumed, changed.rows) == (1, 710)
    assert len(contents(tmp_path / "out")) == changed.parts, "no part of the longer output is left"

    jsonl(tmp_path / "in/c.jsonl", [{"text": "new", "id": "1", "source": "c"}])
    assert run().resumed == 2
    assert run(options.model_copy(update={"record_mb": 31})).resumed == 0


def test_zero_rows_are_done_too(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert ingest(str(tmp_path / "empty.jsonl"), str(tmp_path / "out")).rows == 0
    assert ingest(str(tmp_path / "empty.jsonl"), str(tmp_path / "out")).resumed == 1
    assert rows_of(tmp_path / "out").schema.names == ["id", "text"]


def test_a_datasets_directory_without_its_caches(documents: pa.Table, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset(documents)
    datasets.DatasetDict(train=data.select(range(1000)), test=data.select(range(1000, 1500))).save_to_disk(
        tmp_path / "saved", num_shards={"train": 2, "test": 1}
    )
    cache = tmp_path / "saved/train/cache-0123.arrow"
    cache.write_bytes((tmp_path / "saved/test/data-00000-of-00001.arrow").read_bytes())
    done = ingest(str(tmp_path / "saved"), str(tmp_path / "out"))
    assert (done.files, done.rows, done.quarantined, done.ignored) == (3, 1500, 0, 0)
    table = rows_of(tmp_path / "out").select(documents.column_names)
    assert table.slice(500).to_pylist() == documents.slice(0, 1000).to_pylist()  # "test" sorts before "train"
    broken = tmp_path / "saved/test/data-00000-of-00001.arrow"
    broken.write_bytes(broken.read_bytes()[:-5000])
    done = ingest(str(tmp_path / "saved"), str(tmp_path / "out"))
    assert [Path(uri) for uri in done.failed] == [broken]


def test_a_bomb_does_not_fill_the_memory(tmp_path: Path) -> None:
    """640 MiB in 3 MB, and no line ends: one record, while the memory of the whole process stays far below its size."""
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(b'{"text": "a"}\n')
        for _ in range(40):
            file.write(bytes(16 << 20))
    program = (
        "import sys; from pathlib import Path; from pipeline.corpus.ingest import ingest, parse_options\n"
        "done = ingest(sys.argv[1], sys.argv[2], parse_options([sys.argv[3]]))\n"
        "peak = next(w for w in Path('/proc/self/status').read_text().splitlines() if w.startswith('VmHWM'))\n"
        "print(done.rows, done.quarantined, int(peak.split()[1]) >> 10)"
    )

    def run(option: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, str(tmp_path / "bomb.jsonl.gz"), str(tmp_path / "out"), option]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)

    rows, quarantined, mib = map(int, run("record_mb=32").stdout.split())
    assert (rows, quarantined) == (1, 1)
    assert mib < 400
    assert "does not end within" in run("record_mb=8").stderr  # more than 64 times what a record may be: the file fails


def test_errors_at_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(tmp_path / "out")
    (tmp_path / "a.parquet").write_bytes(b"x")
    for path, message in {
        "nowhere": "nothing to ingest",
        "a.parquet": "needs no ingest",
        "*.jsonl": "nothing to ingest",
    }.items():
        with pytest.raises(CorpusError, match=message):
            ingest(str(tmp_path / path), out)
    with pytest.raises(CorpusError, match="cannot list 'nope://x'"):
        ingest("nope://x", out)
    (tmp_path / "a.warc.wat.gz").write_bytes(b"")
    with pytest.raises(CorpusError, match="take the WARC or WET"):
        ingest(str(tmp_path / "a.warc.wat.gz"), out)
    (tmp_path / "a.warc").write_bytes(b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"fastwarc, which is not installed: pip install 'tamis\[web\]'"):
        ingest(str(tmp_path / "a.warc"), out)
    for override, message in {
        "text": "write name=value",
        "txt=a": "unknown option; the options are format, text, id",
        "fields=[n:int]": "the types are string, int64",
        "encoding=utf-99": "no encoding",
        "record_mb=0": "greater than 0",
    }.items():
        with pytest.raises(ConfigError, match=message):
            parse_options([override])
    assert parse_options(["fields=[lang, n:int64]", "document=line"]).fields == ("lang", "n:int64")


def test_the_command_says_what_came_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jsonl(tmp_path / "in/x.jsonl", [{"text": "abc"}, {"text": ""}])
    (tmp_path / "in/broken.json").write_bytes(b"[]")
    assert ingest_command([str(tmp_path / "in")], str(tmp_path / "out"), [], "inline", None) == 2
    printed = capsys.readouterr().out
    assert "1 rows, 0.0 MB of text, in 1 Parquet files" in printed
    assert "1 of 2 files read" in printed
    assert "1 records in" in printed
    assert "1 blank text" in printed
    assert "broken.json: a JSON array" in printed
