"""Chooses the tokenizer of an attempt: that of the checkpoint, that of the settings, or one to be trained.

Runs in the driver before Ray starts. In another tokenizer the same ids are other tokens, so weights keep the tokenizer
that they were trained with unless the user allows a change.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from savant_ray.config import Config, DataConfig
from savant_ray.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from savant_ray.errors import CheckpointError, DataError, SettingsError
from savant_ray.locations import is_uri
from savant_ray.storage.protocol import newest_checkpoint_name
from savant_ray.storage.run_storage import fetched, initial_checkpoint, run_storage
from savant_ray.training.checkpoint import (
    CONFIG,
    TOKENIZER,
    TOKENIZER_FILES,
    find_checkpoint,
    read_manifest,
    read_settings,
    verify,
)


@dataclass(frozen=True)
class WeightsCheckpoint:
    """The checkpoint whose weights an attempt starts from, and the tokenizer that they were trained with."""

    name: str  # for messages, such as "step_500"
    tokenizer: Tokenizer
    tokenizer_path: str  # what `data.tokenizer` can be set to, if it exists; "" in object storage
    settings: DataConfig  # with which the weights were trained
    is_resumed: bool  # whether it is a checkpoint of this run; otherwise it is `run.init_from`


class Difference(NamedTuple):
    """A difference between a tokenizer and that of the weights."""

    setting: str  # in which they differ
    text: str

    def __str__(self) -> str:
        return f"{self.setting}: {self.text}"


def find_weights_checkpoint(
    resume_checkpoint: Path | None, config: Config, allow_changes: bool = False
) -> WeightsCheckpoint | None:
    """Return the checkpoint `resume_checkpoint` of this run, else that of `run.init_from`; None if there is neither.

    None also for a checkpoint without a tokenizer.

    Raises:
        CheckpointError: there is no checkpoint in `run.init_from`, or it is damaged.
        SettingsError: as `initial_checkpoint`.
    """
    if resume_checkpoint is not None:
        return _weights_checkpoint(
            resume_checkpoint, resume_checkpoint.name, str(resume_checkpoint / TOKENIZER), is_resumed=True
        )
    if config.run.init_from is None:
        return None
    with initial_checkpoint(config, (CONFIG, *TOKENIZER_FILES), allow_changes) as path:
        folder = find_checkpoint(path)
        tokenizer_path = "" if is_uri(config.run.init_from) else str(folder / TOKENIZER)
        return _weights_checkpoint(folder, f"run.init_from = {config.run.init_from}", tokenizer_path, is_resumed=False)


def find_weights_checkpoint_without_lock(config: Config) -> WeightsCheckpoint | None:
    """Return as `find_weights_checkpoint` does for the run's newest checkpoint on this machine, without locking the run.

    For a run without a checkpoint on this machine, `run.continue_from` is used if it is set. A run in object storage may
    have begun elsewhere, so that it needs `run.continue_from` no longer, which may then be missing.

    Raises:
        CheckpointError, SettingsError: as `find_weights_checkpoint`, also for `run.continue_from`.
    """
    storage = run_storage(config)
    newest = newest_checkpoint_name(storage) if storage.filesystem is None else None
    if newest is None and config.run.continue_from is not None:
        try:
            with fetched(config.run.continue_from, (CONFIG, *TOKENIZER_FILES)) as path:
                return find_weights_checkpoint(find_checkpoint(path), config)
        except CheckpointError as error:
            if storage.filesystem is None:
                raise CheckpointError(f"run.continue_from: {error}") from error
    return find_weights_checkpoint(storage.folder / newest if newest else None, config)


def choose_tokenizer(config: Config, checkpoint: WeightsCheckpoint | None, allow_changes: bool) -> Tokenizer | None:
    """Return the tokenizer of this attempt, None if one is to be trained on the training text.

    Raises:
        DataError: there is no tokenizer of that name, or it cannot be read, or has no end-of-document token.
        SettingsError: the settings name another tokenizer than that of `run.init_from`, or other special tokens around
            documents; or the tokenizer has more entries than `model.vocab_size`, or lacks `data.end_of_document`, or the
            template that `data.add_special_tokens: true` requires.
        CheckpointError: the same differences from the tokenizer of the run's checkpoint.
    """
    data = config.data
    if not data.trains_tokenizer:  # the settings name one
        tokenizer = _load(config, checkpoint)
    # A resumed run with the setting `train` keeps the tokenizer that it trained when it was new.
    elif checkpoint is not None and (
        data.tokenizer == "auto" or (checkpoint.is_resumed and checkpoint.settings.trains_tokenizer)
    ):
        tokenizer = checkpoint.tokenizer.with_settings(data.end_of_document, data.add_special_tokens)
    elif checkpoint is not None and not allow_changes:
        text = f"{data.tokenizer} would train a new tokenizer, but {checkpoint.name} has one"
        raise _change_error(checkpoint, Difference("data.tokenizer", text))
    else:  # to be trained
        if data.end_of_document not in (None, END_OF_DOCUMENT):
            raise SettingsError(
                f"data.end_of_document: a tokenizer trained on the text ends documents with {END_OF_DOCUMENT}, not with "
                f"{data.end_of_document}; leave it out, or set data.tokenizer to one that has this token"
            )
        if data.add_special_tokens is True:
            raise SettingsError(
                "data.add_special_tokens: true, but a tokenizer trained on the text has no template that puts special "
                "tokens around a document; leave it at auto, or set data.tokenizer to one that has a template"
            )
        return None
    if checkpoint is not None and not allow_changes and not _may_replace(tokenizer, checkpoint):
        raise _change_error(checkpoint, _difference(checkpoint, tokenizer))
    refuse_too_large(tokenizer, config)
    _ = tokenizer.end_of_document  # raises DataError if it has none
    return tokenizer


def tokenizer_change(checkpoint: WeightsCheckpoint, tokenizer: Tokenizer) -> str | None:
    """Return a warning if the tokenizer or its chat template is not the one that the weights were trained with."""
    if tokenizer.fingerprint != checkpoint.tokenizer.fingerprint:
        return f"warning: {_difference(checkpoint, tokenizer)}"
    trained, template = checkpoint.tokenizer.chat_template, tokenizer.chat_template
    if trained is None or (template is not None and template.source == trained.source):
        return None  # checkpoints of earlier versions contain no chat template
    difference = "has no chat template, unlike" if template is None else "has another chat template than"
    return (
        f"warning: data.tokenizer: {tokenizer.name} {difference} {checkpoint.name}, so conversations have another form"
    )


def refuse_too_large(tokenizer: Tokenizer, config: Config) -> None:
    """Raise SettingsError if the tokenizer has more entries than the model's vocabulary."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise SettingsError(
            f"model.vocab_size: {config.model.vocab_size:,} is less than the {tokenizer.vocab_size:,} entries of "
            f"{tokenizer.name}"
        )


def _load(config: Config, checkpoint: WeightsCheckpoint | None) -> Tokenizer:
    """Return the tokenizer that the settings name; if it is gone, the copy in the checkpoint that was trained with it."""
    data = config.data
    add_special_tokens = data.add_special_tokens
    if add_special_tokens == "auto" and checkpoint is not None and not checkpoint.tokenizer.adds_special_tokens:
        add_special_tokens = False  # the weights were trained without them
    try:
        return Tokenizer.load(data.tokenizer, data.end_of_document, add_special_tokens)
    except DataError as error:
        if checkpoint is None or not checkpoint.is_resumed or checkpoint.settings.tokenizer != data.tokenizer:
            raise DataError(f"data.tokenizer: {error}") from error
        return checkpoint.tokenizer.with_settings(data.end_of_document, add_special_tokens)


def _may_replace(tokenizer: Tokenizer, checkpoint: WeightsCheckpoint) -> bool:
    """Return whether the weights can be trained with this tokenizer without `--allow-changes`.

    A resumed run needs the same tokenizer, because the same text has to yield the same sequences. A new run may use any in
    which all ids are the same tokens and documents have the same special tokens around them.
    """
    if tokenizer.fingerprint == checkpoint.tokenizer.fingerprint:
        return True
    n_same, n_ids = checkpoint.tokenizer.count_same_ids(tokenizer)
    return (
        not checkpoint.is_resumed
        and n_same == n_ids
        and (tokenizer.prefix, tokenizer.suffix) == (checkpoint.tokenizer.prefix, checkpoint.tokenizer.suffix)
    )


def _difference(checkpoint: WeightsCheckpoint, tokenizer: Tokenizer) -> Difference:
    """Return how the tokenizer differs from that of the weights."""
    n_same, n_ids = checkpoint.tokenizer.count_same_ids(tokenizer)
    adds, checkpoint_adds = tokenizer.adds_special_tokens, checkpoint.tokenizer.adds_special_tokens
    if n_same == n_ids and adds != checkpoint_adds:
        text = f"{str(adds).lower()}, but {checkpoint.name} was trained with {str(checkpoint_adds).lower()}"
        return Difference("data.add_special_tokens", text)
    if n_same == n_ids and tokenizer.end_of_document != checkpoint.tokenizer.end_of_document:
        return Difference("data.end_of_document", f"another token than in {checkpoint.name} ends the documents")
    text = f"{n_same:,} of {n_ids:,} token ids of {checkpoint.name} are the same tokens in {tokenizer.name}"
    if n_same == n_ids:
        text += ", but it encodes text differently"
    return Difference("data.tokenizer", text)


def _change_error(checkpoint: WeightsCheckpoint, difference: Difference) -> SettingsError | CheckpointError:
    """Return the error for a tokenizer that must not replace that of the weights without `--allow-changes`."""
    consequence = "with weights that were trained with another tokenizer"
    match difference.setting:
        case "data.end_of_document":
            advice = "leave data.end_of_document out, to keep the token that the weights were trained with"
            consequence = "with weights that were trained with another end-of-document token"
        case "data.add_special_tokens":
            advice = (
                "leave data.add_special_tokens and data.tokenizer at auto, to keep what the weights were trained with"
            )
            consequence = "with weights that were not trained on text in this form"
        case _:
            path = f" or set it to {checkpoint.tokenizer_path}" if Path(checkpoint.tokenizer_path).is_file() else ""
            advice = f"leave data.tokenizer at auto{path}, to keep the tokenizer that the weights were trained with"
    error_class = CheckpointError if checkpoint.is_resumed else SettingsError
    return error_class(f"{difference}:\n  {advice};\n  --allow-changes continues anyway, {consequence}.")


def _weights_checkpoint(folder: Path, name: str, tokenizer_path: str, is_resumed: bool) -> WeightsCheckpoint | None:
    """Return the checkpoint in `folder` with its tokenizer, None if it has no tokenizer."""
    listed = read_manifest(folder)["files"]
    verify(folder, CONFIG, *(file for file in TOKENIZER_FILES if file in listed))
    if TOKENIZER not in listed:
        return None
    data = read_settings(folder).data
    tokenizer = Tokenizer.load(folder / TOKENIZER, data.end_of_document, data.add_special_tokens)
    tokenizer.name = f"the tokenizer of {name}"
    return WeightsCheckpoint(name, tokenizer, tokenizer_path, data, is_resumed)
