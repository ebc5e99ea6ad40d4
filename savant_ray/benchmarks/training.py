"""A training step against the baseline's: time, share of peak and memory of the very same steps.

Two processes take turns, one with the baseline, one with what a worker runs, so that each has its own memory and its
own allocator. On a CPU a model of half the width, else the guide's with its micro-batches, ours under its memory cap; the
same dtype for both: what the device computes bf16 in.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from savant_ray.benchmarks import baseline
from savant_ray.benchmarks.peak import benchmark_device, benchmark_dtype, model_config, peak_flops_per_second
from savant_ray.benchmarks.rounds import Figures, figure, in_turn, seconds
from savant_ray.config import Config, ModelConfig
from savant_ray.training.compilation import compile_block
from savant_ray.training.efficiency import synchronize, useful_flops
from savant_ray.training.memory import cap_memory, cap_memory_again, memory_used_gb, peak_memory_gb
from savant_ray.training.micro_batch import MicroBatch
from savant_ray.training.precision import usable_precision
from savant_ray.training.state import new_state
from savant_ray.training.step import StepResult, take_step

ROUNDS = 3
SEED = 0
FIRST_TOKEN = 3


@dataclass(frozen=True)
class Case:
    """What a step consists of."""

    document_tokens: int
    n_documents: int


CASES = {"documents_of_250": Case(250, 4), "full_rows": Case(1024, 4)}
CASES_ON_A_GPU = {"documents_of_250": Case(250, 48), "full_rows": Case(1024, 12)}  # 12 rows each, once they are packed


def run() -> Figures:
    """Ratios of useful tokens per second and of peak memory."""
    device = benchmark_device()
    figures: Figures = {}
    for name, case in (CASES_ON_A_GPU if device.type == "cuda" else CASES).items():
        with _contestant(_baseline, case, device) as theirs, _contestant(_ours, case, device) as ours:
            peak, slow, fast = in_turn(ROUNDS, lambda: peak_flops_per_second(device), theirs, ours)
            figures |= _figures(name, case, device, peak, slow, fast)
            most, theirs_most = ours.peak_gb(), theirs.peak_gb()
            figures[f"train_{name}_memory"] = figure([most / theirs_most], f"{most:.2f} against {theirs_most:.2f} GiB")
    return figures


def _figures(
    name: str, case: Case, device: torch.device, peak: list[float], slow: list[float], fast: list[float]
) -> Figures:
    tokens = case.document_tokens * case.n_documents
    flops = useful_flops(model_config(device), [case.document_tokens] * case.n_documents)
    ratios = [theirs / ours for theirs, ours in zip(slow, fast, strict=True)]
    fastest = max(*peak, flops / min(*slow, *fast))  # other processes may have disturbed each measurement of the peak
    shares = [[flops / time / fastest for time in times] for times in (slow, fast)]
    speeds = [tokens / statistics.median(times) for times in (fast, slow)]
    detail = (
        f"{speeds[0]:,.0f} against {speeds[1]:,.0f} useful tokens/s; the baseline has "
        f"{statistics.median(shares[0]):.1%} of the {fastest / 1e9:,.0f} GFLOP/s peak"
    )
    return {f"train_{name}": figure(ratios, detail, shares[1])}


class Contestant:
    """A process that takes a step whenever it is called; returns the seconds it took."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __call__(self) -> float:  # noqa: D102 - the class says it
        return float(self._ask("step"))

    def peak_gb(self) -> float:
        """GiB at most: on a GPU all that the process held, else what building the model and taking steps has added."""
        return float(self._ask("memory"))

    def _ask(self, question: str) -> Any:
        self._connection.send(question)
        return self._connection.recv()


@contextmanager
def _contestant(prepare: Callable[..., Callable[[], object]], case: Case, device: torch.device) -> Iterator[Contestant]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there, prepare, case, str(device)), daemon=True)
    process.start()
    there.close()  # so that its end is noticed here
    try:
        yield Contestant(here)
    finally:
        process.terminate()
        process.join()


def _answer(connection: Connection, prepare: Callable[..., Callable[[], object]], case: Case, device_name: str) -> None:
    device = torch.device(device_name)
    before = 0.0 if device.type == "cuda" else peak_memory_gb(device)
    most = memory_used_gb if device.type == "cuda" else peak_memory_gb
    torch.manual_seed(SEED)
    step = prepare(case, device)

    def whole() -> None:
        step()
        synchronize(device)

    while True:
        question = connection.recv()
        connection.send(seconds(whole) if question == "step" else most(device) - before)


def _documents(case: Case, vocab_size: int) -> list[torch.Tensor]:
    same = torch.Generator().manual_seed(SEED)
    shape = (case.n_documents, case.document_tokens)
    return list(torch.randint(FIRST_TOKEN, vocab_size, shape, generator=same))


def _baseline(case: Case, device: torch.device) -> Callable[[], object]:
    config = model_config(device)
    model = baseline.Baseline(config).to(device, benchmark_dtype(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    rows = baseline.padded(_documents(case, config.vocab_size), config.max_seq_len).to(device)
    return lambda: baseline.take_step(model, optimizer, rows.split(Config().training.batch_size))


def _ours(case: Case, device: torch.device) -> Callable[[], object]:
    """What a worker does: the cap first, and less at once where the step does not fit under it."""
    config = Config.from_dict({"model": model_config(device).model_dump()})
    cap_memory(device, config.training.vram_limit_gb)
    state = new_state(config, device, usable_precision("bf16", device)[0])
    compile_block(state.model, config.training.compile, device, state.precision)
    share = _packed(case, config.model, device)

    def step() -> StepResult:
        while (result := take_step(state, share, 2e-5, 1.0, lambda: None)).no_room:
            state.use(state.fit.smaller())
        return result

    if device.type == "cuda":
        step()
        cap_memory_again(device, config.training.vram_limit_gb)
    return step


def _packed(case: Case, config: ModelConfig, device: torch.device) -> list[MicroBatch]:
    """Documents side by side in a row, as packing lays them."""
    length = config.max_seq_len
    per_row = length // case.document_tokens
    n_rows = -(-case.n_documents // per_row)
    tokens, ids = np.zeros((n_rows, length), dtype=np.int64), np.full((n_rows, length), -1, dtype=np.int64)
    for index, document in enumerate(_documents(case, config.vocab_size)):
        row, start = index // per_row, index % per_row * case.document_tokens
        tokens[row, start : start + len(document)] = document
        ids[row, start : start + len(document)] = index
    return [MicroBatch(torch.from_numpy(tokens).to(device), torch.from_numpy(ids).to(device), tuple(range(n_rows)))]
