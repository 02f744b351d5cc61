"""Batch operators on short trainings: what they cost a step, and what the training comes to beside one without.

usage: python bench/in_the_loop.py {opus,cost,q_tuning,noisy,priming} [--seeds N] [--steps N] [--data DIR]

One thread; costs are CPU seconds in one run, those of the operator's call over those of the step that it stands before.

- `opus`: a language model of 1.1 M parameters on the documents of ../shared/data/text_corpus, 8 rows of 128 tokens out
  of buffers of 16, AdamW. The proxy is of medical pages (`nih_web`), a fifth of the corpus. Losses after equal tokens
  and steps, on unseen medical pages and on unseen rows of all sources.
- `q_tuning`: a model of ../shared/data/instruct tuned on GSM8K rows, of which some have another row's answer, in a
  set that is two fifths what the model was trained on before. Loss on answers to unseen questions after equal batches:
  of all rows, of a quarter chosen by Q-Tuning, of as many at random, and of as many that are neither.
- `noisy`: four sources of the text corpus told apart by a small classifier, with 30 % and with no labels replaced.
- `cost`: OPUS on rows of 1,024 tokens, the same model, 16 rows a step out of buffers of 32, by what it looks at.
- `priming`: a text with an improbable keyword learned among ordinary rows, with and without the 8 % largest updates.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from pipeline.batches.base import BatchOperator, Operator, Setup, row_losses, weighted_loss
from pipeline.batches.ignore_top_k import IgnoreTopK, keyword_logp, priming
from pipeline.batches.noisy_loss_rescaling import NoisyLossRescaling
from pipeline.batches.opus import Opus
from pipeline.batches.q_tuning import QTuning
from pipeline.models.training import Shape, new_lm, pack, train_lm, train_tokenizer

Batch = dict[str, torch.Tensor]
SHAPE = Shape(hidden=128, layers=4, heads=4, kv_heads=2, mlp=384, vocab=2048, context=128)
MEDICAL = "nih_web"
CLASSES = ("book", "nih_web", "us_speech", "wikipedia_passage")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["opus", "cost", "q_tuning", "noisy", "priming"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    options = parser.parse_args()
    torch.set_num_threads(1)
    {"opus": opus, "cost": overhead, "q_tuning": q_tuning, "noisy": noisy, "priming": prime}[options.what](options)


def corpus(data: Path, rows: int) -> tuple[list[str], list[str]]:
    """First texts of the corpus, cut to 4,000 characters, and their sources."""
    table = pq.read_table(data / "text_corpus" / "parts", columns=["text", "source"]).slice(0, rows)
    return [text[:4000] for text in table["text"].to_pylist()], table["source"].to_pylist()


def as_batch(ids: np.ndarray) -> Batch:
    tensor = torch.from_numpy(np.asarray(ids, np.int64))
    return {"input_ids": tensor, "labels": tensor}


@torch.no_grad()
def mean_loss(model: Any, batch: Batch, rows: int = 16) -> float:
    model.eval()
    each = []
    for start in range(0, len(batch["labels"]), rows):
        part = {name: values[start : start + rows] for name, values in batch.items()}
        loss, counts = row_losses(model, part)
        each.append((float((loss * counts).sum()), float(counts.sum())))
    model.train()
    return sum(total for total, _ in each) / sum(count for _, count in each)


def train(
    model: Any, batches: Sequence[Batch], lr: float, open_on: Callable[[Any, Any], Operator] | None
) -> tuple[float, list[dict[str, float]]]:
    """Train on every batch; CPU seconds of the operator over those of the steps, and the operator's facts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    operator = open_on(model, optimizer) if open_on else None
    model.train()
    spent: list[tuple[float, float]] = []
    facts = []
    for batch in batches:
        began = time.process_time()
        if operator is not None:
            choice = operator(batch)
            batch = choice.of(batch)
            facts.append(choice.facts)
        chosen = time.process_time()
        weighted_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        spent.append((chosen - began, time.process_time() - chosen))
    if operator is not None:
        operator.close()
    settled = spent[len(spent) // 5 :]
    return sum(a for a, _ in settled) / sum(b for _, b in settled), facts


def spread(values: Sequence[float], digits: int = 3) -> str:
    deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{np.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def paired(values: Sequence[float], others: Sequence[float]) -> str:
    return spread([a - b for a, b in zip(values, others, strict=True)])


def opus(options: argparse.Namespace) -> None:
    texts, sources = corpus(options.data, 3000)
    tokenizer = train_tokenizer(texts, SHAPE.vocab)
    tokens = [e.ids for e in tokenizer.encode_batch_fast(texts)]
    unseen = set(range(0, len(texts), 10))
    medical = [i for i, source in enumerate(sources) if source == MEDICAL]

    def blocks(rows: Sequence[int]) -> np.ndarray:
        return pack([tokens[i] for i in rows], SHAPE.context, 0)

    proxy = as_batch(blocks([i for i in medical if i not in unseen and i % 10 == 1]))
    pool = blocks([i for i in range(len(texts)) if i not in unseen and not (i in set(medical) and i % 10 == 1)])
    targets = as_batch(blocks([i for i in medical if i in unseen])[:48])
    mixed = as_batch(blocks(sorted(unseen))[:96])
    common: dict[str, Any] = {"rows": 0.5, "warmup": options.steps // 10}
    arms: dict[str, BatchOperator | None] = {
        "random rows": None,
        "opus": Opus(**common, score_tokens=32),
        "opus, tau 0": Opus(**common, score_tokens=32, tau=0),
    }
    found: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in arms}
    for seed in range(options.seeds):
        order = np.random.default_rng(seed)
        buffers = [pool[order.choice(len(pool), 16, replace=False)] for _ in range(options.steps)]
        for name, recipe in arms.items():
            model = new_lm(SHAPE, seed)
            batches = [as_batch(b if recipe else b[:8]) for b in buffers]
            start = None if recipe is None else lambda m, o, r=recipe: r.begin(Setup(m, [o], proxy))
            cost, facts = train(model, batches, 2e-3, start)
            effective = statistics.mean(f["effective"] for f in facts[common["warmup"] :]) if facts else 16.0
            found[name].append((mean_loss(model, targets), mean_loss(model, mixed), cost, effective))
    print(f"{new_lm(SHAPE, 0).num_parameters():,} parameters, {options.steps} steps of 8 x {SHAPE.context} tokens")
    print(
        "| arm | loss, medical | less than random | loss, all sources | less than random | CPU of a step | effective |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    plain = list(zip(*found["random rows"], strict=True))
    for name, runs in found.items():
        target, all_of, cost, effective = zip(*runs, strict=True)
        print(
            f"| {name} | {spread(target)} | {paired(plain[0], target)} | {spread(all_of)} | {paired(plain[1], all_of)} "
            f"| {statistics.mean(cost):+.1%} | {statistics.mean(effective):.1f} |"
        )


def overhead(options: argparse.Namespace) -> None:
    shape = dataclasses.replace(SHAPE, context=1024)
    rng = np.random.default_rng(0)
    buffers = [as_batch(rng.integers(1, shape.vocab, (32, shape.context))) for _ in range(4)]
    print("| tokens looked at | layers | CPU of a step |")
    print("| --- | --- | --- |")
    for tokens, last in ((512, None), (64, None), (32, None), (64, 7), (32, 7)):
        model = new_lm(shape, 0)
        recipe = Opus(warmup=0, score_tokens=tokens, last=last)
        share, _ = train(model, buffers, 1e-3, lambda m, o, r=recipe: r.begin(Setup(m, [o], buffers[0])))
        print(f"| {tokens} | {'all' if last is None else f'last {last}'} | {share:+.1%} |", flush=True)


def rows_of(tokenizer: Any, prompts: list[str], answers: list[str], width: int = 128) -> Batch:
    """Padded rows with loss on the answer and the end of it."""
    ids, labels = np.zeros((len(prompts), width), np.int64), np.full((len(prompts), width), -100)
    asked, told = tokenizer.encode_batch_fast([p + "\n" for p in prompts]), tokenizer.encode_batch_fast(answers)
    for i, (prompt, answer) in enumerate(zip(asked, told, strict=True)):
        row = [*prompt.ids[-(width // 2) :], *answer.ids, 0][:width]
        begin = min(len(prompt.ids), width // 2)
        ids[i, : len(row)], labels[i, begin : len(row)] = row, row[begin:]
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def q_tuning(options: argparse.Namespace) -> None:
    table = pq.read_table(options.data / "instruct" / "instruct.parquet").to_pylist()
    maths = [r for r in table if r["source"] == "gsm8k_train"][:2000]
    known = [r for r in table if r["source"] == "p3_paws"][:400]
    tokenizer = train_tokenizer([r["instruction"] + "\n" + r["output"] for r in maths + known], SHAPE.vocab)

    def batch_of(rows: list[dict[str, str]], answers: list[str] | None = None) -> Batch:
        prompts = [" ".join([r["instruction"], r["input"] or ""]) for r in rows]
        return rows_of(tokenizer, prompts, answers or [r["output"] for r in rows])

    old, new, test = batch_of(known), batch_of(maths[:800]), batch_of(maths[1900:])
    start = new_lm(SHAPE, 0)
    base = batch_of(maths[1000:1400])
    first = {name: torch.cat([old[name], base[name]]) for name in old}
    order = np.random.default_rng(0)
    picks = [order.choice(len(first["labels"]), 16, replace=False) for _ in range(options.steps)]
    train(start, [{n: v[p] for n, v in first.items()} for p in picks], 2e-3, None)

    wrong = batch_of(maths[:400], [r["output"] for r in maths[400:800]])
    names = {"clean": {n: v[400:] for n, v in new.items()}, "wrong": {n: v[:200] for n, v in wrong.items()}, "old": old}
    kinds = np.repeat([0, 1, 2], [len(b["labels"]) for b in names.values()])
    mixed = {n: torch.cat([b[n] for b in names.values()]) for n in old}
    arms = ["all rows", "random quarter", "q_tuning", "clean quarter"]
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in arms}
    for seed in range(options.seeds):
        rng = np.random.default_rng(seed)
        picks = [rng.choice(len(kinds), 32, replace=False) for _ in range(options.steps)]
        clean = [rng.choice(np.flatnonzero(kinds == 0), 8, replace=False) for _ in range(options.steps)]
        for name in arms:
            model = copy.deepcopy(start)
            chosen = {"random quarter": [p[:8] for p in picks], "clean quarter": clean}.get(name, picks)
            batches = [{n: v[p] for n, v in mixed.items()} for p in chosen]
            kept: list[int] = []

            def watched(m: Any, o: Any, picks: Any = picks, kept: list[int] = kept) -> Operator:
                inner, at = QTuning(rows=0.25, tokens=0.5).begin(Setup(m)), iter(picks)

                class Watched(Operator):
                    def __call__(self, batch: Any) -> Any:
                        choice = inner(batch)
                        kept.extend(kinds[next(at)[choice.rows.numpy()]])
                        return choice

                return Watched()

            began = time.process_time()
            train(model, batches, 5e-4, watched if name == "q_tuning" else None)
            seconds = time.process_time() - began
            share = float(np.mean(np.array(kept) == 0)) if kept else float("nan")
            found[name].append((mean_loss(model, test), seconds / options.steps, share))
    print(f"before tuning: {mean_loss(start, test):.3f}; clean, wrong, old: {np.bincount(kinds)}")
    print("| arm | loss on unseen answers | CPU seconds a step, over all rows | clean among the kept |")
    print("| --- | --- | --- | --- |")
    whole = statistics.mean(s for _, s, _ in found["all rows"])
    for name, runs in found.items():
        loss, seconds, share = zip(*runs, strict=True)
        print(f"| {name} | {spread(loss)} | {statistics.mean(seconds) / whole:.2f} | {statistics.mean(share):.2f} |")


class Classifier(torch.nn.Module):
    def __init__(self, vocab: int, classes: int) -> None:
        super().__init__()
        self.words, self.drop = torch.nn.Embedding(vocab, 64), torch.nn.Dropout(0.3)
        self.hidden, self.out = torch.nn.Linear(64, 64), torch.nn.Linear(64, classes)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        hidden = torch.relu(self.hidden(self.drop(self.words(input_ids).mean(1))))
        return SimpleNamespace(logits=self.out(self.drop(hidden)))


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    ranks = np.argsort(np.argsort(scores)) + 1.0
    n = positive.sum()
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(scores) - n)))


def noisy(options: argparse.Namespace) -> None:
    texts, sources = corpus(options.data, 6000)
    rows = [i for i, s in enumerate(sources) if s in CLASSES][:3200]
    tokenizer = train_tokenizer([texts[i] for i in rows], 2048)
    ids = np.zeros((len(rows), 24), np.int64)
    for k, encoding in enumerate(tokenizer.encode_batch_fast([texts[i][200:] for i in rows])):
        ids[k, : len(encoding.ids[:24])] = encoding.ids[:24]
    right = np.array([CLASSES.index(sources[i]) for i in rows])
    words, cut = torch.from_numpy(ids), len(rows) // 2
    print("| noise | arm | accuracy on unseen rows | AUC of weight for a right label | CPU of a step |")
    print("| --- | --- | --- | --- | --- |")
    for noise in (0.3, 0.0):
        found: dict[str, list[tuple[float, float, float]]] = {"plain": [], "noisy_loss_rescaling": []}
        for seed in range(options.seeds):
            rng = np.random.default_rng(seed)
            flipped = rng.random(cut) < noise
            labels = np.where(flipped, (right[:cut] + rng.integers(1, len(CLASSES), cut)) % len(CLASSES), right[:cut])
            epochs, batch = 15, 64
            picks = [p for _ in range(epochs) for p in np.array_split(rng.permutation(cut), cut // batch)]
            for name in found:
                torch.manual_seed(seed)
                model = Classifier(2048, len(CLASSES))
                recipe = NoisyLossRescaling(classes=len(CLASSES), warmup=len(picks) // epochs, seed=seed)
                total = np.zeros(cut)

                def start(m: Any, o: Any, recipe: Any = recipe, total: Any = total, picks: Any = picks) -> Operator:
                    inner, at = recipe.begin(Setup(m, [o])), iter(enumerate(picks))

                    class Watched(Operator):
                        def __call__(self, given: Any) -> Any:
                            choice, (step, rows) = inner(given), next(at)
                            if step >= len(picks) // 2:
                                total[rows] += inner.weights.numpy()  # type: ignore[attr-defined]  # of this operator
                            return choice

                    return Watched()

                batches = [{"input_ids": words[p], "labels": torch.from_numpy(labels[p])} for p in picks]
                cost, _ = train(model, batches, 5e-3, start if name != "plain" else None)
                model.eval()
                guess = model(words[cut:]).logits.argmax(1).numpy()
                score = auc(total, ~flipped) if noise and name != "plain" else float("nan")
                found[name].append((float((guess == right[cut:]).mean()), score, cost))
        for name, runs in found.items():
            accuracy, score, cost = zip(*runs, strict=True)
            print(f"| {noise} | {name} | {spread(accuracy)} | {spread(score)} | {statistics.mean(cost):+.1f} |")


def prime(options: argparse.Namespace) -> None:
    texts, _ = corpus(options.data, 2000)
    tokenizer = train_tokenizer(texts, SHAPE.vocab)
    tokens = [e.ids for e in tokenizer.encode_batch_fast(texts)]
    ids = pack(tokens[:1800], SHAPE.context, 0)
    model = new_lm(SHAPE, 0)
    train_lm(model, ids, 3 * options.steps, 8, 2e-3, 0)
    unseen = [row[:64] for row in tokens[1800:] if len(row) > 64]
    rng, position = np.random.default_rng(0), 40
    contexts = [row[:position] for row in unseen[100:112]]
    facts = []
    for row, wanted in zip(unseen, np.geomspace(1e-1, 1e-6, 8 * options.seeds), strict=False):
        with torch.no_grad():
            p = model(input_ids=torch.tensor([row[:position]])).logits[0, -1].float().softmax(-1).numpy()
        keyword = int(np.argmin(np.abs(np.log(p) - np.log(wanted))))
        facts.append((row[:position], keyword, [*row[:position], keyword, *row[position + 1 : 64]], float(p[keyword])))
    found: dict[float, list[tuple[float, float]]] = {0.0: [], 0.08: []}
    mixed = as_batch(pack(tokens[1900:], SHAPE.context, 0)[:24])
    losses: dict[float, list[float]] = {0.0: [], 0.08: []}
    for share, measured in found.items():
        for prefix, keyword, text, _ in facts:
            tuned = copy.deepcopy(model)
            before = keyword_logp(tuned, contexts, [keyword]), keyword_logp(tuned, [prefix], [keyword])
            ordinary = [ids[rng.choice(len(ids), 3, replace=False), :64] for _ in range(20)]
            batches = [as_batch(np.concatenate([rows, np.asarray([text])])) for rows in ordinary]
            train(tuned, batches, 5e-4, lambda m, o, share=share: IgnoreTopK(share=share).begin(Setup(m, [o])))
            after = keyword_logp(tuned, contexts, [keyword]), keyword_logp(tuned, [prefix], [keyword])
            measured.append((priming(before[0], after[0])[1], priming(before[1], after[1])[1]))
            losses[share].append(mean_loss(tuned, mixed))
    risk = -np.log10([p for *_, p in facts])
    ranks = [np.argsort(np.argsort(v)) for v in (risk, [s for s, _ in found[0.0]])]
    print(f"{len(facts)} texts, p of the keyword {10 ** -risk.max():.0e} to {10 ** -risk.min():.0e}")
    print(f"Spearman of -log p and log S_prime, plain updates: {np.corrcoef(*ranks)[0, 1]:+.2f}")
    print("| updates | median log S_prime | median log S_mem | loss on unseen text |")
    print("| --- | --- | --- | --- |")
    for share, measured in found.items():
        primed, kept = np.log(np.array(measured)).T
        print(
            f"| without the {share:.0%} largest | {np.median(primed):+.2f} | {np.median(kept):+.2f} "
            f"| {statistics.mean(losses[share]):.3f} |"
        )


if __name__ == "__main__":
    main()
