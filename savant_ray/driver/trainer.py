"""Creates the `TorchTrainer` of a run: scaling, data, failure handling, checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from ray.train.torch import TorchConfig

# Also exported by `ray.train`, where a type checker sees the classes of Ray Train v1.
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from savant_ray.cluster.session import node_resources, owns_ray, processes_that_fit, resources_text
from savant_ray.config import Config
from savant_ray.driver.data_preparation import PreparedData
from savant_ray.driver.failures import FailureCallback
from savant_ray.driver.hang_watch import collective_timeout
from savant_ray.driver.train_configs import StepDataConfig, StoredRunConfig
from savant_ray.errors import SettingsError
from savant_ray.storage.protocol import RunStorage
from savant_ray.storage.tolerant_file_system import tolerant_file_system
from savant_ray.worker.metrics import ascii_name
from savant_ray.worker.training_function import WorkerTask, train_worker

RESIZE_INTERVAL_SECONDS = 30.0  # a resize restarts all workers and repeats the steps since the last checkpoint


def make_trainer(
    config: Config, storage: RunStorage, data: PreparedData, bridge: Any, allow_changes: bool, verbose: bool
) -> TorchTrainer:
    """Return the trainer of the run. Ray must be running.

    Raises:
        SettingsError: as `scaling`.
    """
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
        train_loop_config=vars(task),
        torch_config=TorchConfig(timeout_s=round(collective_timeout(config.scaling.hang_seconds))),
        scaling_config=scaling(config),
        run_config=StoredRunConfig(
            name=ascii_name(config.run.name),
            folder=os.path.basename(storage.path),  # noqa: PTH119
            storage_path=os.path.dirname(storage.path),  # noqa: PTH120 - a path in `storage_filesystem`
            storage_filesystem=tolerant_file_system(storage.filesystem, storage),
            failure_config=FailureConfig(max_failures=config.scaling.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.keep),
            callbacks=[FailureCallback(bridge)],
            logging_config=LoggingConfig(log_level="INFO" if verbose else "ERROR"),
        ),
        datasets={"train": data.plan},  # type: ignore[dict-item]  # read by `StepDataConfig` only
        dataset_config=StepDataConfig(),
    )


def scaling(config: Config) -> ScalingConfig:
    """Return number and resources of the workers for the cluster that this process is connected to.

    `use_gpu: auto` uses GPUs if there are enough for the smallest number of workers, and PyTorch can use them. Unless
    `resources_per_worker` is set, the cores are divided among the largest number of workers.

    Raises:
        SettingsError: the cluster cannot run the smallest number of workers, PyTorch cannot use its GPUs, or
            `resources_per_worker` is not valid.
    """
    (fewest, most), nodes = config.scaling.worker_limits, node_resources()
    unusable = unusable_gpus()
    gpus = 0 if unusable else int(sum(node.get("GPU", 0) for node in nodes))
    use_gpu = gpus >= fewest if config.scaling.use_gpu == "auto" else bool(config.scaling.use_gpu)
    if use_gpu and unusable:
        raise SettingsError(f"scaling.use_gpu: {unusable}")
    if use_gpu and gpus < fewest:
        wait = "" if owns_ray() else " now; if more are to join (`ray status`), wait for them"
        raise SettingsError(
            f"scaling.num_workers: {fewest} GPU workers need {fewest} GPUs, the cluster has {gpus}{wait}"
        )
    try:
        scaling_config = ScalingConfig(
            num_workers=most if fewest == most else (fewest, most),
            use_gpu=use_gpu,
            resources_per_worker=config.scaling.resources_per_worker or {"CPU": cpus_per_worker(nodes, most, use_gpu)},
            elastic_resize_monitor_interval_s=RESIZE_INTERVAL_SECONDS,
        )
    except ValueError as error:  # such as GPUs in `resources_per_worker` of workers without GPUs
        raise SettingsError(f"scaling.resources_per_worker: {error}") from error
    resources = worker_resources(scaling_config)
    if (n_fitting := processes_that_fit(nodes, resources)) < fewest:
        raise SettingsError(_insufficient_resources(fewest, n_fitting, resources, nodes))
    return scaling_config


def unusable_gpus() -> str | None:
    """Return why PyTorch cannot use the GPUs that Ray counts on this machine; None if it can, or if that is not known.

    Ray counts the GPUs that NVIDIA's driver lists. Workers whose PyTorch cannot use them would end with an error, because
    Ray Train connects workers with GPUs by NCCL. In a Ray that another process has started, workers may see GPUs that this
    process does not, so there only a CPU build is a reason, and only if there is no other node.
    """
    nodes, is_cpu_build = node_resources(), torch.version.cuda is None
    is_known = owns_ray() or (is_cpu_build and len(nodes) == 1)
    if not is_known or not any(node.get("GPU") for node in nodes) or torch.cuda.is_available():
        return None
    problem = "is a CPU build" if is_cpu_build else "cannot use it"
    return f"this machine has a GPU, but PyTorch {torch.__version__} {problem}; `savant doctor` prints what to install"


def _insufficient_resources(
    workers: int, n_fitting: int, required: Mapping[str, float], nodes: Sequence[Mapping[str, float]]
) -> str:
    resources = resources_text(required)
    subject = f"1 worker with {resources}" if workers == 1 else f"{workers} workers with {resources} each"
    largest = {name: max((node.get(name, 0) for node in nodes), default=0) for name in required}
    owner, advice = "this machine has", ""
    if not owns_ray():
        # An autoscaler would add nodes only for workers that are requested, which happens after this check.
        owner, advice = (
            "the cluster's largest node has",
            "wait until its nodes have joined (`ray status` lists them), or ",
        )
    return (
        f"scaling.num_workers: {subject} cannot run: {owner} {resources_text(largest)}, room for {n_fitting}; "
        f"{advice}lower scaling.num_workers or scaling.resources_per_worker"
    )


def worker_resources(scaling_config: ScalingConfig) -> dict[str, float]:
    """Return the resources that one worker occupies, by Ray's names."""
    gpu = {"GPU": 1.0} if scaling_config.use_gpu else {}
    return gpu | dict(scaling_config.resources_per_worker or {})  # type: ignore[arg-type]  # only Ray Tune sets a search space


def cpus_per_worker(nodes: Sequence[Mapping[str, float]], workers: int, use_gpu: bool) -> int:
    """Return the largest number of cores per worker with which all workers fit; a worker runs on one node."""
    gpu = {"GPU": 1.0} if use_gpu else {}
    largest = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    fitting = (n for n in range(largest, 0, -1) if processes_that_fit(nodes, gpu | {"CPU": n}) >= workers)
    return next(fitting, 1)
