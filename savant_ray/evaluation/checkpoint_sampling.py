"""A checkpoint answers a prompt: what `savant generate` calls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from savant_ray.config import Config
from savant_ray.data.tokenizer import IncrementalDecoder, Tokenizer
from savant_ray.errors import CheckpointError, SettingsError
from savant_ray.inference.generate import Sampling, generate
from savant_ray.model.transformer import UniversalTransformer
from savant_ray.training.checkpoint import find_checkpoint, read_checkpoint, read_settings, tokenizer_file


def load_model(checkpoint: Path) -> tuple[UniversalTransformer, Tokenizer, Config]:
    """The fp32 model of a checkpoint (or of a run's newest one) on the GPU if there is one, with its tokenizer.

    Raises:
        CheckpointError: there is none, it is damaged, has no tokenizer, or its weights are not those of its model.
    """
    folder = find_checkpoint(checkpoint)
    config = read_settings(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = UniversalTransformer(config.model)
    weights = read_checkpoint(folder)["model_state_dict"]
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"checkpoint {folder.name}: its weights are not those of its model: {error}") from error
    tokenizer = Tokenizer.load(tokenizer_file(folder), config.data.end_of_document, config.data.add_special_tokens)
    return model.to(device).eval(), tokenizer, config


def stream_answer(
    checkpoint: Path,
    prompt: str,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    seed: int = 0,
    n_loops: int | None = None,
) -> Iterator[str]:
    """Yields text as it is generated; what is None is taken from the checkpoint's `validation` settings.

    Raises:
        CheckpointError: there is no readable checkpoint.
        SettingsError: the prompt is empty.
    """
    model, tokenizer, config = load_model(checkpoint)
    (tokens,) = tokenizer.encode_prompts([prompt])
    if not tokens:
        raise SettingsError("--prompt: the prompt has no tokens")
    sampling = Sampling.of(
        tokenizer,
        config.validation.max_new_tokens if max_new_tokens is None else max_new_tokens,
        config.validation.temperature if temperature is None else temperature,
        seed,
    )
    decoder = IncrementalDecoder(tokenizer)
    for token in generate(model, tokens, sampling, n_loops):
        yield decoder.push(token)
    yield decoder.finish()
