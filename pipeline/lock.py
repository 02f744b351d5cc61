"""One run a directory: whoever holds `<run>/lock.json` works there, and is named to those who come later.

On a file system the kernel holds the lock (flock). It ends with its process, however that ends, so it is never stale.

An object store has no locks. There the holder renews the file every 15 s; a lock that is silent for two minutes, or
whose process is known to be gone, is void; the last to write has it. Of two that begin at once one refuses within a
second; of two that slip past each other all the same, one stops within 15 s. Clocks may differ by less than two
minutes. Nothing is spoilt even then: parts are whole and the same, whoever writes them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from typing import Any

from pipeline.corpus.storage import Store
from pipeline.errors import RunLocked

NAME = "lock.json"
BEAT_S = 15.0
STALE_S = 120.0
SETTLE_S = 1.0
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems answer that know no locks (mounts of object stores, some parallel file systems)."""

_held: set[str] = set()
"""Sessions of this process: a lock in its name that is not among them was left behind by another of the same number."""


class RunLock:
    """The lock of a run directory. `acquire` raises RunLocked, which says who has it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.session = uuid.uuid4().hex
        self.me = {"host": socket.gethostname(), "pid": os.getpid(), "session": self.session, "since": time.time()}
        self._file: int | None = None
        self._stop = threading.Event()
        self._beating: threading.Thread | None = None
        self._lost: RunLocked | None = None

    def acquire(self) -> None:
        if not (self.store.local and self._acquire_from_kernel()):
            self._acquire_by_beats()

    def check(self) -> None:
        """Raise RunLocked when another run has taken the directory over."""
        if self._lost is not None:
            raise self._lost

    def release(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.store.at(NAME))  # before the lock goes, so that nobody locks a file without a name
            os.close(self._file)
            self._file = None
        elif self._beating is not None:
            self._stop.set()
            self._beating.join()  # a beat under way would write the lock anew
            self._beating = None
            if self._lost is None:
                with contextlib.suppress(OSError):
                    self.store.remove(NAME)
        _held.discard(self.session)

    # ---- by the kernel

    def _acquire_from_kernel(self) -> bool:
        """Whether the file system has locks. Takes the lock where it has."""
        try:
            import fcntl
        except ImportError:
            return False
        path = self.store.at(NAME)
        os.makedirs(self.store.path, exist_ok=True)
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same_file(file, path):
                    break
                os.close(file)  # its holder has just let go and removed it
            except OSError as error:
                os.close(file)
                if error.errno in NO_FLOCK:
                    return False
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise self._refusal(self._owner()) from None
                raise
        self._file = file
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(self.me).encode(), 0)
        return True

    # ---- by beats

    def _acquire_by_beats(self) -> None:
        owner = self._owner()
        if owner is not None and self._lives(owner):
            raise self._refusal(owner)
        self._beat()
        time.sleep(SETTLE_S)
        owner = self._owner()
        if owner is None or owner["session"] != self.session:
            raise self._refusal(owner)
        _held.add(self.session)
        self._beating = threading.Thread(target=self._keep_beating, daemon=True)
        self._beating.start()

    def _lives(self, owner: dict[str, Any]) -> bool:
        if owner["host"] == self.me["host"]:
            if owner["pid"] == os.getpid():  # a container's processes have the same few numbers every time
                return owner["session"] in _held
            if not _is_running(owner["pid"]):
                return False
        return bool(time.time() - owner["beat"] < STALE_S)

    def _beat(self) -> None:
        self.store.write(json.dumps(self.me | {"beat": time.time()}).encode(), NAME)

    def _keep_beating(self) -> None:
        while not self._stop.wait(BEAT_S):
            with contextlib.suppress(OSError):  # the next beat may get through
                owner = self._owner()
                if owner is not None and owner["session"] != self.session:
                    self._lost = self._refusal(owner)
                    return
                self._beat()

    # ---- who

    def _owner(self) -> dict[str, Any] | None:
        """Who holds the lock; None where nobody does, or where it is just being written."""
        try:
            owner = json.loads(self.store.read(NAME))
        except (FileNotFoundError, ValueError):
            return None
        return owner if isinstance(owner, dict) else None

    def _refusal(self, owner: dict[str, Any] | None) -> RunLocked:
        if owner is None:
            who = "another process, since a moment ago"
        else:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["since"]))
            who = f"process {owner['pid']} on {owner['host']}, since {since}"
        return RunLocked(
            f"another run works in {self.store.uri}: {who}. "
            "Wait for it, stop it, or give this run another directory with --run"
        )


def _same_file(file: int, path: str) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file), there)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
