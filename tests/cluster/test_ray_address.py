"""Before `ray.init()`: which cluster is used, whether it responds, and where a Ray that is started here keeps its files."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.flight
import pytest
import ray

from savant_ray.cluster import ray_address, session
from savant_ray.cluster.ray_address import (
    ClusterAddress,
    check_cluster_answers,
    cluster_address,
    split_address,
    unreachable_reason,
)
from savant_ray.cluster.session import prepare_environment, ray_session, start_errors_explained
from savant_ray.cluster.temp_folder import choose_temp_folder, unusable_reason
from savant_ray.errors import SavantError
from tests.cluster.conftest import ROOT, environment, free_port, options, start_program


@contextmanager
def listening() -> Iterator[str]:
    """Yield the address of a server that accepts connections and never responds."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def web_server() -> Iterator[str]:
    """Yield the address of a web server, such as Ray's dashboard."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def parse_request(self) -> bool:
            self.wfile.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            return False

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@contextmanager
def grpc_server() -> Iterator[str]:
    """Yield the address of a gRPC server that is not a Ray head, such as Ray Client's port."""
    server = pyarrow.flight.FlightServerBase("grpc://127.0.0.1:0")
    yield f"127.0.0.1:{server.port}"
    server.shutdown()


def test_without_an_address_ray_is_started_on_this_machine(tmp_path: Path) -> None:
    for address in ({}, {"RAY_ADDRESS": ""}, {"RAY_ADDRESS": " "}, {"RAY_ADDRESS": "local"}):
        assert cluster_address({"RAY_TMPDIR": str(tmp_path), **address}) is None


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        ("http://127.0.0.1:8265", "make submit ADDRESS=http://127.0.0.1:8265"),
        ("https://head.example", "make submit ADDRESS=https://head.example"),
        ("ray://127.0.0.1:10001", "Ray Client"),
        ("localhost", "HOST:PORT"),
        (":6379", "HOST:PORT"),
        ("head:0", "HOST:PORT"),
        ("head:99999", "HOST:PORT"),
        ("head:６３７９", "HOST:PORT"),
        ("auto", "ray start --head"),
    ],
)
def test_an_invalid_address_is_refused_with_advice(address: str, advice: str, tmp_path: Path) -> None:
    with pytest.raises(SavantError) as refused:
        cluster_address({"RAY_TMPDIR": str(tmp_path), "RAY_ADDRESS": address})
    assert f"RAY_ADDRESS={address}" in str(refused.value) and advice in str(refused.value)


def test_host_and_port_are_parsed_from_rays_formats() -> None:
    assert split_address("10.0.0.1:6379") == ("10.0.0.1", 6379)
    assert split_address("[2001:db8::1]:6379") == ("2001:db8::1", 6379)
    assert cluster_address({"RAY_ADDRESS": " head:6379 "}) == ClusterAddress("head:6379", "RAY_ADDRESS")


def test_an_address_where_no_head_answers_is_refused_with_its_origin_and_the_reason(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_address, "CONNECT_SECONDS", 0.5)
    with listening() as silent, web_server() as web, grpc_server() as other:
        reasons = {
            f"127.0.0.1:{free_port()}": "nothing listens there",
            "no-such-host.invalid:6379": "the name no-such-host.invalid cannot be resolved",
            silent: "no answer",
            web: "a web server listens there, such as Ray's dashboard",
            other: "the server there is not a Ray head",
        }
        for address, reason in reasons.items():
            with pytest.raises(SavantError) as refused:
                check_cluster_answers(ClusterAddress(address, "RAY_ADDRESS"))
            message = str(refused.value)
            assert address in message and "from RAY_ADDRESS" in message and reason in message and "unset it" in message
    assert capfd.readouterr().err == "", "the message is all there is"


def test_a_missing_token_is_reported_with_where_to_get_one(tmp_path: Path) -> None:
    program = """
import sys
from savant_ray.cluster.ray_address import ClusterAddress, check_cluster_answers
from savant_ray.errors import SavantError
import ray
try:
    check_cluster_answers(ClusterAddress(sys.argv[1], "RAY_ADDRESS"))
except SavantError as error:
    print(error)
"""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with grpc_server() as address:
        done = subprocess.run(
            [sys.executable, "-c", program, address],
            env=variables | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"},
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"no token for the cluster at {address} (from RAY_ADDRESS)" in done.stdout and "auth_token" in done.stdout


def test_an_address_file_left_by_a_crashed_cluster_does_not_prevent_a_local_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ray/ray_current_cluster"
    file.parent.mkdir()
    file.write_text(f"127.0.0.1:{free_port()}\n")
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    cluster = prepare_environment()
    assert (
        cluster is not None
        and cluster.optional
        and cluster.origin == str(file)
        and unreachable_reason(cluster.host_port)
    )
    assert os.environ["RAY_AUTH_MODE"] == "disabled"

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    cluster = cluster_address()
    assert cluster is not None and not cluster.optional
    with pytest.raises(SavantError, match=f"from {file}.* nothing listens there"):
        check_cluster_answers(cluster)


def test_a_signal_while_a_cluster_that_may_be_gone_is_asked_ends_the_run(tmp_path: Path) -> None:
    file = tmp_path / "ray/ray_current_cluster"
    file.parent.mkdir()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        file.write_text(f"127.0.0.1:{listener.getsockname()[1]}\n")
        command = [sys.executable, str(ROOT / "jobs/train.py"), *options()]
        run = start_program(command, tmp_path, environment(RAY_TMPDIR=str(tmp_path)))
        with listener.accept()[0]:  # never responds
            run.send_signal(signal.SIGTERM)
            printed, _ = run.communicate(timeout=600)
    assert (run.returncode, printed) == (75, "stopped before the run was opened\n")


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe"])
def test_an_address_file_without_an_address_names_no_cluster(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_bytes(content)
    assert cluster_address({"RAY_TMPDIR": str(tmp_path)}) is None


@pytest.mark.parametrize("tmpdir", ["/nonexistent/tmp", "relative", "/dev/null", "long", "/tmp/été"])
def test_an_unusable_tmpdir_is_replaced_with_a_notice(tmpdir: str, tmp_path: Path) -> None:
    if tmpdir == "long":
        tmpdir = str(tmp_path / ("x" * 100))
        Path(tmpdir).mkdir()
    environment, messages = {"TMPDIR": tmpdir}, list[str]()
    choose_temp_folder(messages.append, environment)
    assert environment["RAY_TMPDIR"] == "/tmp"
    assert len(messages) == 1 and f"TMPDIR={tmpdir}" in messages[0]
    assert not Path("/nonexistent").exists()


def test_a_usable_folder_for_rays_files_is_used(tmp_path: Path) -> None:
    short = f"/tmp/savant-{os.getpid()}"
    for variables in ({}, {"TMPDIR": "/tmp"}, {"RAY_TMPDIR": short, "TMPDIR": "/nonexistent"}):
        environment = dict(variables)
        choose_temp_folder(pytest.fail, environment)
        assert environment["RAY_TMPDIR"] == variables.get("RAY_TMPDIR", "/tmp")
    Path(short).rmdir()


def test_an_unusable_ray_tmpdir_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (f"/tmp/{'x' * 100}", "relative", "/tmp/été", str(tmp_path / "file"), str(tmp_path / "file/below")):
        with pytest.raises(SavantError, match="RAY_TMPDIR=.*set RAY_TMPDIR to a folder of your own"):
            choose_temp_folder(pytest.fail, {"RAY_TMPDIR": folder})


@pytest.mark.parametrize("chosen", [{}, {"RAY_TMPDIR": "/tmp"}])
def test_a_tmpdir_that_is_too_long_for_any_socket_is_replaced_for_rays_processes(
    chosen: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    environment = {"TMPDIR": str(folder), **chosen}
    choose_temp_folder(lambda _: None, environment)
    assert environment["TMPDIR"] == environment["RAY_TMPDIR"] == "/tmp"


def test_a_full_disk_is_reported_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(SavantError, match="/tmp has only 1.0 MB free; set RAY_TMPDIR"):
        choose_temp_folder(lambda _: None, {})


def test_only_paths_beyond_the_limit_of_sockets_are_too_long() -> None:
    assert "too long" not in unusable_reason("/" + "e" * 37)
    assert "too long" in unusable_reason("/" + "e" * 40)


@pytest.mark.parametrize(
    "error",
    [
        Exception("The current node timed out during startup. This could happen because the GCS is overloaded."),
        PermissionError(13, "Permission denied", "/tmp/ray/session_latest"),
        RuntimeError("Version mismatch: The cluster was started with Ray: 2.0"),
        AssertionError(),
    ],
)
def test_any_error_of_rays_start_becomes_a_savant_error(error: Exception) -> None:
    for cluster, where in ((None, "started on this machine"), (ClusterAddress("h:1", "RAY_ADDRESS"), "reached at h:1")):
        with pytest.raises(SavantError) as raised, start_errors_explained(cluster):
            raise error
        assert where in str(raised.value) and (str(error) or "AssertionError") in str(raised.value)
        assert (cluster is not None) == ("RAY_ADDRESS=local" in str(raised.value))  # it may be another user's cluster


def test_sigterm_during_rays_start_becomes_keyboard_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt), start_errors_explained(None):
        sys.exit(signal.SIGTERM)


def test_sigterm_between_rays_start_and_our_own_handler_becomes_keyboard_interrupt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(ray, "init", lambda *_, **__: SimpleNamespace(dashboard_url=""))
    with pytest.raises(KeyboardInterrupt), ray_session():
        sys.exit(signal.SIGTERM)  # as Ray's handler does


@pytest.mark.parametrize(("allowed", "detected", "used"), [({3}, 64, 1), ({0, 1}, 2, 2), ({0, 1}, 0, 1)])
def test_ray_gets_the_cores_that_this_process_may_use(
    allowed: set[int], detected: int, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: dict[str, Any] = {}
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)  # as Slurm and taskset set it
    monkeypatch.setattr(session, "detected_cores", lambda: detected)
    monkeypatch.setattr(ray, "init", lambda *_, **options: started.update(options) or SimpleNamespace(dashboard_url=""))
    with ray_session():
        assert started["num_cpus"] == used


def test_neither_uv_run_nor_a_disabled_train_v2_changes_how_workers_start(tmp_path: Path) -> None:
    program = """
from savant_ray.cluster.session import prepare_environment
prepare_environment()
import ray.train  # RAY_TRAIN_V2_ENABLED=0 would make it the trainer of Ray Train v1
from ray._private.worker import _maybe_modify_runtime_env
print(_maybe_modify_runtime_env(None, False), ray.train.UserCallback.__name__)
"""
    (tmp_path / "run").write_text(
        '"$PYTHON" -c "$PROGRAM"; exit $?'
    )  # the second argument of the process, as of `uv run`
    variables = {"PYTHON": sys.executable, "PROGRAM": program, "RAY_ADDRESS": "local", "RAY_TRAIN_V2_ENABLED": "0"}
    result = subprocess.run(
        ["uv", "run"],
        executable="/bin/sh",
        cwd=tmp_path,
        env={**environment(), **variables},
        check=True,
        capture_output=True,
        text=True,
    )
    assert result.stdout == "None UserCallback\n"


def test_only_processes_started_with_notices_blocked_survive_sighup_and_sigusr1() -> None:
    program = """
import os, signal, subprocess
from savant_ray.cluster.session import block_notices
with block_notices():
    inside = subprocess.Popen(["sleep", "60"])
for number in (signal.SIGHUP, signal.SIGUSR1):
    outside = subprocess.Popen(["sleep", "60"])
    for child in (inside, outside):
        os.kill(child.pid, number)
    outside.wait()
    print(inside.poll(), outside.returncode)
inside.kill()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert done.stdout == f"None {-signal.SIGHUP}\nNone {-signal.SIGUSR1}\n", done.stderr


def test_a_head_whose_response_arrives_in_two_parts_is_recognized() -> None:
    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            for part in (b"\0\0\0\4", b"\0\0\0\0\0"):
                connection.sendall(part)
                time.sleep(0.1)

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        assert unreachable_reason(f"127.0.0.1:{listener.getsockname()[1]}") == ""
