"""The truth of bench/planted is what its generator says, and every criterion has a seat in it."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench.planted import corpora, exact, generator, pair_models, run, seats  # noqa: E402
from pipeline.config import parse  # noqa: E402

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planted")
    generator.generate(path, rows=1200, seed=1)
    return path


@pytest.fixture(scope="module")
def table(directory: Path) -> pa.Table:
    return pq.read_table(directory / "corpus.parquet")


@pytest.fixture(scope="module")
def rows(table: pa.Table) -> Rows:
    return list(table.to_pylist())


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("PIL")
    path = tmp_path_factory.mktemp("others")
    corpora.generate(path, seed=1)
    return path


def words(text: str) -> list[str]:
    return text.lower().replace(".", "").split()


def test_the_same_seed_makes_the_same_corpus_and_another_does_not(directory: Path, tmp_path: Path) -> None:
    again = generator.generate(tmp_path / "again", rows=1200, seed=1)
    for file in sorted(directory.iterdir()):
        assert file.read_bytes() == again.with_name(file.name).read_bytes(), file.name
    other = pq.read_table(generator.generate(tmp_path / "other", rows=1200, seed=2))
    assert other["text"].to_pylist() != pq.read_table(again)["text"].to_pylist()


def test_roles_are_as_frequent_as_said(rows: Rows) -> None:
    found = Counter(r["role"] for r in rows)
    for role, share in generator.SHARES.items():
        assert found[role] == round(share * 1200), role
    assert found["real"] == 500
    assert found["real_damaged"] > 100
    assert 0.01 <= found["target"] / len(rows) <= 0.05
    assert len({r["id"] for r in rows}) == len(rows)


def test_copies_are_copies(rows: Rows) -> None:
    groups: dict[int, Rows] = {}
    for row in rows:
        if row["copies"] is not None:
            groups.setdefault(row["copies"], []).append(row)
    for group in groups.values():
        (original,) = [r for r in group if r["role"] == "plain"]
        assert len(group) >= 2
        for copy in (r for r in group if r is not original):
            ours, theirs = words(copy["text"]), words(original["text"])
            if copy["role"] == "exact":
                assert copy["text"] == original["text"]
            elif copy["role"] == "near":
                assert len(ours) == len(theirs)
                assert sum(a != b for a, b in zip(ours, theirs, strict=True)) <= 1
            else:
                assert copy["role"] == "same_words"
                assert Counter(ours) == Counter(theirs)
    alone = [r["text"] for r in rows if r["copies"] is None and r["role"] in ("plain", "target")]
    assert len(set(alone)) == len(alone)


def test_concepts_have_words_of_their_own_and_rows_the_hardness_that_they_say(directory: Path, rows: Rows) -> None:
    known = {w["word"]: w["concept"] for w in pq.read_table(directory / "words.parquet").to_pylist()}
    assert len(known) == pq.read_metadata(directory / "words.parquet").num_rows
    assert not set(known) & set(generator.FUNCTION)
    sizes = Counter(known.values())
    for row in rows:
        if row["complexity"] is not None:
            assert row["complexity"] == sizes[row["concept"]]
    plain = [r for r in rows if r["role"] == "plain"]
    foreign = []
    for row in plain:
        concepts = [known[w] for w in words(row["text"]) if w in known]
        foreign.append(np.mean([c != row["concept"] for c in concepts]))
        assert generator.TARGET not in concepts
    assert np.corrcoef(foreign, [r["hardness"] for r in plain])[0, 1] > 0.9
    for row in rows:
        concepts = [known[w] for w in words(row["text"]) if w in known]
        if row["role"] in ("clean", "primed"):
            assert sum(c != row["concept"] for c in concepts) == (row["role"] == "primed"), row["text"]
        if row["role"] == "contrary":
            assert concepts == [0, 1] * (len(concepts) // 2)


def test_labels_are_flipped_where_it_says_so_and_nowhere_else(rows: Rows) -> None:
    labelled = [r for r in rows if r["concept"] > 0]
    for row in labelled:
        assert (row["label"] != f"c{row['concept']}") == row["flipped"]
    assert np.mean([r["flipped"] for r in labelled]) == pytest.approx(generator.FLIPPED, abs=0.02)
    assert not any(r["flipped"] for r in rows if r["concept"] <= 0)


def test_what_criteria_learn_from_is_not_in_the_corpus(directory: Path, rows: Rows) -> None:
    there = {r["text"] for r in rows}
    for name in ("target", "target_more", "good_more", "good"):
        assert there.isdisjoint(pq.read_table(directory / f"{name}.parquet")["text"].to_pylist()), name
    graded = pq.read_table(directory / "graded.parquet")
    good, bad = (pq.read_table(directory / f"{n}.parquet")["text"].to_pylist() for n in ("good", "bad"))
    assert graded["label"].to_pylist() == [1] * len(good) + [0] * len(bad)


def test_every_criterion_has_a_seat_that_its_recipe_accepts(directory: Path, others: Path) -> None:
    assert seats.missing() == []
    model = directory / "model"  # what checks ask of a model's folder before it is loaded
    model.mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (model / name).write_text("{}")
    (model / "open_clip_config.json").write_text(json.dumps({"model_cfg": pair_models.CLIP}))
    places = {p.stem: str(p) for folder in (directory, others) for p in folder.glob("*.parquet")}
    places |= dict.fromkeys((*run.LANGUAGE_MODELS, *run.PAIR_MODELS), str(model)) | {"real": places["corpus"]}
    for seat in seats.SEATS:
        assert set(seat.truths) <= set(seats.TRUTHS)
        scores = [{"kind": seat.kind, **seats.resolved(seat.fields, places)}]
        corpus = {"path": places[seat.corpus], "id": "id", **seat.columns}
        parse(
            {"corpus": corpus, "scores": scores, "select": {"budget": {"rows": 1}}, "run": "x"}
            | seats.resolved(seat.config, places)
        )
        assert seat.asks <= set(places)


def test_foreign_pieces_stand_where_they_say_and_a_perfect_rewrite_removes_them_alone(directory: Path) -> None:
    for form, mark in (("lines", " | "), ("pages", "<li>"), ("code", "def ")):
        table = pq.read_table(directory / f"{form}.parquet")
        kept = []
        for row in table.to_pylist():
            edges = [0, *(e for span in row["planted"] for e in (span["start"], span["end"])), len(row["text"])]
            kept.append([{"start": a, "end": b} for a, b in zip(edges[::2], edges[1::2], strict=True)])
            assert all(mark in row["text"][span["start"] : span["end"]] for span in row["planted"])
            if form != "code":
                assert not any(mark in row["text"][span["start"] : span["end"]] for span in kept[-1])
        rows = pa.table({"source": table["text"], "tamis": [{"kept": spans} for spans in kept]})
        assert seats.characters(table, rows) == (1, 1)
        whole = [{"kept": [{"start": 0, "end": len(text)}]} for text in table["text"].to_pylist()]
        assert seats.characters(table, pa.table({"source": table["text"], "tamis": whole})) == (0, 1)


@pytest.mark.parametrize("name", [n for n in seats.TRUTHS if n not in ("human", "none")])
def test_the_truth_itself_is_found_and_its_opposite_is_not(name: str, directory: Path, others: Path) -> None:
    truth = seats.TRUTHS[name]
    (corpus,) = {seat.corpus for seat in seats.SEATS if name in seat.truths}
    table = pq.read_table((directory if corpus == "corpus" else others) / f"{corpus}.parquet")
    blind = np.random.default_rng(0).random(len(table))
    counted, marked = truth.marks(table, blind)
    assert 0 < (marked & counted).sum() < counted.sum()
    told = np.where(marked, 1.0, 0.0) if truth.end == "top" else np.where(marked, 0.0, 1.0)
    best = seats.judge(truth, table, told + blind / 10)
    assert (best.precision, best.auroc) == (1, 1)
    if not name.startswith(("exact", "fuzzy", "semantic")):  # there the rows to find depend on the scores
        worst = seats.judge(truth, table, -told + blind / 10)
        assert (worst.precision, worst.auroc) == (pytest.approx(0, abs=0.3), 0)
        alike = seats.judge(truth, table, np.zeros(len(table)))
        assert alike.auroc == pytest.approx(0.5)


def test_one_copy_of_each_group_may_stay_whichever_it_is(table: pa.Table) -> None:
    truth, blind = seats.TRUTHS["exact"], np.random.default_rng(0).random(len(table))
    _, first = truth.marks(table, blind)
    _, second = truth.marks(table, -blind)
    assert first.sum() == second.sum()
    assert (first != second).any()


def test_rows_without_a_score_are_the_last_choice(table: pa.Table) -> None:
    truth = seats.TRUTHS["target"]
    marked = truth.marks(table, np.zeros(len(table)))[1]
    found = seats.judge(truth, table, np.where(marked, np.nan, 0.0))
    assert (found.precision, found.auroc) == (0, 0)


def test_leave_one_out_is_the_derivative_where_a_row_weighs_little(directory: Path) -> None:
    """With the exact Hessian the influence function is the first order of leave-one-out, so the ranks agree."""
    from scipy.stats import spearmanr

    x, y, wrong = exact.problem(directory / "corpus.parquet", seed=0)
    n = 80
    weights = exact.optimum(x[:n], y[:n])
    assert np.abs(exact.gradients(weights, x[:n], y[:n]).mean(axis=0) + exact.RIDGE * weights.ravel()).max() < 1e-10
    left_out = exact.leave_one_out(x[:n], y[:n], x[n:], y[n:])
    found = exact.estimates(x[:n], y[:n], x[n:], y[n:])
    assert spearmanr(left_out, found["influence function, exact Hessian"]).statistic > 0.99
    assert left_out[wrong[:n]].mean() < left_out[~wrong[:n]].mean()  # wrong labels do harm


@pytest.mark.parametrize("name", ["pairs", "instructions", "sequences"])
def test_other_corpora_follow_from_the_seed(name: str, others: Path) -> None:
    made = pq.read_table(others / f"{name}.parquet")
    assert made.equals(getattr(corpora, name)(1))
    assert not made.equals(getattr(corpora, name)(2))


def test_pictures_show_what_their_captions_say_but_for_the_swapped_ones(others: Path) -> None:
    from PIL import Image

    found: Counter[Any] = Counter()
    for row in pq.read_table(others / "pairs.parquet").to_pylist():
        picture = Image.open(io.BytesIO(row["image"])).convert("RGB")
        short, long = sorted(picture.size)
        assert (short < corpora.SHORT_SIDE) == (row["role"] == "small")
        assert (long > corpora.ASPECT * short) == (row["role"] == "strip")
        ground = min(
            corpora.COLOURS, key=lambda c: np.abs(np.subtract(corpora.COLOURS[c], picture.getpixel((0, 0)))).sum()
        )
        found[row["role"]] += 1
        found[row["role"], "told"] += f"in a {ground} picture" in row["text"]
    for role, share in corpora.SHARES.items():
        assert found[role] == round(share * corpora.PAIRS)
    for role in ("plain", "spatial", "small", "strip"):
        assert found[role, "told"] == found[role], role
    assert found["swapped", "told"] < 0.4 * found["swapped"]


def test_rare_responses_take_the_rare_successor_and_noise_says_nothing(others: Path) -> None:
    language = generator.Language.made(np.random.default_rng(1))
    place = {word: (c, i) for c, known in enumerate(language.words) for i, word in enumerate(known)}
    frequent: dict[str, list[bool]] = {"usual": [], "rare": [], "noise": []}
    for row in pq.read_table(others / "instructions.parquet").to_pylist():
        at = [place[w] for w in words(row["response"]) if w in place]
        for (c, i), (d, j) in pairwise(at):
            frequent[row["role"]].append(c == d and j == language.following[c][0][i])
    shares = {role: np.mean(frequent[role]) for role in ("usual", "rare")}
    assert shares["usual"] == pytest.approx(corpora.FREQUENT["usual"], abs=0.05)
    assert shares["rare"] < 0.2
    assert len(frequent["noise"]) < 0.05 * len(frequent["rare"])


def test_users_with_a_pattern_stay_in_their_cycle(others: Path) -> None:
    for row in pq.read_table(others / "sequences.parquet").to_pylist():
        cycles = {item // corpora.CYCLE for item in row["items"]}
        assert (len(cycles) == 1) == (row["role"] == "pattern")


@pytest.mark.parametrize(
    ("kind", "least"), [("caption_rules", 1), ("image_size", 1), ("spatial_relations", 0.9), ("dfn", 0.7)]
)
def test_criteria_of_pairs_find_what_is_planted(kind: str, least: float, others: Path, tmp_path: Path) -> None:
    places = {p.stem: str(p) for p in others.glob("*.parquet")}
    if kind == "dfn":
        pytest.importorskip("transformers")
        pair_models.write_vision(tmp_path / "vision", 0)
        pair_models.write_reader(others / "trusted.parquet", tmp_path / "reader", 0)
        places |= {name: str(tmp_path / name) for name in ("vision", "reader")}
    (number,) = [n for n, seat in enumerate(seats.SEATS) if seat.kind == kind]
    (found,) = run.run_seat(number, places, tmp_path)["found"]
    assert found["auroc"] >= least
    assert found["precision"] > 2 * found["marked"] / found["rows"]


def test_a_run_of_some_kinds_replaces_their_lines_and_no_others() -> None:
    score, other = "| {} | {} (top) | {} |", "| sentences, rules of C4 | lines | {} |"
    length, random = seats.TRUTHS["long"].says, seats.TRUTHS["target"].says
    before = "\n\n".join(
        ["all at commit a.", f"h\n--\n{score.format('random', random, 1)}", f"h\n--\n{other.format(2)}", "exact"]
    )
    said = "`run --only length` at commit b: its lines."
    after = run.merged(before, [score.format("length", length, 3)], [], said)
    lines = f"{score.format('random', random, 1)}\n{score.format('length', length, 3)}"
    assert after == f"all at commit a.\n{said}\n\nh\n--\n{lines}\n\nh\n--\n{other.format(2)}\n\nexact"
    again = run.merged(
        after, [score.format("length", length, 4)], [other.format(5)], said.replace("commit b", "commit c")
    )
    assert again == after.replace("| 3 |", "| 4 |").replace("| 2 |", "| 5 |").replace("commit b", "commit c")
    with pytest.raises(ValueError, match="no seat has"):
        run.merged(after, ["| length | failed: no memory | |"], [], said)
