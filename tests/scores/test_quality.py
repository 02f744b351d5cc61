"""Quality: fastText's own numbers to the bit, reproducible training, and errors at the door."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import fasttext
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score

from pipeline.config import parse
from pipeline.corpus.rows import row_column
from pipeline.corpus.storage import Store
from pipeline.engine.pool import InlinePool
from pipeline.errors import TamisError
from pipeline.run import Artifact, Run
from pipeline.scores._proxy import bigram_loss
from pipeline.scores.quality import GOOD, Quality, _has_rare_breaks, _lines, open_classifier
from pipeline.words import hashed_words

EXAMPLES = Path(__file__).parents[2] / "examples"
SAMPLE = EXAMPLES / "sample"
SEEDS = {"positives": str(EXAMPLES / "seeds/good.parquet"), "negatives": str(EXAMPLES / "seeds/bad.parquet")}
SMALL = {"dim": 16, "bucket": 50_000, "lr": 0.5, "epoch": 10}


def run_over(directory: Path, quality: dict[str, Any], corpus: Path = SAMPLE, **options: Any) -> Run:
    scores = [{"kind": "quality", **quality}]
    data = {"corpus": {"path": str(corpus), "id": "id", **options}, "scores": scores, "select": {"budget": {"rows": 1}}}
    return Run(parse(data | {"run": str(directory)}), InlinePool, quiet=True)


def fitted(directory: Path, quality: dict[str, Any], corpus: Path = SAMPLE, **options: Any) -> Path:
    """Fit on a corpus; returns the directory of the artifact."""
    with run_over(directory, quality, corpus, **options) as run:
        run.plan(row_column(True, None))
        run.config.scores[0].fit(run)
    return directory / "artifacts/quality"


def scored(model: Path, texts: pa.Array, label: str = GOOD) -> np.ndarray:
    """Scores of texts by a `model.bin`."""
    batch = pa.record_batch([texts], ["text"])
    out = open_classifier(Artifact("quality", "", Store(str(model.parent))), label)(batch)
    assert out.schema == pa.schema([("score", pa.float32())])
    return out["score"].to_numpy()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitted(tmp_path_factory.mktemp("run"), {**SEEDS, **SMALL}) / "model.bin"


@pytest.fixture(scope="module")
def sample() -> pa.Table:
    return ds.dataset(SAMPLE).to_table()


def hand_made(directory: Path, vectors: dict[str, tuple[float, float]], lines: list[str]) -> Path:
    """A two-dimensional model with an identity output layer (hq, cc) and the given input rows; others are (.5, 1/6)."""
    (directory / "lines.txt").write_text("".join(f"{line}\n" for line in lines))
    options = {"dim": 2, "wordNgrams": 2, "bucket": 1000, "thread": 1, "verbose": 0}
    model = fasttext.train_supervised(str(directory / "lines.txt"), **options)
    rows = np.tile(np.array([0.5, 1 / 6], np.float32), (len(model.words) + 1000, 1))
    for name, vector in vectors.items():
        rows[model.get_word_id(name) if " " not in name else len(model.words) + bigram(*name.split()) % 1000] = vector
    model.set_matrices(rows, np.eye(2, dtype=np.float32)[[model.labels.index(x) for x in (GOOD, "__label__cc")]])
    model.save_model(str(directory / "model.bin"))
    return directory / "model.bin"


def bigram(first: str, second: str) -> int:
    """fastText's hash of a bigram: FNV-1a of the words (bytes signed), combined modulo 2**64."""

    def fnv(word: str) -> int:
        h = 2166136261
        for byte in word.encode():
            h = ((h ^ (byte if byte < 128 else byte | 0xFFFFFF00)) * 16777619) & 0xFFFFFFFF
        return h if h < 1 << 31 else h | 0xFFFFFFFF00000000

    return (fnv(first) * 116049371 + fnv(second)) & 0xFFFFFFFFFFFFFFFF


def test_forward_pass_is_the_mean_of_words_and_bigrams_through_a_softmax(tmp_path: Path) -> None:
    lines = ["__label__hq a b", "__label__cc b a"]
    model = hand_made(tmp_path, {"a": (1, 0), "b": (0, 1), "a b": (0.5, -0.5), "b a": (-1, 2)}, lines)
    # The end of a line and its bigrams are words to fastText; their rows are the mean of the others and change nothing.
    ab, ba = scored(model, pa.array(["a b", "b a"]))
    assert ab == pytest.approx(0.582570, abs=2e-5)
    assert 1 - ab == pytest.approx(0.417430, abs=2e-5)
    assert ba < 0.5  # word order counts, through bigrams alone


def test_scores_are_those_of_fasttexts_own_batched_predict_to_the_bit(trained: Path, sample: pa.Table) -> None:
    texts = sample["text"].to_pylist()
    model = fasttext.load_model(str(trained))
    labels, probabilities = model.f.multilinePredict([t.replace("\n", " ") + "\n" for t in texts], 1, 0.0, "strict")
    p = np.array([x[0] for x in probabilities], np.float32)
    bare = np.where(np.array([x[0] for x in labels]) == GOOD, p, 1 - p)
    got = scored(trained, sample["text"].combine_chunks())
    assert got.tobytes() == np.clip(bare, 0, 1).tobytes()
    assert (got >= 0.5).sum() == (bare >= 0.5).sum() > 100


@given(
    st.lists(st.text(st.sampled_from("ab\n\r\v\f\x00\x1c\x1d\x1e\x85\u2028\u2029\u00a0\u2019é ")), min_size=1),
    st.data(),
)
def test_lines_hold_the_words_of_splitlines(texts: list[str], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(texts) - 1))
    for kind in (pa.string(), pa.large_string()):
        lines = _lines(pa.array(texts, kind).slice(start)).to_pylist()
        for line, text in zip(lines, texts[start:], strict=True):
            assert line.endswith(b"\n")
            assert line.count(b"\n") == 1
            assert fasttext_words(line.decode()) == fasttext_words(" ".join(text.splitlines()))


def fasttext_words(text: str) -> list[str]:
    return [w for w in re.split("[ \n\r\t\v\f\x00]+", text) if w]


def test_rare_breaks_are_seen_only_in_the_rows_at_hand() -> None:
    texts = pa.array(["one\u2028two", "plain \u2019 é", "three\x85four", "five\x1dsix"], pa.large_string())
    assert [_has_rare_breaks(texts.slice(i, 1)) for i in range(4)] == [True, False, True, True]


def test_white_space_at_ends_and_between_words_changes_nothing(trained: Path, sample: pa.Table) -> None:
    texts = sample["text"].slice(0, 50).to_pylist()
    padded = [f"\n\n  {t.replace(' ', '   ')} \r\n\t\n" for t in texts]
    assert (scored(trained, pa.array(texts)) == scored(trained, pa.array(padded))).all()


def test_the_other_label_is_one_minus_the_score(trained: Path, sample: pa.Table) -> None:
    texts = sample["text"].slice(0, 200).combine_chunks()
    np.testing.assert_allclose(scored(trained, texts), 1 - scored(trained, texts, "__label__cc"), atol=1e-7)


def test_a_score_never_leaves_zero_to_one(trained: Path, sample: pa.Table) -> None:
    texts = pa.array(["Home | Login | Register | Cart (0) | Sitemap " * 50, sample["text"][0].as_py()])
    raw = fasttext.load_model(str(trained)).predict(texts[0].as_py())[1][0]
    assert raw > 1  # by fastText's epsilon of 1e-5
    assert scored(trained, texts, "__label__cc")[0] == 1
    assert scored(trained, texts)[0] == 0


def test_the_probability_of_the_other_label_is_folded(tmp_path: Path) -> None:
    lines = ["__label__hq a", "__label__cc b"]
    nine = (0, np.log(9))
    model = hand_made(tmp_path, {"b": nine, "</s>": nine, "b </s>": nine}, lines)
    best, p = fasttext.load_model(str(model)).predict("b")
    raw = float(p[0])
    assert best == ("__label__cc",)
    assert scored(model, pa.array(["b"]))[0] == pytest.approx(1 - raw, abs=1e-6)
    assert raw == pytest.approx(0.9, abs=2e-5)


def test_of_many_labels_the_score_is_the_probability_of_the_one_asked_for(tmp_path: Path) -> None:
    words = {"wiki": "encyclopedia article", "chat": "lol hi", "shop": "buy cheap"}
    (tmp_path / "train.txt").write_text("".join(f"__label__{k} {v}\n" for k, v in words.items()) * 200)
    model = fasttext.train_supervised(str(tmp_path / "train.txt"), dim=8, thread=1, verbose=0)
    model.save_model(str(tmp_path / "model.bin"))
    texts = pa.array([*words.values(), "lol article"])
    by_label = np.array([scored(tmp_path / "model.bin", texts, f"__label__{k}") for k in words])
    assert (by_label[:, :3].argmax(axis=0) == [0, 1, 2]).all()
    np.testing.assert_allclose(by_label.sum(axis=0), 1, atol=1e-4)


def test_the_same_texts_give_the_same_bytes_in_any_order_and_format(tmp_path: Path, trained: Path) -> None:
    good, bad = (pq.read_table(SEEDS[side])["text"].to_pylist() for side in ("positives", "negatives"))
    with gzip.open(tmp_path / "good.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": t}) + "\n" for t in [*reversed(good), good[0], " "])
    pq.write_table(pa.table({"text": [*bad[300:], None, *bad[:300]]}), tmp_path / "bad.parquet")
    seeds = {"positives": [str(tmp_path / "good.jsonl.gz")], "negatives": str(tmp_path / "bad.parquet")}
    again = fitted(tmp_path / "run", {**seeds, **SMALL})
    assert (again / "model.bin").read_bytes() == trained.read_bytes()
    assert (again / "model.json").read_bytes() == (trained.parent / "model.json").read_bytes()


def test_facts_of_the_training_are_written_and_true(trained: Path) -> None:
    facts = json.loads((trained.parent / "model.json").read_text())
    assert facts["trained_on"] == {"positives": 876 - 87, "negatives": 780 - 78}
    assert facts["held_out"]["rows"] == 165
    assert facts["held_out"]["auc"] > 0.8
    assert 0.6 < facts["held_out"]["precision"] < 1
    assert {"lr": 0.5, "dim": 16, "bucket": 50_000, "word_ngrams": 2}.items() <= facts.items()


def test_the_defaults_are_those_of_dclm() -> None:
    recipe = Quality(positives="seeds.parquet")
    assert (recipe.lr, recipe.dim, recipe.epoch, recipe.min_count, recipe.word_ngrams) == (0.1, 100, 5, 1, 2)
    assert recipe.bucket == 2_000_000


def test_draws_depend_on_corpus_and_seed_not_on_shards_and_are_made_once(tmp_path: Path, sample: pa.Table) -> None:
    quality = {"positives": SEEDS["positives"], **SMALL}
    models = [(fitted(tmp_path / str(mb), quality, shard_mb=mb) / "model.bin").read_bytes() for mb in (0.2, 8)]
    assert models[0] == models[1]
    facts = json.loads((tmp_path / "8/artifacts/quality/model.json").read_text())
    assert abs(facts["trained_on"]["negatives"] - facts["trained_on"]["positives"]) < 20  # but for what is in both
    with run_over(tmp_path / "8", quality, shard_mb=8) as run:
        run.config.scores[0].fit(run)
        assert run.manifest["passes"] == []
    few = fitted(tmp_path / "few", {**quality, "draw": 50}) / "model.json"
    assert json.loads(few.read_text())["trained_on"]["negatives"] == 45


def test_a_word_that_looks_like_a_label_is_none(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("a fine text __label__evil\n" * 3 + "another fine text\n")
    (tmp_path / "bad.txt").write_text("__label__hq spam spam\nmore spam\n")
    seeds = {"positives": str(tmp_path / "good.txt"), "negatives": str(tmp_path / "bad.txt")}
    model = fitted(tmp_path / "run", {**seeds, **SMALL, "holdout": 0}) / "model.bin"
    assert sorted(fasttext.load_model(str(model)).get_labels()) == ["__label__cc", GOOD]


def test_on_one_seed_a_side_it_trains_and_on_equal_sides_it_says_why_not(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("a fine text\n")
    (tmp_path / "bad.txt").write_text("spam\n")
    seeds = {"positives": str(tmp_path / "good.txt"), "negatives": str(tmp_path / "bad.txt")}
    facts = json.loads((fitted(tmp_path / "run", {**seeds, **SMALL}) / "model.json").read_text())
    assert facts["held_out"] == {"rows": 0, "precision": None, "recall": None, "auc": None}
    with pytest.raises(TamisError, match="nothing to tell apart"):
        fitted(tmp_path / "same", {**seeds, "negatives": seeds["positives"], **SMALL})


def test_a_model_is_copied_once_from_wherever_it_lies(tmp_path: Path, trained: Path, sample: pa.Table) -> None:
    with fsspec.open("memory://models/quality.bin", "wb") as file:
        file.write(trained.read_bytes())
    with run_over(tmp_path, {"model": "memory://models/quality.bin"}) as run:
        run.materialize([row_column(True, None)])
        recipe = run.config.scores[0]
        recipe.fit(run)
        run.materialize([recipe.column(run)])
    column = ds.dataset(tmp_path / "columns/quality").to_table()["score"]
    assert (column.to_numpy() == scored(trained, sample["text"].combine_chunks())).all()


def test_a_moved_seed_file_is_the_same_seed_file(tmp_path: Path) -> None:
    identities = []
    for where in ("here", "there"):
        (tmp_path / where).mkdir()
        for side, text in (("good", "fine\n"), ("bad", "spam\n")):
            (tmp_path / where / f"{side}.txt").write_text(text)
        seeds = {"positives": str(tmp_path / where / "good.txt"), "negatives": str(tmp_path / where / "bad.txt")}
        with run_over(tmp_path / "run", {**seeds, **SMALL}) as run:
            identities.append(run.config.scores[0].column(run).identity)
    assert identities[0] == identities[1]


@pytest.mark.parametrize(
    ("quality", "message"),
    [
        ({"positives": "nowhere.parquet"}, r"quality\.positives: no such file: nowhere\.parquet"),
        ({"positives": SEEDS["positives"], "negatives": "nowhere.txt"}, r"quality\.negatives: no such file"),
        ({"model": "nowhere.bin"}, r"quality\.model: no such file: nowhere\.bin"),
        ({"model": SEEDS["positives"]}, "is not a fastText model"),
        ({"positives": "{tmp}/empty.txt"}, r"the seed set is empty: no text in .*empty\.txt"),
        ({"positives": "{tmp}/notes.pdf"}, r"is not a \.parquet, \.jsonl or \.txt file"),
        ({"positives": "{tmp}/numbers.jsonl"}, "column 'text' of .* is int64, not text"),
        ({"positives": "{tmp}/broken.jsonl"}, r"cannot read .*broken\.jsonl"),
        ({"positives": SEEDS["positives"], "seed_text": "body"}, "has no column 'body'; it has id, text, source"),
    ],
)
def test_seeds_and_models_that_cannot_be_used_are_errors_that_say_which(
    tmp_path: Path, quality: dict[str, str], message: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "notes.pdf").write_text("text")
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n')
    (tmp_path / "broken.jsonl").write_text("{not json")
    quality = {k: v.replace("{tmp}", str(tmp_path)) for k, v in quality.items()}
    with pytest.raises(TamisError, match=message):
        fitted(tmp_path / "run", quality)


def test_a_model_without_the_label_is_an_error_that_lists_its_labels(tmp_path: Path, trained: Path) -> None:
    fitted(tmp_path, {"model": str(trained)})
    with pytest.raises(TamisError, match=r"has no label '__label__good'; it has .*__label__cc"):
        fitted(tmp_path, {"model": str(trained), "label": "__label__good"})  # though the model is in the run already


@pytest.mark.parametrize(
    ("quality", "message"),
    [
        ({}, "give either `model`"),
        ({"model": "m.bin", "positives": "p.txt"}, "give either `model`"),
        ({"model": "m.bin", "dim": 16, "negatives": "n.txt"}, "trained already: remove dim, negatives"),
        ({"positives": "p.txt", "label": "__label__x"}, "`label` is for `model`"),
        ({"positives": "p.txt", "negatives": "n.txt", "draw": 5}, "either `negatives` or `draw`"),
    ],
)
def test_parameters_that_contradict_each_other(quality: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Quality(**quality)


def test_damaged_rows_of_the_sample_rank_below_intact_ones(trained: Path, sample: pa.Table) -> None:
    scores = scored(trained, sample["text"].combine_chunks())
    planted = sample["planted"].to_pylist()
    damaged = np.array([bool(p) and p.startswith("damaged") for p in planted])
    assert roc_auc_score(~damaged, scores) > 0.9


def test_encyclopaedic_seeds_find_encyclopaedic_rows_among_chatter(tmp_path: Path, shared_data: Path) -> None:
    """In the spirit of the published result: 5 % of a corpus is like the seeds, and the top tenth holds most of it."""
    table = ds.dataset(shared_data / "text_corpus/parts").to_table(columns=["id", "text", "source"])
    kinds = np.array(table["source"].to_pylist())
    wiki = np.flatnonzero(kinds == "wikipedia_passage")
    chatter = ["blog", "email", "essays", "ficlets", "fiction", "jokes", "journal", "letters", "spam", "twitter"]
    other = np.flatnonzero(np.isin(kinds, [f"masc_{c}" for c in chatter] + ["stackexchange"]))
    planted, seeds = wiki[: len(other) // 19], wiki[-400:]
    pq.write_table(table.take(seeds), tmp_path / "seeds.parquet")
    corpus = table.take(np.concatenate([other, planted]))
    (tmp_path / "corpus").mkdir()
    pq.write_table(corpus, tmp_path / "corpus/part.parquet")
    quality = {"positives": str(tmp_path / "seeds.parquet"), **SMALL, "epoch": 5, "draw": 150}
    model = fitted(tmp_path / "run", quality, tmp_path / "corpus") / "model.bin"
    scores = scored(model, corpus["text"].combine_chunks())
    is_planted = np.arange(len(scores)) >= len(other)
    top = np.argsort(scores)[-len(scores) // 10 :]
    assert is_planted[top].sum() > 0.45 * is_planted.sum()
    assert roc_auc_score(is_planted, scores) > 0.95

    # And a bigram model of the top tenth expects unseen text of the target better than one of as many random words.
    unseen = table["text"].take(wiki[len(planted) : len(planted) + 50])
    texts = pa.chunked_array([*corpus["text"].chunks, *unseen.chunks]).combine_chunks().cast(pa.large_string())
    words, offsets = hashed_words(texts, 1 << 14, 4000)
    bits, held_out = bigram_loss(words, offsets, 1 << 14), len(scores) + np.arange(50)
    size = np.diff(offsets)
    best = np.argsort(-scores, kind="stable")[: len(scores) // 10]
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(scores))
        random = order[np.cumsum(size[order]) <= size[best].sum()]
        assert bits(best, held_out) < bits(random, held_out) - 0.2
