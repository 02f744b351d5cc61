"""`tamis submit`: the main job as a Ray job, its log here, its exit code ours.

The configuration travels with the job (as a working directory of one file), so the cluster needs the package and the
corpus but not this checkout.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.config import load
from pipeline.corpus.storage import is_remote
from pipeline.errors import ConfigError, TamisError

FAILED = 1
TOKEN_FILE = "~/.ray/auth_token"
READY_S = 180.0
POLL_S = 2.0
"""Ray can stream a log, too, but only with packages that the base install does not need otherwise."""


def submit_job(config: str, address: str, overrides: list[str], run: str | None) -> int:
    """Submit, follow the log until the job ends, and return its exit code.

    The configuration is checked here first, so a typo does not wait in the cluster's queue. Raises ConfigError for
    paths that would mean another place there, and TamisError where the cluster does not answer.
    """
    checked = load(config, overrides, run)
    for key, location in [("run", checked.run), *(("corpus.path", p) for p in checked.corpus.paths)]:
        if not (is_remote(location) or os.path.isabs(location)):
            raise ConfigError(
                f"{key}: {location!r} is relative, but a job starts in a directory of its own: "
                "give a path or URI that the cluster knows"
            )
    if _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's client sends a token only where the mode says so
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobStatus, JobSubmissionClient

    arguments = [Path(config).name, "--run", checked.run, *(a for o in overrides for a in ("--set", o))]
    with tempfile.TemporaryDirectory(prefix="tamis-submit-") as directory:
        (Path(directory) / Path(config).name).write_bytes(Path(config).read_bytes())
        try:
            client = JobSubmissionClient(address)
            job = _submit(client, f"RAY_ADDRESS=auto tamis curate {shlex.join(arguments)}", directory)
        except AuthenticationError as error:
            raise TamisError(f"{address} asks for a token: set RAY_AUTH_TOKEN, or put it into {TOKEN_FILE}") from error
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise TamisError(f"cannot submit to {address}: {error}") from error
    print(f"tamis: submitted {job} to {address}", file=sys.stderr)

    shown = 0
    while True:
        ended = client.get_job_status(job).is_terminal()  # asked before the log, so that its end is not missed
        log = client.get_job_logs(job)
        print(log[shown:], end="", flush=True)
        shown = len(log)
        if ended:
            break
        time.sleep(POLL_S)
    info = client.get_job_info(job)
    code = info.driver_exit_code
    if code is not None:
        return int(code)
    print(f"tamis: {job} ended as {info.status}: {info.message}", file=sys.stderr)
    return 0 if info.status == JobStatus.SUCCEEDED else FAILED


def _submit(client: Any, entrypoint: str, directory: str) -> str:
    """Submit with a working directory; wait for a head that has just started and cannot take jobs yet."""
    patience = time.monotonic() + READY_S
    while True:
        try:
            return str(client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": directory}))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > patience:
                raise
            time.sleep(POLL_S)


def _has_token() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or Path(TOKEN_FILE).expanduser().is_file()
