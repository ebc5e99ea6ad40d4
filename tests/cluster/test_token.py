"""The commands of docs/guides/cluster.md, executed against a head that requires a token."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from savant_ray.training.checkpoint import checkpoints
from tests.cluster.conftest import ROOT, environment, free_port, losses, steps_done, wait_for
from tests.cluster.test_ray_job import copy_repository, submission, write_config
from tests.test_docs import split_commands, without_environment

pytestmark = pytest.mark.slow
SECTION = "From one machine to a cluster"
DASHBOARD = "http://127.0.0.1:8265"  # in the documentation


def typed(beginning: str) -> list[str]:
    """Return the words of the documented command that begins with this text."""
    text = (ROOT / "docs/guides/cluster.md").read_text().split(f"## {SECTION}\n")[1].split("\n## ")[0]
    script = "".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    (found,) = (words for words in split_commands(script) if " ".join(words).startswith(beginning))
    return found


@dataclass(frozen=True)
class Cluster:
    """A head that requires a token, and the home folder and variables of a user who has it."""

    address: str
    dashboard: str
    home: Path
    variables: Mapping[str, str]

    def run(self, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run a documented command with this cluster's address."""
        there = {**self.variables, **changes}
        return subprocess.run(self.here(words), cwd=ROOT, env=there, text=True, capture_output=True, timeout=400)

    def start(self, *words: str, folder: Path) -> subprocess.Popen[str]:
        """Start a documented command with this cluster's address."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(self.here(words), cwd=folder, env=dict(self.variables), text=True, **pipes)

    def here(self, words: Sequence[str]) -> list[str]:
        """Replace the documented address by that of this cluster."""
        return [word.replace(DASHBOARD, self.dashboard) for word in words]

    def nodes(self) -> list[str]:
        """Return the states of the nodes; none while the cluster starts, when Ray prints text instead of JSON."""
        listed = self.run("ray", "list", "nodes", "--format", "json", "--address", self.dashboard)
        starting = listed.returncode != 0 or listed.stdout.startswith("No resource in the cluster")
        return [] if starting else [node["state"] for node in json.loads(listed.stdout)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Yield a cluster that is started by the documented commands, with its own ports and folders."""
    home, folder = tmp_path_factory.mktemp("home"), tempfile.mkdtemp(prefix="ray", dir="/tmp")
    port, dashboard, agent, client = (free_port() for _ in range(4))
    there = environment(HOME=str(home), RAY_AUTH_MODE="token")
    for command in ("ray get-auth-token", "chmod"):
        subprocess.run(" ".join(typed(command)), shell=True, env=there, check=True, timeout=120)
    start = " ".join(typed("ray start --head")).replace("--port 6379", f"--port {port}").split()
    own = f"--num-cpus 2 --temp-dir {folder} --dashboard-agent-listen-port {agent}"
    ports = f"--dashboard-port {dashboard} --ray-client-server-port {client}"
    with node([*start, *own.split(), *ports.split()], there):
        yield Cluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", home, there)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def node(start: Sequence[str], variables: Mapping[str, str]) -> Iterator[None]:
    """Run a node of a cluster during a `with` block."""
    own = f"--block --object-store-memory {200 << 20} --node-ip-address 127.0.0.1".split()
    process = subprocess.Popen([*start, *own], env=variables, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        end_with_all_below(process)


def end_with_all_below(head: subprocess.Popen[bytes]) -> None:
    below = psutil.Process(head.pid).children(recursive=True)
    head.terminate()
    psutil.wait_procs(below, timeout=15)
    for process in below:
        if process.is_running():
            process.kill()
    head.kill()
    head.wait()


def test_a_cluster_with_a_token_refuses_who_has_none_or_another(cluster: Cluster) -> None:
    token = cluster.home / ".ray/auth_token"
    assert token.stat().st_mode & 0o777 == 0o600 and len(token.read_text()) >= 32
    jobs = typed("ray job list")
    wait_for(lambda: cluster.run(*jobs).returncode == 0)
    for refused in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}):
        answer = cluster.run(*jobs, **refused)
        assert answer.returncode != 0 and re.search("40[13]|[Aa]uthenticat", answer.stdout + answer.stderr)


@pytest.mark.rare
def test_a_job_is_submitted_and_stopped_with_a_token(cluster: Cluster, workplace: Path) -> None:
    wait_for(lambda: cluster.run(*typed("ray job list")).returncode == 0)
    folder, run = copy_repository(workplace / "repository"), workplace / "tiny"
    write_config(folder / "configs/cluster.yaml", workplace, max_steps=10_000)
    venv = Path(sys.executable).parent.parent
    submit = [*typed("make submit"), "--old-file", f"{venv}/.installed", f"VENV={venv}"]
    job = cluster.start(*submit, folder=folder)
    name = submission(job)
    wait_for(lambda: job.poll() is not None or steps_done(run) >= 5)
    assert cluster.run(*named(typed("ray job stop"), name)).returncode == 0
    printed, _ = job.communicate(timeout=600)
    stopped_at = len(losses(run))
    assert stopped_at >= 5 and checkpoints(run)[-1].name == f"step_{stopped_at}", printed

    status, logs = (cluster.run(*named(typed(f"ray job {what}"), name)) for what in ("status", "logs"))
    assert status.returncode == 0 and "stopped" in (status.stdout + status.stderr).lower()
    assert logs.returncode == 0 and f"saved as step_{stopped_at}" in logs.stdout
    assert (cluster.home / ".ray/auth_token").read_text() not in printed + logs.stdout


@pytest.mark.rare
def test_a_second_machine_joins_with_the_token(cluster: Cluster) -> None:
    wait_for(lambda: cluster.nodes() == ["ALIVE"])
    start = without_environment(typed("RAY_AUTH_MODE=token ray start"))
    there = [word.replace("HEAD:6379", cluster.address) for word in start]
    with node([*there, "--num-cpus", "1", "--dashboard-agent-listen-port", str(free_port())], cluster.variables):
        wait_for(lambda: len(cluster.nodes()) == 2)
        assert cluster.nodes() == ["ALIVE", "ALIVE"]


def named(words: list[str], name: str) -> list[str]:
    return [name if word == "raysubmit_NAME" else word for word in words]
