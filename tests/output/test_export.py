"""Exports: what was curated comes back through each format's own reader, shard by shard, and again after a crash."""

from __future__ import annotations

import base64
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.corpus.storage import Store
from pipeline.errors import ConfigError, MissingExtra, TamisError
from pipeline.output.export._json import lines
from pipeline.output.export.base import Export, write_export
from pipeline.output.export.huggingface import Huggingface
from pipeline.output.export.jsonl import Jsonl
from pipeline.output.export.mds import Mds, encoding
from pipeline.output.export.megatron import Megatron
from pipeline.output.export.webdataset import Webdataset, extension
from pipeline.output.order import base as orders
from pipeline.output.order.base import write_order
from pipeline.output.order.repeated import Repeated
from pipeline.output.order.shuffled import Shuffled
from tests.output.feeding_runs import curated, kept, opened, ordinals, rows

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    table = rows().append_column("picture", pa.array([PNG + bytes([i]) for i in range(240)]))
    return curated(tmp_path_factory.mktemp("export"), table.drop_columns(["vector"]))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "PART_ROWS", 50)


def exported(run: str, export: Export, target: Path | str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What was written, and the rows that are expected there, in order."""
    with opened(run) as fed:
        order = write_order(fed, Shuffled(name="to-export"))
        described = write_export(fed, export, str(target), order)
        lying = ordinals(fed, order)
    assert len(order.parts) > 3
    wanted = [c for c in kept(run).column_names if c != "tamis"]
    return described, kept(run).select(export.columns or wanted).take(pa.array(lying)).to_pylist()


def plain(row: dict[str, Any]) -> dict[str, Any]:
    return {n: base64.b64encode(v).decode() if isinstance(v, bytes) else v for n, v in row.items()}


def test_json_lines_come_back(run: str, tmp_path: Path) -> None:
    described, expected = exported(run, Jsonl(), tmp_path / "out")
    found = []
    for name in described["files"]:
        with pa.CompressedInputStream(str(tmp_path / "out" / name), "zstd") as source:
            found += [json.loads(line) for line in source.read().splitlines()]
    assert found == [plain(r) for r in expected]
    assert described["rows"] == 200


def test_json_holds_bytes_at_any_depth_and_whatever_a_text_says() -> None:
    batch = pa.RecordBatch.from_pylist(
        [
            {"a": 'quote " \u2028 \x00 </script>', "b": {"c": b"\xff", "d": [b"", None]}, "e": None},
            {"a": None, "b": None, "e": 1.5},
        ]
    )
    first, second = map(json.loads, lines(batch).split(b"\n")[:2])
    assert first == {"a": 'quote " \u2028 \x00 </script>', "b": {"c": "/w==", "d": ["", None]}, "e": None}
    assert second == {"a": None, "b": None, "e": 1.5}


def test_datasets_reads_its_own(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Image, load_dataset

    described, expected = exported(run, Huggingface(images=("picture",)), tmp_path / "out")
    found = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert found.features["picture"] == Image()
    found = found.cast_column("picture", Image(decode=False))
    assert [r | {"picture": r["picture"]["bytes"]} for r in found] == expected
    card = (tmp_path / "out" / "README.md").read_text()
    assert "num_examples: 200" in card
    assert "What became of every row" in card
    assert len(described["files"]) > 4


@pytest.mark.parametrize("export", [Jsonl(), Huggingface(), Webdataset(image="picture")])
def test_an_object_store_gets_the_same_files(run: str, export: Export, tmp_path: Path, bucket: str) -> None:
    there, here = Store(f"{bucket}/out"), Store(str(tmp_path / "out"))
    described = [exported(run, export, store.uri)[0] for store in (there, here)]
    assert described[0]["files"] == described[1]["files"]
    assert there.files(recursive=True).keys() == here.files(recursive=True).keys() >= {*described[0]["files"]}
    for name in described[0]["files"]:
        assert there.read(name) == here.read(name)


def test_rows_that_an_order_repeats_are_counted(run: str, tmp_path: Path) -> None:
    from datasets import load_dataset

    with opened(run) as fed:
        order = write_order(fed, Repeated(epochs=2, name="twice"))
        described = write_export(fed, Huggingface(), str(tmp_path / "out"), order)
    assert described["rows"] == 400
    found = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(found) == 400  # the library compares them with what the card says
    assert "num_examples: 400" in (tmp_path / "out" / "README.md").read_text()


def test_webdataset_reads_its_own(run: str, tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    described, expected = exported(run, Webdataset(image="picture"), tmp_path / "out")
    tars = [str(tmp_path / "out" / f) for f in described["files"]]
    samples = list(wds.WebDataset(tars, shardshuffle=False, empty_check=False))
    assert len({s["__key__"] for s in samples}) == 200
    found = [json.loads(s["json"]) | {"text": s["txt"].decode(), "picture": s["png"]} for s in samples]
    assert found == [{k: r[k] for k in found[0]} for r in expected]
    with tarfile.open(tars[0]) as tar:
        assert all(m.isfile() and "/" not in m.name and m.mtime == 0 for m in tar)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (PNG, "png"),
        (b"\xff\xd8\xff\xe0", "jpg"),
        (b"GIF89a", "gif"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8", "webp"),
        (b"RIFF\x00\x00\x00\x00WAVE", "bin"),
        (b"", "bin"),
    ],
)
def test_images_are_named_by_what_they_are(content: bytes, name: str) -> None:
    assert extension(content) == name


def test_mds_reads_its_own(run: str, tmp_path: Path) -> None:
    streaming = pytest.importorskip("streaming")
    _, expected = exported(run, Mds(columns=("n", "text", "picture")), tmp_path / "out")
    found = streaming.StreamingDataset(local=str(tmp_path / "out"), shuffle=False, batch_size=1)
    assert [dict(found[i]) for i in range(len(found))] == expected


def test_mds_types() -> None:
    kinds = {pa.string(): "str", pa.large_binary(): "bytes", pa.int32(): "int32", pa.bool_(): "uint8"}
    kinds |= {pa.list_(pa.int64()): "json", pa.dictionary(pa.int32(), pa.string()): "str"}
    assert {k: encoding(k) for k in kinds} == kinds


def test_mds_says_that_its_library_lives_elsewhere(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "streaming", None)
    with pytest.raises(ConfigError, match="install it in another"):
        exported(run, Mds(), tmp_path / "out")


def tokenizer(directory: Path) -> str:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = ["[UNK]", "</s>", "row", "of", "word", *map(str, range(240))]
    made = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = WhitespaceSplit()
    made.save(str(directory / "tokenizer.json"))
    return str(directory / "tokenizer.json")


def test_megatron_reads_its_own(run: str, tmp_path: Path) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    described, expected = exported(run, Megatron(tokenizer=tokenizer(tmp_path), end="</s>"), tmp_path / "out")
    words = {"row": 2, "of": 3, "word": 4} | {str(i): 5 + i for i in range(240)}
    found = []
    for name in described["files"]:
        if name.endswith(".bin"):
            dataset = indexed.IndexedDataset(str(tmp_path / "out" / name.removesuffix(".bin")))
            assert dataset.index.dtype == np.uint16
            assert np.array_equal(dataset.document_indices, np.arange(len(dataset) + 1))
            found += [dataset[i].tolist() for i in range(len(dataset))]
    assert found == [[*(words[w] for w in r["text"].split()), 1] for r in expected]


def test_the_bytes_of_megatrons_index(tmp_path: Path, run: str) -> None:
    """As its definition lists them: magic, version, code of the type, counts, then lengths, pointers, documents."""
    pytest.importorskip("megatron.core.datasets.indexed_dataset")
    _, expected = exported(run, Megatron(tokenizer=tokenizer(tmp_path), end="</s>"), tmp_path / "out")
    raw = (tmp_path / "out" / "part-00000.idx").read_bytes()
    count = int.from_bytes(raw[18:26], "little")
    lengths = np.frombuffer(raw, "<i4", count, 34)
    pointers = np.frombuffer(raw, "<i8", count, 34 + 4 * count)
    assert raw[:9] == b"MMIDIDX\x00\x00"
    assert int.from_bytes(raw[9:17], "little") == 1
    assert raw[17] == 8  # uint16
    assert int.from_bytes(raw[26:34], "little") == count + 1
    assert lengths.tolist() == [len(r["text"].split()) + 1 for r in expected[:count]]
    assert pointers.tolist() == [0, *(2 * np.cumsum(lengths)[:-1]).tolist()]
    assert np.frombuffer(raw, "<i8", -1, 34 + 12 * count).tolist() == list(range(count + 1))


# ---- what all have in common


def test_a_second_call_writes_nothing_and_what_is_lost_comes_back(run: str, tmp_path: Path) -> None:
    def made() -> dict[str, tuple[int, bytes]]:
        exported(run, Jsonl(), tmp_path / "out")
        return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "out").iterdir()}

    first = made()
    assert made() == first
    (tmp_path / "out" / "part-00002.jsonl.zst").unlink()
    again = made()
    assert {n: b for n, (_, b) in again.items()} == {n: b for n, (_, b) in first.items()}
    assert [n for n in first if again[n][0] != first[n][0]] == ["part-00002.jsonl.zst"]


def test_fewer_rows_leave_no_shard_of_the_larger_export(tmp_path: Path) -> None:
    for count in (200, 60):
        run = curated(tmp_path, select={"budget": {"rows": count}})
        with opened(run) as fed:
            write_export(fed, Jsonl(columns=("text",)), str(tmp_path / "out"), None)
            files = len(fed.curated.files)
        assert len(list((tmp_path / "out").iterdir())) == files


def test_a_crash_in_the_middle_is_continued(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Jsonl.write

    def fails(self: Jsonl, shard: Any, directory: Path) -> dict[str, Any]:
        if shard.number == 2:
            raise TamisError("the power fails")
        return write(self, shard, directory)

    monkeypatch.setattr(Jsonl, "write", fails)
    with pytest.raises(TamisError, match="the power fails"):
        exported(run, Jsonl(), tmp_path / "out")
    monkeypatch.setattr(Jsonl, "write", write)
    left = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    described, _ = exported(run, Jsonl(), tmp_path / "out")
    assert 0 < len(left) < len(described["files"])
    assert all((tmp_path / "out" / n).stat().st_mtime_ns == time for n, time in left.items())


def test_files_that_are_not_ours_are_not_touched(run: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("dear")
    with pytest.raises(ConfigError, match=r"holds thesis\.tex, which this run has not written"):
        exported(run, Jsonl(), tmp_path / "out")


def test_a_column_that_is_not_there_is_named(run: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no column 'nothing'"):
        exported(run, Jsonl(columns=("nothing",)), tmp_path / "out")
    pytest.importorskip("webdataset")
    with pytest.raises(ConfigError, match="no column 'nothing' of images"):
        exported(run, Webdataset(image="nothing"), tmp_path / "out")


@pytest.mark.parametrize(
    ("module", "export"), [("webdataset", Webdataset()), ("megatron.core.datasets", Megatron(tokenizer="x"))]
)
def test_a_library_that_is_missing_is_named(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, export: Export
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingExtra, match=r"tamis\[export\]"):
        exported(run, export, tmp_path / "out")
