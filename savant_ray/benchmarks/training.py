"""A training step against the baseline's: time, utilization and memory of the same steps.

Two processes alternate, one with the baseline and one with a worker's step, so that each has its own memory and its own
allocator. On a CPU the model has half the default dimension; on a GPU it is the default model with its micro-batches, and
our process is under the memory cap. Both use the dtype in which the device computes `training.precision: bf16`. They start
from the same weights, so that equal losses show that both train on the same documents.

The figures `deterministic` compare our step with itself, with and without `training.deterministic`. Its step has 16
micro-batches, because the number of sums in memory grows with them.
"""

from __future__ import annotations

import functools
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from savant_ray.benchmarks import baseline
from savant_ray.benchmarks.registry import Figures, alternate, figure, log_progress, seconds
from savant_ray.benchmarks.workload import benchmark_device, benchmark_dtype, model_config, peak_flops_per_second
from savant_ray.config import AUTO, Auto, Config, ModelConfig
from savant_ray.model.transformer import UniversalTransformer
from savant_ray.training.device import (
    compile_block,
    memory_used_gb,
    peak_memory_gb,
    prepare_device,
    supported_precision,
    synchronize,
    update_memory_cap,
)
from savant_ray.training.efficiency import useful_flops
from savant_ray.training.state import is_deterministic, micro_batch_size, new_state
from savant_ray.training.step import MicroBatch, take_step

ROUNDS = 3
SEED = 0
FIRST_TOKEN = 3


@dataclass(frozen=True)
class Case:
    """The documents of a step."""

    document_tokens: int
    n_documents: int


def run() -> Figures:
    """Measure useful tokens per second and peak memory relative to the baseline."""
    device = benchmark_device()
    if device.type == "cuda":
        rows = Config().training.batch_size
        cases = {"documents_of_250": Case(250, 4 * rows), "full_rows": Case(1024, rows)}
    else:
        cases = {"documents_of_250": Case(250, 4), "full_rows": Case(1024, 4)}
    return measure_steps(model_config(device), device, cases, ROUNDS, lambda: peak_flops_per_second(device))


def measure_steps(
    model: ModelConfig,
    device: torch.device,
    cases: Mapping[str, Case],
    rounds: int,
    measure_peak: Callable[[], float],
) -> Figures:
    """Measure with a model of any size; `measure_peak` returns FLOP/s."""
    figures: Figures = {}
    for name, case in cases.items():
        with _process(_baseline, model, case, device) as reference, _process(_savant, model, case, device) as savant:
            peaks, reference_times, savant_times = alternate(rounds, measure_peak, reference, savant)
            losses = f"first losses {savant.first_loss():.3f} and {reference.first_loss():.3f}"
            figures[f"train_{name}"] = _figure(model, case, peaks, reference_times, savant_times, losses)
            savant_gb, reference_gb = savant.peak_gb(), reference.peak_gb()
            figures[f"train_{name}_memory"] = figure(
                [savant_gb / reference_gb], f"{savant_gb:.2f} against {reference_gb:.2f} GiB"
            )
    return figures | _cost_of_determinism(model, device, rounds)


def _cost_of_determinism(model: ModelConfig, device: torch.device, rounds: int) -> Figures:
    """Measure the speed and memory of deterministic steps relative to others."""
    case = Case(model.max_seq_len, 16 * micro_batch_size(_config(model, deterministic=True), device))
    processes = [
        _process(functools.partial(_savant, deterministic=setting), model, case, device) for setting in (True, False)
    ]
    with processes[0] as deterministic, processes[1] as other:
        times, other_times = alternate(rounds, deterministic, other)
        gb, other_gb = deterministic.peak_gb(), other.peak_gb()
    return {
        "train_deterministic": figure(
            [b / a for a, b in zip(times, other_times, strict=True)],
            f"{statistics.median(times):.2f} against {statistics.median(other_times):.2f} s a step",
        ),
        "train_deterministic_memory": figure([gb / other_gb], f"{gb:.2f} against {other_gb:.2f} GiB"),
    }


def _figure(
    model: ModelConfig,
    case: Case,
    peaks: list[float],
    reference_times: list[float],
    savant_times: list[float],
    losses: str,
) -> dict[str, Any]:
    tokens = case.document_tokens * case.n_documents
    flops = useful_flops(model, [case.document_tokens] * case.n_documents)
    ratios = [a / b for a, b in zip(reference_times, savant_times, strict=True)]
    # If a step is faster than the measured peak, other processes disturbed all measurements; its speed is then the peak.
    peak = max(*peaks, flops / min(*reference_times, *savant_times))
    fractions_of_peak = [[flops / time / peak for time in times] for times in (reference_times, savant_times)]
    speeds = [tokens / statistics.median(times) for times in (savant_times, reference_times)]
    detail = (
        f"{speeds[0]:,.0f} against {speeds[1]:,.0f} useful tokens/s, {losses}; the baseline has "
        f"{statistics.median(fractions_of_peak[0]):.1%} of the {peak / 1e9:,.0f} GFLOP/s peak"
    )
    return figure(ratios, detail, fractions_of_peak[1])


Steps = Callable[[ModelConfig, Case, torch.device], Iterator[float]]  # takes a step and yields its loss, endlessly


class StepProcess:
    """A child process; calling this object runs one step in it and returns the seconds that it took."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __call__(self) -> float:  # noqa: D102 - see the class
        return self._request("step")

    def first_loss(self) -> float:
        """Return the loss of the first step."""
        return self._request("first loss")

    def peak_gb(self) -> float:
        """Return peak GiB: on a GPU of the whole process, on a CPU what the model and its steps added."""
        return self._request("memory")

    def _request(self, name: str) -> float:
        self._connection.send(name)
        return float(self._connection.recv())


@contextmanager
def _process(steps: Steps, model: ModelConfig, case: Case, device: torch.device) -> Iterator[StepProcess]:
    context = multiprocessing.get_context("spawn")
    parent_end, child_end = context.Pipe()
    process = context.Process(target=_serve, args=(child_end, steps, model, case, str(device)), daemon=True)
    process.start()
    child_end.close()  # otherwise `recv` would not notice that the process has ended
    try:
        yield StepProcess(parent_end)
    finally:
        process.terminate()
        process.join()


def _serve(connection: Connection, steps: Steps, model: ModelConfig, case: Case, device_name: str) -> None:
    device = torch.device(device_name)
    before = 0.0 if device.type == "cuda" else peak_memory_gb(device)
    memory_gb = memory_used_gb if device.type == "cuda" else peak_memory_gb
    losses = steps(model, case, device)
    first_loss = next(losses)

    def step_and_synchronize() -> None:
        next(losses)
        synchronize(device)

    answers = {
        "step": lambda: seconds(step_and_synchronize),
        "first loss": lambda: first_loss,
        "memory": lambda: memory_gb(device) - before,
    }
    while True:
        connection.send(answers[connection.recv()]())


def _documents(case: Case, vocab_size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    shape = (case.n_documents, case.document_tokens)
    return list(torch.randint(FIRST_TOKEN, vocab_size, shape, generator=generator))


def _config(model: ModelConfig, deterministic: bool | Auto) -> Config:
    return Config.from_dict({"model": model.model_dump(), "training": {"deterministic": deterministic}})


def _baseline(config: ModelConfig, case: Case, device: torch.device) -> Iterator[float]:
    """Take steps of the baseline, from the initial weights of `_savant`."""
    model = baseline.Baseline(config)
    torch.manual_seed(Config().run.seed)
    model.load_state_dict(UniversalTransformer(config).state_dict(), strict=False)
    model.to(device, benchmark_dtype(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    rows = baseline.padded(_documents(case, config.vocab_size), config.max_seq_len).to(device)
    while True:
        yield baseline.take_step(model, optimizer, rows.split(Config().training.batch_size))


def _savant(model: ModelConfig, case: Case, device: torch.device, deterministic: bool | Auto = AUTO) -> Iterator[float]:
    """Take steps as a worker does: with a memory cap, and with smaller micro-batches if a step does not fit."""
    config = _config(model, deterministic)
    prepare_device(device, config.training.vram_limit_gb, is_deterministic(config, device))
    state = new_state(config, device, supported_precision("bf16", device)[0])
    compile_block(state.model, config.training.compile, device, state.settings.precision)
    parts = _packed(case, config.model, device).parts(micro_batch_size(config, device))
    local_batch = [replace(part, index=index) for index, part in enumerate(parts)]

    def step() -> float:
        while (result := take_step(state, local_batch, 2e-5, 1.0, lambda: None)).out_of_memory:
            state.set_batch_fit(state.batch_fit.smaller())
            log_progress(f"a step did not fit into memory: from now on {state.batch_fit}")
        return result.loss

    yield step()
    update_memory_cap(device, config.training.vram_limit_gb)
    while True:
        yield step()


def _packed(case: Case, config: ModelConfig, device: torch.device) -> MicroBatch:
    """Pack documents into rows."""
    length = config.max_seq_len
    per_row = length // case.document_tokens
    n_rows = -(-case.n_documents // per_row)
    tokens, ids = np.zeros((n_rows, length), dtype=np.int64), np.full((n_rows, length), -1, dtype=np.int64)
    for index, document in enumerate(_documents(case, config.vocab_size)):
        row, start = index // per_row, index % per_row * case.document_tokens
        tokens[row, start : start + len(document)] = document
        ids[row, start : start + len(document)] = index
    tokens_NT, ids_NT = torch.from_numpy(tokens), torch.from_numpy(ids)
    return MicroBatch(tokens_NT, ids_NT, torch.ones_like(ids_NT, dtype=torch.bool), tuple(range(n_rows))).to(device)
