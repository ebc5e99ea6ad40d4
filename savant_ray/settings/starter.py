"""The settings file that `savant init` writes: `configs/own_data.yaml` with the user's paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from savant_ray.errors import SettingsError
from savant_ray.settings.files import shipped_files
from savant_ray.settings.yaml_text import in_one_line

STARTER = "own_data"
_NAME, _PATH, _TEXT_BLOCKS = "name: checkpoints_own_data", "- path: text/*.jsonl", "# text_blocks: true"


def starter_text(run: str, texts: Sequence[str], text_blocks: bool = False) -> str:
    """Return the content of the file.

    Args:
        run: name of the run.
        texts: paths of the text; if empty, the path of the example is kept.
        text_blocks: whether blocks of lines are documents.
    """
    content = shipped_files()[STARTER].read_text(encoding="utf-8").replace(_NAME, f"name: {in_one_line(run)}", 1)
    if texts:
        content = content.replace(_PATH, f"- path: {in_one_line(texts[0] if len(texts) == 1 else list(texts))}", 1)
    return content.replace(_TEXT_BLOCKS, _TEXT_BLOCKS.removeprefix("# "), 1) if text_blocks else content


def write_new(path: Path, content: str) -> None:
    """Write a file that does not exist yet.

    Raises:
        SettingsError: it exists, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError:
        raise SettingsError(f"{path} exists already; choose another name with --output") from None
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror}") from error
