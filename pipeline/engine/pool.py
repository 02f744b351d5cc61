"""The one seam between Tamis and Ray: `map(task, units)`, with two implementations, `RayPool` and `InlinePool`.

A task is a picklable callable from a unit of work to a small dict; it lives in an actor and may keep a loaded model
between units. Rows never pass here: a task reads and writes storage and returns counters and paths.

What the pool promises: at most one unit an actor is in flight; a dead or stuck actor is replaced and its unit queued
again (with `attempt` raised, at which readers halve their batches); what keeps failing comes back as an `Outcome` with
its error, and the rest goes on. Order of outcomes is the order of completion; nothing that counts depends on it.
Measured: an actor call costs about 1 ms, a unit on a warm pool 2 to 5 ms.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.engine import threads
from pipeline.errors import DiskFull, TamisError
from pipeline.recipe import Resources

Task = Callable[[Any, int], dict[str, Any]]
"""(unit, attempt) to a small result. `attempt` is 0 at first and counts the workers that this unit has cost."""


@dataclass(frozen=True)
class Outcome:
    """What became of one unit: its result, or the error that was left after all tries."""

    index: int
    result: dict[str, Any]
    error: str | None = None
    attempts: int = 1


class Pool(Protocol):
    def map(self, task: Task, units: Sequence[Any], resources: Resources = Resources()) -> Iterator[Outcome]: ...
    def close(self) -> None: ...


class InlinePool:
    """The twin in this process, for debugging and for work so small that starting Ray would cost more."""

    def __init__(self, cpus: float = 1) -> None:
        self.cpus = cpus

    def map(self, task: Task, units: Sequence[Any], resources: Resources = Resources()) -> Iterator[Outcome]:
        with threads.limited(resources.cpus):
            for index, unit in enumerate(units):
                yield _attempt(task, index, unit, 0)

    def close(self) -> None:
        """Nothing is held."""


def _attempt(task: Task, index: int, unit: Any, attempt: int) -> Outcome:
    """Run a unit; errors of the unit become outcomes, errors that doom the whole run are raised."""
    from pipeline.corpus.storage import is_disk_full

    try:
        return Outcome(index, task(unit, attempt), None, attempt + 1)
    except Exception as error:
        if is_disk_full(error):
            raise DiskFull(f"no space is left where the run writes: {error}") from error
        known = isinstance(error, TamisError)
        detail = str(error) if known else "".join(traceback.format_exception_only(error)).strip() + _where(error)
        return Outcome(index, {}, detail, attempt + 1)


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" (at {frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""


class _Worker:
    """What runs in an actor: holds one task at a time, so that a model is loaded once and freed when the next comes."""

    def __init__(self, cpus: float) -> None:
        threads.prepare_process(cpus)
        self.key: str | None = None
        self.task: Task | None = None

    def ready(self) -> bool:
        return True

    def run(self, key: str, task: list[Any], index: int, unit: Any, attempt: int) -> Outcome:
        import ray

        if key != self.key or self.task is None:
            self.task = None  # the old model goes before the new one comes
            self.key, self.task = key, ray.get(task[0])
        return _attempt(self.task, index, unit, attempt)


@dataclass
class _Flight:
    actor: Any
    index: int
    attempt: int
    deadline: float


class RayPool:
    """Ray actors, as many as configured or as fit. Ray must be connected (see `pipeline.engine.connect`)."""

    def __init__(self, workers: int | None, timeout_s: float, retries: int) -> None:
        self.workers = workers
        self.timeout_s = timeout_s
        self.retries = retries
        self.lost = 0
        """Actors that died or were killed, over the pool's life."""
        self._idle: dict[Resources, list[Any]] = {}
        self._passes = 0

    def map(self, task: Task, units: Sequence[Any], resources: Resources = Resources()) -> Iterator[Outcome]:
        import ray

        self._passes += 1
        key, reference = f"pass-{self._passes}", [ray.put(task)]
        queue = deque((index, 0) for index in range(len(units)))
        wanted = min(len(units), self.workers or self._capacity(resources))
        self._release_others(resources)
        idle = self._idle.setdefault(resources, [])
        starting = self._start(wanted - len(idle), resources)
        flying: dict[Any, _Flight] = {}
        try:
            while queue or flying:
                while queue and idle:
                    index, attempt = queue.popleft()
                    actor = idle.pop()
                    call = actor.run.remote(key, reference, index, units[index], attempt)
                    flying[call] = _Flight(actor, index, attempt, time.monotonic() + self.timeout_s)
                waiting = [*flying, *starting]
                nearest = min((f.deadline for f in flying.values()), default=time.monotonic() + 60)
                ready, _ = ray.wait(waiting, num_returns=1, timeout=max(0.0, nearest - time.monotonic()))
                for done in ready:
                    if done in starting:
                        idle.append(starting.pop(done))
                        ray.get(done)
                        continue
                    flight = flying.pop(done)
                    try:
                        outcome: Outcome = ray.get(done)
                    except ray.exceptions.RayTaskError as error:
                        raise error.as_instanceof_cause() from None  # DiskFull, or a defect of ours: both end the run
                    except ray.exceptions.RayError as error:
                        lost = self._replace(flight, queue, starting, resources, f"worker lost: {_first_line(error)}")
                        if lost is not None:
                            yield lost
                        continue
                    idle.append(flight.actor)
                    yield outcome
                for call in [c for c, f in flying.items() if f.deadline <= time.monotonic()]:
                    flight = flying.pop(call)
                    ray.kill(flight.actor)
                    lost = self._replace(flight, queue, starting, resources, f"no result within {self.timeout_s:g} s")
                    if lost is not None:
                        yield lost
        finally:
            for flight in flying.values():
                ray.kill(flight.actor)
            for actor in starting.values():
                ray.kill(actor)

    def _capacity(self, resources: Resources) -> int:
        import ray

        have = ray.cluster_resources()
        fits = have.get("CPU", 1) / resources.cpus
        if resources.gpus:
            fits = min(fits, have.get("GPU", 0) / resources.gpus)
            if fits < 1:
                raise TamisError(f"an actor wants {resources.gpus:g} GPU, the cluster has {have.get('GPU', 0):g}: set engine.gpus=0")
        return max(1, int(fits))

    def _start(self, count: int, resources: Resources) -> dict[Any, Any]:
        import ray

        options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_restarts": 0}
        if resources.memory:
            options["memory"] = resources.memory
        worker = ray.remote(_Worker).options(**options)
        actors = [worker.remote(resources.cpus) for _ in range(max(0, count))]
        return {actor.ready.remote(): actor for actor in actors}

    def _replace(
        self, flight: _Flight, queue: deque[tuple[int, int]], starting: dict[Any, Any], resources: Resources, why: str
    ) -> Outcome | None:
        self.lost += 1
        starting.update(self._start(1, resources))
        if flight.attempt < self.retries:
            queue.append((flight.index, flight.attempt + 1))
            return None
        return Outcome(flight.index, {}, f"{why}, {flight.attempt + 1} times", flight.attempt + 1)

    def _release_others(self, resources: Resources) -> None:
        """Actors of another shape would hold the cores that this pass needs."""
        import ray

        for other in [r for r in self._idle if r != resources]:
            for actor in self._idle.pop(other):
                ray.kill(actor)

    def close(self) -> None:
        import ray

        if ray.is_initialized():
            for actors in self._idle.values():
                for actor in actors:
                    ray.kill(actor)
        self._idle.clear()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
