"""Finds the files of a source or of the validation text, and downloads those of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from savant_ray.config import HeldOutConfig, SourceConfig
from savant_ray.data.sources import HUB_SCHEME, SourceFile, expand


def find_files(
    settings: SourceConfig | HeldOutConfig,
    cache_dir: str | Path,
    notify: Callable[[str], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[SourceFile]:
    """Return the files that the path of these settings refers to.

    A data set of the Hub is downloaded into `cache_dir` if it is not there yet; `progress` receives the bytes of it that are
    there and the total. `notify` receives the messages of `expand` about files that are skipped. Of a folder that contains
    `cache_dir`, the files in `cache_dir` are left out.

    Raises:
        DataError: there are none, or one cannot be read, downloaded or has an unsupported format.
    """
    local: list[str] = []
    for path in path_list(settings.path):
        local += _downloaded(path, settings.splits, Path(cache_dir), notify, progress) or [path]
    return expand(
        local, notify, settings.format, settings.text_blocks, settings.splits, settings.quotes, str(cache_dir)
    )


def path_list(paths: str | list[str] | None) -> list[str]:
    """Return the paths of a setting that takes one or several."""
    return [paths] if isinstance(paths, str) else list(paths or ())


def _downloaded(
    path: str,
    splits: Sequence[str],
    cache_dir: Path,
    notify: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> list[str]:
    """Return the downloaded files of a data set of the Hub; none if the path is not the name of one."""
    if not path.startswith(HUB_SCHEME):
        return []
    from savant_ray.data.hub import HubDataset, download  # takes half a second

    dataset = HubDataset.parse(path)
    if dataset is None:
        return []
    return [str(file) for file in download(dataset, splits, cache_dir, notify, progress)]
