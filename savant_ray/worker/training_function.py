"""What each Ray Train worker runs: memory cap first, then model, resume, loop."""

from __future__ import annotations

import functools
import platform
import traceback
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.exceptions import RayError
from ray.train.torch import get_device

from savant_ray.cluster.same_code import other_code, own_digest, package_folder
from savant_ray.config import Config
from savant_ray.data.order import GlobalOrder, rank_slice
from savant_ray.data.stream import StepShare, StepStream
from savant_ray.data.token_cache import TokenCache
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.errors import SavantError, UnexpectedError, describe, doing
from savant_ray.events import AttemptEnded, AttemptStarted, RunFailed, RunResumed, WorkersStarted
from savant_ray.storage.lease import Owner
from savant_ray.storage.local import Disk
from savant_ray.storage.run_storage import run_storage
from savant_ray.training.device import (
    cap_memory,
    compile_block,
    memory_used_gb,
    raise_memory_cap_error_on_oom,
    supported_precision,
    update_memory_cap,
)
from savant_ray.training.examiner import Examiner
from savant_ray.training.loop import train, validation_is_due
from savant_ray.training.prefetch import prefetch
from savant_ray.training.state import TrainingState, new_state
from savant_ray.training.step import MicroBatch, all_reduce_sum, micro_batches
from savant_ray.training.validator import Validator
from savant_ray.worker.host import RayHost
from savant_ray.worker.resume import load_newest

VALIDATION_SEED = 0  # not `run.seed`: runs with other seeds are compared on the same sequences


@dataclass(frozen=True)
class WorkerTask:
    """What the driver sends: plain values that the dashboard may show, and the bridge's handle."""

    config: dict[str, Any]
    tokenizer: str  # a tokenizer.json that every node can read
    validation: str  # a token cache that every node can read
    data_fingerprint: str
    allow_changes: bool
    bridge: Any
    owner: dict[str, Any] | None = None  # the fields of an `Owner`, where the storage has a lease
    package: str = field(default_factory=lambda: str(package_folder()))  # the driver's folder of this package
    code: str = field(default_factory=own_digest)  # and its digest


def train_worker(settings: dict[str, Any]) -> None:
    """The training function of `TorchTrainer`; `settings` are the fields of a `WorkerTask`."""
    task = WorkerTask(**settings)
    if ray.get(task.bridge.has_failed.remote()):
        return
    config = Config.from_dict(task.config)
    tokenizer = Tokenizer.load(task.tokenizer, config.data.end_of_document, config.data.add_special_tokens)
    storage = run_storage(config, Owner(**task.owner) if task.owner else None)
    host = RayHost(task.bridge, storage, config, tokenizer)
    if host.rank == 0:
        host.emit(WorkersStarted())
    try:
        if task.code != own_digest():  # a node that joined after the driver had asked them all
            raise other_code(task.package, f"worker {host.rank}", str(package_folder()))
        _train(task, config, tokenizer, storage, host)
    except SavantError as error:
        host.finish_saving()
        host.emit(RunFailed(error=type(error).__name__, text=str(error), exit_code=error.exit_code), wait=True)
        raise
    except (RayError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # Ray Train hands on the error, but neither its traceback nor what was being done
        raise UnexpectedError(describe(error, "training"), traceback.format_exc()) from error


def _train(task: WorkerTask, config: Config, tokenizer: Tokenizer, storage: Disk, host: RayHost) -> None:
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where collectives over objects put their bytes
    torch.manual_seed(config.run.seed)  # nothing of ours draws from it; what a library draws is the same each time
    precision, note = supported_precision(config.training.precision, device)
    notes = [cap_memory(device, config.training.vram_limit_gb), note]
    with raise_memory_cap_error_on_oom(config.training.vram_limit_gb):
        state = new_state(config, device, precision)
    state.data_fingerprint = task.data_fingerprint
    notes.append(compile_block(state.model, config.training.compile, device, precision))
    resumed = load_newest(state, config, storage, task.allow_changes)
    stream: StepStream = ray.train.get_dataset_shard("train")
    host.plan = stream.plan
    steps = stream.steps(state.position, config.training.max_steps - state.step)  # reads ahead from now on
    if device.type == "cuda":  # NCCL takes its memory at the first collective of a size, and the cap has to count it
        with raise_memory_cap_error_on_oom(config.training.vram_limit_gb):
            all_reduce_sum(state.gradients.flat)
        notes.append(update_memory_cap(device, config.training.vram_limit_gb))
    host.saver.saved_step = state.step
    if host.rank == 0:
        host.host_copy.allocate(state)
    _announce(host, state, config, [note for note in notes if note], resumed)
    host.validator = make_validator(task, config, tokenizer, host)
    if host.rank == 0 and not validation_is_due(state.step, config):
        host.validator.remember_weights(state)
    shares = ready_steps(steps, config, device)
    if device.type == "cuda":  # pinning memory in a thread without a current device makes a context on GPU 0
        shares = prefetch(shares, functools.partial(torch.cuda.set_device, device))
    finished = train(state, config, host.metrics.watched(shares, lambda: memory_used_gb(device)), host)
    if host.rank == 0:
        host.emit(AttemptEnded(step=state.step, finished=finished, saved_step=host.saver.saved_step), wait=True)


def ready_steps(
    steps: Iterable[StepShare], config: Config, device: torch.device
) -> Generator[list[MicroBatch], None, None]:
    """Each step's micro-batches of this rank, as `ready` makes them."""
    with doing("reading the next step's sequences"):
        for step in steps:
            yield ready(step, config, device)


def ready(step: StepShare, config: Config, device: torch.device) -> list[MicroBatch]:
    """Return this rank's micro-batches of a step in host memory, pinned for a GPU."""
    return micro_batches(step.sequences, step.positions, config, pinned=device.type == "cuda")


def make_validator(task: WorkerTask, config: Config, tokenizer: Tokenizer, host: RayHost) -> Validator:
    """The validator with this rank's share of `validation.batches` batches, the same for every run on that text.

    Drawn from the whole text: packing puts the longest documents first.
    """
    cache = TokenCache.open(task.validation)
    wanted = min(config.validation.batches * config.training.batch_size, cache.n_sequences)
    _, rows = GlobalOrder([cache.n_sequences], [1.0], VALIDATION_SEED).locate(np.arange(wanted))
    rows = rows[np.asarray(rank_slice(wanted, host.rank, host.world_size), dtype=np.int64)]
    examiner = Examiner(config, tokenizer, host.rank, host.world_size, host.stop_requested)
    return Validator(
        config=config,
        tokenizer=tokenizer,
        micro_batches=micro_batches(cache.take(rows), rows, config, pinned=False),
        target_tokens=cache.manifest.target_tokens,
        text_bytes=cache.manifest.text_bytes,
        rank=host.rank,
        emit=host.emit,
        stop_requested=host.stop_requested,
        examiner=examiner if config.validation.logic_problems else None,
    )


def _announce(
    host: RayHost, state: TrainingState, config: Config, notes: list[str], resumed: RunResumed | None
) -> None:
    if host.rank != 0:
        return
    host.emit(
        AttemptStarted(
            step=state.step,
            workers=host.world_size,
            device=torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else "cpu",
            parameters=sum(p.numel() for p in state.model.parameters()),
            max_steps=config.training.max_steps,
            effective_batch=config.training.effective_batch,
            validates_first=validation_is_due(state.step, config),
            notes=tuple(notes),
            precision=state.precision,
            threads=torch.get_num_threads(),
            vram_limit_gb=config.training.vram_limit_gb if state.device.type == "cuda" else None,
            versions={"python": platform.python_version(), "torch": str(torch.__version__), "ray": ray.__version__},
            settings=config.to_dict(),
        )
    )
    if resumed is not None:
        host.emit(resumed)
