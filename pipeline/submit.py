"""`tamis submit`: the main job as a Ray job, its log here, its exit code ours.

The configuration travels with the job (as a working directory of one file), so the cluster needs the package and the
corpus but not this checkout.
"""

from __future__ import annotations

import asyncio
import shlex
import sys
import tempfile
from pathlib import Path

from pipeline.config import load
from pipeline.errors import TamisError

FAILED = 1


def submit_job(config: str, address: str, overrides: list[str], run: str | None) -> int:
    """Submit, follow the log until the job ends, and return its exit code.

    The configuration is checked here first, so a typo does not wait in the cluster's queue. Raises TamisError where
    the cluster does not answer.
    """
    checked = load(config, overrides, run)
    from ray.job_submission import JobStatus, JobSubmissionClient

    arguments = [Path(config).name, "--run", checked.run, *(a for o in overrides for a in ("--set", o))]
    with tempfile.TemporaryDirectory(prefix="tamis-submit-") as directory:
        (Path(directory) / Path(config).name).write_bytes(Path(config).read_bytes())
        try:
            client = JobSubmissionClient(address)
            job = client.submit_job(
                entrypoint=f"RAY_ADDRESS=auto tamis curate {shlex.join(arguments)}",
                runtime_env={"working_dir": directory},
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise TamisError(f"cannot submit to {address}: {error}") from error
    print(f"tamis: submitted {job} to {address}", file=sys.stderr)

    async def follow() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    asyncio.run(follow())
    info = client.get_job_info(job)
    code = info.driver_exit_code
    if code is not None:
        return int(code)
    print(f"tamis: {job} ended as {info.status}: {info.message}", file=sys.stderr)
    return 0 if info.status == JobStatus.SUCCEEDED else FAILED
