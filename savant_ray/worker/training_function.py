"""The training function of a Ray Train worker: memory cap, model, checkpoint, input, training loop."""

from __future__ import annotations

import platform
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.exceptions import RayError

from savant_ray.cluster.same_code import other_code_error, own_digest, package_folder
from savant_ray.config import Config
from savant_ray.data.stream import StepStream
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.errors import SavantError, UnexpectedError, describe
from savant_ray.events import AttemptEnded, AttemptStarted, RunFailed
from savant_ray.storage.lease import Owner
from savant_ray.storage.protocol import RunStorage
from savant_ray.storage.run_storage import run_storage
from savant_ray.training.compiler_cache import keep_compiled_code
from savant_ray.training.device import (
    compile_block,
    prepare_device,
    processor_name,
    raise_memory_cap_error_on_oom,
    refuse_gpu_without_kernels,
    set_threads,
    supported_precision,
    update_memory_cap,
    wants_compiled,
)
from savant_ray.training.loop import train, validation_is_due
from savant_ray.training.progress import PROGRESS, STORAGE
from savant_ray.training.state import TrainingState, is_deterministic, micro_batch_size, new_state
from savant_ray.training.step import allocate_reduction
from savant_ray.worker.batch_reader import local_batches
from savant_ray.worker.host import DriverConnection, RayHost
from savant_ray.worker.resume import load_newest


@dataclass(frozen=True)
class WorkerTask:
    """The arguments of the training function: plain values, which Ray's dashboard can show, and the bridge's handle."""

    config: dict[str, Any]
    tokenizer: str  # path of a tokenizer.json that every node can read
    validation: str  # folder of a token cache that every node can read
    data_fingerprint: str
    allow_changes: bool
    bridge: Any
    owner: dict[str, Any] | None = None  # the fields of an `Owner` if the storage has a lease
    package: str = field(default_factory=lambda: str(package_folder()))  # the driver's folder of this package
    code: str = field(default_factory=own_digest)  # digest of the driver's package


def train_worker(settings: dict[str, Any]) -> None:
    """Train in a worker process; `settings` are the fields of a `WorkerTask`."""
    task = WorkerTask(**settings)
    config = Config.from_validated(task.config)
    connection = DriverConnection(task.bridge, config)
    try:
        if not ray.get(task.bridge.has_failed.remote()):  # else: restarted after an error that would occur again
            _start(task, config, connection)
    finally:
        PROGRESS.finish()


def _start(task: WorkerTask, config: Config, connection: DriverConnection) -> None:
    try:
        tokenizer = Tokenizer.load(task.tokenizer, config.data.end_of_document, config.data.add_special_tokens)
        storage = run_storage(config, Owner(**task.owner) if task.owner else None)
        PROGRESS.begin("loading the state", STORAGE)
        if task.code != own_digest():  # a node that joined after the driver had compared the code of all nodes
            raise other_code_error(task.package, f"worker {connection.rank}", str(package_folder()))
        _train(task, config, tokenizer, storage, connection)
    except SavantError as error:
        connection.emit_and_wait(RunFailed(error=type(error).__name__, text=str(error), exit_code=error.exit_code))
        if connection.world_size > 1:
            raise  # Ray Train then ends the other workers, which may be waiting for this one, and starts them once more
    except (RayError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # Ray Train passes on the message only, without traceback and activity
        raise UnexpectedError(describe(error, "training"), traceback.format_exc()) from error


def _train(
    task: WorkerTask,
    config: Config,
    tokenizer: Tokenizer,
    storage: RunStorage,
    connection: DriverConnection,
) -> None:
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # collectives over Python objects allocate on the current device
    torch.manual_seed(config.run.seed)  # for libraries; this package uses no global generator
    settings = config.training
    precision, precision_note = supported_precision(settings.precision, device)
    notes = [prepare_device(device, settings.vram_limit_gb, is_deterministic(config, device)), precision_note]
    with raise_memory_cap_error_on_oom(settings.vram_limit_gb):
        refuse_gpu_without_kernels(device)
        state = new_state(config, device, precision)
    state.data_fingerprint = task.data_fingerprint
    if device.type == "cuda" or wants_compiled(settings.compile, device, precision):
        keep_compiled_code(Path(config.data.cache_dir))
    notes.append(compile_block(state.model, settings.compile, device, precision))
    resumed, threads = load_newest(state, config, storage, task.allow_changes)
    if device.type == "cpu":
        checkpoint_threads = threads if state.settings.deterministic else None
        notes.append(set_threads(config.scaling.threads_per_worker, checkpoint_threads))
    if state.settings.deterministic:
        notes.append(_idle_workers(config, micro_batch_size(config, device), connection.world_size))
    stream: StepStream = ray.train.get_dataset_shard("train")
    batches = local_batches(stream, state, config)
    if device.type == "cuda":
        # NCCL allocates memory at the first collective of a given size, and the cap has to include this memory.
        with raise_memory_cap_error_on_oom(settings.vram_limit_gb):
            allocate_reduction(state)
        notes.append(update_memory_cap(device, settings.vram_limit_gb))
    if connection.rank == 0:
        connection.emit(_attempt_started(connection.world_size, state, config, [note for note in notes if note]))
        if resumed is not None:
            connection.emit(resumed)
    host = RayHost(connection, storage, config, tokenizer, stream, task.validation, task.allow_changes, state)
    try:
        finished = train(state, config, batches, host)
    except SavantError:
        host.finish_saving()
        raise
    if connection.rank == 0:
        connection.emit_and_wait(AttemptEnded(step=state.step, finished=finished, saved_step=host.saved_step))


def _idle_workers(config: Config, rows: int, n_workers: int) -> str | None:
    """Return a note for the user if some workers have none of a step's micro-batches of `rows` sequences, or None."""
    n_micro_batches = -(-config.training.effective_batch // rows)
    if n_micro_batches >= n_workers:
        return None
    return (
        f"{n_workers - n_micro_batches} of {n_workers} workers have nothing to compute: a step has {n_micro_batches} "
        f"micro-batches of {rows} sequences, which are not divided (training.deterministic); lower training.batch_size and "
        "raise training.accumulation"
    )


def _attempt_started(n_workers: int, state: TrainingState, config: Config, notes: list[str]) -> AttemptStarted:
    is_cuda = state.device.type == "cuda"
    return AttemptStarted(
        step=state.step,
        workers=n_workers,
        device=torch.cuda.get_device_name(state.device) if is_cuda else "cpu",
        parameters=sum(p.numel() for p in state.model.parameters()),
        max_steps=config.training.max_steps,
        effective_batch=config.training.effective_batch,
        validates_first=validation_is_due(state.step, config),
        notes=tuple(notes),
        precision=state.settings.precision,
        threads=torch.get_num_threads(),
        vram_limit_gb=config.training.vram_limit_gb if is_cuda else None,
        versions={"python": platform.python_version(), "torch": str(torch.__version__), "ray": ray.__version__},
        processor=processor_name(),
        code=own_digest(),
        data_fingerprint=state.data_fingerprint,
        settings=config.to_dict(),
    )
