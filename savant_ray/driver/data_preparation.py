"""From settings to what workers read: tokenizer, token caches, the plan of the global order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from savant_ray.cluster.session import prepare_environment, ray_session
from savant_ray.config import WEIGHT_RESOLUTION, Config, SourceConfig
from savant_ray.data.cache_builder import empty_file_report, learn_tokenizer
from savant_ray.data.cache_builder import prepare as prepare_files
from savant_ray.data.order import Weight, weights_by_documents
from savant_ray.data.overlap import count_held_out_documents, split_held_out
from savant_ray.data.quickstart import write_quickstart
from savant_ray.data.shard_writer import encode_beginning
from savant_ray.data.sources import SourceFile, expand, refuse_empty
from savant_ray.data.stream import StreamPlan
from savant_ray.data.token_cache import TokenCache, bad_line_report, dropped_report
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.driver.tokenizer_choice import (
    choose_tokenizer,
    find_origin_without_lock,
    refuse_too_large,
    refuse_unencodable_prompts,
)
from savant_ray.errors import DataError, SettingsError, unexpected_errors_explained
from savant_ray.events import DataPrepared, TextCounts
from savant_ray.locations import is_uri, usable_folder, working_directory
from savant_ray.reporting import RunReport
from savant_ray.storage.paths import output_folder, parent_and_name, with_absolute_paths

MIB = 1 << 20


@dataclass(frozen=True)
class Text:
    """The files that a run reads."""

    sources: list[tuple[SourceConfig, list[SourceFile]]]
    validation: list[SourceFile]


@dataclass(frozen=True)
class PreparedData:
    """What a run trains on."""

    tokenizer: Tokenizer
    tokenizer_path: Path
    plan: StreamPlan
    validation: Path  # a token cache
    fingerprint: str  # of tokenizer, sources and weights


def prepare(config: Config, verbose: bool = False) -> None:
    """`savant prepare`: everything that training would prepare first; `verbose` shows what Ray says.

    Raises:
        DataError: text is missing, unreadable, yields nothing, or is bad where `data.on_bad_line` refuses it.
    """
    prepare_environment()
    config = with_absolute_paths(config, working_directory(), output_folder())
    with RunReport(None) as report, unexpected_errors_explained(activity=lambda: report.activity):
        tokenizer = choose_tokenizer(config, find_origin_without_lock(config), allow_changes=True)
        text = find_text(config, report)
        refuse_unencodable(config, text, tokenizer)
        report.stage("starting Ray")
        from savant_ray.driver.failures import ray_errors_explained

        with ray_session(verbose, report.say), ray_errors_explained():
            prepare_data(config, text, report, tokenizer)


def find_text(config: Config, report: RunReport) -> Text:
    """The files behind the settings' patterns; needs no Ray.

    Raises:
        DataError: a source that is not optional, or the validation text, is missing, empty or unreadable.
        SettingsError: the cache folder cannot be made.
    """
    if config.data.quickstart:
        write_missing_quickstart(config, report)
    usable_folder(Path(config.data.cache_dir), "data.cache_dir")
    sources = existing_sources(config.data.sources, report.say)
    validation = _expanded(config.data.validation, "data.validation", report.say)
    return Text(without_validation(sources, validation, Path(config.data.cache_dir), report.say), validation)


def refuse_unencodable(config: Config, text: Text, tokenizer: Tokenizer | None) -> None:
    """Try the tokenizer on the beginning of each source and on the prompts, before Ray starts; one to be learnt fits.

    Raises:
        DataError: it cannot encode the text; names file and line.
        SettingsError: it cannot encode a prompt of the validation.
    """
    if tokenizer is None:
        return
    for files in [*(files for _, files in text.sources), text.validation]:
        encode_beginning(files[0], tokenizer)
    refuse_unencodable_prompts(tokenizer, config)


def prepare_data(config: Config, text: Text, report: RunReport, tokenizer: Tokenizer | None) -> PreparedData:
    """Makes what is missing; Ray must be running. Without a `tokenizer` one is learnt from the training text.

    Raises:
        DataError: text is unreadable, yields nothing, or is bad where `data.on_bad_line` refuses it.
        SettingsError: a source would have less than 1 sequence in 100,000 with `data.mix_by: documents`.
    """
    if tokenizer is None:
        report.stage("learning the tokenizer")
        files = [file for _, files in text.sources for file in files]
        tokenizer = learn_tokenizer(files, Path(config.data.cache_dir), config.model.vocab_size)
        refuse_too_large(tokenizer, config)
    tokenizer_path = keep_tokenizer(tokenizer, Path(config.data.cache_dir))
    caches = [
        tokenise(f"tokenising {_named(source.path)}", files, tokenizer, config, report)
        for source, files in text.sources
    ]
    validation = tokenise("tokenising the validation text", text.validation, tokenizer, config, report)
    if overlap := count_held_out_documents(validation, caches):
        report.say(
            f"{overlap:,} of {validation.manifest.documents:,} validation documents are in the training text, too, word "
            "for word; the validation loss is lower than it would be for text that is new"
        )
    plan = StreamPlan(
        folders=tuple(str(cache.folder) for cache in caches),
        weights=_sequence_weights(config, [source for source, _ in text.sources], caches, report.say),
        seed=config.run.seed,
        effective_batch=config.training.effective_batch,
    )
    report.handle(
        DataPrepared(
            sources=tuple(
                _counts(_named(source.path), cache) for (source, _), cache in zip(text.sources, caches, strict=True)
            ),
            validation=_counts(_named(config.data.validation), validation),
        )
    )
    identity = repr((tokenizer.fingerprint, [cache.fingerprint for cache in caches], plan.weights))
    return PreparedData(
        tokenizer, tokenizer_path, plan, validation.folder, hashlib.sha256(identity.encode()).hexdigest()
    )


def write_missing_quickstart(config: Config, report: RunReport) -> None:
    """The quickstart's files beside where the first source is expected, when one of them is not there."""
    paths = [p for source in config.data.sources for p in _listed(source.path)] + _listed(config.data.validation)
    if all(os.path.exists(path) for path in paths):  # noqa: PTH110 - Path.exists raises for a name too long
        return
    report.stage("making the quickstart's text")
    write_quickstart(Path(paths[0]).parent, log=report.say)


def existing_sources(
    sources: list[SourceConfig], say: Callable[[str], None]
) -> list[tuple[SourceConfig, list[SourceFile]]]:
    """Each source with its files; a missing optional one is left out, and said."""
    found = []
    for number, source in enumerate(sources):
        try:
            found.append((source, _expanded(source.path, f"data.sources[{number}].path", say)))
        except DataError as error:
            if not source.optional:
                raise
            say(f"going on without the optional {_named(source.path)} ({error})")
    if not found:
        raise DataError("data.sources: none of the optional sources is there, so there is nothing to train on")
    return found


def without_validation(
    sources: list[tuple[SourceConfig, list[SourceFile]]],
    validation: list[SourceFile],
    cache_dir: Path,
    say: Callable[[str], None],
) -> list[tuple[SourceConfig, list[SourceFile]]]:
    """Return each source without the files whose content is that of a validation file, and report which.

    A source that holds nothing else stays as it is, with a warning: somebody may want to see a model memorise a text.
    """
    kept = []
    for number, (source, files) in enumerate(sources):
        training, held_out = split_held_out(files, validation, cache_dir)
        names = ", ".join(file.path for file in held_out[:5]) + f" and {len(held_out) - 5:,} more" * (len(held_out) > 5)
        if not training:
            say(
                f"warning: data.sources[{number}].path: holds nothing but the validation text (data.validation): {names}; "
                "the model trains on it, so the validation loss will not show how it does on new text"
            )
        elif held_out:
            say(f"left out of the training text, because it is the validation text (data.validation): {names}")
        kept.append((source, training or files))
    return kept


def keep_tokenizer(tokenizer: Tokenizer, cache_dir: Path) -> Path:
    """Return a `tokenizer.json` of it in the cache folder, which every node can read."""
    path = cache_dir / f"tokenizer-used-{tokenizer.fingerprint[:16]}.json"
    try:
        is_kept = path.read_text(encoding="utf-8") == tokenizer.to_json()
    except (OSError, ValueError):
        is_kept = False
    if not is_kept:
        tokenizer.save(path)
    return path


def tokenise(
    title: str, files: list[SourceFile], tokenizer: Tokenizer, config: Config, report: RunReport
) -> TokenCache:
    """The token cache of the files; says which lines and how many characters were left out."""
    report.stage(title)
    cache = prepare_files(
        files,
        tokenizer,
        config.model.max_seq_len,
        config.data.cache_dir,
        on_bad_line=config.data.on_bad_line,
        max_line_bytes=int(config.data.max_line_mb * MIB),
        progress=lambda done, total: report.progress(done, total, "bytes"),
        log=report.say,
    )
    for sentence in [
        *bad_line_report(cache.manifest),
        *empty_file_report(cache.manifest),
        *dropped_report(cache.manifest, tokenizer.name),
    ]:
        report.say(sentence)
    return cache


def _sequence_weights(
    config: Config, sources: list[SourceConfig], caches: list[TokenCache], say: Callable[[str], None]
) -> tuple[Weight, ...]:
    """Return the weights for the global order; prints what `data.mix_by: documents` makes of those in the settings."""
    weights = [source.weight for source in sources]
    if config.data.mix_by == "sequences":
        return tuple(weights)
    sizes = [(cache.manifest.documents, cache.manifest.rows) for cache in caches]
    fractions = weights_by_documents(weights, *zip(*sizes, strict=True))
    total = sum(map(Fraction, weights))
    mixture = []
    for source, (documents, rows), fraction in zip(sources, sizes, fractions, strict=True):
        name = _named(source.path)
        if fraction * WEIGHT_RESOLUTION < 1:
            raise SettingsError(
                f"data.sources: weight {source.weight:g} of {name} with data.mix_by: documents is less than 1 sequence in "
                f"{WEIGHT_RESOLUTION:,} ({documents:,} documents in {rows:,} sequences); raise it, or leave the source out"
            )
        by_documents = float(Fraction(source.weight) / total)
        mixture.append(f"{name} {by_documents:.2%} of the documents, {float(fraction):.2%} of the sequences")
    say(f"mixed by documents: {'; '.join(mixture)}")
    return fractions


def _expanded(paths: str | list[str], setting: str, say: Callable[[str], None]) -> list[SourceFile]:
    try:
        files = expand(paths, say)
        refuse_empty(files)
    except DataError as error:
        raise DataError(f"{setting}: {error}") from error
    return files


def _counts(name: str, cache: TokenCache) -> TextCounts:
    manifest = cache.manifest
    return TextCounts(name, manifest.documents, manifest.tokens, manifest.rows, manifest.padding, manifest.bad_lines)


def _named(paths: str | list[str]) -> str:
    return ", ".join(parent_and_name(path)[1] if is_uri(path) else Path(path).name for path in _listed(paths))


def _listed(path: str | list[str]) -> list[str]:
    return [path] if isinstance(path, str) else list(path)
