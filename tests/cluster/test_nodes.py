"""Nodes that are drained, lost or added: what is saved, what is repeated, and what is printed."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from savant_ray.training.checkpoint import checkpoints
from tests.cluster.conftest import (
    RUN,
    losses,
    records,
    run_job,
    start_job,
    steps_done,
    wait_for,
)
from tests.cluster.nodes import Nodes, running_nodes

pytestmark = [pytest.mark.slow, pytest.mark.rare]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with running_nodes() as nodes:
        yield nodes


def log(run: Path) -> str:
    return (run / "training_log.txt").read_text()


def end(job: subprocess.Popen[str]) -> tuple[int, str]:
    printed, _ = job.communicate(timeout=600)
    print(printed)
    return job.returncode, printed


def test_draining_a_node_saves_the_step_and_the_same_command_resumes(
    nodes: Nodes, workplace: Path, uninterrupted_losses: list[float]
) -> None:
    run = workplace / "tiny"
    _, leaving = nodes.add(), nodes.add()
    job = start_job(nodes.head, workplace, **RUN)
    wait_for(lambda: steps_done(run) >= 12)
    nodes.drain(leaving)
    code, printed = end(job)
    assert code == 75 and "is being drained" in printed and "run the same command again" in printed, printed
    stopped_at = len(losses(run))
    assert checkpoints(run)[-1].name == f"step_{stopped_at}" and 12 <= stopped_at < 100
    assert records(run, "checkpoint")[-1]["reason"] == "stop"
    assert len(records(run, "attempt")) == 1, "not tried again on its own where there is no room"
    assert losses(run) == uninterrupted_losses[:stopped_at]

    nodes.add()
    code, printed = run_job(nodes.head, workplace, **RUN)
    assert code == 0 and f"step_{stopped_at}" in printed, printed
    assert losses(run) == uninterrupted_losses


def test_a_run_recovers_from_lost_nodes_and_can_be_stopped_while_it_waits_for_new_ones(
    nodes: Nodes, workplace: Path, uninterrupted_losses: list[float]
) -> None:
    run = workplace / "tiny"
    first, second = nodes.add(), nodes.add()
    job = start_job(nodes.head, workplace, **RUN)
    wait_for(lambda: steps_done(run) >= 12)
    nodes.add()
    nodes.kill(first)
    wait_for(lambda: len(records(run, "attempt")) == 2)
    assert "its node is gone" in log(run)
    went_on_at = records(run, "attempt")[1]["step"]
    assert went_on_at >= 10 and went_on_at % 10 == 0, "the last checkpoint"

    wait_for(lambda: steps_done(run) >= went_on_at + 12)
    nodes.kill(second)
    wait_for(lambda: "2 workers need {CPU: 1} each" in log(run))
    third = nodes.add()
    wait_for(lambda: len(records(run, "attempt")) == 3 and steps_done(run) >= went_on_at + 12)

    nodes.kill(third)
    wait_for(lambda: log(run).count("its node is gone") == 3)
    job.send_signal(signal.SIGINT)
    code, printed = end(job)
    assert code == 75 and f"resume from {checkpoints(run)[-1].name}" in printed, printed
    assert len(losses(run)) > went_on_at and losses(run) == uninterrupted_losses[: len(losses(run))]
