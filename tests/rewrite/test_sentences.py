"""Where sentences end, which lines the rules drop, and that a unit's score is the criterion's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import curate
from pipeline.config import parse
from pipeline.errors import ConfigError
from pipeline.rewrite.base import Pieces
from pipeline.rewrite.sentences import LINE, SENTENCE, Sentences, _by_rules, _open, edges
from pipeline.run import Run
from pipeline.scores._proxy import bigram_loss
from pipeline.words import hashed_words


def units(text: str) -> list[str]:
    at = edges(text)
    return [text[a:b] for a, b in pairwise(at) if a < b]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One ends. Two does, too! Three?", ["One ends. ", "Two does, too! ", "Three?"]),
        ("Dr. Who met J. R. Smith, e.g. on Mars. He left.", ["Dr. Who met J. R. Smith, e.g. on Mars. ", "He left."]),
        ("It costs 3.14 euros... more or less. Fine.", ["It costs 3.14 euros... more or less. ", "Fine."]),
        ('He said "Go." Then he went.', ['He said "Go." ', "Then he went."]),
        ("Title\n\nBody here. End.\n", ["Title\n\n", "Body here. ", "End.\n"]),
        ("今日は晴れ。明日は雨！終わり", ["今日は晴れ。", "明日は雨！", "終わり"]),
        ("See:\n```py\na. b\n\nc. d\n```\nDone.", ["See:\n", "```py\na. b\n\nc. d\n```\n", "Done."]),
        ("| a. B | c |\n| d. E | f |\nAfter.", ["| a. B | c |\n| d. E | f |\n", "After."]),
        ("no end", ["no end"]),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert units(text) == expected


@settings(max_examples=150)
@given(st.text(st.sampled_from("aB. !?…。\n\r\t\"')|`é漢 3"), max_size=40))
def test_units_tile_any_text(text: str) -> None:
    for split in (SENTENCE, LINE):
        at = edges(text, split)
        assert at[0] == 0
        assert at[-1] == len(text)
        assert at == sorted(at)
        pieces = Pieces.between([at])
        assert "".join(text[a:b] for a, b in zip(pieces.start, pieces.end, strict=True)) == text


@pytest.mark.parametrize("unit", [".", ". ", "``` ", "```\n", "| ", "\n ", "a. \t", '."', "。", "?!\r"])
def test_no_text_takes_quadratic_time(unit: str) -> None:
    text = unit * (300_000 // len(unit)) + "x"
    start = time.process_time()
    for split in (SENTENCE, LINE):
        edges(text, split)
    assert time.process_time() - start < 2  # quadratic: minutes


def judged(rules: tuple[str, ...], lines: list[str]) -> list[float]:
    batch = pa.record_batch([pa.array(lines, pa.large_string())], ["text"])
    return _by_rules(rules)(batch).column("score").to_pylist()  # type: ignore[arg-type]  # names of rules


def test_c4_drops_lines_as_its_paper_says() -> None:
    lines = {
        "A full sentence ends here.\n": 1,
        'She said: "it does."': 1,
        "A headline without an end": 0,
        "Two words.": 0,
        "This one trails off...": 0,
        "Please enable JavaScript to read this.": 0,
        "By reading you accept our Cookie Policy.": 0,
    }
    assert judged(("c4",), list(lines)) == list(lines.values())


def test_refinedweb_drops_lines_as_its_appendix_says() -> None:
    lines = {
        "A full sentence ends here": 1,
        "BREAKING NEWS FROM Rome": 0,
        "12,345.6 7": 0,
        "3 likes": 0,
        "Home": 0,
        "Sign in to continue": 0,
        "The mayor resigned. Read more...": 0,
        "2 items in cart": 0,
        "In a longer line the items in cart are a thing that somebody wrote about at length.": 1,
    }
    assert judged(("refinedweb",), list(lines)) == list(lines.values())
    assert judged(("c4", "refinedweb"), ["A full sentence ends here", "It does end, here."]) == [0, 1]


def test_a_higher_threshold_never_adds_a_sentence() -> None:
    scores = np.random.default_rng(0).random(40).astype(np.float32)
    texts = pa.array(["A b c. " * 10, "D e f. " * 10, "G h. " * 20])
    batch = pa.record_batch([texts], ["text"])

    def score() -> Callable[[pa.RecordBatch], pa.RecordBatch]:
        return lambda units: pa.record_batch([pa.array(scores[: len(units)])], ["score"])

    before: set[tuple[int, int]] = set()
    for threshold in (1.5, 0.9, 0.5, 0.1, -1.0):
        kept = _open(SENTENCE, score, threshold)(batch)
        inside = {(r, c) for r, a, b in zip(kept.row, kept.start, kept.end, strict=True) for c in range(a, b)}
        assert before <= inside
        assert set(kept.row) == {0, 1, 2}  # the best of a text stays
        before = inside
    assert before == {(r, c) for r, t in enumerate(texts.to_pylist()) for c in range(len(t))}


def test_a_classifier_scores_sentences_and_boilerplate_goes(write_corpus: Callable[..., Path], tmp_path: Path) -> None:
    """The headline in spirit: over 95 % of planted boilerplate is removed, under 2 % of the prose."""
    rng = np.random.default_rng(0)
    nouns = ["river", "mountain", "village", "summer", "harvest", "winter", "forest", "meadow", "bridge", "mill"]
    junk = ["cookie", "login", "cart", "checkout", "subscribe", "newsletter", "menu", "sitemap", "banner", "widget"]

    def sentence(words: list[str]) -> str:
        return f"The {' and '.join(rng.choice(words, 6))} {rng.integers(1000)}. ".capitalize()

    good, bad = ([sentence(words) for _ in range(400)] for words in (nouns, junk))
    for name, seeds in (("good", good), ("bad", bad)):
        pq.write_table(pa.table({"text": seeds}), tmp_path / f"{name}.parquet")

    def rows(file: int, count: int) -> dict[str, list[str]]:
        texts = [[sentence(junk) if rng.random() < 0.4 else sentence(nouns) for _ in range(10)] for _ in range(count)]
        texts = [[sentence(nouns), *t] for t in texts]
        return {"id": [f"{file}-{i}" for i in range(count)], "text": ["".join(t) for t in texts]}

    corpus = write_corpus(files=1, rows=60, rows_of=rows)
    seeds = {"positives": str(tmp_path / "good.parquet"), "negatives": str(tmp_path / "bad.parquet")}
    classifier = {"kind": "quality", **seeds, "dim": 8, "bucket": 1000, "lr": 0.5, "epoch": 10}
    config = {
        "corpus": {"path": str(corpus), "id": "id"},
        "scores": [classifier],
        "select": {"budget": {"fraction": 1.0}},
        "output": {"rewrite": {"kind": "sentences", "score": classifier, "threshold": 0.5}},
        "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
        "engine": {"address": "inline"},
        "run": str(tmp_path / "run"),
    }
    result = curate(config, quiet=True)
    kept = "".join(pq.read_table(result.path)["text"].to_pylist())
    original = "".join(pq.read_table(corpus)["text"].to_pylist())
    sizes = {}
    for name, words in (("junk", junk), ("nouns", nouns)):
        before, after = (sum(len(u) for u in units(t) if any(w in u.lower() for w in words)) for t in (original, kept))
        sizes[name] = after / before
    assert sizes["junk"] < 0.05
    assert sizes["nouns"] > 0.98
    assert {p.name for p in (tmp_path / "run" / "artifacts").iterdir()} >= {"quality", "rewrite-quality"}

    # A bigram model of what is left expects clean text better than one of as many words of the original.
    budget, clean = len(kept.split()), "".join(sentence(nouns) for _ in range(50))
    texts = [kept, " ".join(original.split()[:budget]), clean]
    words, offsets = hashed_words(pa.array(texts, pa.large_string()), 4096, 1 << 20)
    bits = bigram_loss(words, offsets, 4096)
    assert bits(np.array([0]), np.array([2])) < bits(np.array([1]), np.array([2])) - 0.1


@pytest.mark.parametrize(
    ("rewrite", "message"),
    [
        ({}, "give either `score`"),
        ({"rules": ["c4"]}, "judge lines: add `unit: line`"),
        ({"score": "density"}, "does not judge a text by itself"),
        ({"rules": ["c4"], "unit": "line", "score": "length"}, "give either `score`"),
        ({"score": {"kind": "quality"}}, "give either `model`"),
    ],
)
def test_what_cannot_work_is_refused(rewrite: dict[str, object], message: str) -> None:
    config = {
        "corpus": {"path": "x"},
        "scores": ["random"],
        "select": {"budget": {"rows": 1}},
        "output": {"rewrite": {"kind": "sentences"} | rewrite},
        "run": "r",
    }
    with pytest.raises(ConfigError, match=message):
        parse(config)


def test_a_score_that_reads_more_than_the_text_is_refused(
    write_corpus: Callable[..., Path], open_run: Callable[..., Run]
) -> None:
    recipe = Sentences.model_validate({"score": {"kind": "random"}})
    with open_run(write_corpus(files=1)) as run, pytest.raises(ConfigError, match="not the text alone"):
        recipe.prune(run)
