"""Prepares what workers read: tokenizer, token caches, the plan of the global order. Uses Ray Data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from savant_ray.cluster.session import ray_session
from savant_ray.config import WEIGHT_RESOLUTION, Config, SourceConfig
from savant_ray.data.atomic_files import fingerprint, write_atomically
from savant_ray.data.cache_builder import empty_file_report, filter_report, train_or_load_tokenizer
from savant_ray.data.cache_builder import prepare as prepare_files
from savant_ray.data.documents import SourceText
from savant_ray.data.order import Weight, weights_by_documents
from savant_ray.data.overlap import count_duplicates, count_overlapping_documents
from savant_ray.data.stream import StreamPlan
from savant_ray.data.text_statistics import MAX_NAMED_RECORDS, N_EXAMPLES, named_lengths, shown_example
from savant_ray.data.token_cache import TokenCache, dropped_report, invalid_line_report
from savant_ray.data.tokenizer import TOKENIZER_FILE, Tokenizer
from savant_ray.driver.data_files import DataFiles, find_data_files, refuse_unencodable, short_name
from savant_ray.driver.failures import ray_errors_explained
from savant_ray.driver.tokenizer_choice import choose_tokenizer, find_weights_checkpoint_without_lock, refuse_too_large
from savant_ray.errors import SettingsError, unexpected_errors_explained
from savant_ray.events import DataPrepared, TextCounts
from savant_ray.reporting import RunReport

USED_TOKENIZER = "tokenizer-used-"  # prefix of the folder with the tokenizer of a run, in `data.cache_dir`


@dataclass(frozen=True)
class PreparedData:
    """What a run trains on."""

    tokenizer: Tokenizer
    tokenizer_path: Path  # a tokenizer.json that every node can read
    plan: StreamPlan
    validation: Path  # a token cache
    fingerprint: str  # of tokenizer and sources, and of the weights with which the sources are mixed


def prepare_only(config: Config, verbose: bool) -> None:
    """Prepare the data of a run that is not trained; see `savant_ray.driver.prepare`."""
    with RunReport(None) as report, unexpected_errors_explained(activity=lambda: report.activity):
        tokenizer = choose_tokenizer(config, find_weights_checkpoint_without_lock(config), allow_changes=True)
        files = find_data_files(config, report)
        refuse_unencodable(config, files, tokenizer)
        report.begin_stage("starting Ray")
        with ray_session(verbose, report.notify), ray_errors_explained():
            prepare_data(config, files, report, tokenizer)


def prepare_data(config: Config, files: DataFiles, report: RunReport, tokenizer: Tokenizer | None) -> PreparedData:
    """Return the data of a run, and create what is not in the cache folder yet. Ray must be running.

    If `tokenizer` is None, one is trained on the training text.

    Raises:
        DataError: text is unreadable or contains no document, or a line is invalid and `data.on_bad_line` is `error`.
        SettingsError: a source would have less than 1 sequence in 100,000 with `data.mix_by: documents`, or the trained
            tokenizer has more entries than `model.vocab_size`.
    """
    cache_dir = Path(config.data.cache_dir)
    if tokenizer is None:
        report.begin_stage("training the tokenizer")
        training_texts = files.training_texts(chat_template=None)
        tokenizer = train_or_load_tokenizer(
            training_texts, cache_dir, config.model.vocab_size, config.data.max_line_bytes
        )
        refuse_too_large(tokenizer, config)
    tokenizer_path = _write_tokenizer(tokenizer, cache_dir)
    names = [short_name(source.path) for source, _ in files.sources]
    training_texts = files.training_texts(tokenizer.chat_template)
    caches: list[TokenCache] = []
    for name, text in zip(names, training_texts, strict=True):
        earlier = list(caches) if config.data.deduplicate else None
        caches.append(_tokenize(f"tokenizing {name}", [text], tokenizer, config, report, earlier))
    validation_texts = files.validation_texts(tokenizer.chat_template)
    # Validation text in files of its own keeps its duplicates.
    earlier = [] if config.data.deduplicate and files.held_out.fraction else None
    validation = _tokenize("tokenizing the validation text", validation_texts, tokenizer, config, report, earlier)
    if overlap := count_overlapping_documents(validation, caches):
        report.notify(
            f"{overlap:,} of {validation.manifest.documents:,} validation documents are also in the training text, word "
            "for word; the validation loss is lower than it would be for new text"
        )
    plan = StreamPlan(
        folders=tuple(str(cache.folder) for cache in caches),
        weights=_sequence_weights(config, [source for source, _ in files.sources], caches, report.notify),
        seed=config.run.seed,
        effective_batch=config.training.effective_batch,
    )
    fraction = files.held_out.fraction
    held_out_name = f"{fraction:.2%} of the sources" if fraction else short_name(files.held_out.path)
    counts = _source_counts(names, caches, plan, tokenizer)
    report.add_event(DataPrepared(sources=counts, validation=_counts(held_out_name, validation, tokenizer)))
    identity = repr((tokenizer.fingerprint, [cache.fingerprint for cache in caches], plan.weights))
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    return PreparedData(tokenizer, tokenizer_path, plan, validation.folder, fingerprint)


def _write_tokenizer(tokenizer: Tokenizer, cache_dir: Path) -> Path:
    """Write the tokenizer with its chat template into the cache folder; return the path of its `tokenizer.json`.

    Files that are there already are not written again. The folder's name depends on the content, so that runs with other
    tokenizers do not change it.
    """
    files = tokenizer.files()
    folder = cache_dir / f"{USED_TOKENIZER}{fingerprint(files)[:16]}"
    for name, text in files.items():
        try:
            is_written = (folder / name).read_bytes() == text.encode()
        except OSError:
            is_written = False
        if not is_written:
            write_atomically(folder / name, text)
    return folder / TOKENIZER_FILE


def _tokenize(
    title: str,
    texts: list[SourceText],
    tokenizer: Tokenizer,
    config: Config,
    report: RunReport,
    deduplicate_after: list[TokenCache] | None,
) -> TokenCache:
    """Return the token cache of the texts; report skipped and filtered lines, empty files and dropped characters."""
    report.begin_stage(title)
    cache = prepare_files(
        texts,
        tokenizer,
        config.model.max_seq_len,
        config.data.cache_dir,
        on_bad_line=config.data.on_bad_line,
        max_line_bytes=config.data.max_line_bytes,
        deduplicate_after=deduplicate_after,
        progress=lambda done, total: report.progress(done, total, "bytes"),
        log=report.notify,
    )
    if any(text.rule.split == "validation" for text in texts):
        return cache  # its lines were reported with the training text of the same files
    for message in [
        *invalid_line_report(cache.manifest),
        *filter_report(cache.manifest),
        *empty_file_report(cache.manifest, has_other_split=any(text.rule.held_out for text in texts)),
        *dropped_report(cache.manifest, tokenizer.name),
    ]:
        report.notify(message)
    return cache


def _sequence_weights(
    config: Config, sources: list[SourceConfig], caches: list[TokenCache], notify: Callable[[str], None]
) -> tuple[Weight, ...]:
    """Return the weights for the global order; with `data.mix_by: documents`, print the resulting mixture by `notify`."""
    weights = [source.weight for source in sources]
    if config.data.mix_by == "sequences":
        return tuple(weights)
    sizes = [(cache.manifest.documents, cache.manifest.rows) for cache in caches]
    fractions = weights_by_documents(weights, *zip(*sizes, strict=True))
    total = sum(map(Fraction, weights))
    mixture = []
    for source, (documents, rows), fraction in zip(sources, sizes, fractions, strict=True):
        name = short_name(source.path)
        if fraction * WEIGHT_RESOLUTION < 1:
            raise SettingsError(
                f"data.sources: weight {source.weight:g} of {name} with data.mix_by: documents is less than 1 sequence in "
                f"{WEIGHT_RESOLUTION:,} ({documents:,} documents in {rows:,} sequences); raise it, or leave the source out"
            )
        of_documents = float(Fraction(source.weight) / total)
        mixture.append(f"{name} {of_documents:.2%} of the documents, {float(fraction):.2%} of the sequences")
    notify(f"mixed by documents: {'; '.join(mixture)}")
    return fractions


def _source_counts(
    names: list[str], caches: list[TokenCache], plan: StreamPlan, tokenizer: Tokenizer
) -> tuple[TextCounts, ...]:
    """Return the counts of all sources, with their fractions of the sequences and the steps of an epoch."""
    repeated = count_duplicates(caches) or [0] * len(caches)
    total = sum(Fraction(str(weight)) for weight in plan.weights)
    counts = []
    for name, cache, weight, n_repeated in zip(names, caches, plan.weights, repeated, strict=True):
        fraction = float(Fraction(str(weight)) / total)
        steps_per_epoch = cache.manifest.rows / (fraction * plan.effective_batch)
        source = _counts(name, cache, tokenizer)
        counts.append(replace(source, repeated=n_repeated, fraction=fraction, steps_per_epoch=steps_per_epoch))
    return tuple(counts)


def _counts(name: str, cache: TokenCache, tokenizer: Tokenizer) -> TextCounts:
    manifest = cache.manifest
    examples = (shown_example(tokenizer, document) for document in cache.examples(N_EXAMPLES))
    return TextCounts(
        name,
        documents=manifest.documents,
        tokens=manifest.tokens,
        sequences=manifest.rows,
        padding=manifest.padding,
        bad_lines=manifest.bad_lines,
        filtered=manifest.filtered,
        duplicates=manifest.duplicates,
        trained_tokens=manifest.trained_tokens,
        cut_documents=manifest.cut_documents,
        shortest=manifest.shortest,
        longest=manifest.longest,
        lengths=named_lengths(manifest.lengths),
        first_bad_lines=tuple(
            f"{invalid.file} {manifest.unit(invalid.file)} {invalid.line:,}: {invalid.reason}"
            for invalid in manifest.first_bad_lines[:MAX_NAMED_RECORDS]
        ),
        examples=tuple(map(tuple, examples)),
    )
