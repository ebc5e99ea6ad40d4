"""The benchmark of checkpoints, the only one that starts a Ray Train worker itself."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.cluster.conftest import ROOT, Head, environment


@pytest.mark.slow
@pytest.mark.rare
def test_the_stall_of_a_checkpoint_is_compared_with_a_blocking_save(head: Head) -> None:
    script = (
        "import json; from savant_ray.benchmarks.checkpointing import measure_stall\n"
        "print(json.dumps(measure_stall({'vocab_size': 500, 'dim': 32, 'n_heads': 2}, rounds=2)))"
    )
    there = environment(RAY_ADDRESS=head.address)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=there, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["checkpoint_stall"]["ratio"] > 0 and figures["checkpoint_stall"]["rounds"] == 2
