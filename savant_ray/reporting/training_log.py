"""`training_log.txt`: what the console said, with the time, appended over all attempts of a run."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path


class TrainingLog:
    """Appends lines; whoever reads along sees each at once. `refusal` says why the last was lost, if it was."""

    def __init__(self, path: Path) -> None:
        self.path, self.refusal = path, ""
        again = path.exists() and path.stat().st_size > 0
        self._file = path.open("ab", buffering=0)
        if again:  # an empty line between attempts
            self._append("\n")

    def write(self, text: str) -> None:
        """The time, then the text, its further lines indented below its first; a full disk loses lines, not the run."""
        time = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        self._append(f"{time}  {text.replace(chr(10), chr(10) + ' ' * (len(time) + 2))}\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _append(self, text: str) -> None:
        try:
            self._file.write(text.encode())
            self.refusal = ""
        except OSError as error:
            self.refusal = error.strerror or str(error)
