"""Settings files by path, and by the name of a file that is shipped with the package."""

from __future__ import annotations

import difflib
from contextlib import suppress
from pathlib import Path

SUFFIX = ".yaml"


def shipped_folder() -> Path:
    """Return the folder of the shipped files: `configs/` of the checkout, or its copy in the installed package."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def shipped_files() -> dict[str, Path]:
    """Return the path of each shipped file by its name, such as `quickstart`."""
    return {path.stem: path for path in sorted(shipped_folder().glob(f"*{SUFFIX}"))}


def settings_file(path: Path) -> Path:
    """Return the file that a path or name means; whether it exists is not checked.

    A name without a folder and a suffix means the file of that name or `NAME.yaml` in the working directory, otherwise the
    shipped file of that name.
    """
    if not _is_name(path):
        return path
    local = (path, path.with_name(f"{path.name}{SUFFIX}"))
    return next((file for file in local if _is_file(file)), shipped_files().get(path.name, path))


def shadowed_file(path: Path) -> Path | None:
    """Return the shipped file that is not used because the working directory has a file of the same name, or None."""
    used, shipped = settings_file(path), shipped_files().get(path.name)
    if shipped is None or not _is_name(path) or used == shipped or used.samefile(shipped):
        return None
    return shipped


def suggestion(path: Path) -> str:
    """Return `; did you mean …?` for a file that does not exist, or which files are shipped if that was a name."""
    shipped = shipped_files()
    close = difflib.get_close_matches(path.stem, shipped, n=1, cutoff=0.75)
    if close:
        return f"; did you mean --config {close[0]}, which is shipped with savant-ray?"
    return f"; the shipped files are {', '.join(shipped)}" if _is_name(path) else ""


def _is_name(path: Path) -> bool:
    """Return whether the path is only a name, without a folder and a suffix."""
    return path.name == str(path) and bool(path.name) and not path.suffix


def _is_file(path: Path) -> bool:
    with suppress(OSError):  # raised for a name that is too long, and for a folder that may not be searched
        return path.is_file()
    return False
