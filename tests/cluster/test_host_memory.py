"""A node runs out of memory: Ray ends the worker, and the message says what to reduce."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import Head, run_job, running_cluster, with_text

pytestmark = [pytest.mark.slow, pytest.mark.rare]
ROOM_BYTES = 3 << 30  # that everything on this machine may take in addition
HUNGRY = {  # keeps some 20 GB for the backward pass: rows of a micro-batch are limited on a CPU, loops are not
    "model__n_loops": 400,
    "training__batch_size": 100_000,
    "training__accumulation": 1,
    "training__max_steps": 2,
    "training__recompute_loops": "false",
}


def test_a_worker_that_exhausts_the_memory_of_its_node_ends_the_run_with_advice(tmp_path: Path) -> None:
    workplace = with_text(tmp_path)
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + ROOM_BYTES) / memory.total
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_memory_usage_threshold", f"{threshold:.4f}")
        patch.setenv("RAY_memory_monitor_refresh_ms", "100")
        with running_cluster(num_cpus=2, object_store_memory=100 << 20, include_dashboard=False) as cluster:
            code, printed = run_job(Head(cluster.address, ""), workplace, **HUNGRY, scaling__max_failures=0)
    print(printed)
    assert code == 1 and "ran out of memory" in printed and "training.batch_size" in printed, printed
    assert "Traceback" not in printed
