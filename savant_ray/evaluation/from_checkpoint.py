"""Generation and evaluation with the model of a checkpoint, for `savant generate` and `savant evaluate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from savant_ray.config import Config, SourceConfig
from savant_ray.data.documents import Document, encode, validation_texts
from savant_ray.data.record_reader import documents
from savant_ray.data.source_files import find_files
from savant_ray.data.sources import SourceFile
from savant_ray.data.tokenizer import IncrementalDecoder, Tokenizer
from savant_ray.errors import CheckpointError, DataError, SettingsError
from savant_ray.evaluation.held_out_loss import loss_sums
from savant_ray.evaluation.logic_suite import (
    Answer,
    Question,
    Score,
    answer_questions,
    refuse_empty_prompts,
    scores,
    total,
)
from savant_ray.evaluation.loop_statistics import loop_statistics
from savant_ray.inference.generate import generate
from savant_ray.inference.sampling import Sampling
from savant_ray.model.transformer import UniversalTransformer
from savant_ray.training.checkpoint import (
    CONFIG,
    TOKENIZER_FILES,
    find_checkpoint,
    model_weights,
    read_checkpoint,
    read_settings,
    tokenizer_file,
)
from savant_ray.training.step import MicroBatch

TEXT_FILES = (CONFIG, *TOKENIZER_FILES)  # of a checkpoint, for encoding and decoding text
LOSS_DOCUMENTS = 100  # held-out documents for the loss at each depth
MIN_ROW = 128  # smallest length of a row in tokens, for the loss at each depth


def load_model(checkpoint: Path, raw_weights: bool = False) -> tuple[UniversalTransformer, Tokenizer, Config]:
    """Return the fp32 model of a checkpoint, on the GPU if there is one, with its tokenizer and settings.

    `checkpoint` may be the folder of a run, which means its newest checkpoint. With `training.ema_decay` the weights are the
    average, or with `raw_weights` those of the last step.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged or has no tokenizer, its weights do not fit its settings, or
            a weight is NaN or infinite, so that the model could not generate text.
    """
    folder = find_checkpoint(checkpoint)
    config = read_settings(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = UniversalTransformer(config.model)
    weights = model_weights(read_checkpoint(folder), raw_weights)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"checkpoint {folder.name}: its weights do not fit its settings: {error}") from error
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise CheckpointError(
            f"checkpoint {folder.name}: its weights are not finite (NaN or infinite), so the model has no answers; use an "
            "earlier checkpoint"
        )
    return model.to(device).eval(), *load_tokenizer(folder)


def load_tokenizer(checkpoint: Path) -> tuple[Tokenizer, Config]:
    """Return the tokenizer and the settings of a checkpoint, as `load_model` does; reads only `TEXT_FILES`.

    Raises:
        CheckpointError: there is no checkpoint, or it has no tokenizer.
    """
    folder = find_checkpoint(checkpoint)
    config, file = read_settings(folder), tokenizer_file(folder)
    return Tokenizer.load(file, config.data.end_of_document, config.data.add_special_tokens), config


def stream_answer(
    checkpoint: Path,
    prompt: str,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    seed: int = 0,
    n_loops: int | None = None,
    raw_weights: bool = False,
) -> Iterator[str]:
    """Yield the continuation of the prompt as it is generated; None means the value of the checkpoint's settings.

    `raw_weights` is that of `load_model`.

    Raises:
        CheckpointError: as `load_model`.
        SettingsError: the prompt has no tokens.
        DataError: the tokenizer cannot encode the prompt.
    """
    model, tokenizer, config = load_model(checkpoint, raw_weights)
    (prompt_ids,) = tokenizer.encode_prompts([prompt])
    if not prompt_ids:
        raise SettingsError("--prompt: the prompt has no tokens")
    sampling = Sampling.for_tokenizer(
        tokenizer,
        config.validation.max_new_tokens if max_new_tokens is None else max_new_tokens,
        config.validation.temperature if temperature is None else temperature,
        seed,
    )
    decoder = IncrementalDecoder(tokenizer, prompt_ids)
    for token in generate(model, prompt_ids, sampling, n_loops):
        yield decoder.push(token)
    yield decoder.finish()


def answers_of(
    checkpoint: Path,
    questions: Sequence[Question],
    max_new_tokens: int | None = None,
    n_loops: int | None = None,
    raw_weights: bool = False,
) -> Iterator[Answer]:
    """Yield the checkpoint's answers; None means the value of its settings. `raw_weights` is that of `load_model`.

    Raises:
        CheckpointError: as `load_model`.
        DataError: a question's prompt has no tokens.
    """
    model, tokenizer, _, limit = _load_for_questions(checkpoint, questions, max_new_tokens, raw_weights)
    yield from answer_questions(model, tokenizer, questions, limit, n_loops)


def _load_for_questions(
    checkpoint: Path, questions: Sequence[Question], max_new_tokens: int | None, raw_weights: bool
) -> tuple[UniversalTransformer, Tokenizer, Config, int]:
    """Return model, tokenizer and settings of a checkpoint, and the maximum length of an answer in tokens.

    Raises:
        CheckpointError: as `load_model`.
        DataError: a question's prompt has no tokens.
    """
    model, tokenizer, config = load_model(checkpoint, raw_weights)
    refuse_empty_prompts(tokenizer, questions)
    return model, tokenizer, config, config.validation.max_new_tokens if max_new_tokens is None else max_new_tokens


def evaluation_result(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return scores and answers as plain values: for all trained wordings, for new wordings, and for each template."""
    templates = scores(answers)
    return {
        **_score_record(total(templates)),
        "new_wordings": _score_record(total(templates, new_wordings=True)),
        "templates": {name: _score_record(score) for name, score in templates.items()},
        "answers": [
            {
                "template": answer.question.template,
                "prompt": answer.question.prompt,
                "expected": answer.question.answer,
                "text": answer.text,
                "correct": answer.correct,
            }
            for answer in answers
        ],
    }


def _score_record(score: Score) -> dict[str, Any]:
    return {"score": score.fraction, "n": score.n, "interval": list(score.interval)}


def by_depth(
    checkpoint: Path,
    questions: Sequence[Question],
    depths: Sequence[int],
    max_new_tokens: int | None = None,
    raw_weights: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield score, loss, residual and cosine for each number of loops; `raw_weights` is that of `load_model`.

    The loss is that of the first `LOSS_DOCUMENTS` documents of the run's held-out text; residual and cosine are those of the
    last loop on the first document. If the text cannot be read, the loss is None, and residual and cosine are absent.

    Raises:
        CheckpointError: as `load_model`.
        DataError: a question's prompt has no tokens.
    """
    model, tokenizer, config, limit = _load_for_questions(checkpoint, questions, max_new_tokens, raw_weights)
    device = model.head.weight.device
    rows = [row.to(device) for row in held_out_rows(config, tokenizer)]
    for n_loops in depths:
        score = total(scores(answer_questions(model, tokenizer, questions, limit, n_loops)))
        loss, tokens = loss_sums(model, rows, n_loops).tolist()
        row = {"loops": n_loops, **_score_record(score), "loss": loss / tokens if tokens else None}
        if rows:
            statistics = loop_statistics(model, rows[0].tokens_BT, rows[0].document_ids_BT, n_loops)
            row |= {"residual": statistics.residuals[-1], "cosine": statistics.cosines[-1]}
        yield row


def held_out_rows(config: Config, tokenizer: Tokenizer) -> Iterator[MicroBatch]:
    """Yield one sequence `[1, T]` for each of the first validation documents; nothing if they cannot be read.

    T is the next power of two, at least `MIN_ROW` and at most `model.max_seq_len`, so that there are few lengths. On a GPU
    attention is compiled for each length; after too many lengths PyTorch stops compiling and computes all T x T scores at
    once.
    """
    try:
        held_out = list(islice(_held_out_documents(config, tokenizer), LOSS_DOCUMENTS))
    except DataError:
        return
    for ids, is_trained in encode(held_out, tokenizer):
        tokens_T = torch.tensor(ids[: config.model.max_seq_len])
        length = max(MIN_ROW, 1 << (len(tokens_T) - 1).bit_length())
        padding = (0, min(length, config.model.max_seq_len) - len(tokens_T))
        yield MicroBatch(
            F.pad(tokens_T, padding)[None],
            F.pad(torch.zeros_like(tokens_T), padding, value=-1)[None],
            F.pad(torch.from_numpy(is_trained[: len(tokens_T)]), padding, value=True)[None],
            positions=(),
        )


def _held_out_documents(config: Config, tokenizer: Tokenizer) -> Iterator[Document]:
    """Yield the validation documents: those of files, or the held-out fraction of each source.

    Raises:
        DataError: the text cannot be read.
    """
    held_out = config.data.held_out
    files = [] if held_out.path is None else find_files(held_out, config.data.cache_dir, _ignore)
    for text in validation_texts(held_out, files, _existing_sources(config), tokenizer.chat_template):
        yield from documents(text.files, rule=text.rule)


def _existing_sources(config: Config) -> Iterator[tuple[SourceConfig, list[SourceFile]]]:
    """Yield each source with its files, except for optional ones that are missing.

    Raises:
        DataError: a source that is not optional cannot be read.
    """
    for source in config.data.sources:
        try:
            files = find_files(source, config.data.cache_dir, _ignore)
        except DataError:
            if not source.optional:
                raise
        else:
            yield source, files


def _ignore(message: str) -> None:
    """Do nothing with a notice about files that are skipped: training has printed it."""
