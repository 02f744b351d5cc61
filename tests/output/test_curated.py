"""The nanochat layout: what that trainer's loader reads, shard by shard and rank by rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.errors import TamisError
from pipeline.output.curated import write_curated
from pipeline.run import Run
from pipeline.select.stage import Selection

Sieve = Callable[..., tuple[Run, Selection]]
NANOCHAT = {"output": {"layout": "nanochat", "file_mb": 0.1}, "select": {"budget": {"rows": 3500}}}


def batches(directory: Path, split: str, start: int, step: int) -> Iterator[list[str]]:
    """How nanochat reads: every file but the last to train, row group by row group in strides of the ranks."""
    paths = sorted(p for p in directory.iterdir() if p.suffix == ".parquet")
    for path in paths[:-1] if split == "train" else paths[-1:]:
        file = pq.ParquetFile(path)
        for group in range(start, file.num_row_groups, step):
            yield file.read_row_group(group).column("text").to_pylist()


def test_ranks_read_every_row_once_and_the_last_shard_validates(sieved: Sieve, corpus: Path) -> None:
    run, selection = sieved(corpus, **NANOCHAT)
    directory, files = write_curated(run, selection)
    place = Path(directory.path)
    assert [f["file"] for f in files] == [f"shard_{i:05d}.parquet" for i in range(len(files))]
    assert len(files) > 3
    train = [t for rank in range(4) for batch in batches(place, "train", rank, 4) for t in batch]
    validation = [t for batch in batches(place, "val", 0, 1) for t in batch]
    assert len(validation) == 35
    assert len(train) == len(set(train)) == 3500 - 35
    assert not set(train) & set(validation)
    for file in files:
        footer = pq.read_metadata(place / file["file"])
        assert footer.schema.names == ["text"]
        assert {footer.row_group(i).num_rows for i in range(footer.num_row_groups - 1)} <= {1024}


def test_a_second_call_leaves_all_shards_as_they_are(sieved: Sieve, corpus: Path) -> None:
    run, selection = sieved(corpus, **NANOCHAT)
    directory, files = write_curated(run, selection)
    times = {p: p.stat().st_mtime_ns for p in Path(directory.path).glob("*.parquet")}
    assert write_curated(run, selection) == (directory, files)
    assert {p: p.stat().st_mtime_ns for p in Path(directory.path).glob("*.parquet")} == times


def test_the_column_is_named_text_whatever_the_corpus_calls_it(sieved: Sieve, corpus: Path, tmp_path: Path) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    for path in corpus.iterdir():
        pq.write_table(pq.read_table(path).rename_columns(["id", "content"]), source / path.name)
    run, selection = sieved(source, corpus={"path": str(source), "text": "content", "id": "id"}, **NANOCHAT)
    directory, _ = write_curated(run, selection)
    assert sum(len(batch) for split in ("train", "val") for batch in batches(Path(directory.path), split, 0, 1)) == 3500


def test_one_row_cannot_train_and_validate(sieved: Sieve, corpus: Path) -> None:
    run, selection = sieved(corpus, **NANOCHAT | {"select": {"budget": {"rows": 1}}})
    with pytest.raises(TamisError, match="needs two rows"):
        write_curated(run, selection)


def test_changing_the_layout_leaves_none_of_the_other_ones_files(sieved: Sieve, corpus: Path, tmp_path: Path) -> None:
    place = tmp_path / "out"
    for name, layout in (("one", "nanochat"), ("two", "parquet")):
        run, selection = sieved(corpus, name, output={"layout": layout, "path": str(place)})
        _, files = write_curated(run, selection)
    assert [p.name for p in place.iterdir()] == ["part-00000.parquet"] == [files[0]["file"]]
