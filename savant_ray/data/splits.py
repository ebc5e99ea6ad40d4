"""Which files of a data set belong to which split, by the data set's card (README.md) or by their names.

The rules are those of the Hugging Face Hub, which also hold for a folder that is a clone of a repository of the Hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import yaml

from savant_ray.locations import printable

CARD = "README.md"
DEFAULT_CONFIG = "default"
DEFAULT_SPLIT = "train"
SPLIT_KINDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}

_KEYWORD = "|".join(keyword for keywords in SPLIT_KINDS.values() for keyword in keywords)
# The split in the name of a file or folder: train, train-00000-of-00012, train_sft-00000-of-00002, partial-train.
_SPLIT = re.compile(rf"(partial-)?(?P<split>({_KEYWORD})(_[A-Za-z]+)?)([-_.]?[0-9].*)?", re.IGNORECASE)
_SPLIT_WITHIN = re.compile(
    rf"(?<![A-Za-z])(?P<split>{_KEYWORD})(?![A-Za-z])", re.IGNORECASE
)  # orca_train.jsonl, wiki.test.json
_FRONT_MATTER = re.compile(r"---\s*\n(.*?)\n---", re.DOTALL)


class SplitOfFolder(NamedTuple):
    """The files of a folder that belong to a split, and the names of the splits."""

    files: list[str]
    taken: list[str]
    available: list[str]


def choose_splits(available: Iterable[str], preferred_splits: Sequence[str]) -> list[str]:
    """Return the first of `preferred_splits` that is available, as a list, which is empty without one.

    Without a split of exactly this name, those of the same kind are taken: `training` or `train_sft` for `train`.
    """
    names = sorted(available)
    for split in preferred_splits:
        if chosen := [split] if split in names else [name for name in names if _kind(name) == split]:
            return chosen
    return []


def split_of_folder(names: Sequence[str], card: str, preferred_splits: Sequence[str]) -> SplitOfFolder | None:
    """Return the files of a split of a folder; None if all files are used.

    All are without splits, and with a single one if it or `train` is preferred. The result has no files if the folder has
    none of the preferred splits.

    Args:
        names: paths of the data files relative to the folder.
        card: content of the folder's README.md.
        preferred_splits: as for `choose_splits`.
    """
    by_split: dict[str, list[str]] = {}
    for (_, name), files in splits_of_card(names, card).items():
        by_split.setdefault(name, []).extend(files)
    if not by_split and any(map(_split_in, names)):
        by_split = names_by_split(names)
    if not by_split or (len(by_split) == 1 and not {*by_split, DEFAULT_SPLIT}.isdisjoint(preferred_splits)):
        return None
    taken = choose_splits(by_split, preferred_splits)
    files = list(dict.fromkeys(file for name in taken for file in by_split[name]))
    return SplitOfFolder(files, taken, sorted(by_split))


def used_splits(taken: Sequence[str], available: Sequence[str]) -> str:
    """Return a message that names the splits that are used, and all that there are."""
    verb = "are" if len(taken) > 1 else "is"
    names, used = ", ".join(map(printable, available)), " and ".join(map(printable, taken))
    return f"of the splits {names}, {used} {verb} used (see split)"


def names_by_split(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the files of each split by their names, or those of their folders; others belong to `train`."""
    splits: dict[str, list[str]] = {}
    for name in names:
        splits.setdefault(_split_in(name) or DEFAULT_SPLIT, []).append(name)
    return splits


def splits_of_card(names: Sequence[str], card: str) -> dict[tuple[str, str], list[str]]:
    """Return the files of each config and split that the card lists."""
    from fsspec.utils import glob_translate  # takes 50 ms

    splits: dict[tuple[str, str], list[str]] = {}
    for config in _card_configs(card):
        name, folder = _config_name(config), str(config.get("data_dir") or "")
        data_files = config.get("data_files", "**")
        for entry in data_files if isinstance(data_files, list) else [data_files]:
            listed = entry if isinstance(entry, dict) else {"path": entry}
            patterns = listed.get("path")
            for pattern in patterns if isinstance(patterns, list) else [patterns]:
                is_match = re.compile(glob_translate(str(PurePosixPath(folder, str(pattern))))).match
                files = [file for file in names if is_match(file)]
                by_split = {str(listed["split"]): files} if "split" in listed else names_by_split(files)
                for split, of_split in by_split.items():
                    known = splits.setdefault((name, split), [])
                    known += [file for file in of_split if file not in known]
    return {key: files for key, files in splits.items() if files}


def splits_of_names(names: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    """Return the files of each config and split by their paths; of a data set in several formats, its Parquet files.

    A config is a folder, possibly in the folder "data": `[data/][CONFIG/]SPLIT-00000-of-00012.parquet`.
    """
    parquet = [name for name in names if name.lower().endswith(".parquet")]
    configs: dict[str, list[str]] = {}
    for name in sorted(parquet or names):
        folders = [part for part in PurePosixPath(name).parts[:-1] if part != "data" and _SPLIT.fullmatch(part) is None]
        configs.setdefault("/".join(folders) or DEFAULT_CONFIG, []).append(name)
    return {
        (config, split): files
        for config, of_config in configs.items()
        for split, files in names_by_split(of_config).items()
    }


def default_configs(card: str) -> list[str]:
    """Return the names of the configs that the card marks as default."""
    return [_config_name(listed) for listed in _card_configs(card) if listed.get("default")]


def _split_in(name: str) -> str:
    """Return the split in the name of a file, or of its closest parent folder that names one; "" without one."""
    *folders, file = PurePosixPath(name).parts
    match = (
        _SPLIT.fullmatch(file.partition(".")[0])
        or _SPLIT_WITHIN.search(file)
        or next(filter(None, map(_SPLIT.fullmatch, folders[::-1])), None)
    )
    return match["split"].lower() if match else ""


def _kind(split: str) -> str:
    """Return the kind of a split: train of training and train_sft; "" if it is unknown."""
    match = _SPLIT_WITHIN.match(split)
    return next((kind for kind, keywords in SPLIT_KINDS.items() if match and match["split"].lower() in keywords), "")


def _card_configs(card: str) -> list[dict[str, Any]]:
    """Return the configs in the front matter of a card; none if it has none or cannot be parsed."""
    match = _FRONT_MATTER.match(card.lstrip("\ufeff"))
    try:
        values = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return []
    configs = values.get("configs") if isinstance(values, dict) else None
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []


def _config_name(config: Mapping[str, Any]) -> str:
    return str(config.get("config_name", DEFAULT_CONFIG))
