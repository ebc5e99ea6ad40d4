"""Finds the Ray cluster that RAY_ADDRESS or `ray start` names, and checks that it answers.

`ray.init()` waits for minutes for an address where nothing answers, and then raises an internal error. This module
tries the connection first: TCP, then HTTP/2, then a request to Ray's head.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from savant_ray.cluster.temp_folder import ray_temp_folder
from savant_ray.errors import SavantError
from savant_ray.ray_internals import (
    enable_token_authentication_if_token_exists,
    request_cluster_id,
    require_token_if_authentication_is_enabled,
)

VARIABLE = "RAY_ADDRESS"
CONNECT_SECONDS = 10.0
HEAD_SECONDS = 20.0
# A client's first bytes in HTTP/2, with an empty SETTINGS frame; the server answers with its own SETTINGS frame.
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
FRAME_HEADER_BYTES, SETTINGS_FRAME = 9, 4
START_OR_UNSET = (
    f"Start that cluster (`ray start --head`), set {VARIABLE} to the HOST:PORT of another one, or unset it: then this "
    "command starts Ray on this machine."
)


@dataclass(frozen=True)
class ClusterAddress:
    """The address of a cluster's head, HOST:PORT, and where it was found.

    `origin` is RAY_ADDRESS, or the path of the file that `ray start` writes. An `optional` cluster may not exist any more,
    because that file remains after a crash; then Ray is started on this machine.
    """

    host_port: str
    origin: str
    optional: bool = False


def cluster_address(environment: Mapping[str, str] = os.environ) -> ClusterAddress | None:
    """Return the cluster to connect to, or None if Ray is to be started on this machine.

    Raises:
        SavantError: RAY_ADDRESS is not of the form HOST:PORT, or it is "auto" and no cluster was started here.
    """
    value = environment.get(VARIABLE, "").strip()
    if value == "local":
        return None
    if value and value != "auto":
        _check_form(value)
        return ClusterAddress(value, VARIABLE)
    # Ray's own "auto" would connect to any Ray on this machine, also to one that another training process started.
    file, text = address_file(environment), ""
    with suppress(OSError, ValueError):
        text = file.read_text(encoding="utf-8").strip()
    if value and not text:
        raise SavantError(
            f"{VARIABLE}=auto: no Ray cluster was started on this machine by `ray start` ({file} names none).\n"
            f"{START_OR_UNSET}"
        )
    return ClusterAddress(text, str(file), optional=not value) if text else None


def address_file(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the file in which `ray start` keeps the address of this machine's cluster."""
    return Path(ray_temp_folder(environment), "ray", "ray_current_cluster")


def unreachable_reason(address: str) -> str:
    """Return why no Ray head can be at HOST:PORT, or "" if something there speaks its protocol (HTTP/2).

    If Ray uses TLS, only the TCP connection is tried.
    """
    try:
        host, port = split_address(address)
    except ValueError as error:
        return str(error)
    try:
        with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return ""
            connection.sendall(HTTP2_PREFACE)
            answer = b""
            while len(answer) < FRAME_HEADER_BYTES and (part := connection.recv(FRAME_HEADER_BYTES - len(answer))):
                answer += part
    except socket.gaierror:
        return f"the name {host} cannot be resolved"
    except ConnectionRefusedError:
        return "nothing listens there"
    except TimeoutError:
        return f"no answer within {CONNECT_SECONDS:g} s"
    except (OSError, UnicodeError) as error:
        return str(getattr(error, "strerror", None) or error).lower()
    if answer.startswith(b"HTTP/"):
        return "a web server listens there, such as Ray's dashboard; the port of a head is 6379 by default"
    if len(answer) < FRAME_HEADER_BYTES or answer[3] != SETTINGS_FRAME:
        return "the server there is not a Ray head"
    return ""


def check_cluster_answers(cluster: ClusterAddress) -> None:
    """Check that a Ray head answers; Ray must have been imported.

    Raises:
        SavantError: it does not answer, or it requires a token and this machine has none.
    """
    reason = unreachable_reason(cluster.host_port)
    if not reason:
        _check_token(cluster)
        reason = _head_rejection(cluster.host_port)
    if reason:
        raise SavantError(
            f"Ray's address {cluster.host_port} (from {cluster.origin}) cannot be used: {reason}.\n{START_OR_UNSET}"
        )


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `host:port` or `[IPv6]:port`.

    Raises:
        ValueError: it is neither.
    """
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 1 << 16:
        raise ValueError("it is not of the form HOST:PORT, such as 10.0.0.1:6379")
    return host, int(port)


def _check_form(text: str) -> None:
    """Raise SavantError if the text is not HOST:PORT, with advice for the addresses of a dashboard and of Ray Client."""
    if text.lower().startswith(("http://", "https://")):
        raise SavantError(
            f"{VARIABLE}={text} is the address of a dashboard, which is for `ray job submit`.\n"
            f"To train there, submit a job: make submit ADDRESS={text}\n"
            f"To connect from a machine of that cluster, set {VARIABLE} to its head's HOST:PORT, such as 10.0.0.1:6379; "
            "to start Ray on this machine, unset it."
        )
    if "://" in text:
        raise SavantError(
            f"{VARIABLE}={text} is an address of Ray Client, which cannot run a training job.\n"
            f"On a machine of that cluster set {VARIABLE} to its head's HOST:PORT, such as 10.0.0.1:6379; from elsewhere "
            "submit a job (make submit ADDRESS=http://HEAD:8265); to start Ray on this machine, unset it."
        )
    try:
        split_address(text)
    except ValueError as error:
        raise SavantError(f"{VARIABLE}={text}: {error}.\n{START_OR_UNSET}") from error


def _check_token(cluster: ClusterAddress) -> None:
    """Raise SavantError if authentication is enabled and there is no token; Ray's own client would end the process."""
    from ray.exceptions import AuthenticationError

    if cluster.origin != VARIABLE:  # with the variable Ray uses a token only with RAY_AUTH_MODE=token
        enable_token_authentication_if_token_exists()
    try:
        require_token_if_authentication_is_enabled()
    except AuthenticationError as error:
        raise SavantError(
            f"RAY_AUTH_MODE=token, but this machine has no token for the cluster at {cluster.host_port} (from "
            f"{cluster.origin}): {str(error).partition('. ')[0]}.\n"
            "Copy ~/.ray/auth_token from the cluster's head (docs/guides/cluster.md), or unset RAY_AUTH_MODE."
        ) from error


def _head_rejection(address: str) -> str:
    """Return why a request to the Ray head at HOST:PORT failed, or "" if it was answered."""
    reasons: list[str] = []

    def request() -> None:
        try:
            request_cluster_id(address)
            reasons.append("")
        except Exception as error:
            reasons.append(_explain(str(error)))

    thread = threading.Thread(target=request, name="request-ray-head", daemon=True)  # the call itself has no timeout
    with _standard_error_silenced():  # Ray's client writes warnings directly to the file descriptor
        thread.start()
        thread.join(HEAD_SECONDS)
    return reasons[0] if reasons else f"no answer within {HEAD_SECONDS:g} s"


@contextmanager
def _standard_error_silenced() -> Iterator[None]:
    try:
        original = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    try:
        yield
    finally:
        os.dup2(original, 2)
        os.close(original)


def _explain(error: str) -> str:
    if "authenti" in error.lower():
        return f"it refuses this machine's token ({error.strip()}); see docs/guides/cluster.md"
    return f"the server there is not a Ray head ({error.strip() or 'no reason given'})"
