"""Where Ray comes from. Only entry points (the CLI, the jobs, `pipeline.curate`) come here; the library never does."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.engine.pool import InlinePool, Pool, RayPool
from pipeline.errors import ConfigError, TamisError

if TYPE_CHECKING:
    from pipeline.config import EngineConfig

OBJECT_STORE_BYTES = 256 << 20
"""Only tasks and centroids pass through the object store, so a local Ray gets a small one."""


def connect(engine: EngineConfig) -> Pool:
    """A pool on the Ray that the configuration names: the one already connected, a cluster's, or one of our own.

    Raises ConfigError for a `ray://` address (the client protocol moves data through the driver; submit a job instead)
    and TamisError where the cluster does not answer.
    """
    if engine.address == "inline":
        return InlinePool(engine.retries)
    if engine.address and engine.address.startswith("ray://"):
        raise ConfigError(
            "engine.address: ray:// is not used; give host:port on the cluster, "
            "or `tamis submit CONFIG --address http://head:8265`"
        )
    address = engine.address or os.environ.get("RAY_ADDRESS") or "local"
    if "ray" not in sys.modules:  # these are read on import
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's default, announced where it is unset
        if address == "local":
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # likewise
            os.environ.setdefault("RAY_enable_autoscaler_v2", "1")  # nothing scales, but that of v1 takes 1 s to end
    import ray

    owned = not ray.is_initialized()
    elastic = not owned or address != "local"
    if owned:
        logging.getLogger("ray").setLevel(logging.ERROR)  # it warns that a thread cannot set its handler of SIGTERM
        options = {"address": address, "logging_level": logging.ERROR, "log_to_driver": False}
        if address == "local":
            options |= {
                "num_cpus": max(1, int((engine.workers or os.cpu_count() or 1) * engine.cpus)),
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
                "configure_logging": False,
            }
        try:
            with _without_dashboard():
                ray.init(**options)
        except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
            where = "on this machine" if address == "local" else f"at {address}"
            raise TamisError(f"cannot connect to Ray {where}: {error}") from error
    return RayPool(engine.workers, engine.timeout_s, engine.retries, elastic, owned)


@contextmanager
def _without_dashboard() -> Iterator[None]:
    """Let a Ray that is started here find no dependencies of its dashboard, as where `ray[default]` is not installed.

    Where they can be imported, Ray loads them into itself and its agents and waits for these, even if it is told that
    no dashboard is wanted: 7.0 s instead of 3.9 s on two cores (Ray 2.60).
    """
    name = "ray.dashboard.optional_deps"
    before = {key: sys.modules[key] for key in (name,) if key in sys.modules}
    sys.modules[name] = None  # type: ignore[assignment]  # which is how an import is made to fail
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(before)
