"""The notebook `docs/tour.ipynb`: its cells run, and the outputs stored in it are those of such a run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import environment

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs/tour.ipynb"


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def printed(cell: dict[str, Any]) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"])


def printed_by(cells: list[dict[str, Any]], code: str) -> str:
    """Return what the cell that contains this code has printed."""
    return next(printed(cell) for cell in cells if code in "".join(cell["source"]))


def kind(cell: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the types of a cell's outputs, and their first lines up to the first number or colon."""
    outputs = [(output["output_type"], output["name"], "".join(output["text"])) for output in cell["outputs"]]
    return [(output_type, name, re.split(r"[\d:\n]", text)[0]) for output_type, name, text in outputs]


def test_the_stored_outputs_are_those_of_all_cells_in_order_and_name_no_path_of_a_machine() -> None:
    cells = code_cells(NOTEBOOK)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    without_output = [cell for cell in cells if not printed(cell)]
    assert without_output == cells[:1], "only the first cell, of imports, prints nothing"
    text = "\n".join(map(printed, cells))
    assert re.findall(r"(?<![\w:/])/\w.*|site-packages|.*Error.*", text) == []


@pytest.mark.slow
@pytest.mark.rare
def test_all_cells_run_and_print_what_the_notebook_shows_except_for_figures(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    variables = {"RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-m", "docs.tour", str(tmp_path / "executed.ipynb")],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT), **variables),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    cells, stored = code_cells(tmp_path / "executed.ipynb"), code_cells(NOTEBOOK)
    assert [kind(cell) for cell in cells] == [kind(cell) for cell in stored]
    assert "finished: True" in printed_by(cells, "result.finished")
    losses = re.findall(r"^ *\d+ +([\d.]+) ", printed_by(cells, "held-out loss   problems"), re.MULTILINE)
    assert len(losses) == 4 and float(losses[-1]) < float(losses[0])
    answer = printed_by(cells, "AutoModelForCausalLM")
    assert "The answer is" in answer
    assert answer.strip() == printed_by(cells, 'savant("generate"').strip()
    assert printed_by(cells, 'savant("chat"').strip()
