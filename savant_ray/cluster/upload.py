"""Warns of a large upload by `ray job submit --working-dir .`: python -m savant_ray.cluster.upload jobs/runtime_env.yaml

`make submit` runs it first. Ray uploads every file that neither git nor `excludes` ignores, warns above 256 MiB, and refuses
512 MiB or more.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ray.dashboard.modules.dashboard_sdk import parse_runtime_env_args

from savant_ray.ray_internals import walk_working_directory

WARN_BYTES = 50_000_000
LISTED_FOLDERS = 5


def files_to_send(folder: Path, excludes: Sequence[str]) -> dict[Path, int]:
    """Return the files that Ray would pack, relative to `folder`, with their sizes in bytes."""
    sizes: dict[Path, int] = {}

    def add(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(folder)] = path.stat().st_size

    walk_working_directory(folder, excludes, add)
    return sizes


def size_warning(sizes: dict[Path, int]) -> str:
    """Return a warning with the largest folders, "" if the upload is small enough."""
    total = sum(sizes.values())
    if total < WARN_BYTES:
        return ""
    by_folder: dict[str, int] = {}
    for path, size in sizes.items():
        name = "/".join(path.parts[:2])
        by_folder[name] = by_folder.get(name, 0) + size
    largest = sorted(by_folder.items(), key=lambda item: -item[1])[:LISTED_FOLDERS]
    listed = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in largest)
    return (
        f"warning: {total / 1e6:,.0f} MB of this folder are uploaded with the job ({listed}). A job needs the code and its "
        "configuration only: list what it does not need in jobs/runtime_env.yaml under excludes"
    )


def main(runtime_env: str) -> None:
    """Print the warning for the current folder, if any; `runtime_env` is the path of a YAML file."""
    excludes = parse_runtime_env_args(runtime_env=runtime_env).get("excludes", [])
    if warning := size_warning(files_to_send(Path.cwd(), excludes)):
        print(warning, file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
