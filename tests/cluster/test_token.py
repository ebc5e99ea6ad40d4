"""The README's way to a cluster, typed as it stands, against a head that wants a token."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import ROOT, environment, free_port, losses, wait_for
from tests.cluster.test_ray_job import copy_repository, write_config
from tests.test_readme import split_commands

pytestmark = pytest.mark.slow
SECTION = "From one machine to a cluster"
DASHBOARD = "http://127.0.0.1:8265"  # the README's


def typed(beginning: str) -> list[str]:
    """The README's command that begins so."""
    text = (ROOT / "README.md").read_text().split(f"## {SECTION}\n")[1].split("\n## ")[0]
    script = "".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    (found,) = (words for words in split_commands(script) if " ".join(words).startswith(beginning))
    return found


@dataclass(frozen=True)
class Cluster:
    """A head that wants a token, and where whoever has it submits."""

    dashboard: str
    home: Path
    variables: Mapping[str, str]

    def run(self, *words: str, folder: Path = ROOT, **changes: str) -> subprocess.CompletedProcess[str]:
        """Types a command of the README, with this cluster's address."""
        here = [word.replace(DASHBOARD, self.dashboard) for word in words]
        there = {**self.variables, **changes}
        return subprocess.run(here, cwd=folder, env=there, text=True, capture_output=True, timeout=400)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Begun as the README says, but with ports and folders of its own."""
    home, folder = tmp_path / "home", tempfile.mkdtemp(prefix="ray", dir="/tmp")
    home.mkdir()
    port, dashboard, agent, client = (free_port() for _ in range(4))
    there = environment(HOME=str(home), RAY_AUTH_MODE="token")
    for command in ("ray get-auth-token", "chmod"):
        subprocess.run(" ".join(typed(command)), shell=True, env=there, check=True, timeout=120)
    start = " ".join(typed("ray start --head")).replace("--port 6379", f"--port {port}").split()
    own = f"--block --num-cpus 2 --object-store-memory {200 << 20} --temp-dir {folder} --node-ip-address 127.0.0.1"
    ports = f"--dashboard-port {dashboard} --dashboard-agent-listen-port {agent} --ray-client-server-port {client}"
    head = subprocess.Popen([*start, *own.split(), *ports.split()], env=there, stdout=subprocess.DEVNULL)
    try:
        yield Cluster(f"http://127.0.0.1:{dashboard}", home, there)
    finally:
        end_with_all_below(head)
        shutil.rmtree(folder, ignore_errors=True)


def end_with_all_below(head: subprocess.Popen[bytes]) -> None:
    below = psutil.Process(head.pid).children(recursive=True)
    head.terminate()
    psutil.wait_procs(below, timeout=15)
    for process in below:
        if process.is_running():
            process.kill()
    head.kill()
    head.wait()


def test_a_job_is_submitted_and_watched_with_a_token_and_refused_without(cluster: Cluster, workplace: Path) -> None:
    token = cluster.home / ".ray/auth_token"
    assert token.stat().st_mode & 0o777 == 0o600 and len(token.read_text()) >= 32
    jobs = typed("ray job list")
    wait_for(lambda: cluster.run(*jobs).returncode == 0)
    for refused in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}):
        answer = cluster.run(*jobs, **refused)
        assert answer.returncode != 0 and re.search("40[13]|[Aa]uthenticat", answer.stdout + answer.stderr)

    folder = copy_repository(workplace / "repository")
    write_config(folder / "configs/cluster.yaml", workplace, max_steps=3)
    venv = Path(sys.executable).parent.parent
    submit = [*typed("make submit"), "--old-file", f"{venv}/.installed", f"VENV={venv}"]
    done = cluster.run(*submit, folder=folder)
    assert done.returncode == 0 and "succeeded" in done.stdout.lower(), done.stdout + done.stderr
    assert len(losses(workplace / "tiny")) == 3

    (name,) = set(re.findall(r"raysubmit_\w+", done.stdout))
    status, logs = (cluster.run(*named(typed(f"ray job {what}"), name)) for what in ("status", "logs"))
    assert status.returncode == 0 and "succeeded" in (status.stdout + status.stderr).lower()
    assert logs.returncode == 0 and "step_3" in logs.stdout
    assert token.read_text() not in done.stdout + logs.stdout


def named(words: list[str], name: str) -> list[str]:
    return [name if word == "raysubmit_NAME" else word for word in words]
