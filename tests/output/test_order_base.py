"""Orders as they are stored: permutations, exact, uniform, resumable, and the rows themselves in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import parse_as
from pipeline.corpus.storage import Store
from pipeline.engine.pool import InlinePool, RayPool
from pipeline.errors import ConfigError, CorpusError, TamisError
from pipeline.output import feeding as feeding_module
from pipeline.output.commands import Feeding
from pipeline.output.feeding import CuratedSet, feeding
from pipeline.output.order import _arrange, base
from pipeline.output.order._arrange import arrange, fed_parts
from pipeline.output.order.base import StoredOrder, drawn, write_order
from pipeline.output.order.curriculum import Curriculum
from pipeline.output.order.repeated import Repeated, spread
from pipeline.output.order.shuffled import Shuffled
from pipeline.output.order.source import Source
from tests.output.feeding_runs import column, curated, kept, opened, ordinals, rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return curated(tmp_path_factory.mktemp("order"))


def test_a_curated_run_has_several_files(run: str) -> None:
    assert len(CuratedSet.at(run).files) > 2
    assert CuratedSet.at(run).rows == 200


def test_the_source_is_the_curated_files_as_they_lie(run: str) -> None:
    with opened(run) as fed:
        order = write_order(fed, Source())
        assert ordinals(fed, order).tolist() == list(range(200))
        assert [p.order for p in fed_parts(fed, order)] == [None] * len(fed.curated.files)


def test_shuffled_holds_every_row_once_and_another_order_for_every_epoch(run: str) -> None:
    with opened(run) as fed:
        orders = [ordinals(fed, write_order(fed, Shuffled(epoch=e, name=f"e{e}"))) for e in range(3)]
        again = ordinals(fed, write_order(fed, Shuffled(epoch=1, name="again")))
        other = ordinals(fed, write_order(fed, Shuffled(seed=9, name="other")))
    for order in (*orders, other):
        assert sorted(order.tolist()) == list(range(200))
    assert np.array_equal(again, orders[1])
    for a, b in ((orders[0], orders[1]), (orders[1], orders[2]), (orders[0], other), (orders[0], np.arange(200))):
        assert abs(np.corrcoef(np.argsort(a), np.argsort(b))[0, 1]) < 0.25


def test_the_shuffle_is_uniform() -> None:
    """Chi-squared over the 24 orders of four neighbours, 24,000 of them: 99.99 % of uniform shuffles are below 57."""
    keys = [drawn(np.arange(4000), seed, stream).reshape(-1, 4) for seed in range(6) for stream in range(4)]
    counts = np.unique(np.argsort(np.concatenate(keys), axis=1), axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 1000) ** 2 / 1000).sum() < 57


def test_parts_and_shards_change_nothing(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(run) as fed:
        whole = write_order(fed, Shuffled(name="whole"))
        monkeypatch.setattr(base, "PART_ROWS", 17)
        many = write_order(fed, Shuffled(name="many"))
        assert len(whole.parts) == 1
        assert len(many.parts) > 8
        expected = ordinals(fed, whole)
        assert np.array_equal(expected, ordinals(fed, many))
    corpus = {"path": str(Path(run).parent / "corpus-*.parquet"), "shard_mb": 1}
    one_shard = curated(tmp_path, corpus=corpus, output={"file_mb": 0.005, "row_group_rows": 16})
    with opened(one_shard) as fed:
        assert np.array_equal(ordinals(fed, write_order(fed, Shuffled())), expected)


def test_rows_are_arranged_whole_and_in_order(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "PART_ROWS", 40)
    monkeypatch.setattr(_arrange, "CHUNK_BYTES", 3000)
    with opened(run) as fed:
        order = write_order(fed, Shuffled(name="arranged", seed=3))
        parts = fed_parts(fed, order)
        found = [(b, o) for p in parts for b, o in p.batches(rows=7)]
        lying = ordinals(fed, order)
        assert not fed.store.files("scratch", recursive=True)
    assert np.array_equal(np.concatenate([o for _, o in found]), lying)
    table = pa.Table.from_batches([b for b, _ in found])
    assert table.to_pylist() == kept(run).take(pa.array(lying)).to_pylist()
    files = [pq.read_metadata(f"{run}/order/arranged/rows/{name}").num_rows for name in order.parts]
    assert files == [p["rows"] for p in order.described["parts"]]


def test_what_is_there_stays_and_what_is_lost_comes_back_byte_for_byte(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "PART_ROWS", 40)

    def made() -> dict[str, tuple[int, bytes]]:
        with opened(run) as fed:
            arrange(fed, write_order(fed, Shuffled(name="lasting")))
        place = Path(run) / "order" / "lasting"
        return {str(p.relative_to(place)): (p.stat().st_mtime_ns, p.read_bytes()) for p in place.rglob("*.parquet")}

    first = made()
    assert made() == first
    for lost in ("part-00001.parquet", "rows/part-00002.parquet", "order.json"):
        (Path(run) / "order" / "lasting" / lost).unlink()
    assert {n: content for n, (_, content) in made().items()} == {n: content for n, (_, content) in first.items()}


def test_ray_makes_the_same_bytes(run: str, lasting_pool: RayPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "PART_ROWS", 40)
    made = []
    for name, pool in (("inline", InlinePool(0)), ("ray", lasting_pool)):
        order = Curriculum(by="random", stages=3, seed=5, name=name)
        with feeding(run, lambda engine, pool=pool: pool, quiet=True) as fed:
            if name == "ray":
                monkeypatch.setattr(feeding_module, "LIGHT_BYTES", -1)
            arrange(fed, write_order(fed, order))
        parts = sorted((Path(run) / "order" / name).rglob("*.parquet"))
        made.append([pq.read_table(p).replace_schema_metadata(None) for p in parts])
    assert len(made[0]) > 8
    assert all(a.equals(b) for a, b in zip(*made, strict=True))


def test_an_order_of_another_curation_is_refused_and_made_anew(tmp_path: Path) -> None:
    run = curated(tmp_path)
    with opened(run) as fed:
        write_order(fed, Shuffled())
    curated(tmp_path, select={"budget": {"rows": 150}})
    with pytest.raises(ConfigError, match="has since changed: run `tamis order` again"):
        StoredOrder.at(run, "shuffled", CuratedSet.at(run))
    with opened(run) as fed:
        assert sorted(ordinals(fed, write_order(fed, Shuffled())).tolist()) == list(range(150))


def test_curated_files_that_change_underneath_are_refused(tmp_path: Path) -> None:
    run = curated(tmp_path)
    victim = next(iter(sorted((tmp_path / "run" / "curated").iterdir())))
    pq.write_table(pq.read_table(victim).slice(1), victim)
    with opened(run) as fed, pytest.raises(TamisError, match="has changed since the run was curated"):
        fed_parts(fed, write_order(fed, Shuffled()))


def test_parts_of_another_order_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a crash leaves of an order that was being made anew under the same name."""
    monkeypatch.setattr(base, "PART_ROWS", 100)
    run = curated(tmp_path)
    with opened(run) as fed:
        order, other = (write_order(fed, Shuffled(name=str(i), seed=i)) for i in range(2))
        parts = [fed_parts(fed, o)[0] for o in (order, other)]
        place = Path(run, "order")
        for name in ("rows/part-00000.parquet", "part-00000.parquet"):
            shutil.copy(place / "1" / name, place / "0" / name)
            with pytest.raises(
                CorpusError, match=rf"{name} is not of the order that order.json describes.*tamis order"
            ):
                list(parts[0].batches())
        assert len(list(parts[1].batches()))
        with pytest.raises(CorpusError, match="tamis order"):
            order.addresses(0)
        assert sorted(ordinals(fed, write_order(fed, Shuffled(name="0", seed=0))).tolist()) == list(range(200))
        assert order.addresses(0).num_rows


@pytest.mark.parametrize("status", ["running", "failed"])
def test_only_a_finished_curation_is_fed_from(tmp_path: Path, status: str) -> None:
    with pytest.raises(ConfigError, match="run `tamis curate` first"):
        opened(str(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()
    run = curated(tmp_path)
    manifest = json.loads(Store(run).read("manifest.json"))
    Store(run).write(json.dumps(manifest | {"status": status}).encode(), "manifest.json")
    with pytest.raises(ConfigError, match="not a finished curation"):
        opened(run)


def test_the_manifest_of_the_curation_stays_as_it_is(run: str) -> None:
    before = (Path(run) / "manifest.json").read_bytes()
    with opened(run) as fed:
        write_order(fed, Shuffled(name="quiet"))
    with pytest.raises(ConfigError), opened(run) as fed:
        write_order(fed, Curriculum(by="nothing"))
    assert (Path(run) / "manifest.json").read_bytes() == before


def test_nanochats_validation_file_is_in_no_order(tmp_path: Path) -> None:
    run = curated(tmp_path, output={"layout": "nanochat", "file_mb": 0.005})
    validation = sorted((tmp_path / "run" / "curated").iterdir())[-1]
    with opened(run) as fed:
        order = write_order(fed, Shuffled())
        texts = [t for p in fed_parts(fed, order) for b, _ in p.batches() for t in b.column("text").to_pylist()]
    assert order.rows == len(set(texts)) == 198
    assert not set(texts) & set(pq.read_table(validation)["text"].to_pylist())


# ---- curriculum


def scores(run: str) -> np.ndarray:
    return np.array([t["random"] for t in kept(run)["tamis"].to_pylist()])


@pytest.mark.parametrize("descending", [False, True])
def test_a_curriculum_goes_by_the_score(run: str, descending: bool) -> None:
    with opened(run) as fed:
        found = scores(run)[ordinals(fed, write_order(fed, Curriculum(by="random", descending=descending)))]
    assert np.array_equal(found, np.sort(found)[::-1] if descending else np.sort(found))


def test_stages_are_equal_and_shuffled_inside(run: str) -> None:
    with opened(run) as fed:
        order = write_order(fed, Curriculum(by="random.score", stages=4, name="staged"))
        found, stage = scores(run)[ordinals(fed, order)], np.asarray(column(order, "group"))
    assert stage.tolist() == sorted(stage.tolist())
    assert np.bincount(stage).tolist() == [50, 50, 50, 50]
    for i in range(4):
        inside = found[stage == i]
        assert i == 3 or inside.max() < found[stage == i + 1].min()
        assert 0.3 < (np.diff(inside) > 0).mean() < 0.7


def test_a_constant_score_is_shuffled_rather_than_left_in_one_part(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(base, "PART_ROWS", 20)
    table = rows().append_column("same", pa.array(np.zeros(240, np.float32)))
    run = curated(tmp_path, table, scores=[{"kind": "length"}], select={"budget": {"fraction": 1.0}})
    with opened(run) as fed:
        order = write_order(fed, Curriculum(by="length.score"))
        assert max(p["rows"] for p in order.described["parts"]) < 60
        assert sorted(ordinals(fed, order).tolist()) == list(range(240))


@pytest.mark.parametrize("name", ["random.rule", "row.tokens", "nothing"])
def test_a_curriculum_by_what_is_no_score_is_refused(run: str, name: str) -> None:
    with opened(run) as fed, pytest.raises(ConfigError, match=r"no score|no column"):
        write_order(fed, Curriculum(by=name))


# ---- repeats


def test_every_row_comes_as_often_as_it_is_to_and_evenly_spread() -> None:
    times = np.repeat([1.0, 2.0, 4.0], 10_000)
    places = spread(np.arange(30_000), times, seed=0)
    assert np.array_equal(np.bincount(places.row), times)
    where = places.key / 2.0**64
    share = (where * times[places.row]).astype(int)
    assert np.array_equal(share, places.times)  # the i-th time comes in the i-th n-th
    for n in (1, 2, 4):
        quarters = np.histogram(where[times[places.row] == n], 4, (0, 1))[0]
        assert abs(quarters / quarters.sum() - 0.25).max() < 0.02  # the mixture is the same throughout


def test_a_fraction_of_an_epoch_is_drawn() -> None:
    places = spread(np.arange(10_000), np.full(10_000, 1.7), seed=1)
    assert set(np.bincount(places.row)) == {1, 2}
    assert abs(len(places.row) - 17_000) < 4 * np.sqrt(10_000 * 0.7 * 0.3)


def test_repeats_are_stored_with_their_pass_and_whole_epochs_are_shuffles(run: str) -> None:
    with opened(run) as fed:
        order = write_order(fed, Repeated(epochs=3))
        found, passes = ordinals(fed, order), column(order, "pass")
    assert passes == pytest.approx(np.repeat([0, 1, 2], 200))
    for i in range(3):
        assert sorted(found[200 * i : 200 * (i + 1)].tolist()) == list(range(200))
    assert not np.array_equal(found[:200], found[200:400])


def test_better_buckets_are_seen_more_often(run: str) -> None:
    with opened(run) as fed:
        order = write_order(fed, Repeated(by="random", times=(4, 2, 1, 1), name="buckets"))
        seen = np.bincount(ordinals(fed, order), minlength=200)
    best_first = seen[np.argsort(-scores(run))]
    assert best_first.tolist() == [4] * 50 + [2] * 50 + [1] * 100


def test_the_compute_aware_plan_says_how_often(tmp_path: Path) -> None:
    """Goyal et al.'s law with one bucket: all tokens, read so often as the compute allows."""
    law = {"utility": [-0.2], "half_life": 2, "scale": 100, "share": 1.0}
    tokens = sum(-(-len(t) // 4) for t in rows()["text"].to_pylist())
    budget = {"compute": 2.5 * tokens * 6 * 1000, "params": 1000, "law": law}
    run = curated(tmp_path, select={"budget": budget})
    with opened(run) as fed:
        order = write_order(fed, Repeated(epochs="plan"))
        assert order.described["about"]["epochs"] == pytest.approx(2.5)
        assert set(np.bincount(ordinals(fed, order))) == {2, 3}


def test_a_plan_needs_a_selection_by_compute(run: str) -> None:
    with opened(run) as fed, pytest.raises(ConfigError, match="needs a selection by compute"):
        write_order(fed, Repeated(epochs="plan"))


@pytest.mark.parametrize(
    ("order", "why"),
    [
        ({"kind": "repeated"}, "say how often"),
        ({"kind": "repeated", "epochs": 2, "by": "random", "times": [1]}, "say how often"),
        ({"kind": "repeated", "epochs": 0.5}, "at least once"),
        ({"kind": "repeated", "by": "random", "times": [2, 0]}, "at least once"),
        ({"kind": "curriculum", "by": "random", "stages": 1}, "greater than or equal to 2"),
        ({"kind": "shuffled", "name": "../up"}, "cannot name a directory"),
        ({"kind": "shuffled", "name": ".."}, "cannot name a directory"),
        ({"kind": "shufled"}, "did you mean 'shuffled'"),
    ],
)
def test_bad_orders_are_refused_with_what_to_change(order: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_as(Feeding, {"run": "x", "order": order})
