"""Chooses the folder in which a Ray that is started on this machine keeps its sockets and logs.

Ray uses RAY_TMPDIR, else TMPDIR, and fails if a path below it is too long for a Unix socket, as with the TMPDIR that some
schedulers set for each job.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path

from savant_ray.errors import SavantError

VARIABLE = "RAY_TMPDIR"
DEFAULT = "/tmp"  # noqa: S108 - Ray's own default
SOCKET_PATH_BYTES = 107  # the longest path of a Unix socket on Linux
RAY_SOCKET = "/ray/session_2026-01-31_23-59-59_123456_4194304/sockets/plasma_store"  # the longest that Ray creates
PYTHON_SOCKET = "/pymp-abcdefgh/listener-abcdefgh"  # of multiprocessing's fork server
MIN_FREE_BYTES = 32 << 20  # for Ray's first logs; on a full disk Ray fails after a timeout without a reason


def ray_temp_folder(environment: Mapping[str, str] = os.environ) -> str:
    """Return the folder below which a Ray started here keeps its sockets and logs."""
    return environment.get(VARIABLE) or environment.get("TMPDIR") or DEFAULT


def choose_temp_folder(notify: Callable[[str], None], environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RAY_TMPDIR to a folder in which Ray can start: RAY_TMPDIR, else TMPDIR, else /tmp.

    If TMPDIR is not usable, /tmp is chosen, and `notify` prints why. A TMPDIR that is too long for the sockets of Python's
    own multiprocessing is replaced for this process and its children.

    Raises:
        SavantError: RAY_TMPDIR, or /tmp, is not usable.
    """
    chosen = ray_temp_folder(environment)
    reason = unusable_reason(chosen, create=bool(environment.get(VARIABLE)))
    if reason and not environment.get(VARIABLE) and chosen != DEFAULT:
        notify(f"Ray's files go to {DEFAULT}: TMPDIR={chosen} {reason} (set RAY_TMPDIR to choose another folder)")
        chosen = DEFAULT
        reason = unusable_reason(chosen)
    if reason:
        variable = "RAY_TMPDIR=" if environment.get(VARIABLE) else ""
        raise SavantError(
            f"Ray cannot start: {variable}{chosen} {reason}; set RAY_TMPDIR to a folder of your own with a short path, "
            f"such as {DEFAULT}/my-ray"
        )
    environment[VARIABLE] = chosen
    tmpdir = environment.get("TMPDIR")
    if tmpdir and len(os.fsencode(tmpdir)) + len(PYTHON_SOCKET) > SOCKET_PATH_BYTES:
        environment["TMPDIR"] = chosen  # Ray starts its dashboard through a socket in it


def unusable_reason(folder: str, create: bool = False) -> str:
    """Return why Ray cannot keep its files below the folder, "" if it can; with `create`, create a missing folder first."""
    if not Path(folder).is_absolute():
        return "is not an absolute path"
    if not folder.isascii():
        return "has characters that are not ASCII, which Ray cannot encode there"
    spare_bytes = SOCKET_PATH_BYTES - len(os.fsencode(folder)) - len(RAY_SOCKET)
    if spare_bytes < 0:
        return f"is {-spare_bytes} bytes too long for Ray's Unix sockets"
    try:
        if create:
            Path(folder).mkdir(parents=True, exist_ok=True)
        if not Path(folder).is_dir():
            return "is not a folder" if Path(folder).exists() else "does not exist"
        ray_folder = Path(folder, "ray")
        if ray_folder.exists() and not ray_folder.is_dir():
            return "has a file named ray in it"
        if not os.access(ray_folder if ray_folder.exists() else folder, os.W_OK | os.X_OK):
            return f"is not usable, because this user cannot write {ray_folder}"
        free = shutil.disk_usage(folder).free
        if free < MIN_FREE_BYTES:
            return f"has only {free / 1e6:.1f} MB free"
    except OSError as error:
        return f"cannot be used ({(error.strerror or str(error)).lower()})"
    return ""
