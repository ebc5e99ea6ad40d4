"""Build hook of MkDocs: a page that git does not track is not part of the site, and notebooks are pages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File

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
        elif is_ours and file.src_uri.endswith(".ipynb"):
            page = NotebookPage(file.src_uri, file.src_dir, file.dest_dir, file.use_directory_urls)
            page.content_string = markdown(json.loads(file.content_string))
            files.remove(file)
            files.append(page)
    return files


class NotebookPage(File):
    """A notebook that is a page of the site; links and the navigation name the notebook."""

    def is_documentation_page(self) -> bool:
        """Return True, because the content is Markdown."""
        return True


def markdown(notebook: dict[str, Any]) -> str:
    """Return the cells of a notebook, and what they printed, as Markdown."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        parts += [f"```text\n{''.join(output['text']).rstrip()}\n```" for output in cell.get("outputs", [])]
    return "\n\n".join(parts)
