"""`savant_ray.train`: training as a function call, for scripts and notebooks.

Training runs in a process of its own. Ray Train can be stopped only by ending the process that drives it, Ray ends its
driver when the head dies, and a signal handler belongs to a main thread: none of this may happen to the caller.
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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from savant_ray.config import Config, load_config
from savant_ray.errors import SavantError, SettingsError, TrainingError, UnexpectedError, explain, warn_of_thread
from savant_ray.streams import open_standard_streams

POLL_SECONDS = 0.5
BLOCK_BYTES = 1 << 16
LONGEST_DETAILS = 50_000  # characters of a traceback; the message has to fit into a socket's buffer
CHILD = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the driver takes it over there is nothing to save
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
) -> Result:
    """Start or resume a run and return its state when it has ended.

    `config` is a `Config`, nested settings such as `{"training": {"max_steps": 100}}`, or a YAML file; SAVANT_…
    environment variables are ignored. `fresh` first moves an older run of that name aside,
    `allow_changes` resumes with other settings or data than the checkpoint's, `verbose` prints the output of Ray.

    If the caller is connected to a Ray cluster, training runs there and leaves it running; otherwise a local Ray is
    started and ended. Progress is printed to `sys.stdout`. The call blocks and works in any thread; in an asyncio
    program use `await asyncio.to_thread(savant_ray.train, config)`. If the caller's process dies, the step is saved.

    Raises:
        SavantError: with a message for the user; see `savant_ray.errors` for its subclasses.
        KeyboardInterrupt: after Ctrl+C in the main thread, once the step is saved; a second Ctrl+C exits immediately.
    """
    settings = _config(config).to_dict()
    options = {"fresh": fresh, "allow_changes": allow_changes, "verbose": verbose}
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            child = _start_child(theirs)
        with suppress(ConnectionError):  # it has ended already
            ours.sendall(json.dumps({"settings": settings, "options": options}).encode() + b"\n")
        interrupted, answer = _wait(child), b""
        with suppress(ConnectionError):
            answer = ours.makefile("rb").read()
    if not answer and not interrupted:
        raise TrainingError(
            f"the training process ended without a word ({_ended_by(child.returncode)}); "
            "run it again to go on from the last checkpoint"
        )
    result = _result(json.loads(answer)) if answer else None
    if result is None or interrupted:
        raise KeyboardInterrupt
    return result


def run_child(descriptor: int) -> NoReturn:
    """In the child process: train what the caller sends over the socket, send the result back, and exit."""
    open_standard_streams().tolerant = True
    threading.excepthook = warn_of_thread
    with socket.socket(fileno=descriptor) as caller:
        line = caller.makefile("rb").readline()
        if not line:  # interrupted before it had said what to do
            sys.exit(1)
        order = json.loads(line)
        threading.Thread(target=_stop_when_gone, args=(caller,), name="caller-watch", daemon=True).start()
        code, answer = _train(order["settings"], order["options"])
        with suppress(OSError):
            caller.sendall(json.dumps(answer).encode())
            caller.shutdown(socket.SHUT_WR)
        from savant_ray.cluster.session import exit_without_shutdown

        sys.exit(exit_without_shutdown(code))


def _config(config: Config | Mapping[str, Any] | str | Path) -> Config:
    if isinstance(config, Config):
        return config
    if not isinstance(config, Mapping):
        return load_config((), {}, Path(config))
    try:
        settings = json.loads(json.dumps(config, default=_plain))
    except (TypeError, ValueError) as error:
        raise SettingsError(f"config: holds something that is no setting: {error}") from error
    return Config.from_dict(settings)


def _plain(value: object) -> object:
    """A mapping of any kind as a dict, a Path as its text."""
    return dict(value) if isinstance(value, Mapping) else os.fspath(value)  # type: ignore[call-overload]


def _start_child(theirs: socket.socket) -> subprocess.Popen[bytes]:
    """A session of its own: Ctrl+C reaches only the caller, who passes it on."""
    replaced = sys.stdout is not sys.__stdout__ or sys.__stdout__ is None  # by a notebook, or redirect_stdout
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if replaced else {}
    try:
        return subprocess.Popen(
            [sys.executable or "", "-c", CHILD.format(path=sys.path, descriptor=theirs.fileno())],
            env=os.environ | _cluster_of_caller(),
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            **streams,
        )
    except OSError as error:
        reason = error.strerror or error
        raise TrainingError(f"the training process cannot be started: {sys.executable}: {reason}") from error


def _cluster_of_caller() -> dict[str, str]:
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return {}
    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


def _wait(child: subprocess.Popen[bytes]) -> bool:
    """Pass on the child's output, and Ctrl+C, until it has ended; return whether there was a Ctrl+C."""
    interrupted = False
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    try:
        while True:
            try:
                _pass_on_output(child, decoder)
                child.wait()
            except KeyboardInterrupt:
                interrupted = True
                child.send_signal(signal.SIGINT)
            else:
                return interrupted
    finally:  # by another exception, of a signal handler of the caller's
        if child.poll() is None:
            child.terminate()
            child.wait()
        if child.stdout is not None:
            child.stdout.close()


def _pass_on_output(child: subprocess.Popen[bytes], decoder: codecs.IncrementalDecoder) -> None:
    """Until the child has ended, even if a process that it left behind keeps the pipe open."""
    if child.stdout is None:
        return
    while True:
        ended = child.poll() is not None
        if select.select([child.stdout], [], [], 0 if ended else POLL_SECONDS)[0]:
            block = os.read(child.stdout.fileno(), BLOCK_BYTES)
            with suppress(OSError, ValueError, AttributeError):  # the caller's stdout may be closed or full
                sys.stdout.write(decoder.decode(block))
                sys.stdout.flush()
            if not block:
                return
        elif ended:
            return


def _ended_by(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _result(answer: dict[str, Any]) -> Result:
    if "error" not in answer:
        return Result(**answer)
    kinds = {kind.__name__: kind for kind in SavantError.__subclasses__()}
    if answer["error"] == UnexpectedError.__name__:
        raise UnexpectedError(answer["text"], answer["details"], is_kept=True)
    raise kinds.get(answer["error"], SavantError)(answer["text"])


def _stop_when_gone(caller: socket.socket) -> None:
    """Stop the run as SIGTERM does when the caller's process has died, which closes its end of the socket."""
    with suppress(OSError):
        caller.recv(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _train(settings: dict[str, Any], options: dict[str, bool]) -> tuple[int, dict[str, Any]]:
    """Exit code and answer."""
    from savant_ray.cluster.session import Leave
    from savant_ray.driver import resolve_paths, train

    config, error, code = Config.from_dict(settings), None, 0
    try:
        config = resolve_paths(config)
        code = train(config, **options)
    except Leave as leave:
        code, error = leave.code, leave.error
    except KeyboardInterrupt:
        code = SavantError.exit_code
    except Exception as unexpected:
        error = unexpected
    if error is None:
        return code, asdict(_summary(config, finished=code == 0))
    explained = explain(error)
    details = explained.details[-LONGEST_DETAILS:] if isinstance(explained, UnexpectedError) else ""
    return explained.exit_code, {"error": type(explained).__name__, "text": str(explained), "details": details}


def _summary(config: Config, finished: bool) -> Result:
    from savant_ray.reporting.record import METRICS
    from savant_ray.reporting.runs import summarise
    from savant_ray.storage.lock import is_in_use
    from savant_ray.storage.run_storage import run_storage

    storage = run_storage(config)
    names: list[str] = []
    with suppress(OSError):
        names = storage.complete_steps()
    checkpoint = storage.locate(names[-1]) if names else None
    if not (storage.folder / METRICS).exists():  # stopped before anything had begun
        return Result(storage.location, checkpoint, 0, finished, {})
    run = summarise(storage.folder, is_in_use)
    named = ("train_loss", "validation_loss", "best_validation_loss", "tokens_per_second")
    metrics = {name: value for name in named if (value := getattr(run, name)) is not None}
    return Result(storage.location, checkpoint, run.step, finished, metrics)
