"""The settings of a run as Ray Train's own: `TorchTrainer`, scaling, failures, checkpoints."""

from __future__ import annotations

from typing import Any

from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import LoggingConfig

from savant_ray.cluster.data_config import StepDataConfig
from savant_ray.cluster.paths import run_folder
from savant_ray.cluster.preparation import PreparedData
from savant_ray.cluster.session import n_cpus, n_gpus
from savant_ray.cluster.worker import WorkerTask, train_worker
from savant_ray.config import Config
from savant_ray.errors import SettingsError


SECONDS_BETWEEN_RESIZES = 30.0  # each costs a start of all workers and the steps since the last checkpoint


def make_trainer(config: Config, data: PreparedData, bridge: Any, allow_changes: bool) -> TorchTrainer:
    """The job; Ray must be running."""
    task = WorkerTask(
        config=config.to_dict(),
        run_folder=str(run_folder(config)),
        tokenizer=str(data.tokenizer_path),
        validation=str(data.validation),
        data_fingerprint=data.fingerprint,
        allow_changes=allow_changes,
        bridge=bridge,
    )
    return TorchTrainer(
        train_worker,
        train_loop_config={name: getattr(task, name) for name in task.__dataclass_fields__},
        scaling_config=scaling(config),
        run_config=RunConfig(
            name=config.run.name,
            storage_path=config.run.storage_path,
            failure_config=FailureConfig(max_failures=config.scaling.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.keep),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
        datasets={"train": data.plan},
        dataset_config=StepDataConfig(),
    )


def scaling(config: Config) -> ScalingConfig:
    """`use_gpu: auto` = when the cluster has a GPU for each worker; on CPUs the workers share all cores.

    Raises:
        SettingsError: the cluster can never offer what is asked for, the fewest workers at least.
    """
    (fewest, most), gpus = config.scaling.worker_limits, n_gpus()
    use_gpu = gpus >= fewest if config.scaling.use_gpu == "auto" else bool(config.scaling.use_gpu)
    if use_gpu and gpus < fewest:
        raise SettingsError(f"scaling.num_workers: {fewest} GPU workers need {fewest} GPUs, the cluster has {gpus}")
    resources = config.scaling.resources_per_worker or {"CPU": max(1, n_cpus() // most)}
    if not use_gpu and resources.get("CPU", 0) * fewest > n_cpus():
        raise SettingsError(
            f"scaling.num_workers: {fewest} workers with {resources['CPU']:g} CPUs each do not fit on "
            f"{n_cpus()} CPUs; lower it or scaling.resources_per_worker"
        )
    return ScalingConfig(
        num_workers=most if fewest == most else (fewest, most),
        use_gpu=use_gpu,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=SECONDS_BETWEEN_RESIZES,
    )
