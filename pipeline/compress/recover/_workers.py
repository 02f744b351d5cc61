"""The same training on workers of Ray Train: who starts them, and what each does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.engine import threads
from pipeline.errors import MissingExtra, TamisError

if TYPE_CHECKING:
    from pipeline.compress.healing import Job
    from pipeline.config import EngineConfig


def under_ray(job: Job, engine: EngineConfig) -> None:
    """Run a training on Ray Train's workers. Raises TamisError with what the last try failed of."""
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise MissingExtra("recovery under Ray", "models", error.name or "ray[train]") from error
    import ray

    from pipeline.engine.connect import connect

    pool = connect(engine)
    try:
        resources = {"CPU": engine.cpus} | ({"GPU": engine.gpus} if engine.gpus else {})
        trainer = TorchTrainer(
            _work,
            train_loop_config={"job": ray.put(job), "cpus": engine.cpus},
            scaling_config=ScalingConfig(
                num_workers=engine.workers or 1, use_gpu=engine.gpus > 0, resources_per_worker=resources
            ),
            torch_config=TorchConfig(backend="nccl" if engine.gpus else "gloo"),
            run_config=RunConfig(
                name="recovery",
                storage_path=str(job.directory / "ray"),
                failure_config=FailureConfig(max_failures=engine.retries),
            ),
        )
        trainer.fit()
    except Exception as error:
        known = next((cause for cause in _causes(error) if isinstance(cause, TamisError)), None)
        raise known or TamisError(f"the recovery failed under Ray: {error}") from error
    finally:
        pool.close()


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and what lies under it: Ray Train wraps what a worker raised, and keeps one for each of them."""
    yield error
    beneath = [*getattr(error, "worker_failures", {}).values(), getattr(error, "_base_exc", None), error.__cause__]
    for each in beneath:
        if each is not None:
            yield from _causes(each)


def _work(config: dict[str, Any]) -> None:
    """What a worker of Ray Train does."""
    import ray
    import torch
    from ray import train
    from ray.train.torch import get_device

    from pipeline.compress.healing import Place, Training

    threads.prepare_process(config["cpus"])
    torch.set_num_threads(threads.cpus())
    context = train.get_context()
    place = Place(str(get_device()), context.get_world_rank(), context.get_world_size())
    Training(ray.get(config["job"]), place).run()
