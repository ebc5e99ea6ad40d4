"""An elastic run goes on with the nodes it has; losing or getting one costs the steps since the last checkpoint."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.cluster.conftest import Head, losses, records, start_job, wait_for

pytestmark = pytest.mark.slow
EVERY = 50  # steps between checkpoints
RUN: dict[str, Any] = {
    "training__max_steps": 100_000,
    "checkpoint__every_steps": EVERY,
    "validation__every_steps": 1000,
    "scaling__num_workers": "[1, 2]",
    "scaling__resources_per_worker": "{CPU: 1}",
}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that only drives, and two nodes with a CPU each."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    head = {"num_cpus": 0, "temp_dir": folder, "object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    yield cluster
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_run_goes_on_with_a_node_less_and_with_a_node_more(cluster: Cluster, head: Head, workplace: Path) -> None:
    run = workplace / "tiny"
    job = start_job(Head(cluster.address, ""), workplace, **RUN)
    wait_for(lambda: steps(run) > EVERY)
    lost = next(iter(cluster.worker_nodes))
    before = steps(run)
    cluster.remove_node(lost, allow_graceful=False)
    wait_for(lambda: len(attempts(run)) == 2)
    assert attempts(run)[0]["workers"] == 2 and attempts(run)[1]["workers"] == 1
    assert before - EVERY <= attempts(run)[1]["step"], "no more is repeated than the steps since the last checkpoint"
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    wait_for(lambda: len(attempts(run)) == 3)
    assert attempts(run)[2]["workers"] == 2
    n = attempts(run)[2]["step"] + 10
    wait_for(lambda: steps(run) >= n)
    stop(job)

    alone = {"run__name": "alone", "scaling__num_workers": 1}
    job = start_job(head, workplace, **RUN | alone)
    wait_for(lambda: steps(workplace / "alone") >= n)
    stop(job)
    same = [[step["tokens"] for step in records(workplace / name, "step")][:n] for name in ("tiny", "alone")]
    assert same[0] == same[1], "the same batches, whoever took them"
    assert losses(run)[:10] == pytest.approx(losses(workplace / "alone")[:10], rel=1e-3)
    assert losses(run)[n - 1] == pytest.approx(losses(workplace / "alone")[n - 1], rel=0.1)


def stop(job: subprocess.Popen[str]) -> None:
    job.send_signal(signal.SIGINT)
    printed, _ = job.communicate(timeout=120)
    assert job.returncode == 75, printed


def attempts(run: Path) -> list[dict[str, Any]]:
    return records(run, "attempt")


def steps(run: Path) -> int:
    return len(records(run, "step")) if (run / "metrics.jsonl").exists() else 0
