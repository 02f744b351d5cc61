"""A run's way to its engine: connected to in the background, and let go of there when nothing heavy is left to do."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.engine.pool import Pool


class Connection:
    """A pool that is there once it is needed. `connect` makes it; it may be made again after a `release`.

    One thread connects and lets go: the processes that Ray starts live no longer than the thread that does.
    """

    def __init__(self, connect: Callable[[], Pool]) -> None:
        self._connect = connect
        self._thread = ThreadPoolExecutor(1, "engine")
        self._pool: Pool | None = None
        self._connecting: Future[Pool] | None = None
        self._closing: Future[None] | None = None

    @property
    def up(self) -> bool:
        """Whether a pass has had its pool, and it is still there."""
        return self._pool is not None

    def begin(self) -> Future[Pool]:
        """Begin to connect: Ray takes seconds to start, in which the driver can fit and plan."""
        if self._connecting is None:
            self._connecting = self._thread.submit(self._connect)
        return self._connecting

    def pool(self) -> Pool:
        """The pool, waited for. Raises what connecting raised."""
        if self._pool is None:
            self._pool = self.begin().result()
        return self._pool

    def release(self) -> None:
        """Let go in the background."""
        if self._connecting is not None:
            self._closing = self._thread.submit(_close, self._connecting)
        self._pool = self._connecting = None

    def close(self) -> None:
        """Let go for good, and wait until that is done."""
        self.release()
        self._thread.shutdown()
        if self._closing is not None:
            self._closing.result()


def _close(connecting: Future[Pool]) -> None:
    if connecting.exception() is None:
        connecting.result().close()
