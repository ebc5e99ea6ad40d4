"""Data-parallel scaling: tokens per second of two single-threaded workers against one, on steps of the same size."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from savant_ray.benchmarks.registry import Figures, alternate, figure, seconds
from savant_ray.config import Config
from savant_ray.training.state import new_state
from savant_ray.training.step import MicroBatch, take_step

ROUNDS = 3
SEQUENCES = 8  # of a step; with the default 192, fixed costs of a step matter less
MODEL = {"dim": 512, "n_heads": 8}


def run() -> Figures:
    """Measure the speed-up; all processes exist throughout and wait while others work."""
    with (
        tempfile.TemporaryDirectory() as folder,
        _group(1, Path(folder, "alone")) as alone,
        _group(2, Path(folder, "pair")) as pair,
    ):
        one, two = alternate(ROUNDS, lambda: _step(alone), lambda: _step(pair))
    tokens = SEQUENCES * Config().model.max_seq_len
    speeds = [tokens / statistics.median(times) for times in (two, one)]
    detail = f"{speeds[0]:,.0f} against {speeds[1]:,.0f} tokens/s, {SEQUENCES} sequences a step"
    return {"scaling_2_workers": figure([a / b for a, b in zip(one, two, strict=True)], detail)}


@contextmanager
def _group(world_size: int, rendezvous: Path) -> Iterator[list[Connection]]:
    """Start processes that take a step together on request; yield the connections to them."""
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in range(world_size)]
    processes = [
        context.Process(target=_worker, args=(child_end, rank, world_size, str(rendezvous)), daemon=True)
        for rank, (_, child_end) in enumerate(ends)
    ]
    for process in processes:
        process.start()
    try:
        yield [parent_end for parent_end, _ in ends]
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _step(group: list[Connection]) -> float:
    for connection in group:
        connection.send("step")
    return max(float(connection.recv()) for connection in group)


def _worker(connection: Connection, rank: int, world_size: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    config = Config.from_dict({"model": MODEL})
    state = new_state(config, torch.device("cpu"), "fp32")
    generator = torch.Generator().manual_seed(rank)
    local_batch = []
    n_own = SEQUENCES // world_size
    for position in range(n_own):
        tokens = torch.randint(config.model.vocab_size, (1, config.model.max_seq_len), generator=generator)
        is_trained = torch.ones_like(tokens, dtype=torch.bool)
        local_batch.append(
            MicroBatch(tokens, torch.zeros_like(tokens), is_trained, (position,), index=rank * n_own + position)
        )
    while connection.recv() == "step":
        connection.send(seconds(lambda: take_step(state, local_batch, 2e-5, 1.0, lambda: None)))
