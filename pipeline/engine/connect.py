"""Where Ray comes from. Only entry points (the CLI, the jobs, `pipeline.curate`) come here; the library never does."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from pipeline.engine.pool import InlinePool, Pool, RayPool
from pipeline.errors import ConfigError, TamisError

if TYPE_CHECKING:
    from pipeline.config import EngineConfig

OBJECT_STORE_BYTES = 256 << 20
"""Only tasks and centroids pass through the object store, so a local Ray gets a small one."""


def connect(engine: EngineConfig) -> Pool:
    """A pool on the Ray that the configuration names: the one already connected, a cluster's, or a local one of our own.

    Raises ConfigError for a `ray://` address (the client protocol moves data through the driver; submit a job instead)
    and TamisError where the cluster does not answer.
    """
    if engine.address == "inline":
        return InlinePool(engine.cpus)
    if engine.address and engine.address.startswith("ray://"):
        raise ConfigError("engine.address: ray:// is not used; give host:port on the cluster, or `tamis submit CONFIG --address http://head:8265`")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's own announced default, which it warns about
    import ray

    if not ray.is_initialized():
        address = engine.address or os.environ.get("RAY_ADDRESS")
        try:
            if address:
                ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
            else:
                cores = (engine.workers or os.cpu_count() or 1) * engine.cpus
                ray.init(
                    num_cpus=max(1, int(cores)),
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                    configure_logging=False,
                )
        except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
            raise TamisError(f"cannot connect to Ray at {address or 'this machine'}: {error}") from error
    return RayPool(engine.workers, engine.timeout_s, engine.retries)
