"""Executes `docs/tour.ipynb` without Jupyter, and stores the outputs in it: `python -m docs.tour [OUTPUT.ipynb]`.

Needs the packages of the extra `hf`.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).with_name("tour.ipynb")


def execute(notebook: dict[str, Any]) -> None:
    """Execute all code cells in one namespace, in a temporary folder, and replace the stored outputs.

    Only what cells print to `sys.stdout` is stored, not the value of a last expression, and without paths of this machine.

    Raises:
        Exception: a cell has failed; the outputs of the previous cells are replaced.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    working_directory, temporary_folder = Path.cwd(), tempfile.tempdir
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder  # of this process only: Ray's sockets need a short path
        try:
            for number, cell in enumerate(cells, start=1):
                with redirect_stdout(io.StringIO()) as printed:
                    exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)  # noqa: S102 (our own code)
                text = without_local_paths(printed.getvalue())
                lines = text.splitlines(keepends=True)
                cell["execution_count"] = number
                cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if text else []
        finally:
            tempfile.tempdir = temporary_folder
            os.chdir(working_directory)


def without_local_paths(text: str) -> str:
    """Return an output with paths relative to the working directory, and commands as `savant …`."""
    script = Path(sys.executable).with_name("savant")
    for command in (f"{sys.executable} -m savant_ray.cli", "python -m savant_ray.cli", str(script)):
        text = text.replace(command, "savant")
    return text.replace(f"{Path.cwd()}/", "")


def main() -> None:
    """Execute the notebook and write it, to the file that is named as argument or else to the notebook itself."""
    output = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else NOTEBOOK
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    execute(notebook)
    output.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
