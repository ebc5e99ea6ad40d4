"""Downloads data sets of the Hugging Face Hub, named `hf://datasets/OWNER/NAME[/CONFIG][@REVISION]`.

The files of a config and a split are those that the data set's card (README.md) lists, otherwise those whose names contain
them, otherwise those of the Parquet copy that the Hub makes of each data set. They are stored in the cache folder, which all
nodes can read, under the commit to which the revision refers. What was downloaded once can be used without a network.
Importing this module takes half a second, because it imports an HTTP client.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import errors

from savant_ray.data.atomic_files import dump_with_checksum, load_with_checksum, write_atomically
from savant_ray.data.sources import HUB_SCHEME, format_by_suffix
from savant_ray.data.splits import (
    CARD,
    DEFAULT_CONFIG,
    choose_splits,
    default_configs,
    splits_of_card,
    splits_of_names,
    used_splits,
)
from savant_ray.errors import DataError, SavantError
from savant_ray.locations import error_text, printable

PARQUET_COPY = "refs/convert/parquet"
DEFAULT_REVISION = "main"
FOLDER = "hub"  # of downloaded files, in `data.cache_dir`
MAX_NAMED = 10  # configs or splits that an error names

_REFERENCE = re.compile(
    HUB_SCHEME + r"(?P<repository>[^/@]+/[^/@]+)(@(?P<early>[^/]+))?(/(?P<config>[^/@*?]+))?(@(?P<late>.+))?"
)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hub; without a revision, the newest commit of the branch main."""

    repository: str  # OWNER/NAME
    config: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, uri: str) -> HubDataset | None:
        """Return the data set that a URI names; None if it names files of the Hub, or is another kind of path."""
        if not (match := _REFERENCE.fullmatch(uri.rstrip("/"))):
            return None
        config, revision = match["config"], match["late"] or match["early"]
        if config is not None and format_by_suffix(config):
            return None
        return cls(match["repository"], config, revision)


@dataclass(frozen=True)
class _Listing:
    """The files of a revision: names relative to the repository, with their sizes in bytes."""

    commit: str
    sizes: Mapping[str, int]


def download(
    dataset: HubDataset, splits: Sequence[str], cache_dir: Path, notify: Callable[[str], None], progress: Progress
) -> list[Path]:
    """Download the files of a split that are not in `cache_dir` yet, and return their paths, sorted.

    The split is the first one of `splits` that the data set has.

    `progress` receives the bytes that are there and the total. An interrupted download is continued. `HF_TOKEN` or
    `hf auth login` gives access to private data sets, `HF_ENDPOINT` names another Hub.

    Raises:
        DataError: the data set, revision, config or split does not exist, is not accessible, or cannot be downloaded.
    """
    folder = cache_dir / FOLDER
    with _errors_explained(dataset):
        commit, files = _find_files(dataset, splits, folder, notify)
        total, done = sum(files.values()), 0
        paths = []
        for name, size in sorted(files.items()):
            progress(done, total)
            paths.append(_download_file(dataset, name, commit, folder))
            done += size
        progress(done, total)
    return paths


class SplitOfConfig(NamedTuple):
    """The files of a config that belong to a split; none if there is no such config or split."""

    files: list[str]
    taken: list[str]  # splits
    of_config: list[str]  # all splits of the config
    available: list[str]  # all configs and splits, for messages


def files_of_split(
    names: Sequence[str], card: str, config: str | None, preferred_splits: Sequence[str]
) -> SplitOfConfig:
    """Return the files of a config and a split, the first one of `preferred_splits` that the config has.

    `names` are the files of the repository, `card` is its README. Without a config, the default one is used: the one that
    the card marks or calls "default", or the only one.
    """
    data_files = [name for name in names if _is_data(name)]
    splits = splits_of_card(data_files, card) or splits_of_names(data_files)
    configs = list(dict.fromkeys(name for name, _ in splits))
    if config is None:
        candidates = [*default_configs(card), DEFAULT_CONFIG, *(configs if len(configs) == 1 else [])]
        config = next((name for name in candidates if name in configs), None)
    of_config = sorted(split for name, split in splits if name == config)
    taken = choose_splits(of_config, preferred_splits)
    files = list(dict.fromkeys(file for split in taken for file in splits[config or "", split]))
    return SplitOfConfig(files, taken, of_config, [f"{name} ({split})" for name, split in splits])


def _find_files(
    dataset: HubDataset, preferred_splits: Sequence[str], folder: Path, notify: Callable[[str], None]
) -> tuple[str, Mapping[str, int]]:
    """Return the commit and the files of the split with their sizes.

    Raises:
        DataError: there are none.
    """
    listing = _listing(dataset, dataset.revision or DEFAULT_REVISION, folder, notify)
    card = ""
    if CARD in listing.sizes:
        card = _download_file(dataset, CARD, listing.commit, folder).read_text(encoding="utf-8", errors="replace")
    found = files_of_split(list(listing.sizes), card, dataset.config, preferred_splits)
    available = found.available
    if not found.files and dataset.revision is None and (copy := _parquet_copy(dataset, folder, notify)):
        found = files_of_split(list(copy.sizes), "", dataset.config, preferred_splits)
        listing, available = copy, available or found.available
    if found.files:
        if found.taken != [preferred_splits[0]]:
            notify(f"{printable(dataset.repository)}: {used_splits(found.taken, found.of_config)}")
        return listing.commit, {name: listing.sizes[name] for name in found.files}
    if not available:
        raise DataError("contains no file in a supported format")
    missing = f"config {dataset.config}" if dataset.config else "default config"
    missing += f" with a split {' or '.join(preferred_splits)}"
    more = f" and {len(available) - MAX_NAMED:,} more" if len(available) > MAX_NAMED else ""
    raise DataError(
        f"has no {missing}; its configs (and splits): {', '.join(available[:MAX_NAMED])}{more}. A config is named as in "
        f"{HUB_SCHEME}{dataset.repository}/CONFIG"
    )


def _parquet_copy(dataset: HubDataset, folder: Path, notify: Callable[[str], None]) -> _Listing | None:
    try:
        return _listing(dataset, PARQUET_COPY, folder, notify)
    except errors.RevisionNotFoundError:
        return None


def _listing(dataset: HubDataset, revision: str, folder: Path, notify: Callable[[str], None]) -> _Listing:
    """List a revision; without a network, as it was listed the last time."""
    path = folder / f"{dataset.repository.replace('/', '--')}-{revision.replace('/', '--')}.json"
    is_commit = re.fullmatch("[0-9a-f]{40}", revision) is not None
    if is_commit and (listed := _load_listing(path)):
        return listed
    try:
        info = huggingface_hub.HfApi(endpoint=_endpoint()).dataset_info(
            dataset.repository, revision=revision, files_metadata=True
        )
    except errors.HfHubHTTPError as error:
        if error.response.status_code < 500:  # an answer: no such data set, no access
            raise
        reason: Exception = error
    except Exception as error:  # the library's HTTP client differs between versions
        reason = error
    else:
        listing = _Listing(info.sha or revision, {file.rfilename: file.size or 0 for file in info.siblings or ()})
        write_atomically(path, dump_with_checksum({"commit": listing.commit, "sizes": dict(listing.sizes)}))
        return listing
    if listed := _load_listing(path):
        notify(
            f"{HUB_SCHEME}{dataset.repository}: the Hub cannot be reached ({error_text(reason)}); using commit "
            f"{listed.commit[:12]}, which was {revision} when it was downloaded"
        )
        return listed
    raise reason


def _load_listing(path: Path) -> _Listing | None:
    try:
        return _Listing(**load_with_checksum(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _download_file(dataset: HubDataset, name: str, commit: str, folder: Path) -> Path:
    return Path(
        huggingface_hub.hf_hub_download(
            dataset.repository,
            name,
            repo_type="dataset",
            revision=commit,
            cache_dir=folder,
            endpoint=_endpoint(),
        )
    )


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


@contextmanager
def _errors_explained(dataset: HubDataset) -> Iterator[None]:
    """Turn errors into a `DataError` that names the data set and says what to do."""
    uri = f"{HUB_SCHEME}{dataset.repository}"
    try:
        yield
    except SavantError as error:
        raise DataError(f"{uri}: {error}") from error
    except errors.GatedRepoError as error:
        raise DataError(
            f"{uri}: access has to be requested on its page; then set HF_TOKEN, or run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(f"{uri}: does not exist, or is private (then set HF_TOKEN, or run `hf auth login`)") from error
    except errors.RevisionNotFoundError as error:
        raise DataError(f"{uri}: has no revision {dataset.revision or DEFAULT_REVISION}") from error
    except errors.HFValidationError as error:
        raise DataError(f"{uri}: is not the name of a data set, which is OWNER/NAME") from error
    except Exception as error:  # the library's HTTP client differs between versions; a full disk is an OSError
        raise DataError(
            f"{uri}: cannot be downloaded ({error_text(error)}); without a network, only what was downloaded before "
            "into data.cache_dir can be used"
        ) from error


def _is_data(name: str) -> bool:
    is_hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
    return format_by_suffix(name) not in ("", "text") and not is_hidden
