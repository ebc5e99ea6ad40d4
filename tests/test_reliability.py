"""Each row of docs/RELIABILITY.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs/RELIABILITY.md").read_text(encoding="utf-8")
FAULTS = [line for line in PAGE.splitlines() if re.match(r"\|(?! fault | input |-)", line)]
FOOTNOTES = dict(re.findall(r"^\[\^([\w-]+)\]: (.*)$", PAGE, re.MULTILINE))


@pytest.mark.parametrize("row", FAULTS, ids=lambda row: row[2:62])
def test_each_fault_has_an_outcome_a_loss_and_a_footnote(row: str) -> None:
    cells = [cell.strip() for cell in row.strip("|").split(" | ")]
    assert len(cells) == 3 and all(cells)
    assert re.search(r"\[\^[\w-]+\]$", cells[0])


def test_each_footnote_is_used_and_exists() -> None:
    used = re.findall(r"\[\^([\w-]+)\](?!:)", PAGE)
    assert sorted(used) == sorted(FOOTNOTES)


@pytest.mark.parametrize("name", FOOTNOTES)
def test_each_footnote_names_tests_that_exist(name: str) -> None:
    tests = re.findall(r"`([\w/]+\.py)::(test_\w+)`", FOOTNOTES[name])
    assert tests, "no test"
    for file, test in tests:
        assert re.search(rf"^def {test}\(", (TESTS / file).read_text(), re.MULTILINE), f"{file} has no {test}"
