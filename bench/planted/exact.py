"""Influence beside the exact answer, and whether rows that should raise a loss do.

1. Leave-one-out: softmax regression with a ridge penalty on vectors of planted rows and their labels, some of them
   wrong, is trained to its optimum without each row in turn. A row's exact influence is how much the loss on rows held
   out rises without it. The estimators are the functions of the criteria themselves, at the full optimum; Spearman's
   rank correlation with the exact answer says how far to trust them where no exact answer can be had.
2. Trained on: the small model takes ten steps on rows of one role, and its loss on unseen target texts is measured
   before and after. So `contrary` rows are shown to raise it, not supposed to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

ROWS, HELD_OUT, CONCEPTS, DIMS = 240, 400, 6, 16
RIDGE = 1e-2
STEPS, BATCH, LR = 10, 4, 3e-4
ROLES = ("target", "contrary", "plain", "real")


def problem(corpus: Path, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors with a constant 1 behind (n, DIMS + 1), labels (n,) and whether they are wrong (n,)."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    table = pq.read_table(corpus)
    concept, role = table["concept"].to_numpy(), np.array(table["role"].to_pylist())
    rows = np.flatnonzero((role == "plain") & (concept >= 1) & (concept <= CONCEPTS))
    rows = np.random.default_rng(seed).permutation(rows)[: ROWS + HELD_OUT]
    texts = table["text"].take(rows.tolist()).to_pylist()
    x = TruncatedSVD(DIMS, random_state=seed).fit_transform(TfidfVectorizer().fit_transform(texts))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    wrong = np.random.default_rng(seed + 1).random(len(rows)) < 0.15
    y = np.where(wrong, concept[rows] % CONCEPTS, concept[rows] - 1)
    y[ROWS:] = concept[rows][ROWS:] - 1  # what is held out is labelled right
    return np.concatenate([x, np.ones((len(x), 1))], axis=1), y, wrong


def optimum(x: np.ndarray, y: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """Weights (classes, d) of the least mean cross-entropy + RIDGE / 2 |w|^2, by Newton's method to 1e-10."""
    classes, d = CONCEPTS, x.shape[1]
    w = np.zeros((classes, d)) if start is None else start.copy()
    for _ in range(50):
        gradient = gradients(w, x, y).mean(axis=0) + RIDGE * w.ravel()
        if np.abs(gradient).max() < 1e-10:
            return w
        w -= np.linalg.solve(hessian(w, x), gradient).reshape(w.shape)
    raise RuntimeError("Newton's method has not converged")


def gradients(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of every row's cross-entropy, without the penalty; (n, classes d)."""
    from pipeline.scores._head import errors, softmax

    delta = errors(softmax(x @ w.T), y)
    return np.asarray((delta[:, :, None] * x[:, None, :]).reshape(len(x), -1))


def hessian(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Of the mean loss and the penalty; (classes d, classes d)."""
    from pipeline.scores._head import softmax

    p = softmax(x @ w.T)
    middle = p[:, :, None] * np.eye(p.shape[1]) - p[:, :, None] * p[:, None, :]
    size = p.shape[1] * x.shape[1]
    full = np.einsum("nab,ni,nj->aibj", middle, x, x, optimize=True).reshape(size, size) / len(x)
    return np.asarray(full + RIDGE * np.eye(size))


def leave_one_out(x: np.ndarray, y: np.ndarray, held_x: np.ndarray, held_y: np.ndarray) -> np.ndarray:
    """How much the held-out loss rises when each row is left out and the rest retrained; (n,)."""

    def loss(w: np.ndarray) -> float:
        z = held_x @ w.T
        return float((np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), held_y]).mean())

    full = optimum(x, y)
    rest = [np.arange(len(x)) != i for i in range(len(x))]
    return np.array([loss(optimum(x[r], y[r], full)) for r in rest]) - loss(full)


def estimates(x: np.ndarray, y: np.ndarray, held_x: np.ndarray, held_y: np.ndarray) -> dict[str, np.ndarray]:
    """Influence of every row by each estimator, greater where leaving it out should hurt more; (n,)."""
    from pipeline.scores._head import error_norms
    from pipeline.scores._influence import unit
    from pipeline.scores.dealrec import lissa, softmax_product
    from pipeline.scores.trak import directions

    w = optimum(x, y)
    g, v = gradients(w, x, y), gradients(w, held_x, held_y).mean(axis=0)
    order = np.random.default_rng(0).integers(0, len(x), 5000)

    def product(h: np.ndarray, step: int) -> np.ndarray:
        return softmax_product(w, x[order[step]], h)

    h, _ = lissa(v.reshape(w.shape), product, 0.01, 25, len(order))
    el2n = error_norms([w.astype(np.float32)], x[:, :-1].astype(np.float32), y)
    return {
        "influence function, exact Hessian": g @ np.linalg.solve(hessian(w, x), v),
        "trak (Gram matrix, damping 0.1)": g @ directions(g.T @ g, len(g), v[None], 0.1)[0],
        "dealrec (LiSSA, damping 0.01, scale 25)": g @ h.ravel(),
        "tracin, normalise: false (product of gradients)": g @ v,
        "tracin, less (cosine of gradients)": unit(g) @ v,
        "el2n, easy first (no target)": -el2n,
        "random": np.random.default_rng(0).random(len(x)),
    }


def influence(corpus: Path, seed: int) -> list[tuple[str, float]]:
    """Estimator and Spearman's rank correlation with leave-one-out retraining, the best first."""
    from scipy.stats import spearmanr

    x, y, _ = problem(corpus, seed)
    parts = x[:ROWS], y[:ROWS], x[ROWS:], y[ROWS:]
    exact = leave_one_out(*parts)
    found = [(name, float(spearmanr(exact, e).statistic)) for name, e in estimates(*parts).items()]
    return sorted(found, key=lambda f: -f[1])


def trained_on(corpus: Path, model: Path, seed: int) -> list[tuple[str, float]]:
    """Role, and the change of the loss on unseen target texts (nats a token) after ten steps on rows of that role."""
    import torch

    from pipeline.models.causal import load_causal
    from pipeline.models.training import lm_loss, pack, train_lm

    torch.set_num_threads(1)
    table = pq.read_table(corpus)
    role = np.array(table["role"].to_pylist())

    def blocks(texts: Sequence[str], encode: Callable[[str], list[int]]) -> np.ndarray:
        return pack([encode(t) for t in texts], 128, 0)

    found = []
    for name in ROLES:
        lm, tokenizer = load_causal(model)
        encode: Callable[[str], list[int]] = lambda t, tokenizer=tokenizer: list(tokenizer(t)["input_ids"])  # noqa: E731
        unseen = blocks(pq.read_table(corpus.with_name("target_more.parquet"))["text"].to_pylist(), encode)
        rows = table["text"].take(np.flatnonzero(role == name)[:24].tolist()).to_pylist()
        before = lm_loss(lm, unseen)
        train_lm(lm, blocks(rows, encode), STEPS, BATCH, LR, seed, warmup=1)
        found.append((name, lm_loss(lm, unseen) - before))
    return found


def main(directory: Path, seed: int) -> str:
    """Both answers as JSON."""
    corpus = directory / "planted" / "corpus.parquet"
    return json.dumps({"influence": influence(corpus, seed), "trained": trained_on(corpus, directory / "model", seed)})
