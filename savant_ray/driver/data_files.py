"""The files that a run reads, found and checked before Ray starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from savant_ray.config import MAX_INTEGER, Config, HeldOutConfig, SourceConfig
from savant_ray.data.conversations import ChatTemplate
from savant_ray.data.documents import SourceText, rule_of, validation_texts
from savant_ray.data.overlap import split_held_out
from savant_ray.data.quickstart import FILES, TRAIN_FILE, VALIDATION_FILE, write_quickstart
from savant_ray.data.shard_writer import check_encodable
from savant_ray.data.source_files import find_files, path_list
from savant_ray.data.sources import HUB_SCHEME, SourceFile, refuse_empty
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.errors import DataError, SettingsError
from savant_ray.evaluation.logic_suite import logic_suite
from savant_ray.locations import create_writable_folder, is_uri, parent_and_name
from savant_ray.reporting import RunReport

SHOWN_FILES = 5  # in a message or the name of a source
NO_TEXT_HINT = (
    "; `savant init TEXT` writes a settings file for your own text, `savant quickstart` trains on generated text"
)
NO_VALIDATION_HINT = (
    "; set data.validation to held-out text, or to {fraction: 0.01} to hold out a part of the sources' documents"
)


@dataclass(frozen=True)
class DataFiles:
    """The files of each training source, and those of the validation text; none if it is a fraction of the sources."""

    sources: list[tuple[SourceConfig, list[SourceFile]]]
    held_out: HeldOutConfig
    validation: list[SourceFile]

    def training_texts(self, chat_template: ChatTemplate | None) -> list[SourceText]:
        """Return the training text of each source, with the rule by which records become documents."""
        fraction = self.held_out.fraction
        return [SourceText(files, rule_of(source, chat_template, fraction)) for source, files in self.sources]

    def validation_texts(self, chat_template: ChatTemplate | None) -> list[SourceText]:
        """Return the validation text: one text, or the held-out documents of each source."""
        return list(validation_texts(self.held_out, self.validation, self.sources, chat_template))


def find_sources(config: Config, report: RunReport) -> list[tuple[SourceConfig, list[SourceFile]]]:
    """Return each source with its files, except for optional sources that are missing, which are reported.

    Writes the quickstart's files first if the settings name one that is missing.

    Raises:
        DataError: a source that is not optional is missing, empty or unreadable, or there is none.
        SettingsError: the cache folder cannot be created, or a filter compares with a number that is rounded.
    """
    _refuse_rounded_numbers(config.data.sources)
    if config.data.quickstart:
        _write_missing_quickstart(config, report)
    cache_dir = Path(config.data.cache_dir)
    create_writable_folder(cache_dir, "data.cache_dir")
    existing = []
    for number, source in enumerate(config.data.sources):
        try:
            existing.append((source, _find(source, f"data.sources[{number}].path", cache_dir, report)))
        except DataError as error:
            if not source.optional:
                if not config.data.quickstart and _is_missing_default(source.path, TRAIN_FILE):
                    raise DataError(f"{error}{NO_TEXT_HINT}") from error
                raise
            report.notify(f"continuing without the optional {short_name(source.path)} ({error})")
    if not existing:
        raise DataError("data.sources: none of the optional sources exists, so there is no text to train on")
    return existing


def find_data_files(config: Config, report: RunReport, needs_validation: bool = True) -> DataFiles:
    """Return the files that match the patterns in the settings, as `find_sources` finds them.

    Raises:
        DataError: a source that is not optional is missing, empty or unreadable; so is the validation text, and
            `needs_validation` is true.
        SettingsError: as `find_sources`.
    """
    cache_dir = Path(config.data.cache_dir)
    sources = find_sources(config, report)
    held_out = config.data.held_out
    try:
        validation = _find(held_out, "data.validation", cache_dir, report) if held_out.path is not None else []
    except DataError as error:
        if needs_validation:
            hint = NO_VALIDATION_HINT if _is_missing_default(held_out.path, VALIDATION_FILE) else ""
            raise DataError(f"{error}{hint}") from error
        validation = []
    return DataFiles(_without_validation(sources, validation, cache_dir, report.notify), held_out, validation)


def refuse_unencodable(config: Config, files: DataFiles, tokenizer: Tokenizer | None) -> None:
    """Check that the tokenizer can encode the beginning of each source and of the validation text, and its prompts.

    A tokenizer that is still to be trained (None) is not checked.

    Raises:
        DataError: it cannot encode the text; the message names file and line.
        SettingsError: it cannot encode a prompt.
    """
    if tokenizer is None:
        return
    template = tokenizer.chat_template
    texts = files.training_texts(template)
    if files.validation:
        texts += files.validation_texts(template)
    for text in texts:
        check_encodable(text.files[0], tokenizer, text.rule)
    _refuse_unencodable_prompts(config, tokenizer)


def _refuse_unencodable_prompts(config: Config, tokenizer: Tokenizer) -> None:
    """Raise SettingsError if the tokenizer cannot encode a prompt of the validation."""
    prompts = {"validation.prompt": [config.validation.prompt]}
    if config.validation.logic_problems:
        prompts["validation.logic_problems"] = [question.prompt for question in logic_suite()]
    for setting, texts in prompts.items():
        try:
            if all(tokenizer.encode_batch(texts)):
                continue
            reason = f"{tokenizer.name} has no token for it; set data.tokenizer to one that has"
        except DataError as error:
            reason = str(error)
        advice = "give another prompt" if setting == "validation.prompt" else "set it to 0"
        raise SettingsError(f"{setting}: {reason}; or {advice}")


def short_name(paths: str | list[str] | None) -> str:
    """Return the last parts of the first paths, and the number of the others, for messages."""
    return _listed([parent_and_name(path)[1] if is_uri(path) else Path(path).name for path in path_list(paths)])


def _listed(names: Sequence[str]) -> str:
    """Return the first names, and the number of the others."""
    return ", ".join(names[:SHOWN_FILES]) + f" and {len(names) - SHOWN_FILES:,} more" * (len(names) > SHOWN_FILES)


def _is_missing_default(path: str | list[str] | None, name: str) -> bool:
    """Return whether `path` is a missing file with the name of a default, which the user has probably not set."""
    if not isinstance(path, str) or is_uri(path) or Path(path).name != name:
        return False
    return not os.path.exists(path)  # noqa: PTH110 - Path.exists raises for a name too long


def _refuse_rounded_numbers(sources: Sequence[SourceConfig]) -> None:
    for number, source in enumerate(sources):
        for name, value in (source.filter.equals or {}).items():
            is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
            if is_whole and abs(value) > MAX_INTEGER:  # type: ignore[arg-type]  # a number
                raise SettingsError(
                    f"data.sources[{number}].filter.equals: the value of {name} has more than 18 digits, so it cannot be "
                    "compared exactly"
                )


def _write_missing_quickstart(config: Config, report: RunReport) -> None:
    """Write the quickstart's files into each folder in which one is missing that the settings name."""
    paths = [path for source in config.data.sources for path in path_list(source.path)]
    paths += path_list(config.data.held_out.path)
    missing = [
        Path(path)
        for path in paths
        if not (is_uri(path) or os.path.exists(path))  # noqa: PTH110 - Path.exists raises for a name too long
    ]
    for folder in dict.fromkeys(path.parent for path in missing if path.name in FILES):
        report.begin_stage("writing the quickstart's text")
        write_quickstart(folder, log=report.notify)


def _without_validation(
    sources: list[tuple[SourceConfig, list[SourceFile]]],
    validation: list[SourceFile],
    cache_dir: Path,
    notify: Callable[[str], None],
) -> list[tuple[SourceConfig, list[SourceFile]]]:
    """Return each source without the files whose content is that of a validation file; `notify` prints their names.

    A source that contains no other files is kept, with a warning: a user may want to see a model memorize a text.
    """
    remaining = []
    for number, (source, files) in enumerate(sources):
        training, held_out = split_held_out(files, validation, cache_dir)
        names = _listed([file.path for file in held_out])
        if not training:
            notify(
                f"warning: data.sources[{number}].path: contains only the validation text (data.validation): {names}; "
                "the model trains on it, so the validation loss does not measure new text"
            )
        elif held_out:
            notify(f"left out of the training text, because it is the validation text (data.validation): {names}")
        remaining.append((source, training or files))
    return remaining


def _find(settings: SourceConfig | HeldOutConfig, name: str, cache_dir: Path, report: RunReport) -> list[SourceFile]:
    """Return the files of a source or of the validation text.

    Raises:
        DataError: there are none, or all are empty; the message begins with `name`, that of the setting.
    """
    if any(path.startswith(HUB_SCHEME) for path in path_list(settings.path)):
        report.begin_stage(f"looking for {short_name(settings.path)} on the Hugging Face Hub")
    try:
        files = find_files(
            settings, cache_dir, report.notify, lambda done, total: report.progress(done, total, "bytes")
        )
        refuse_empty(files)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    return files
