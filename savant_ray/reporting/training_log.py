"""`training_log.txt`: what the console said, with the time, appended over all attempts of a run."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path


class TrainingLog:
    """Appends lines; whoever reads along sees each at once."""

    def __init__(self, path: Path) -> None:
        again = path.exists() and path.stat().st_size > 0
        self._file = path.open("a", encoding="utf-8")
        if again:  # an empty line between attempts
            self._file.write("\n")

    def write(self, text: str) -> None:
        """The time, then the text, its further lines indented below its first."""
        time = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        self._file.write(f"{time}  {text.replace(chr(10), chr(10) + ' ' * (len(time) + 2))}\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
