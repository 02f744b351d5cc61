"""The loader over real curated runs: batches, resuming, worker processes, ranks, and what is refused."""

from __future__ import annotations

import json
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from pipeline.corpus.storage import Store
from pipeline.curation import curate
from pipeline.engine.pool import InlinePool
from pipeline.errors import ConfigError, CorpusError
from pipeline.models.training import train_tokenizer
from pipeline.output.feeding import FedRun, feeding
from pipeline.output.loader import ROW, VALID, CuratedDataset, CuratedLoader, Tokenized, language_model, tensors
from pipeline.output.loader.source import open_curated
from pipeline.output.order._arrange import arrange
from pipeline.output.order.base import write_order
from pipeline.output.order.shuffled import Shuffled
from pipeline.output.pack.base import write_packed
from pipeline.output.pack.best_fit import BestFit
from tests.output import loader_rank
from tests.tiny_lm import sentences

ROWS, BATCH = 1000, 16


def curated(directory: Path, seed: int = 0, **output: Any) -> str:
    """A run that kept 1,000 of 2,000 rows, in four files of row groups of 40; `number` is a row's own."""
    rng = np.random.default_rng(seed)
    numbers = np.arange(2000)
    table = pa.table(
        {
            "text": [f"text {i} {' word' * int(n)}" for i, n in zip(numbers, rng.integers(1, 30, 2000), strict=True)],
            "number": numbers,
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(numbers, 3).astype(np.float32)), 3),
            "tokens": pa.array([[int(i)] * int(n) for i, n in zip(numbers, rng.integers(0, 5, 2000), strict=True)]),
        }
    )
    directory.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, directory / "corpus.parquet", row_group_size=250)
    config = {
        "corpus": {"path": str(directory / "corpus.parquet"), "shard_mb": 0.01},
        "scores": ["random"],
        "select": {"budget": {"rows": ROWS}},
        "output": {"row_group_rows": 40, "file_mb": 0.01} | output,
        "engine": {"address": "inline"},
        "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
        "seed": seed,
        "run": str(directory / "run"),
    }
    curate(config, quiet=True)
    return str(directory / "run")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return curated(tmp_path_factory.mktemp("loader"))


@pytest.fixture
def own(run: str, tmp_path: Path) -> str:
    """A copy of the run to change."""
    return str(shutil.copytree(run, tmp_path / "own"))


def fed(run: str) -> FedRun:
    return feeding(run, lambda _: InlinePool(), quiet=True)


def opened(run: str, rank: int = 0, world: int = 1, batch: int = BATCH, **options: Any) -> CuratedDataset:
    kept = {"columns": ["number"], "lanes": 4, "shuffle_mb": 0.001} | options
    return CuratedDataset(run, batch, rank=rank, world_size=world, **kept)


def numbers(batches: Any) -> list[list[int]]:
    return [batch["number"].tolist() for batch in batches]


def joined(ranks: list[list[list[int]]]) -> list[list[int]]:
    """Global batches from those of every rank."""
    assert len({len(batches) for batches in ranks}) == 1, "a rank has a batch more"
    return [list(chain(*parts)) for parts in zip(*ranks, strict=True)]


@pytest.fixture(scope="module")
def expected(run: str) -> list[list[int]]:
    """The first epoch as one process reads it."""
    return numbers(opened(run))


# ---- batches


def test_a_batch_is_tensors(run: str) -> None:
    data = opened(run, columns=None, numbered=True, drop_last=False)
    batches = list(data)
    assert len(batches) == len(data) == -(-ROWS // BATCH)
    table = pa.concat_tables([pq.read_table(p) for p in sorted(Path(run, "curated").iterdir())])
    first = batches[0]
    assert set(first) == {"text", "number", "vector", "tokens", "tokens_mask", ROW, VALID}
    assert (first["number"].dtype, first["number"].shape) == (torch.int64, (BATCH,))
    assert (first["vector"].dtype, first["vector"].shape) == (torch.float32, (BATCH, 3))
    assert first["tokens_mask"].dtype == torch.bool
    for batch in batches:
        rows = table.take(batch[ROW].numpy())
        assert rows["text"].to_pylist() == batch["text"]
        assert rows["number"].to_pylist() == batch["number"].tolist()
        assert torch.equal(batch["vector"], batch["number"].float()[:, None].expand(-1, 3))
        ragged = [row[mask].tolist() for row, mask in zip(batch["tokens"], batch["tokens_mask"], strict=True)]
        assert ragged == rows["tokens"].to_pylist()
        assert not batch["tokens"][~batch["tokens_mask"]].any()
    assert [int(b[VALID].sum()) for b in batches] == [BATCH] * 62 + [ROWS - 62 * BATCH]
    assert all(b["text"] for b in batches)


def test_without_a_shuffle_rows_come_as_they_lie(run: str) -> None:
    data = opened(run, shuffle=False, numbered=True)
    assert [row for b in data for row in b[ROW].tolist()] == list(range(ROWS // BATCH * BATCH))


def test_every_epoch_has_an_order_of_its_own_and_the_same_rows(run: str, expected: list[list[int]]) -> None:
    data = opened(run, drop_last=False)
    epochs = [numbers(data) for _ in range(2)]
    assert data.epoch == 2
    data.set_epoch(0)
    assert numbers(data) == epochs[0]
    assert epochs[0] != epochs[1]
    assert set(chain(*epochs[0])) == set(chain(*epochs[1]))
    assert len(set(chain(*epochs[0]))) == ROWS
    assert numbers(opened(run, seed=1)) != expected


def test_nulls(tmp_path: Path) -> None:
    table = pa.table({"x": pa.array([1.0, None]), "r": pa.array([None, [1, 2]], pa.list_(pa.int32()))})
    batch = tensors(table)
    assert batch["x"][0] == 1
    assert batch["x"][1].isnan()
    assert batch["r_mask"].tolist() == [[False, False], [True, True]]
    with pytest.raises(CorpusError, match="column 'n' has null for a value"):
        tensors(pa.table({"n": pa.array([1, None])}))
    with pytest.raises(CorpusError, match="column 'v' has rows without values"):
        tensors(pa.table({"v": pa.array([[1], None], pa.list_(pa.int8(), 1))}))
    assert tensors(pa.table({"s": [{"a": 1}, None]})) == {"s": [{"a": 1}, None]}
    assert tensors(pa.table({"b": [True, False]}))["b"].dtype == torch.bool
    sliced = pa.concat_tables([table.slice(1), table.slice(1)])
    assert tensors(sliced)["r"].tolist() == [[1, 2], [1, 2]]


def test_packed_sequences_as_a_language_model_takes_them() -> None:
    def lists(values: list[list[Any]], kind: pa.DataType) -> pa.Array:
        return pa.array(values, pa.list_(kind, 6))

    table = pa.table(
        {
            "input_ids": lists([[5, 6, 2, 7, 2, 0]], pa.int32()),
            "position_ids": lists([[0, 1, 2, 0, 1, 0]], pa.int32()),
            "loss_mask": lists([[True, True, False, True, True, False]], pa.bool_()),
        }
    )
    batch = language_model(table)
    assert batch["labels"].tolist() == [[-100, 6, -100, -100, 2, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]
    assert {t.dtype for t in batch.values()} == {torch.int64}
    assert "loss_mask" not in batch


def test_texts_tokenised_as_they_are_loaded(run: str) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(sentences(50), 300), eos_token="<|end|>")
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    batch = next(iter(opened(run, columns=["text"], collate=Tokenized(tokenizer, 12))))
    texts = next(iter(opened(run, columns=["text"])))["text"]
    for text, ids, mask, labels in zip(
        texts, *(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:12]
        assert ids[mask.bool()].tolist() == whole
        assert labels.tolist() == whole + [-100] * int((~mask.bool()).sum())


# ---- resuming


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata 0.11 under torch 2.14
@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_dataloader_resumes_to_the_same_next_batch(run: str, expected: list[list[int]], workers: int) -> None:
    for taken in (0, 1, 5):
        loader = StatefulDataLoader(opened(run), batch_size=None, num_workers=workers)
        batches = iter(loader)
        assert numbers(next(batches) for _ in range(taken)) == expected[:taken]
        state = loader.state_dict()
        resumed = StatefulDataLoader(opened(run), batch_size=None, num_workers=workers)
        resumed.load_state_dict(state)
        assert numbers(resumed) == expected[taken:]


def test_the_state_is_of_the_training_not_of_its_workers(run: str, expected: list[list[int]]) -> None:
    """Begun by one rank with two workers, gone on with by two ranks with none, then by four with one each."""
    loader = CuratedLoader(opened(run), workers=2)
    batches = iter(loader)
    assert numbers(next(batches) for _ in range(7)) == expected[:7]
    state = json.loads(json.dumps(loader.state_dict()))
    assert (state["epoch"], state["rows"], state["worker"]) == (0, 7 * BATCH, None)
    two = [CuratedLoader(opened(run, rank, 2)) for rank in range(2)]
    for one in two:
        one.load_state_dict(state)
    several = [iter(one) for one in two]
    assert joined([numbers(next(it) for _ in range(4)) for it in several]) == expected[7:11]
    late = [CuratedLoader(opened(run, rank, 4), workers=rank % 2) for rank in range(4)]
    for one in late:
        one.load_state_dict(two[1].state_dict())  # that of any rank
    assert joined([numbers(one) for one in late]) == expected[11:]


def test_a_loader_goes_on_through_epochs(run: str, expected: list[list[int]]) -> None:
    loader = CuratedLoader(opened(run))
    second = numbers(opened(run))
    data = opened(run)
    data.set_epoch(1)
    second = numbers(data)
    batches = iter(loader)
    for _ in range(len(loader) - 1):
        next(batches)
    assert next(batches)["number"].tolist() == expected[-1]
    assert (loader.state_dict()["epoch"], loader.state_dict()["rows"]) == (1, 0)
    loader.set_epoch(1)  # as a trainer does
    assert numbers(loader) == second
    broken = CuratedLoader(opened(run))
    for count, batch in enumerate(broken):
        assert batch["number"].tolist() == expected[count]
        if count == 2:
            break
    assert numbers(broken) == expected[3:]
    broken.data.seek(len(loader) + 5)
    assert numbers(broken) == second[5:]


def test_iterating_leaves_global_random_numbers_alone(run: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(iter(CuratedLoader(opened(run))))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_state_of_something_else_is_refused(run: str, own: str) -> None:
    state = opened(run).state_dict()
    for changed, what in (
        ({"batch": 32}, "batch: 16 there, 32 here"),
        ({"seed": 4}, "seed: 0 there, 4 here"),
        ({"lanes": 2}, "lanes: 4 there, 2 here"),
        ({"shuffle": False}, "shuffle: True there, False here"),
    ):
        with pytest.raises(ConfigError, match=what):
            opened(run, **changed).load_state_dict(state)
    other = opened(str(curated(Path(own).parent / "other", seed=1)))
    with pytest.raises(ConfigError, match=f"{state['data']}.*{other.fingerprint}"):
        other.load_state_dict(state)
    with pytest.raises(ConfigError, match="not of this loader"):
        other.load_state_dict({"epoch": 1})
    data = opened(run)
    data.load_state_dict(state | {"worker": [1, 2]})
    with pytest.raises(ConfigError, match="of worker 1 of 2, loaded in worker 0 of 1"):
        list(data)


# ---- ranks and processes


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batches(run: str, expected: list[list[int]], world: int) -> None:
    assert joined([numbers(opened(run, rank, world)) for rank in range(world)]) == expected


@pytest.mark.parametrize(("start_method", "workers"), [("fork", 2), ("spawn", 1)])
def test_worker_processes(run: str, expected: list[list[int]], start_method: Any, workers: int) -> None:
    """Forked after this process has read with Arrow's threads, too."""
    data = opened(run)
    list(data)
    data.set_epoch(0)
    assert numbers(CuratedLoader(data, workers, start_method=start_method)) == expected


def test_a_plain_dataloader(run: str, expected: list[list[int]]) -> None:
    loader = DataLoader(opened(run), batch_size=None, num_workers=2)
    assert len(loader) == len(expected)
    assert numbers(loader) == expected


def test_persistent_workers_move_on_by_themselves(run: str, expected: list[list[int]]) -> None:
    second = opened(run)
    second.set_epoch(1)
    loader = DataLoader(opened(run), batch_size=None, num_workers=2, persistent_workers=True)
    assert numbers(loader) == expected
    assert numbers(loader) == numbers(second)


def test_two_ranks_of_a_process_group(run: str, tmp_path: Path) -> None:
    data = CuratedDataset(run, BATCH, columns=["number"], lanes=4, shuffle_mb=0.001, drop_last=False)
    assert data.place == (0, 1)  # here; in the processes that it is sent to, it is theirs
    torch.multiprocessing.spawn(loader_rank.read, (2, str(tmp_path), data), nprocs=2)
    totals = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert totals[0] == totals[1] == [sum(batch) for batch in numbers(opened(run, drop_last=False))]


def test_ranks_from_the_environment(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = CuratedDataset(run, BATCH, columns=["number"], lanes=4, shuffle_mb=0.001)
    assert found.place == (1, 2)
    assert numbers(found) == numbers(opened(run, 1, 2))


# ---- sets that change


def test_a_set_that_is_curated_anew_under_a_loader_is_refused_when_it_is_read(own: str, tmp_path: Path) -> None:
    data = opened(own)
    batches = iter(data)
    next(batches)
    other = open_curated(curated(tmp_path / "other", seed=1))
    shutil.rmtree(Path(own, "curated"))
    shutil.copytree(tmp_path / "other/run/curated", Path(own, "curated"))
    with pytest.raises(CorpusError, match="has changed under the loader") as refused:
        list(batches)
    assert any(p.mark in str(refused.value) for p in other.parts)
    fresh = opened(str(tmp_path / "other/run"))
    with pytest.raises(ConfigError, match="fingerprint"):
        fresh.load_state_dict(data.state_dict())
    shutil.rmtree(Path(own, "curated"))
    with pytest.raises(CorpusError, match=r"which the loader opened as fingerprint .* cannot be read"):
        list(data)


def test_files_that_are_not_those_of_the_manifest_are_refused_at_once(own: str, tmp_path: Path) -> None:
    directory = Path(own, "curated")
    names = sorted(p.name for p in directory.iterdir())
    marks = [p.mark for p in open_curated(own).parts]
    shutil.copy(directory / names[1], directory / names[0])
    with pytest.raises(CorpusError, match=rf"{names[0]} is not the file that.*{marks[1]}.*{marks[0]}"):
        opened(own)
    (directory / names[0]).write_bytes(b"PAR1 no more")
    with pytest.raises(CorpusError, match=names[0]):
        opened(own)
    (directory / names[0]).unlink()
    with pytest.raises(CorpusError, match=rf"{names[0]} is missing, which should have fingerprint {marks[0]}"):
        opened(own)


def test_a_file_of_another_size_is_refused(own: str) -> None:
    """The same rows, rewritten: the lineage may be the same, the row groups that the order is made of are not."""
    data = opened(own)
    path = sorted(Path(own, "curated").iterdir())[0]
    table = pq.read_table(path)
    pq.write_table(table, path, row_group_size=40, compression="none")
    with pytest.raises(CorpusError, match=r"has changed under the loader: it was .* bytes, it is .* bytes"):
        list(data)
    assert opened(own).fingerprint != data.fingerprint


# ---- orders, packed sets, object stores


def test_a_stored_order_is_kept(own: str) -> None:
    with fed(own) as run:
        order = write_order(run, Shuffled(seed=5))
        with pytest.raises(ConfigError, match=r"tamis order .* --kind shuffled --rows"):
            opened(own, order="shuffled")
        arrange(run, order)
    table = pa.concat_tables([pq.read_table(p) for p in sorted(Path(own, "curated").iterdir())])
    edges = np.cumsum([0, *(p.rows for p in open_curated(own).parts)])
    addresses = order.addresses(0)
    rows = edges[addresses["file"].to_numpy()] + addresses["row"].to_numpy()
    for world in (1, 2):
        found = joined([numbers(opened(own, rank, world, order="shuffled", drop_last=False)) for rank in range(world)])
        assert list(chain(*found))[:ROWS] == table["number"].take(rows).to_pylist()
    assert len(set(chain(*numbers(opened(own, order="shuffled", shuffle=True))))) == ROWS // BATCH * BATCH


def test_packed_sequences(own: str) -> None:
    with fed(own) as run:
        packed = write_packed(run, BestFit(length=8, ids="tokens", end_id=0, name="small"), None)
    data = CuratedDataset(own, 4, packed="small", drop_last=False)
    assert data.rows == packed["sequences"]
    batches = list(data)
    assert set(batches[0]) == {"input_ids", "position_ids", "labels", VALID}
    assert batches[0]["input_ids"].shape == (4, 8)
    learnt = [int(x) for b in batches for x in b["labels"][b[VALID]].flatten() if x != -100]
    table = pa.concat_tables([pq.read_table(p) for p in sorted(Path(own, "curated").iterdir())])
    tokens = [row for row in table["tokens"].to_pylist() if row]
    assert sorted(learnt) == sorted(t for row in tokens for t in row[1:])  # the first has nothing before it
    path = Path(own, "packed/small/packed.json")
    path.write_text(path.read_text().replace(packed["curated"], "0" * 32))
    with pytest.raises(ConfigError, match=f"made of the curated set {'0' * 32}, the run's is now {packed['curated']}"):
        CuratedDataset(own, 4, packed="small")


@pytest.mark.parametrize("key", ["packed", "order"])
def test_parts_that_were_made_anew_are_refused(own: str, key: str) -> None:
    """As many rows in the same place, but others: what a crash leaves of a set that was being made anew."""
    with fed(own) as run:
        for seed in range(2):
            write_packed(run, BestFit(length=8, ids="tokens", end_id=0, name=f"s{seed}", seed=seed), None)
            arrange(run, write_order(run, Shuffled(seed=seed, name=f"s{seed}")))
    data = opened(own, columns=None, **{key: "s0"})
    places = [Path(own, key, f"s{seed}", "rows" if key == "order" else "") for seed in range(2)]
    shutil.copy(places[1] / "part-00000.parquet", places[0])
    with pytest.raises(CorpusError, match="has changed under the loader"):
        list(data)
    with pytest.raises(CorpusError, match=r"part-00000.parquet is not the file that the run describes"):
        opened(own, columns=None, **{key: "s0"})


def test_an_object_store(run: str, expected: list[list[int]], bucket: str) -> None:
    store = Store(f"{bucket}/run")
    for path in [Path(run, "manifest.json"), *Path(run, "curated").iterdir()]:
        store.write(path.read_bytes(), *path.relative_to(run).parts)
    data = opened(store.uri)
    assert data.fingerprint == opened(run).fingerprint  # a set that was moved is the same set
    assert numbers(data) == expected
    assert CuratedLoader(data, workers=1).start_method == "spawn"
    with pytest.raises(ConfigError, match="does not survive a fork"):
        list(DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="fork"))


# ---- the door


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "global_batch: must be at least 1"),
        ({"batch": 1001}, "make no full batch of 1,000 rows"),
        ({"batch": 15, "world": 2}, "15 rows cannot be shared by 2 ranks: take a multiple, such as 16"),
        ({"rank": 2, "world": 2}, "rank: 2 is not one of 2"),
        ({"seed": -1}, "seed"),
        ({"columns": ["nothing"]}, "columns: curated has no 'nothing'; it has text, number"),
        ({"columns": []}, "name at least one"),
        ({"packed": "a", "order": "b"}, "name one of them"),
        ({"packed": "none"}, "has no 'none'; it has nothing"),
        ({"split": "validation"}, "nanochat"),
        ({"lanes": 0}, "lanes: must be at least 1"),
    ],
)
def test_wrong_settings(run: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(run, **options)


def test_what_is_no_curated_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `tamis curate` first"):
        opened(str(tmp_path))


def test_the_validation_file_is_not_trained_on(tmp_path: Path) -> None:
    run = curated(tmp_path, layout="nanochat")
    train = CuratedDataset(run, 4, drop_last=False)
    validation = CuratedDataset(run, 4, split="validation", shuffle=False, drop_last=False)
    assert (train.rows, validation.rows) == (990, 10)
    texts = [{text for b in data for text in b["text"]} for data in (train, validation)]
    assert not texts[0] & texts[1]
    assert len(texts[0] | texts[1]) == ROWS
