"""Where PyTorch's compiler keeps its results: beside the tokenized text, so that the next attempt starts with them.

PyTorch's own default is a folder below the system's temporary files, which a container or a restart of the machine loses.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

FOLDER = "compiled"  # in `data.cache_dir`; may be deleted at any time
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # Inductor keeps the kernels of Triton below it
REMOTE = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "9p", "afs", "fuse")  # file systems, by prefix


def keep_compiled_code(cache_dir: Path) -> Path | None:
    """Make the compiler keep its results in `cache_dir`; call it before the first compilation.

    Several workers of a machine may use the folder at the same time: Inductor writes its files atomically.

    Returns:
        The folder, or None if PyTorch's default or the user's own setting stays: `TORCHINDUCTOR_CACHE_DIR` is set, the
        folder cannot be written, compiled code could not be run from it, it is on a file system of the network (slow for
        many small files, and shared by machines with different processors), or another user could write into it (the
        compiler executes what it finds there).
    """
    if VARIABLE in os.environ:
        return None
    folder = cache_dir / FOLDER
    try:
        no_execution = getattr(os, "ST_NOEXEC", 0)  # Linux
        if _file_system(cache_dir).startswith(REMOTE) or os.statvfs(cache_dir).f_flag & no_execution:
            return None
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
    except OSError:
        return None
    is_private = status.st_uid == os.geteuid() and not status.st_mode & 0o022
    if not is_private or not os.access(folder, os.W_OK | os.X_OK):
        return None
    os.environ[VARIABLE] = str(folder)
    return folder


def _file_system(path: Path) -> str:
    """Return the type of the file system that `path` is on, "" if it is unknown."""
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    path = path.resolve(strict=True)
    return next((mounts[folder] for folder in (path, *path.parents) if folder in mounts), "")
