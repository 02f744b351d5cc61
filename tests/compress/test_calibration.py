"""Calibration: sums do not depend on how rows are dealt out, padding counts nowhere, bad rows are dropped."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compress.architecture import anatomy
from pipeline.compress.calibration import Calibration, InputMoments, Turns, moments, token_loss, variance
from pipeline.compress.importance.minitron import Activity
from pipeline.errors import TamisError
from tests.compress.conftest import Tiny, make_tiny

torch = pytest.importorskip("torch")


def probes(model: Any) -> list[Any]:
    body = anatomy(model)
    consumers = tuple(units.consumer for units in body.units("neuron", "kv_group"))
    return [
        InputMoments(consumers, gram=True),
        Turns(body.blocks),
        Activity(tuple((c, 1) for c in consumers), body.norms, "mean"),
    ]


def rows(tiny: Tiny, count: int) -> dict[str, Any]:
    """Many rows for a tiny model."""
    shapes = {name: (count, *value.shape[1:]) for name, value in tiny.batch.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return {n: torch.randint(1, 96, s) if n == "input_ids" else torch.randn(s) for n, s in shapes.items()}


def split(batch: dict[str, Any], size: int) -> list[dict[str, Any]]:
    count = len(next(iter(batch.values())))
    return [{n: v[i : i + size] for n, v in batch.items()} for i in range(0, count, size)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_sums_do_not_depend_on_batches_or_shards(name: str) -> None:
    tiny = make_tiny(name)
    batch = rows(tiny, 11)
    whole = Calibration(tiny.model, [batch]).measure(*probes(tiny.model))
    for size in (1, 4):
        parts = Calibration(tiny.model, split(batch, size)).measure(*probes(tiny.model))
        for key, value in whole.items():
            torch.testing.assert_close(parts[key], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))
    shards = [Calibration(tiny.model, [part]).measure(*probes(tiny.model)) for part in split(batch, 4)]
    assert len(shards) == 3
    for key, value in whole.items():
        added = torch.stack([shard[key] for shard in shards]).sum(0)
        torch.testing.assert_close(added, value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))


def test_gradients_do_not_depend_on_batches_and_squares_are_of_rows() -> None:
    tiny = make_tiny("llama")
    batch = rows(tiny, 6)
    whole = Calibration(tiny.model, [batch])
    by_row = []
    for row in split(batch, 1):
        tiny.model.zero_grad()
        token_loss(tiny.model, row).sum().backward()
        by_row.append({n: p.grad.clone() for n, p in tiny.model.named_parameters()})
    squares = whole.squared_gradients()
    assert whole.passes == {"backward": 6 * 12}
    mean = whole.gradients()
    assert whole.passes == {"backward": 6 * 12}  # the pass over rows brought them along
    batched = Calibration(tiny.model, split(batch, 4)).gradients()
    for name in by_row[0]:
        each = torch.stack([g[name] for g in by_row])
        for found, expected in ((mean, each.mean(0)), (batched, each.mean(0)), (squares, each.square().mean(0))):
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_what_was_measured_is_not_measured_again_until_the_model_changes() -> None:
    tiny = make_tiny("llama")
    calibration = Calibration(tiny.model, [tiny.batch])
    first, *others = probes(tiny.model)
    calibration.measure(first)
    calibration.measure(first)
    assert calibration.passes == {"forward": 36}
    calibration.measure(first, *others)
    assert calibration.passes == {"forward": 72}
    calibration.forget()
    calibration.measure(first)
    assert calibration.passes == {"forward": 108}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_padding_counts_nowhere(name: str, side: str) -> None:
    tiny = make_tiny(name)
    ids = tiny.batch["input_ids"][:1, :8]
    zeros = torch.zeros(1, 4, dtype=torch.long)
    order = (ids, zeros) if side == "right" else (zeros, ids)
    padded = {"input_ids": torch.cat(order, 1), "attention_mask": torch.cat([(x > 0).long() for x in order], 1)}
    if name == "bert":  # its positions are absolute
        padded["position_ids"] = padded["attention_mask"].cumsum(1).sub(1).clamp_min(0)
    plain, masked = (
        Calibration(tiny.model, [batch]).measure(*probes(tiny.model)) for batch in ({"input_ids": ids}, padded)
    )
    for key, value in plain.items():
        torch.testing.assert_close(masked[key], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))
    if name == "llama":
        losses = [token_loss(tiny.model, batch).item() for batch in ({"input_ids": ids}, padded)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_token_loss_is_the_mean_surprise_of_the_next_token() -> None:
    tiny = make_tiny("gpt2")
    ids = tiny.batch["input_ids"]
    surprise = -tiny.model(**tiny.batch).logits.detach().log_softmax(-1)
    by_hand = [np.mean([float(surprise[r, t, ids[r, t + 1]]) for t in range(11)]) for r in range(3)]
    np.testing.assert_allclose(token_loss(tiny.model, tiny.batch).detach().numpy(), by_hand, rtol=1e-5)


@settings(max_examples=30)
@given(st.integers(1, 200), st.floats(-1e3, 1e3), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_variance_is_that_of_merged_means_and_deviations(n: int, mean: float, shards: int, seed: int) -> None:
    """Conventions, section 6: Q = Q1 + Q2 + (m1 - m2)^2 n1 n2 / n, where the mean may be a thousand deviations."""
    x = (np.random.default_rng(seed).standard_normal((n, 3)) + mean).astype(np.float32)
    merged_n, merged_mean, merged_q = 0, np.zeros(3), np.zeros(3)
    sums: dict[str, Any] = {}
    for part in np.array_split(x, shards):
        m, own = len(part), part.astype(np.float64)
        if m:
            apart = own.mean(0) - merged_mean
            merged_q += ((own - own.mean(0)) ** 2).sum(0) + apart**2 * merged_n * m / (merged_n + m)
            merged_n, merged_mean = merged_n + m, merged_mean + apart * m / (merged_n + m)
        for key, value in zip(("count", "sum", "square"), moments(torch.from_numpy(part)), strict=True):
            sums[f"x.{key}"] = sums.get(f"x.{key}", 0) + value
    expected = merged_q / max(1, n - 1)
    np.testing.assert_allclose(variance(sums, "x").numpy(), expected, rtol=1e-4, atol=1e-7 * (1 + mean**2 * 1e-6))
    np.testing.assert_allclose((sums["x.sum"] / n).numpy(), merged_mean, rtol=1e-6, atol=1e-6)


class Overflowing(torch.nn.Module):
    """Gives infinity for rows that hold a 7."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(1, 1, bias=False)
        self.inner.weight.data.fill_(1.0)

    def forward(self, input_ids: Any) -> Any:
        x = input_ids.float()[..., None]
        x = torch.where((input_ids == 7).any(1)[:, None, None], torch.inf * x, x)
        return self.inner(x)


def test_rows_that_are_not_finite_are_dropped_and_counted() -> None:
    ids = torch.ones(200, 3, dtype=torch.long)
    ids[[5, 77], 1] = 7
    for size in (1, 8, 200):
        calibration = Calibration(Overflowing(), split({"input_ids": ids}, size))
        sums = calibration.measure(InputMoments(("inner",)))
        assert calibration.dropped == 2
        assert float(sums["rows"]) == 198
        assert float(sums["inner.count"]) == float(sums["inner.sum"]) == 594
    ids[100:102, 0] = 7
    with pytest.raises(TamisError, match="4 of 200 calibration rows give values that are not finite"):
        Calibration(Overflowing(), split({"input_ids": ids}, 8)).measure(InputMoments(("inner",)))


def test_gradients_that_are_not_finite_are_dropped_and_counted() -> None:
    ids = torch.ones(200, 3, dtype=torch.long)
    ids[5] = 7
    calibration = Calibration(Overflowing(), split({"input_ids": ids}, 8), lambda m, b: m(**b).mean((1, 2)))
    assert calibration.gradients()["inner.weight"].item() == pytest.approx(1.0)
    assert calibration.dropped == 1
    calibration.batches = split({"input_ids": ids[:8]}, 8)
    calibration.forget()
    with pytest.raises(TamisError, match="1 of 8 calibration rows"):
        calibration.squared_gradients()


@pytest.mark.parametrize(
    ("fits", "says"), [(3, "a batch of 8 rows does not fit in memory; 2 fit: set batch to 2"), (0, "nor does one row")]
)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_out_of_memory_says_which_batch_fits(fits: int, says: str, error: type[Exception]) -> None:
    def loss(model: Any, batch: Any) -> Any:
        if len(batch["input_ids"]) > fits:
            raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return model(**batch).sum((1, 2))

    ids = torch.ones(16, 3, dtype=torch.long)
    with pytest.raises(TamisError, match=says):
        Calibration(Overflowing(), split({"input_ids": ids}, 8), loss).gradients()


LIMITED = r"""
import re, resource
import numpy as np, torch
from pipeline.compress.calibration import Calibration, InputMoments
from pipeline.errors import TamisError
from pipeline.models.training import Shape, new_lm

torch.set_num_threads(1)
model = new_lm(Shape(hidden=16, layers=1, heads=2, kv_heads=1, mlp=16, vocab=2000, context=256), 0)
blocks = np.arange(32 * 256, dtype=np.int32).reshape(32, 256) % 2000

def forward(calibration):
    calibration.measure(InputMoments(("model.layers.0.mlp.down_proj",)))

def calibrate(run, batch):
    calibration = Calibration.of_blocks(model, blocks, batch)
    run(calibration)
    return calibration.passes.total()

for run in (forward, Calibration.gradients):
    calibrate(run, 1)  # libraries take what they take
size = int(re.search(r"VmSize:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 40 * 2**20,) * 2)  # logits of 32 rows alone are 62 MiB
for run in (forward, Calibration.gradients):
    try:
        calibrate(run, 32)
    except TamisError as error:
        fits = int(re.search(r"set batch to (\d+)", str(error))[1])
        print(error, calibrate(run, fits), sep="; ran ")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hold a process to RLIMIT_AS")
def test_where_memory_really_runs_out_the_batch_that_is_named_fits() -> None:
    # Freed memory goes back at once: what is left of it in a heap of many pieces is up to chance.
    given_back = {f"MALLOC_{name}_": "65536" for name in ("MMAP_THRESHOLD", "TRIM_THRESHOLD")}
    environment = os.environ | given_back | {"MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", LIMITED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    told = re.findall(r"a batch of 32 rows does not fit in memory; (\d+) fit: set batch to \1; ran (\d+)", done.stdout)
    assert len(told) == 2, done.stdout
    forward, backward = (int(fits) for fits, _ in told)
    assert 0 < backward <= forward < 32
    assert {int(ran) for _, ran in told} == {32 * 256}  # under the same limit, all rows


def test_no_rows() -> None:
    for batches in ([], [{"input_ids": torch.ones(0, 3, dtype=torch.long)}]):
        with pytest.raises(TamisError, match="no rows to run the model on"):
            Calibration(Overflowing(), batches).measure(InputMoments(("inner",)))


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Calibration(torch.nn.Linear(3, 1), [{"input": torch.ones(2, 4)}], lambda m, b: m(**b)[:, 0]).gradients()
