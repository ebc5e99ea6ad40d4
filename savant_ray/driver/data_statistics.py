"""Counts the text of the settings before a run: `savant data`. Needs no Ray."""

from __future__ import annotations

from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

from savant_ray.config import Config
from savant_ray.data.cache_builder import train_or_load_tokenizer
from savant_ray.data.order import weights_by_documents
from savant_ray.data.text_statistics import SAMPLE_BYTES, text_statistics
from savant_ray.driver.data_files import find_data_files, short_name
from savant_ray.driver.tokenizer_choice import choose_tokenizer, find_weights_checkpoint_without_lock
from savant_ray.errors import unexpected_errors_explained
from savant_ray.reporting import RunReport


def data_statistics(config: Config, full: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the statistics of each source, and the plan of the run, as `print_text_statistics` takes them.

    Of each source a sample is read, or all of it with `full`. Validation files are left out as in training, if they exist. A
    tokenizer that a run would train is trained.

    Raises:
        CheckpointError: as `find_weights_checkpoint`.
        DataError: text is missing or unreadable, or the tokenizer cannot encode it.
        SettingsError: as `choose_tokenizer`; or the cache folder cannot be created.
    """
    with RunReport(None) as report, unexpected_errors_explained(activity=lambda: report.activity):
        tokenizer = choose_tokenizer(config, find_weights_checkpoint_without_lock(config), allow_changes=True)
        files = find_data_files(config, report, needs_validation=False)
        if tokenizer is None:
            report.begin_stage("training the tokenizer")
            texts = files.training_texts(chat_template=None)
            tokenizer = train_or_load_tokenizer(
                texts, Path(config.data.cache_dir), config.model.vocab_size, config.data.max_line_bytes
            )
        seen: set[bytes] = set()
        sources = []
        texts = files.training_texts(tokenizer.chat_template)
        for (source, _), text in zip(files.sources, texts, strict=True):
            name = short_name(source.path)
            report.begin_stage(f"reading {name}")
            counted = text_statistics(
                name,
                text,
                tokenizer,
                config.model.max_seq_len,
                config.data.max_line_bytes,
                seen,
                sample_bytes=None if full else SAMPLE_BYTES,
                progress=lambda done, total: report.progress(done, total, "bytes"),
            )
            estimate = (
                counted.bytes / counted.bytes_read if counted.bytes_read and not counted.is_limit_reached else 1.0
            )
            if text.rule.limit is not None and counted.documents:
                estimate = min(estimate, text.rule.limit * (1 - text.rule.held_out) / counted.documents)
            sources.append({**asdict(counted), "estimate": max(estimate, 1.0)})
    return sources, {
        "sequence_length": config.model.max_seq_len,
        "effective_batch": config.training.effective_batch,
        "max_steps": config.training.max_steps,
        "fractions": _fractions_of_sequences(config, [source.weight for source, _ in files.sources], sources),
    }


def _fractions_of_sequences(config: Config, weights: list[float], sources: list[dict[str, Any]]) -> list[float]:
    """Return the fraction of the sequences that each source has in the run.

    With `data.mix_by: documents` it depends on the documents in a sequence; of a source without documents it is unknown, and
    the weights are returned as they are.
    """
    documents, sequences = ([source[name] for source in sources] for name in ("documents", "sequences"))
    if config.data.mix_by == "documents" and all(documents):
        return [float(fraction) for fraction in weights_by_documents(weights, documents, sequences)]
    total = sum(Fraction(str(weight)) for weight in weights)
    return [float(Fraction(str(weight)) / total) for weight in weights]
