"""Which end of a ranking to keep, asked of cheap models instead of guessed: hard rows, easy rows, or a random draw.

A small model is trained on each choice, at the same budget, and tried on rows held out at random. Two models, neither
of which needs torch: a bigram language model over hashed words (loss in bits a word), and, where rows have labels, a
logistic regression on their vectors (loss is the share of errors). Both are far smaller than what is trained later, on
far fewer rows; they tell which choice teaches more about the corpus at this scale, and no more than that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

ARMS = ("hard", "easy", "random")
DRAWS = 5
"""Random draws, whose spread says how much of a difference is chance."""

Loss = Callable[[np.ndarray, np.ndarray], float]
"""Rows to train on and rows to try on (indices) to the loss of the model trained."""


def compare(
    score: np.ndarray, concept: np.ndarray, size: np.ndarray, share: float, balance: float, loss: Loss, seed: int
) -> dict[str, Any]:
    """Losses of the three arms over m rows in random order, of which the first fifth is held out.

    `score`: (m,), greater is harder. `concept`, `size`: (m,) int. An arm keeps `share` of the pool's total size; every
    concept first gets `balance` of an equal share. Returns the choice and all that led to it, ready for JSON.
    """
    held_out = np.arange(max(1, len(score) // 5))
    pool = np.arange(len(held_out), len(score))
    budget = int(share * size[pool].sum())
    random = np.random.default_rng(seed)

    def arm(ranking: np.ndarray) -> tuple[float, int]:
        kept = pool[best(ranking, concept[pool], size[pool], budget, balance)]
        return loss(kept, held_out), len(kept)

    hard, easy = arm(score[pool]), arm(-score[pool])
    draws = [arm(random.random(len(pool))) for _ in range(DRAWS)]
    mean, spread = float(np.mean([d[0] for d in draws])), float(np.std([d[0] for d in draws], ddof=1))
    keep, least = ("hard", hard[0]) if hard[0] < easy[0] else ("easy", easy[0])
    return {
        "keep": keep,
        "better_than_random": least < mean,
        "arms": {
            "hard": {"loss": hard[0], "rows": hard[1]},
            "easy": {"loss": easy[0], "rows": easy[1]},
            "random": {
                "loss": mean,
                "rows": round(np.mean([d[1] for d in draws])),
                "deviation": spread,
                "draws": DRAWS,
            },
        },
        "share": share,
        "balance": balance,
        "budget": budget,
        "pool_rows": len(pool),
        "held_out_rows": len(held_out),
    }


def best(score: np.ndarray, concept: np.ndarray, size: np.ndarray, budget: int, balance: float) -> np.ndarray:
    """Rows (indices) of greatest score within a budget of `size`; first `balance * budget / concepts` of every concept.

    Sorscher et al. 2022: the floors are filled by rank inside the concept, the rest of the budget by rank among all.
    """
    order = np.argsort(-score, kind="stable")
    grouped = order[np.argsort(concept[order], kind="stable")]
    _, first, rows = np.unique(concept[grouped], return_index=True, return_counts=True)
    running = np.cumsum(size[grouped])
    inside = running - np.repeat(running[first] - size[grouped[first]], rows)
    floor = grouped[inside <= balance * budget // max(len(first), 1)]
    rest = order[~_mask(len(score), floor)[order]]
    return np.concatenate([floor, rest[np.cumsum(size[rest]) <= budget - size[floor].sum()]])


def _mask(length: int, chosen: np.ndarray) -> np.ndarray:
    mask = np.zeros(length, bool)
    mask[chosen] = True
    return mask


def bigram_loss(words: np.ndarray, offsets: np.ndarray, buckets: int) -> Loss:
    """Bits a word under a Witten-Bell interpolated bigram model; no parameter to tune.

    `words`: hashed words of m texts end to end, in [0, buckets); `offsets`: (m + 1,). A text begins with a mark of its
    own. P(w|h) = (c(h, w) + t(h) P(w)) / (c(h) + t(h)), where t(h) counts the distinct words seen after h; P(w) backs
    off to 1 / buckets in the same way.
    """
    before = np.empty_like(words)
    before[1:] = words[:-1]
    before[offsets[:-1][np.diff(offsets) > 0]] = buckets
    pairs = before.astype(np.int64) * (buckets + 1) + words
    rows = len(offsets) - 1
    row = np.repeat(np.arange(rows), np.diff(offsets))

    def loss(train: np.ndarray, held_out: np.ndarray) -> float:
        learn, tried = _mask(rows, train)[row], _mask(rows, held_out)[row]
        seen, count = np.unique(pairs[learn], return_counts=True)
        after = np.bincount(before[learn], minlength=buckets + 1)
        kinds = np.bincount(seen // (buckets + 1), minlength=buckets + 1)
        single = np.bincount(words[learn], minlength=buckets)
        types, total = int((single > 0).sum()), int(single.sum())
        unigram = (single + types / buckets) / max(total + types, 1) if total else np.full(buckets, 1 / buckets)
        at = np.searchsorted(seen, pairs[tried])
        found = at < len(seen)
        found[found] = seen[at[found]] == pairs[tried][found]
        hits = np.zeros(len(at))
        hits[found] = count[at[found]]
        h, p = before[tried], unigram[words[tried]]
        known = after[h] > 0
        p = np.where(known, (hits + kinds[h] * p) / np.maximum(after[h] + kinds[h], 1), p)
        return float(-np.log2(p).sum() / max(len(p), 1))

    return loss


def label_loss(vectors: np.ndarray, labels: np.ndarray) -> Loss:
    """Share of wrong labels of a logistic regression on (m, d) vectors."""

    def loss(train: np.ndarray, held_out: np.ndarray) -> float:
        from sklearn.linear_model import LogisticRegression

        known = np.unique(labels[train])
        if len(known) < 2:
            return float((labels[held_out] != known).mean())
        model = LogisticRegression(C=10.0, max_iter=300).fit(vectors[train], labels[train])
        return float((model.predict(vectors[held_out]) != labels[held_out]).mean())

    return loss
