"""An elastic run continues with the nodes that exist; a lost or a new node costs the steps since the last checkpoint."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from savant_ray.config import Config
from savant_ray.data.stream import StreamPlan
from savant_ray.model.loss import IGNORED, next_token_targets
from savant_ray.reporting.record import METRICS, read_records
from savant_ray.training.checkpoint import newest_checkpoint
from tests.cluster.conftest import losses, records, start_job, steps_done, wait_for
from tests.cluster.nodes import Nodes, running_nodes
from tests.cluster.test_failures import training_workers

pytestmark = pytest.mark.slow
EVERY = 50  # steps between checkpoints
INTERRUPTIONS = 10
RUN: dict[str, Any] = {
    "training__max_steps": 100_000,
    "checkpoint__every_steps": EVERY,
    "validation__every_steps": 1000,
    "scaling__num_workers": "[1, 2]",
    "scaling__resources_per_worker": "{CPU: 1}",
}


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with running_nodes() as nodes:
        yield nodes


def test_an_elastic_run_goes_on_without_a_lost_node_and_saves_when_its_last_node_is_drained(
    nodes: Nodes, workplace: Path
) -> None:
    run = workplace / "tiny"
    lost, drained = nodes.add(), nodes.add()
    job = start_job(nodes.head, workplace, **RUN)
    wait_for((run / f"step_{EVERY}").exists)
    nodes.kill(lost)
    wait_for(lambda: attempts(run)[-1]["workers"] == 1)
    assert attempts(run)[0]["workers"] == 2
    resumed = attempts(run)[-1]["step"]
    assert resumed >= EVERY, "no more is repeated than the steps since the last checkpoint"
    wait_for(lambda: steps_of_last_attempt(run) >= 10)
    nodes.drain(drained)
    printed, _ = job.communicate(timeout=600)
    assert job.returncode == 75 and "is being drained" in printed, printed
    assert newest_checkpoint(run) == run / f"step_{steps_done(run)}"
    n = resumed + 10
    assert tokens(run)[:n] == expected_tokens(workplace, n), "the same batches, whoever took them"


@pytest.mark.rare
def test_an_elastic_run_uses_a_node_that_joins(nodes: Nodes, workplace: Path) -> None:
    run = workplace / "tiny"
    nodes.add()
    job = start_job(nodes.head, workplace, **RUN)
    wait_for(lambda: steps_done(run) > EVERY)
    nodes.add()
    wait_for(lambda: attempts(run)[-1]["workers"] == 2)
    assert attempts(run)[0]["workers"] == 1
    wait_for(lambda: steps_of_last_attempt(run) >= 10)
    stop(job)
    n = attempts(run)[-1]["step"] + 10
    assert tokens(run)[:n] == expected_tokens(workplace, n), "the same batches, whoever took them"


def tokens(run: Path) -> list[int]:
    """Return the number of trained tokens of each step."""
    assert len(losses(run)) > 0, "each step once, in order"
    return [step["tokens"] for step in records(run, "step")]


def expected_tokens(workplace: Path, steps: int) -> list[int]:
    """Compute the number of trained tokens of each of the first steps from the token cache."""
    (cache,) = (workplace / "cache").glob("savant_dataset_train-*/")
    plan = StreamPlan((str(cache),), (1.0,), seed=Config().run.seed, effective_batch=12)
    expected = [target_tokens(plan, step) for step in range(steps)]
    assert len(set(expected)) > 5, "the comparison is worth nothing otherwise"
    return expected


@pytest.mark.rare
def test_an_elastic_run_with_kills_is_bit_for_bit_the_run_of_one_worker(nodes: Nodes, workplace: Path) -> None:
    """Nodes are lost and join, and workers are killed, at random moments."""
    settings = RUN | {
        "training__accumulation": 11,
        "validation__every_steps": EVERY,
        "checkpoint__keep": 1000,
        "scaling__max_failures": 100,
        "scaling__threads_per_worker": 1,
    }
    chance, run = random.Random(0), workplace / "tiny"
    present = [nodes.add(), nodes.add()]
    job = start_job(nodes.head, workplace, **settings)
    for n_attempts in range(1, INTERRUPTIONS + 1):
        wait_for(lambda n=n_attempts: run.exists() and len(attempts(run)) == n)
        wait_for(lambda n=chance.randint(1, 2 * EVERY): steps_of_last_attempt(run) >= n)
        if len(present) == 1:
            present.append(nodes.add())
        elif chance.random() < 0.5:
            nodes.kill(present.pop())
        else:
            os.kill(chance.choice(training_workers()).pid, signal.SIGKILL)
    wait_for(lambda: len(attempts(run)) == INTERRUPTIONS + 1)
    wait_for(lambda: steps_of_last_attempt(run) >= 10)
    stop(job)
    n = attempts(run)[-1]["step"] + 10

    alone = workplace / "alone"
    job = start_job(nodes.head, workplace, **settings | {"run__name": "alone", "scaling__num_workers": 1})
    wait_for(lambda: alone.exists() and steps_done(alone) >= n, seconds=600)
    stop(job)
    assert {attempt["workers"] for attempt in attempts(run)} == {1, 2}
    assert figures(run)[:n] == figures(alone)[:n]
    assert validation_losses(run)
    assert all(a == b for a, b in zip(validation_losses(run), validation_losses(alone), strict=False))
    for step in range(EVERY, n, EVERY):
        expected, found = (tensors(folder / f"step_{step}/step_{step}.pt") for folder in (alone, run))
        assert all(torch.equal(expected[name], tensor) for name, tensor in found.items())


def figures(run: Path) -> list[tuple[float, float, int]]:
    return [(step["train_loss"], step["grad_norm"], step["tokens"]) for step in records(run, "step")]


def validation_losses(run: Path) -> list[float]:
    return [validation["validation_loss"] for validation in records(run, "validation")]


def tensors(file: Path) -> dict[str, torch.Tensor]:
    """Return weights and moments of a checkpoint by name."""
    content = torch.load(file, weights_only=True)
    moments = {
        f"{index} {name}": tensor
        for index, state in content["optimizer_state_dict"]["state"].items()
        for name, tensor in state.items()
    }
    return content["model_state_dict"] | moments


def target_tokens(plan: StreamPlan, step: int) -> int:
    sequences = plan.read(np.arange(12 * step, 12 * (step + 1)))
    targets = next_token_targets(torch.from_numpy(sequences.tokens), torch.from_numpy(sequences.document_ids))
    return int((targets != IGNORED).sum())


def stop(job: subprocess.Popen[str]) -> None:
    job.send_signal(signal.SIGINT)
    printed, _ = job.communicate(timeout=600)
    assert job.returncode == 75, printed


def attempts(run: Path) -> list[dict[str, Any]]:
    return records(run, "attempt")


def steps_of_last_attempt(run: Path) -> int:
    """Return how many steps the last attempt has recorded; those of earlier ones after its start are soon removed."""
    events = [line["event"] for line in read_records(run / METRICS)]
    return sum(event == "step" for event in itertools.takewhile(lambda event: event != "attempt", reversed(events)))
