"""`savant_ray.train`: training as a function call, for scripts and notebooks.

Training runs in a child process, for three reasons: Ray Train can be stopped only by ending its process, Ray exits the
driver's process when the head node dies, and signal handlers can be installed only in a main thread.
"""

from __future__ import annotations

import codecs
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from savant_ray.config import Config, load_config
from savant_ray.errors import (
    SavantError,
    SettingsError,
    TrainingError,
    UnexpectedError,
    error_class,
    explain,
    report_thread_error,
)
from savant_ray.settings.files import settings_file
from savant_ray.streams import open_standard_streams

POLL_SECONDS = 0.5
BLOCK_BYTES = 1 << 16
# Sent to the child if the caller requests a stop, and if the caller ends or an exception interrupts it. Unlike a second
# SIGTERM, a SIGUSR1 after a SIGTERM does not end a run before it has saved.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
CHILD_CODE = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing to save before the driver installs its handler
sys.path[:] = {path!r}
from savant_ray.api import run_child
run_child({descriptor})
"""


@dataclass(frozen=True)
class Result:
    """State of a run after a call of `train` that raised no error."""

    run_folder: str
    """Folder or URI of the run."""
    checkpoint: str | None
    """Folder or URI of its newest checkpoint, None if it has none yet."""
    step: int
    """Optimizer steps done over all attempts."""
    finished: bool
    """Whether `training.max_steps` is reached; False if the run was stopped (SIGTERM, a drained node) and saved."""
    metrics: dict[str, float]
    """Latest `train_loss`, `validation_loss` (nats per token), `best_validation_loss`, `tokens_per_second`."""


def train(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    fresh: bool = False,
    allow_changes: bool = False,
    verbose: bool = False,
    stop_requested: Callable[[], bool] | None = None,
) -> Result:
    """Start or resume a run and return its state when it has ended.

    `config` is a `Config`, nested settings such as `{"training": {"max_steps": 100}}`, the path of a YAML file, or the name
    of a shipped one such as `"quickstart"`; SAVANT_… environment variables are ignored. `fresh` starts a new run and renames
    an existing one of that name, `allow_changes` resumes although settings or data differ from the checkpoint, `verbose`
    prints the output of Ray.

    If the caller is connected to a Ray cluster, training runs in that cluster, otherwise in the one that RAY_ADDRESS names
    or that `ray start` started on this machine. If there is none, a local Ray is started and shut down.

    `stop_requested` is called about twice a second in a thread; when it has returned True, the run is saved and stopped. An
    error that it raises also saves and stops the run, and is then raised by `train`.

    Progress is printed to `sys.stdout`. The call blocks and works in any thread; in an asyncio program use
    `await asyncio.to_thread(savant_ray.train, config)`. If the caller's process dies, the run saves a checkpoint and stops.

    Raises:
        SavantError: with a message for the user; see `savant_ray.errors` for its subclasses.
        KeyboardInterrupt: after Ctrl+C in the main thread. A run that trains is saved first, unless Ctrl+C is pressed again.
    """
    settings = _config(config).to_dict()
    options = {"fresh": fresh, "allow_changes": allow_changes, "verbose": verbose}
    connection, child_connection = socket.socketpair()
    with connection:
        with child_connection:
            child = _start_child(child_connection)
        stop_errors: list[BaseException] = []  # raised by `stop_requested`
        if stop_requested is not None:
            arguments = (child, stop_requested, stop_errors)
            threading.Thread(target=_stop_on_request, args=arguments, daemon=True).start()
        with suppress(ConnectionError):  # the child has exited already
            connection.sendall(json.dumps({"settings": settings, "options": options}).encode() + b"\n")
        interrupted, response = _wait(child, connection)
    try:
        if not response and not interrupted:
            raise TrainingError(
                f"the training process exited without a result ({_exit_reason(child.returncode)}); "
                "run it again to resume from the last checkpoint"
            )
        result = _parse_response(json.loads(response)) if response else None
    finally:
        if stop_errors:
            raise stop_errors[0]  # with an error of the training as its context
    if result is None or interrupted:
        raise KeyboardInterrupt
    return result


def run_child(descriptor: int) -> NoReturn:
    """Run in the child process: receive settings and options over the socket, train, send the result, and exit."""
    open_standard_streams().tolerant = True
    threading.excepthook = report_thread_error
    with socket.socket(fileno=descriptor) as caller:
        line = caller.makefile("rb").readline()
        if not line:  # the caller was interrupted before it sent the settings
            sys.exit(1)
        request = json.loads(line)
        threading.Thread(target=_stop_when_caller_exits, args=(caller,), name="caller-watch", daemon=True).start()
        code, response = _train(request["settings"], request["options"])
        with suppress(OSError):
            caller.sendall(json.dumps(response).encode())
            caller.shutdown(socket.SHUT_WR)
        from savant_ray.cluster.session import exit_without_shutdown

        sys.exit(exit_without_shutdown(code))


def _config(config: Config | Mapping[str, Any] | str | Path) -> Config:
    if isinstance(config, Config):  # `model_copy` may have put values into it that are not validated
        return Config.from_dict(config.to_dict())
    if not isinstance(config, Mapping):
        return load_config((), {}, settings_file(Path(config)))
    try:
        settings = json.loads(json.dumps(config, default=_to_json_value))
    except (TypeError, ValueError) as error:
        raise SettingsError(f"config: contains a value that is not a setting: {error}") from error
    return Config.from_dict(settings)


def _to_json_value(value: object) -> object:
    """Convert a mapping to a dict and a path to a string; `json.dumps` calls it for values that it cannot serialize."""
    return dict(value) if isinstance(value, Mapping) else os.fspath(value)  # type: ignore[call-overload]


def _start_child(connection: socket.socket) -> subprocess.Popen[bytes]:
    """Start the child process in its own session, so that Ctrl+C reaches only the caller, which forwards it."""
    replaced = sys.stdout is not sys.__stdout__ or sys.__stdout__ is None  # by a notebook, or redirect_stdout
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if replaced else {}
    path = [entry for entry in sys.path if isinstance(entry, str)]  # Python ignores others, such as a `Path`
    # The child inherits this: a stop request is delayed until `_train` can return a result.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        return subprocess.Popen(
            [sys.executable or "", "-c", CHILD_CODE.format(path=path, descriptor=connection.fileno())],
            env=os.environ | _ray_address(),
            stdin=subprocess.DEVNULL,
            pass_fds=[connection.fileno()],
            start_new_session=True,
            **streams,
        )
    except OSError as error:
        reason = error.strerror or error
        raise TrainingError(f"the training process cannot be started: {sys.executable}: {reason}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _ray_address() -> dict[str, str]:
    """Return the address of the Ray cluster to which the caller is connected, as an environment variable."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return {}
    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


def _stop_on_request(
    child: subprocess.Popen[bytes], stop_requested: Callable[[], bool], errors: list[BaseException]
) -> None:
    """Send SIGTERM to the child once a stop is requested or `stop_requested` raises an error; add the error to `errors`."""
    while child.poll() is None:
        try:
            is_requested = stop_requested()
        except BaseException as error:
            errors.append(error)
            is_requested = True
        if is_requested:
            child.terminate()
            return
        time.sleep(POLL_SECONDS)


def _wait(child: subprocess.Popen[bytes], connection: socket.socket) -> tuple[bool, bytes]:
    """Forward the child's output and Ctrl+C until it has exited; return whether Ctrl+C was pressed, and its response.

    The response is read meanwhile: a child whose response does not fit into the socket's buffer waits for its reader.
    """
    interrupted = False
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    response: list[bytes] = []
    reader = threading.Thread(target=_receive, args=(connection, response), daemon=True)
    try:
        reader.start()
        while True:
            try:
                _forward_output(child, decoder)
                child.wait()
                reader.join()
            except KeyboardInterrupt:
                interrupted = True
                child.send_signal(signal.SIGINT)
            else:
                return interrupted, b"".join(response)
    finally:  # also after an exception that a signal handler of the caller raised
        if child.poll() is None:
            child.send_signal(signal.SIGUSR1)
            _forward_output(child, decoder)  # otherwise it may wait for room in the pipe
            child.wait()
        if child.stdout is not None:
            child.stdout.close()


def _receive(connection: socket.socket, response: list[bytes]) -> None:
    """Add what the child sends to `response` until it closes its end of the socket."""
    with suppress(OSError):  # such as EBADF, after an exception in the caller
        while block := connection.recv(BLOCK_BYTES):
            response.append(block)


def _forward_output(child: subprocess.Popen[bytes], decoder: codecs.IncrementalDecoder) -> None:
    """Forward the output until the child has exited, even if one of its child processes keeps the pipe open."""
    if child.stdout is None:
        return
    output = select.poll()
    output.register(child.stdout, select.POLLIN)
    while True:
        exited = child.poll() is not None
        if output.poll(0 if exited else 1000 * POLL_SECONDS):
            block = os.read(child.stdout.fileno(), BLOCK_BYTES)
            with suppress(OSError, ValueError, AttributeError):  # the caller's stdout may be closed or full
                sys.stdout.write(decoder.decode(block))
                sys.stdout.flush()
            if not block:
                return
        elif exited:
            return


def _exit_reason(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _parse_response(response: dict[str, Any]) -> Result:
    """Return the result, or raise the error, that the child process has sent."""
    if "error" not in response:
        return Result(**response)
    if response["error"] == UnexpectedError.__name__:
        raise UnexpectedError(response["text"], response["details"], is_explained=True)
    raise error_class(response["error"], SavantError)(response["text"])


def _stop_when_caller_exits(caller: socket.socket) -> None:
    """Stop the run when the caller's process has exited, which closes its end of the socket."""
    with suppress(OSError):
        caller.recv(1)
    os.kill(os.getpid(), signal.SIGUSR1)


def _train(settings: dict[str, Any], options: dict[str, bool]) -> tuple[int, dict[str, Any]]:
    """Train, and return the exit code and the response for the caller."""
    from savant_ray.cluster.session import ExitWithoutShutdown
    from savant_ray.driver import resolve_paths, train

    config, error, code = Config.from_validated(settings), None, 0
    try:
        config = resolve_paths(config)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.default_int_handler)  # until the driver installs its handlers
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        code = train(config, **options)
    except ExitWithoutShutdown as end:
        code, error = end.code, end.error
    except KeyboardInterrupt:  # Ctrl+C or SIGTERM just before or after `train`, which handles them itself
        code = SavantError.exit_code
    except Exception as unexpected:
        error = unexpected
    if error is None:
        return code, asdict(_result(config, finished=code == 0))
    explained = explain(error)
    details = explained.details if isinstance(explained, UnexpectedError) else ""
    return explained.exit_code, {"error": type(explained).__name__, "text": str(explained), "details": details}


def _result(config: Config, finished: bool) -> Result:
    """Return the state of the run from its storage and its record."""
    from savant_ray.reporting.record import METRICS
    from savant_ray.reporting.runs import summarize
    from savant_ray.storage.lock import is_in_use
    from savant_ray.storage.protocol import newest_checkpoint_name
    from savant_ray.storage.run_storage import run_storage

    storage = run_storage(config)
    newest = None
    with suppress(OSError):
        newest = newest_checkpoint_name(storage)
    checkpoint = storage.locate(newest) if newest else None
    if not (storage.folder / METRICS).exists():  # stopped before the first event
        return Result(storage.location, checkpoint, 0, finished, {})
    run = summarize(storage.folder, is_in_use)
    names = ("train_loss", "validation_loss", "best_validation_loss", "tokens_per_second")
    metrics = {name: value for name in names if (value := getattr(run, name)) is not None}
    return Result(storage.location, checkpoint, run.step, finished, metrics)
