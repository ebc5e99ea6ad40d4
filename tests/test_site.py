"""`make docs` builds the documentation as a site that needs no network, and fails for a broken link."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tracked_files import copy_tracked_files

LOADED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"((?:https?:)?//[^\"]*)\"")


def make_docs(checkout: Path) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "docs", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed"]  # never into this environment
    unreachable = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    environment = {**variables, **unreachable, "PYTHONPATH": str(checkout)}
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    if not (Path(sys.prefix) / ".installed").exists():
        pytest.skip("this environment was not made by `make install`")
    return copy_tracked_files(tmp_path / "checkout", "*")


@pytest.mark.slow
def test_the_site_is_built_from_tracked_pages_and_loads_nothing_from_other_hosts(checkout: Path) -> None:
    subprocess.run(["git", "init", "-q"], cwd=checkout, check=True)
    subprocess.run(["git", "add", "--all", "--force"], cwd=checkout, check=True)
    (checkout / "docs/notes.md").write_text("A page that is not in the navigation: [nowhere](nowhere.md)\n")
    done = make_docs(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((checkout / "site").rglob("*.html"))
    assert len(pages) > 20 and checkout / "site/notes.html" not in pages
    tour = (checkout / "site/tour.html").read_text(encoding="utf-8")
    assert '<h2 id="train">' in tour and "The answer is" in tour, "the notebook is a page, with its outputs"
    loaded = [LOADED.findall(page.read_text(encoding="utf-8")) for page in pages]
    assert sum(loaded, []) == []
    styles = [path.read_text(encoding="utf-8") for path in (checkout / "site").rglob("*.css")]
    assert [style for style in styles if re.search(r"url\([\"']?(?:https?:)?//", style)] == []


@pytest.mark.slow
def test_a_broken_link_fails_the_build_and_is_named(checkout: Path) -> None:
    with (checkout / "docs/index.md").open("a", encoding="utf-8") as page:
        page.write("\n[a page that does not exist](guides/nowhere.md) and [an anchor](LOG.md#nowhere)\n")
    done = make_docs(checkout)
    assert done.returncode != 0
    assert "guides/nowhere.md" in done.stderr and "LOG.md#nowhere" in done.stderr
