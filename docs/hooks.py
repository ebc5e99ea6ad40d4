"""Build hook of MkDocs: a page that git does not track is not part of the site."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Remove pages and images that git does not track, so that strict checks apply only to tracked ones."""
    script = [sys.executable, "-P", str(ROOT / "tests/tracked_files.py"), "docs/*"]
    tracked = set(subprocess.run(script, capture_output=True, check=True).stdout.decode().split("\0"))
    for file in list(files):
        is_ours = file.src_dir == config.docs_dir  # and not the theme's
        if is_ours and f"docs/{file.src_uri}" not in tracked:
            files.remove(file)
    return files
