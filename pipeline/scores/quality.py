"""Quality: the probability that a fastText classifier gives to the better of two kinds of text (DCLM-Baseline).

The classifier is a `.bin` that exists (`model`), or it is trained from seed sets (`positives`, and `negatives` or a
draw from the corpus). The defaults are DCLM's: softmax over words and bigrams, text as `" ".join(text.splitlines())`,
so a `.bin` of DCLM gets DCLM's scores. A score is float32 in [0, 1]; `floors: {quality: 0.5}` keeps the rows that
fastText's own batched predict puts at 0.5 or more. On another corpus take a budget, not DCLM's 0.018112.

What it trades away:
- The last bits: a classifier is folded into one with a number a word and label (`pipeline.scores._fold`), which takes
  less than half the time. Scores move by less than 1e-5; `exact: true` gives fastText's own.
- Training runs on one thread, because fastText is reproducible on one thread only: the same seeds, the same bytes.
  Measured: 1.0 M words an epoch and second at dim 100, 4 M at dim 16.
- Training, and every actor where it is `exact`, holds (bucket + words) * dim * 4 bytes: 0.8 GB with DCLM's bucket and
  dim. Small seed sets want less of both and more training: on examples/seeds (1,656 documents) intact rows rank above
  damaged ones with AUC 0.77 by the defaults, 0.92 with `lr: 0.5, epoch: 10`, and 0.92 in 9 MB with `dim: 16,
  bucket: 50_000` besides.
- fastText splits at ASCII white space: in scripts without spaces a document is one word. `tokenizer` makes a
  tokenizer's pieces the words, of text normalised as the classifier of Ultra-FineWeb has it (arXiv 2505.05427), whose
  `.bin` with `label: __label__pos` and tokenizer.json then scores as in their script.

Measured: 1.76 and 1.93 times the rows/s of fastText's own batched predict on the same core, 0.93 and 0.94 with `exact`
(bench/quality.py).

Source: Li et al. 2024, "DataComp-LM", arXiv 2406.11794, `mlfoundations/dclm`; Joulin et al. 2016, arXiv 1607.01759.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from pipeline.corpus.storage import is_remote, resolve
from pipeline.errors import ConfigError
from pipeline.hashing import hash64, row_keys
from pipeline.recipe import Column, Recipe, Transform, fingerprint
from pipeline.sample import Sample, needs_fit, texts
from pipeline.scores._fold import fold
from pipeline.scores._pieces import Pieces, store_pieces, stored_pieces
from pipeline.scores._seeds import identify, locate, read_seeds
from pipeline.scores._targets import listed
from pipeline.scores.base import Score

if TYPE_CHECKING:
    from pipeline.run import Artifact, Run

FIELDS = pa.schema([("score", pa.float32())])
DRAWN_BYTES = 1 << 16
"""A drawn text counts up to here, so that a draw of a hundred thousand stays within memory."""
GOOD, BAD = "__label__hq", "__label__cc"
FASTTEXT = {
    "lr": "lr",
    "dim": "dim",
    "epoch": "epoch",
    "min_count": "minCount",
    "word_ngrams": "wordNgrams",
    "bucket": "bucket",
}
TRAINING = (*FASTTEXT, "negatives", "draw", "holdout", "seed_text")


class FastText(Recipe):
    """How a classifier is trained; the defaults are DCLM's."""

    exact: bool = Field(False, description="fastText's own sums to the last bit, in twice the time")
    holdout: float = Field(0.1, ge=0, le=0.5, description="share of the seeds kept out of training to measure it with")
    lr: float = Field(0.1, gt=0)
    dim: int = Field(100, ge=1)
    epoch: int = Field(5, ge=1)
    min_count: int = Field(1, ge=1)
    word_ngrams: int = Field(2, ge=1)
    bucket: int = Field(2_000_000, ge=1)
    tokenizer: str | None = Field(
        None, description="tokenizer.json whose pieces are the words, of text normalised as Ultra-FineWeb's"
    )

    def prints(self) -> dict[str, Any]:
        """The fields, with the content of the tokenizer instead of its place: what a classifier depends on."""
        return self.model_dump(include={*FastText.model_fields}) | {"tokenizer": identify(self.pieces())}

    def pieces(self) -> list[str]:
        """Address of the tokenizer; none where words are what stands between white space."""
        return locate([self.tokenizer], "tokenizer")[:1] if self.tokenizer else []


class Quality(FastText, Score):
    """P(label) of a fastText classifier, for one that is trained here P(positive)."""

    claim = "like the positive seeds more than the negative ones"
    cost = "a look-up a word and bigram: 17,000 documents of 2.8 kB a core and second"
    source = "Li et al. 2024 (DCLM), arXiv 2406.11794"
    kind: Literal["quality"] = "quality"
    model: str | None = Field(None, description="fastText .bin to use; local or on an object store")
    label: str = Field(GOOD, description="label of `model` whose probability is the score")
    positives: str | list[str] | None = Field(None, description="texts to be like: Parquet, .jsonl or .txt files")
    negatives: str | list[str] | None = Field(None, description="texts to be unlike (default: a draw from the corpus)")
    draw: int | None = Field(None, ge=1, description="rows to draw as negatives (default: as many as positives)")
    seed_text: str = Field("text", description="column of the seed sets that holds the text")

    @model_validator(mode="after")
    def _one_classifier(self) -> Self:
        if (self.model is None) == (self.positives is None):
            raise ValueError("give either `model` (a fastText .bin) or `positives` (seed texts to train one from)")
        if self.model is None and self.label != GOOD:
            raise ValueError(f"`label` is for `model`; a classifier trained from seeds always scores {GOOD!r}")
        if self.model is not None and (unused := self.model_fields_set.intersection(TRAINING)):
            raise ValueError(f"`model` is trained already: remove {', '.join(sorted(unused))}")
        if self.negatives is not None and self.draw is not None:
            raise ValueError("give either `negatives` or `draw`: rows are drawn only where no negatives are given")
        return self

    def fit(self, run: Run) -> None:
        self._classifier(run)

    def column(self, run: Run) -> Column:
        classifier = self._classifier(run)
        identity = fingerprint(type(self).__name__, self.version, self.label, classifier.fingerprint)
        return Column(self.column_name, ("text",), FIELDS, partial(open_classifier, classifier, self.label), identity)

    def _classifier(self, run: Run) -> Artifact:
        """The artifact with `model.bin` and `model.json`; copied or trained once, found again by its fingerprint."""
        if self.model is not None:
            (model,) = locate([self.model], "quality.model")[:1]
            identity = fingerprint("fasttext", self.label, self.exact, identify([model, *self.pieces()]))
            adopt = partial(_adopt, model, self.label, self)
            return run.artifact(self.column_name, identity, adopt, resources=None)
        positives = locate(listed(self.positives), "quality.positives")
        negatives = locate(listed(self.negatives), "quality.negatives")
        corpus = [] if negatives else [run.identity("text"), run.seed, self.draw]
        asked = [identify(positives), identify(negatives), self.seed_text, corpus, self.prints()]
        identity = fingerprint("fasttext", self.version, asked)
        drawn = None
        if not negatives and needs_fit(run, self.column_name, identity):
            rows = self.draw or len(read_seeds(positives, self.seed_text, "quality.positives"))
            sample = Sample(("text",), rows, run.rows, _draw_seed(run.seed), key="text", max_bytes=DRAWN_BYTES)
            if not (state := run.aggregate(sample)):
                raise ConfigError("quality.negatives: the corpus has no text to draw them from: give files")
            drawn = pa.array(texts(state), pa.large_string())
        return run.artifact(self.column_name, identity, partial(_train, positives, negatives, drawn, self))


def _draw_seed(seed: int) -> int:
    """A seed of its own, so that the draw is independent of the samples that other stages take."""
    return int(fingerprint("quality.negatives", seed)[:15], 16)


def _adopt(path: str, label: str, settings: FastText, directory: Path) -> None:
    """Copy a model into an artifact. Raises ConfigError where it is no classifier or lacks the label."""
    import fasttext

    filesystem, inside = resolve(path)
    whole = directory / "whole.bin" if is_remote(path) else Path(inside)
    if is_remote(path):
        with filesystem.open_input_file(inside) as source, open(whole, "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 24)
    if settings.exact or not fold(whole, directory / "model.bin"):
        shutil.copyfile(whole, directory / "model.bin")
    (directory / "whole.bin").unlink(missing_ok=True)
    store_pieces(settings.pieces(), directory)
    try:
        classifier = fasttext.load_model(str(directory / "model.bin"))
    except (ValueError, RuntimeError, MemoryError) as error:
        raise ConfigError(f"quality.model: {path!r} is not a fastText model: {error}") from error
    labels = classifier.get_labels() if classifier.f.getArgs().model.name == "supervised" else []
    if label not in labels:
        raise ConfigError(f"quality.label: {path!r} has no label {label!r}; it has {', '.join(labels[:20]) or 'none'}")
    _write_facts(directory, {"labels": labels, "source": path})


def _train(
    positives: list[str], negatives: list[str], drawn: pa.Array | None, recipe: Quality, directory: Path
) -> None:
    """Train from seed files. `drawn`: texts of the corpus where no negatives are given."""
    good = read_seeds(positives, recipe.seed_text, "quality.positives")
    bad = drawn if drawn is not None else read_seeds(negatives, recipe.seed_text, "quality.negatives")
    train_classifier(good, bad, recipe, directory)


def train_classifier(positives: pa.Array, negatives: pa.Array, settings: FastText, directory: Path) -> None:
    """Train a classifier on one thread, with its lines in the order of their hashes: a function of the texts alone.

    A text counts once; one on both sides is a positive. Writes `model.bin`, and the settings with precision, recall and
    AUC on the seeds held out to `model.json`. Raises ConfigError where one side is empty.
    """
    import fasttext

    pieces = store_pieces(settings.pieces(), directory)
    good, bad = _lines(positives, pieces), _lines(negatives, pieces)
    # A word of a seed that looks like a label would be one.
    lines = pc.replace_substring(pa.concat_arrays([good, bad]), b"__label__", b"__label_")
    _, order = np.unique(hash64(row_keys(lines), 0), return_index=True)  # shuffled, and the first of equal lines
    is_good = order < len(good)
    held = np.zeros(len(order), bool)
    for side in (is_good, ~is_good):
        members = np.flatnonzero(side)
        held[members[: int(settings.holdout * len(members))]] = True
    counts = {"positives": int((is_good & ~held).sum()), "negatives": int((~is_good & ~held).sum())}
    if not all(counts.values()):
        raise ConfigError(f"quality: nothing to tell apart: {counts} are left once equal texts count once")
    lines = lines.take(pa.array(order))
    labels = pc.if_else(pa.array(is_good), f"{GOOD} ", f"{BAD} ").cast(pa.large_binary())
    with tempfile.NamedTemporaryFile(suffix=".txt") as file:
        file.writelines(_joined(labels, lines).filter(pa.array(~held)).to_pylist())
        file.flush()
        options = {option: getattr(settings, name) for name, option in FASTTEXT.items()}
        model = fasttext.train_supervised(file.name, loss="softmax", thread=1, verbose=0, **options)
    whole = directory / "whole.bin"
    model.save_model(str(whole))
    if settings.exact or not fold(whole, directory / "model.bin"):
        shutil.copyfile(whole, directory / "model.bin")
    whole.unlink()
    measured = measure(_probabilities(model, lines.filter(pa.array(held)), GOOD), is_good[held])
    _write_facts(
        directory, {"trained_on": counts, "words": len(model.words), "held_out": measured, **settings.prints()}
    )


def measure(score: np.ndarray, is_good: np.ndarray) -> dict[str, Any]:
    """Precision and recall at 0.5 and the area under the ROC curve; null where the held-out rows cannot tell."""
    from sklearn.metrics import roc_auc_score

    kept = score >= 0.5
    hits, both = int((kept & is_good).sum()), 0 < is_good.sum() < len(is_good)
    return {
        "rows": len(is_good),
        "precision": hits / int(kept.sum()) if kept.any() else None,
        "recall": hits / int(is_good.sum()) if is_good.any() else None,
        "auc": float(roc_auc_score(is_good, score)) if both else None,
    }


def _write_facts(directory: Path, facts: dict[str, Any]) -> None:
    (directory / "model.json").write_text(json.dumps(facts, indent=2))


def open_classifier(classifier: Artifact, label: str = GOOD) -> Transform:
    """From `text` to `score`, P(label) by the `model.bin` of an artifact."""
    import fasttext

    model = fasttext.load_model(str(classifier.local() / "model.bin"))
    pair = len(model.get_labels()) == 2 and model.f.getArgs().loss.name == "softmax"
    pieces = stored_pieces(classifier.local())

    def predict(batch: pa.RecordBatch) -> pa.RecordBatch:
        lines = _lines(batch["text"], pieces)
        return pa.record_batch([pa.array(_probabilities(model, lines, label, pair))], schema=FIELDS)

    return predict


def _lines(texts: pa.Array, pieces: Pieces | None = None) -> pa.LargeBinaryArray:
    """What fastText reads of every text: its lines, or its pieces, joined by a space, and one line break at the end.

    fastText takes CR, VT, FF and NUL for white space itself; what else `str.splitlines` breaks at is rare, so the
    regular expression, which costs five times the literal, runs only where the bytes of a batch show one of them.
    """
    texts = pieces(texts) if pieces else texts.cast(pa.large_string())
    if _has_rare_breaks(texts):
        texts = pc.replace_substring_regex(texts, "[\x1c-\x1e\x85\u2028\u2029]", " ")
    return _joined(
        pc.replace_substring(texts.cast(pa.large_binary()), b"\n", b" "), pa.scalar(b"\n", pa.large_binary())
    )


def _joined(left: pa.Array, right: pa.Array | pa.Scalar) -> pa.LargeBinaryArray:
    return pc.binary_join_element_wise(left, right, pa.scalar(b"", pa.large_binary()))


def _has_rare_breaks(texts: pa.LargeStringArray) -> bool:
    """Whether the bytes hold 1C to 1E, or what begins C2 85 (NEL) or E2 80 A8 and A9 (line, paragraph separator)."""
    offsets = np.frombuffer(texts.buffers()[1], np.int64)
    first, last = offsets[texts.offset], offsets[texts.offset + len(texts)]
    data = np.frombuffer(texts.buffers()[2] or b"", np.uint8)[first:last]
    if (data - np.uint8(0x1C) <= 2).any():  # bytes below 1C wrap around to large ones
        return True
    pair, triple = np.flatnonzero(data == 0xC2), np.flatnonzero(data == 0xE2)  # UTF-8 is whole: bytes follow
    separator = (data[triple + 1] == 0x80) & ((data[triple + 2] == 0xA8) | (data[triple + 2] == 0xA9))
    return bool((data[pair + 1] == 0x85).any() or separator.any())


def _probabilities(model: Any, lines: pa.LargeBinaryArray, label: str, pair: bool = True) -> np.ndarray:
    """P(label) of n lines, float32 in [0, 1]; fastText's own may exceed 1 by 1e-5.

    `pair`: there are two labels whose probabilities sum to 1, so the better one tells both. Else all are asked for, and
    a label that fastText leaves out has 0.
    """
    found, given = model.f.multilinePredict(lines.to_pylist(), 1 if pair else -1, 0.0, "strict")
    is_label = np.array(list(chain.from_iterable(found))) == label
    p = np.fromiter(chain.from_iterable(given), np.float32)
    if pair:
        return np.clip(np.where(is_label, p, 1 - p), 0, 1)
    score = np.zeros(len(lines), np.float32)
    score[np.repeat(np.arange(len(lines)), [len(g) for g in given])[is_label]] = p[is_label]
    return np.clip(score, 0, 1)
