"""The settings of a run as Ray Train's own: `TorchTrainer`, scaling, failures, checkpoints."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

# What `ray.train` gives out too; there a type checker sees the classes of its first version.
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from savant_ray.cluster.session import is_our_own, node_resources
from savant_ray.config import Config
from savant_ray.driver.data_config import StepDataConfig
from savant_ray.driver.data_preparation import PreparedData
from savant_ray.driver.failures import FailureNews
from savant_ray.errors import SettingsError
from savant_ray.ray_internals import storage_context
from savant_ray.storage.protocol import RunStorage
from savant_ray.storage.tolerant_file_system import tolerant_file_system
from savant_ray.worker.metrics import ascii_name
from savant_ray.worker.training_function import WorkerTask, train_worker

SECONDS_BETWEEN_RESIZES = 30.0  # each costs a start of all workers and the steps since the last checkpoint


def make_trainer(
    config: Config, storage: RunStorage, data: PreparedData, bridge: Any, allow_changes: bool, verbose: bool
) -> TorchTrainer:
    """The job; Ray must be running."""
    task = WorkerTask(
        config=config.to_dict(),
        tokenizer=str(data.tokenizer_path),
        validation=str(data.validation),
        data_fingerprint=data.fingerprint,
        allow_changes=allow_changes,
        owner=asdict(storage.owner) if storage.owner else None,
        bridge=bridge,
    )
    return TorchTrainer(
        train_worker,
        train_loop_config={name: getattr(task, name) for name in task.__dataclass_fields__},
        scaling_config=scaling(config),
        run_config=_RunConfig(
            name=ascii_name(config.run.name),
            folder=os.path.basename(storage.path),  # noqa: PTH119
            storage_path=os.path.dirname(storage.path),  # noqa: PTH120 - a path of a file system, maybe not of this machine
            storage_filesystem=tolerant_file_system(storage.filesystem, storage),
            failure_config=FailureConfig(max_failures=config.scaling.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.keep),
            callbacks=[FailureNews(bridge)],
            logging_config=LoggingConfig(log_level="INFO" if verbose else "ERROR"),
        ),
        datasets={"train": data.plan},  # type: ignore[dict-item]  # only `StepDataConfig` looks at them
        dataset_config=StepDataConfig(),
    )


@dataclass
class _RunConfig(RunConfig):
    """Ray's metrics and state get `name`, which has to be ASCII; the run's folder keeps its own name."""

    folder: str = ""

    @cached_property
    def storage_context(self) -> Any:
        return storage_context(str(self.storage_path), self.folder, self.storage_filesystem)


def scaling(config: Config) -> ScalingConfig:
    """`use_gpu: auto` = when the cluster has a GPU for each worker; on CPUs the workers share all cores.

    Raises:
        SettingsError: the cluster cannot offer what is asked for, the fewest workers at least.
    """
    (fewest, most), nodes = config.scaling.worker_limits, node_resources()
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    use_gpu = gpus >= fewest if config.scaling.use_gpu == "auto" else bool(config.scaling.use_gpu)
    if use_gpu and gpus < fewest:
        raise SettingsError(f"scaling.num_workers: {fewest} GPU workers need {fewest} GPUs, the cluster has {gpus}")
    try:
        scaling = ScalingConfig(
            num_workers=most if fewest == most else (fewest, most),
            use_gpu=use_gpu,
            resources_per_worker=config.scaling.resources_per_worker or {"CPU": cpus_per_worker(nodes, most, use_gpu)},
            elastic_resize_monitor_interval_s=SECONDS_BETWEEN_RESIZES,
        )
    except ValueError as error:  # such as GPUs among the resources of workers without
        raise SettingsError(f"scaling.resources_per_worker: {error}") from error
    if (room := workers_that_fit(nodes, needs(scaling))) < fewest:
        raise SettingsError(_too_little_room(fewest, room, needs(scaling), nodes))
    return scaling


def _too_little_room(workers: int, room: int, each: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> str:
    who = "1 worker with" if workers == 1 else f"{workers} workers with"
    largest = {name: max((node.get(name, 0) for node in nodes), default=0) for name in each}
    where = "this machine has" if is_our_own() else "the cluster's largest node has"
    return (
        f"scaling.num_workers: {who} {_listed(each)}{'' if workers == 1 else ' each'} cannot run: {where} "
        f"{_listed(largest)}, room for {room}; lower scaling.num_workers or scaling.resources_per_worker"
    )


def _listed(resources: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {amount:g}" for name, amount in resources.items()) + "}"


def needs(scaling: ScalingConfig) -> dict[str, float]:
    """What one worker takes."""
    gpu = {"GPU": 1.0} if scaling.use_gpu else {}
    return gpu | dict(scaling.resources_per_worker or {})  # type: ignore[arg-type]  # never a search of Ray Tune's


def cpus_per_worker(nodes: Sequence[Mapping[str, float]], workers: int, use_gpu: bool) -> int:
    """The most cores each so that all workers find room; a worker is never spread over nodes."""
    gpu = {"GPU": 1.0} if use_gpu else {}
    largest = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    fitting = (n for n in range(largest, 0, -1) if workers_that_fit(nodes, gpu | {"CPU": n}) >= workers)
    return next(fitting, 1)


def workers_that_fit(nodes: Sequence[Mapping[str, float]], resources: Mapping[str, float]) -> int:
    """How many workers that take `resources` there is room for when nothing else runs."""
    wanted = {name: amount for name, amount in resources.items() if amount > 0}
    if not wanted:
        return sys.maxsize
    return sum(int(min(node.get(name, 0) // amount for name, amount in wanted.items())) for node in nodes)
