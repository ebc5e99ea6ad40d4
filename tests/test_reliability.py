"""docs/RELIABILITY.md claims nothing that no test holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs/RELIABILITY.md"
ROWS = [line.strip("|").split(" | ") for line in PAGE.read_text().splitlines() if re.match(r"\|(?! fault |-)", line)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip()[:60])
def test_each_row_names_tests_that_exist(row: list[str]) -> None:
    assert len(row) == 4 and all(cell.strip() for cell in row)
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row[3])
    assert named, "no test"
    for file, name in named:
        assert re.search(rf"^def {name}\(", (TESTS / file).read_text(), re.MULTILINE), f"{file} has no {name}"
