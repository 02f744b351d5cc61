"""The one seam between Tamis and Ray: `map(task, units)`, with two implementations, `RayPool` and `InlinePool`.

A task is a picklable callable from a unit of work to a small dict; it lives in an actor and may keep a loaded model
between units. Rows never pass here: a task reads and writes storage and returns counters and paths.

What the pool promises: at most one unit an actor is in flight; a dead or stuck actor is replaced and its unit queued
again with `attempt` raised, and so is a unit that ran out of memory or met an error of input or output; what keeps
failing comes back as an `Outcome` with its error, and the rest goes on. What no unit is to blame for (a full disk, a
model that is not there) ends the run. Order of outcomes is the order of completion; nothing that counts depends on it.
Measured in bench/overhead.py.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.corpus.storage import is_disk_full
from pipeline.engine import threads
from pipeline.errors import ConfigError, DiskFull, MissingExtra, TamisError
from pipeline.recipe import Resources

log = logging.getLogger(__name__)

Task = Callable[[Any, int], dict[str, Any]]
"""(unit, attempt) to a small result. `attempt` is 0 at first and counts the tries that this unit has cost."""

FATAL = (DiskFull, ConfigError, MissingExtra)
"""Errors that every further unit would meet as well."""

PAUSE_S = 0.1
"""Wait before the second try of a unit; four times as long before every next."""
START_TRIES = 3
CHECK_S = 10.0
"""How often a pass asks the cluster whether there is room for more actors."""
PATIENCE_S = 600.0
"""A pass waits at least this long for its first actor: a cluster may have to grow for it."""
REPORT_S = 30.0
"""A pass that waits longer than this for its first actor says so."""
ENVIRONMENT = ("AWS_", "GOOGLE_", "HF_")
"""Variables that an actor takes over from the driver where its machine does not set them: where and as whom to read."""


@dataclass(frozen=True)
class Outcome:
    """What became of one unit: its result, or the error that was left after all tries."""

    index: int
    result: dict[str, Any]
    error: str | None = None
    attempts: int = 1


class Pool(Protocol):
    lost: int
    """Actors that died or were killed, over the pool's life."""

    def map(self, task: Task, units: Sequence[Any], resources: Resources = Resources()) -> Iterator[Outcome]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class _Reply:
    """How one try ended; what an actor sends back."""

    result: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    again: bool = False
    fatal: type[TamisError] | None = None

    def outcome(self, index: int, attempt: int, retries: int) -> Outcome | None:
        """None where the unit is to be tried again. Raises what ends the run."""
        if self.fatal is not None:
            raise Exception.__new__(self.fatal, self.error)
        if self.again and attempt < retries:
            return None
        return Outcome(index, self.result, self.error, attempt + 1)


def _try(task: Task, unit: Any, attempt: int) -> _Reply:
    from pipeline.engine.materialize import is_out_of_memory

    if attempt:
        time.sleep(PAUSE_S * 4 ** (attempt - 1))
    try:
        return _Reply(task(unit, attempt))
    except FATAL as error:
        return _Reply(error=str(error), fatal=type(error))
    except Exception as error:
        if is_disk_full(error):
            return _Reply(error=f"no space is left where the run writes: {error}", fatal=DiskFull)
        transient = isinstance(error, OSError) or isinstance(error.__cause__, OSError) or is_out_of_memory(error)
        return _Reply(error=_describe(error), again=transient)


def _describe(error: Exception) -> str:
    if isinstance(error, TamisError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" (at {frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""
    return "".join(traceback.format_exception_only(error)).strip() + where


class InlinePool:
    """The twin in this process, for debugging and for work so small that starting Ray would cost more.

    It cannot outlive a unit that kills or blocks its process; all else is as with Ray.
    """

    def __init__(self, retries: int = 3) -> None:
        self.retries = retries
        self.lost = 0

    def map(self, task: Task, units: Sequence[Any], resources: Resources = Resources()) -> Iterator[Outcome]:
        with threads.limited(resources.cpus):  # once: finding the libraries to limit takes a millisecond
            for index, unit in enumerate(units):
                outcome, attempt = None, 0
                while outcome is None:
                    outcome = _try(task, unit, attempt).outcome(index, attempt, self.retries)
                    attempt += 1
                yield outcome

    def close(self) -> None:
        """Nothing is held."""


class _Worker:
    """What runs in an actor: holds one task at a time, so that a model is loaded once and freed when the next comes."""

    def __init__(self, cpus: float, environment: dict[str, str], paths: list[str]) -> None:
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        sys.path += [path for path in paths if path not in sys.path]  # a recipe that the driver can import
        threads.prepare_process(cpus)
        self.key = ""
        self.task: Task | None = None

    def ready(self) -> None:
        """Answered once the actor is there."""

    def run(self, key: str, task: list[Any], unit: Any, attempt: int) -> _Reply:
        import ray

        if key != self.key or self.task is None:
            self.task = None  # the old model goes before the new one comes
            try:
                self.key, self.task = key, ray.get(task[0])
            except Exception as error:
                return _Reply(error=f"a worker cannot load its task: {_summary(error)}", fatal=ConfigError)
        return _try(self.task, unit, attempt)


@dataclass
class _Flight:
    """A unit under way."""

    actor: Any
    index: int
    attempt: int
    deadline: float


@dataclass
class _Crew:
    """The actors of one shape, each in exactly one of three states."""

    idle: list[Any] = field(default_factory=list)
    starting: dict[Any, Any] = field(default_factory=dict)
    """Call of `ready` to actor."""
    flying: dict[Any, _Flight] = field(default_factory=dict)
    """Call of `run` to what it is about."""

    def __len__(self) -> int:
        return len(self.idle) + len(self.starting) + len(self.flying)

    def dismiss(self) -> None:
        import ray

        if ray.is_initialized():
            for actor in [*self.idle, *self.starting.values(), *(f.actor for f in self.flying.values())]:
                ray.kill(actor)
        self.idle, self.starting, self.flying = [], {}, {}


class RayPool:
    """Ray actors, as many as configured or as fit. Ray must be connected (see `pipeline.engine.connect`).

    `timeout_s`: a unit that takes longer is killed with its actor and tried again. `retries`: tries after the first.
    `elastic`: whether the cluster may still grow; where it may not, an actor that does not fit is an error at once.
    `owned`: whether Ray was started (or joined) for this pool, and ends with it.
    """

    def __init__(
        self, workers: int | None, timeout_s: float, retries: int, elastic: bool = True, owned: bool = False
    ) -> None:
        self.workers = workers
        self.timeout_s = timeout_s
        self.retries = retries
        self.elastic = elastic
        self.owned = owned
        self.lost = 0
        self._crews: dict[Resources, _Crew] = {}
        self._passes = 0
        self._unable = 0
        """Actors in a row that did not start."""
        self._waiting_since: float | None = None

    def map(self, task: Task, units: Sequence[Any], resources: Resources = Resources()) -> Iterator[Outcome]:
        import ray

        self._passes += 1
        job = (f"pass-{self._passes}", [ray.put(task)])
        queue = deque((index, 0) for index in range(len(units)))
        crew = self._crew(resources)
        recruit_at, self._waiting_since = time.monotonic(), None
        try:
            while queue or crew.flying:
                now = time.monotonic()
                if now >= recruit_at:
                    self._recruit(crew, resources, len(queue) + len(crew.flying))
                    recruit_at = now + CHECK_S
                while queue and crew.idle:
                    index, attempt = queue.popleft()
                    actor = crew.idle.pop()
                    call = actor.run.remote(*job, units[index], attempt)
                    crew.flying[call] = _Flight(actor, index, attempt, now + self.timeout_s)
                next_event = min([recruit_at, *(f.deadline for f in crew.flying.values())])
                calls, wait_s = [*crew.flying, *crew.starting], max(0.0, next_event - now)
                ready, _ = ray.wait(calls, num_returns=1, timeout=wait_s)
                strength = len(crew)
                landed = [self._land(crew, call) for call in ready if call in crew.flying]
                now = time.monotonic()
                landed += [self._abort(crew, call) for call, f in [*crew.flying.items()] if f.deadline <= now]
                for call in ready:
                    if call in crew.starting:
                        self._welcome(crew, call)
                if len(crew) < strength:
                    recruit_at = now
                for flight, reply in landed:
                    outcome = reply.outcome(flight.index, flight.attempt, self.retries)
                    if outcome is None:
                        queue.append((flight.index, flight.attempt + 1))
                    else:
                        yield outcome
        finally:
            for flight in crew.flying.values():
                ray.kill(flight.actor)
            crew.flying.clear()

    def _crew(self, resources: Resources) -> _Crew:
        """Actors of one shape; those of others would hold the cores that this pass needs, and go."""
        for other in [r for r in self._crews if r != resources]:
            self._crews.pop(other).dismiss()
        return self._crews.setdefault(resources, _Crew())

    def _recruit(self, crew: _Crew, resources: Resources, units: int) -> None:
        """Start actors for which there are units and room."""
        import ray

        room = self._room(resources)  # asked in any case: an actor for which there never is any must not be waited for
        wanted = min(units, self.workers or max(1, room))
        options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_restarts": 0}
        if resources.memory:
            options["memory"] = resources.memory
        environment = {k: v for k, v in os.environ.items() if k.startswith(ENVIRONMENT)}
        for _ in range(wanted - len(crew)):
            actor = ray.remote(_Worker).options(**options).remote(resources.cpus, environment, sys.path)
            crew.starting[actor.ready.remote()] = actor
        self._stay_patient(bool(crew.idle or crew.flying), resources)

    def _room(self, resources: Resources) -> int:
        """Actors that the cluster's machines can hold. Raises TamisError for none on a cluster that cannot grow."""
        import ray

        wishes = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": resources.memory}
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(min(int(m.get(k, 0) / w) for k, w in wishes.items() if w) for m in machines)
        if not room and not self.elastic:
            raise TamisError(f"{_needs(resources)} Lower engine.cpus, engine.gpus or engine.memory_gb")
        return room

    def _stay_patient(self, working: bool, resources: Resources) -> None:
        if working:
            self._waiting_since = None
            return
        self._waiting_since = self._waiting_since or time.monotonic()
        waited = time.monotonic() - self._waiting_since
        if waited > max(self.timeout_s, PATIENCE_S):
            raise TamisError(f"no worker has started within {waited:.0f} s. {_needs(resources)}")
        if waited > REPORT_S:
            log.warning("no worker has started for %.0f s. %s", waited, _needs(resources))

    def _welcome(self, crew: _Crew, call: Any) -> None:
        import ray

        actor = crew.starting.pop(call)
        try:
            ray.get(call)
        except ray.exceptions.RayError as error:
            self._unable += 1
            if self._unable >= START_TRIES:
                raise TamisError(f"workers do not start: {_summary(error)}") from error
        else:
            self._unable = 0
            crew.idle.append(actor)

    def _land(self, crew: _Crew, call: Any) -> tuple[_Flight, _Reply]:
        import ray

        flight = crew.flying.pop(call)
        try:
            reply: _Reply = ray.get(call)
        except ray.exceptions.RayError as error:
            self.lost += 1
            return flight, _Reply(error=f"worker lost: {_summary(error)}", again=True)
        crew.idle.append(flight.actor)
        return flight, reply

    def _abort(self, crew: _Crew, call: Any) -> tuple[_Flight, _Reply]:
        import ray

        flight = crew.flying.pop(call)
        ray.kill(flight.actor)
        self.lost += 1
        return flight, _Reply(error=f"no result within {self.timeout_s:g} s", again=True)

    def close(self) -> None:
        for crew in self._crews.values():
            crew.dismiss()
        self._crews.clear()
        if self.owned:
            import ray

            ray.shutdown()


def _needs(resources: Resources) -> str:
    """What an actor wants and what there is."""
    import ray

    have, free = ray.cluster_resources(), ray.available_resources()
    wishes = (("CPU", resources.cpus, 1), ("GPU", resources.gpus, 1), ("memory", resources.memory, 1 << 30))
    named = {"CPU": "cpus", "GPU": "gpus", "memory": "GiB"}
    wants = ", ".join(f"{wish / unit:g} {named[k]}" for k, wish, unit in wishes if wish)
    there = ", ".join(
        f"{have.get(k, 0) / unit:g} {named[k]} ({free.get(k, 0) / unit:g} free)" for k, wish, unit in wishes if wish
    )
    return f"A worker wants {wants}; the cluster has {there}."


def _summary(error: BaseException) -> str:
    """First and last line of what Ray says, which is long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ... ".join(dict.fromkeys([lines[0], lines[-1]])) if lines else type(error).__name__
