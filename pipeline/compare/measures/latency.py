"""What a model takes: prefill and decoding apart, at batches of 1 and 8, memory, size on disk.

Measured, never derived: unaligned widths can be slower than the dense model, and masks save nothing. Threads are fixed
and given back; ten runs warm up, at least thirty count, and every one is a value, so medians, 90 % quantiles and
intervals follow. Prefill is a forward pass over a prompt; decoding a step of one token after it, with the cache.

Peak memory is the process's largest resident set while the measurement runs, counted anew where Linux lets it, so it
holds whatever else the process holds: `in_own_process` gives a model one of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.compare.measures.base import Measured, evaluating
from pipeline.errors import ConfigError, TamisError

if TYPE_CHECKING:
    import torch
    from torch import nn

WARM_UP = 10


def latency(
    model: nn.Module,
    batches: Sequence[int] = (1, 8),
    prompt: int = 128,
    repeats: int = 30,
    threads: int | None = None,
    warm_up: int = WARM_UP,
) -> list[Measured]:
    """Measures `prefill@B` (tokens/s), `decode@B` (ms a token of a row) for every batch B, and `peak_memory` (MB).

    `threads`: of torch; None leaves what is set.
    """
    import torch

    found = []
    memory = _PeakMemory()
    with _threads(threads), evaluating(model):
        for batch in batches:
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(int(model.config.vocab_size), (batch, prompt), generator=generator)
            ids = ids.to(next(model.parameters()).device)
            seconds = _timed(partial(model, input_ids=ids, use_cache=False), warm_up + repeats)[warm_up:]
            found.append(Measured(f"prefill@{batch}", "cost", batch * prompt / seconds, True))
            steps = _decode(model, ids, warm_up + repeats)
            found.append(Measured(f"decode@{batch}", "cost", 1000 * steps[warm_up:], False))
    return [*found, Measured("peak_memory", "cost", np.array([memory.megabytes()]), False)]


def in_own_process(
    folder: Path, batches: Sequence[int], prompt: int, repeats: int, threads: int | None
) -> dict[str, float]:
    """Medians of `latency` of the model in a folder, by a process that does nothing else. Raises TamisError."""
    asked = json.dumps([str(folder), list(batches), prompt, repeats, threads])
    done = subprocess.run([sys.executable, "-m", __name__, asked], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise TamisError(f"latency: the speed of {folder} could not be measured: {last}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def file_size(folder: Path) -> Measured:
    """Measure `file_size`: MB of a folder's safetensors."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder} holds no safetensors")
    return Measured("file_size", "cost", np.array([sum(f.stat().st_size for f in files) / 1e6]), False)


def _timed(run: Callable[[], object], times: int) -> np.ndarray:
    """Seconds of each run."""
    seconds = np.empty(times)
    for i in range(times):
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        seconds[i] = time.perf_counter() - start
    return seconds


def _decode(model: nn.Module, ids: torch.Tensor, steps: int) -> np.ndarray:
    """Seconds of each step after a prompt (rows, length)."""
    import torch

    given = model(input_ids=ids, use_cache=True)

    def step() -> None:
        nonlocal given
        cache = given.past_key_values
        position = torch.full((1, 1), cache.get_seq_length(), device=ids.device)
        token = given.logits[:, -1:].argmax(-1)
        given = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)

    return _timed(step, steps)


def _wait() -> None:
    """Until a GPU is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _PeakMemory:
    """Largest resident set since it was made, where /proc can be reset; of the whole process where it cannot."""

    def __init__(self) -> None:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def megabytes(self) -> float:
        try:
            status = Path("/proc/self/status").read_text()
            return next(float(line.split()[1]) / 1e3 for line in status.splitlines() if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak / (1e6 if sys.platform == "darwin" else 1e3)


def _main(asked: str) -> None:
    from pipeline.compress.folder import load

    folder, batches, prompt, repeats, threads = json.loads(asked)
    model, _ = load(Path(folder))
    print(json.dumps({m.name: m.quantile(0.5) for m in latency(model, batches, prompt, repeats, threads)}))


if __name__ == "__main__":
    _main(sys.argv[1])
