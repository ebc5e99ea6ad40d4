"""Fixtures: runs with small models, and their exports for Hugging Face."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from savant_ray.config import Config, dump_yaml
from savant_ray.data.tokenizer import Tokenizer, train_tokenizer
from savant_ray.training.checkpoint import write_checkpoint
from savant_ray.training.state import new_state
from tests.training.tiny import CPU, MODEL

# Read when transformers is imported. It copies the code of a model folder into the folder of the second variable.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "HF_MODULES_CACHE" not in os.environ:
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="savant-modules-")
    atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

TEXT = "Question: what is 1 + 2? The answer is 3.\n"
WriteRun = Callable[..., Path]


@pytest.fixture(scope="session")
def trained_tokenizer() -> Tokenizer:
    return train_tokenizer(iter([TEXT] * 9), 300)


@pytest.fixture
def write_run(tmp_path: Path, trained_tokenizer: Tokenizer) -> WriteRun:
    """Return a function that writes a run with the given settings and returns its folder."""

    def write(
        model: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        validation: dict[str, Any] | None = None,
        training: dict[str, Any] | None = None,
        tokenizer_json: str | None = None,
        files: dict[str, str] | None = None,
        weights: Callable[[Config], dict[str, torch.Tensor]] = random_weights,
    ) -> Path:
        config = Config.from_dict(
            {
                "run": {"name": "test_run"},
                "model": MODEL | {"vocab_size": 320} | (model or {}),
                "data": data or {},
                "training": training or {},
                "validation": {"max_new_tokens": 6, **(validation or {})},
            }
        )
        texts = {"config.yaml": dump_yaml(config), "tokenizer.json": tokenizer_json or trained_tokenizer.to_json()}
        state = new_state(config, CPU)
        state.data_fingerprint = "a text"
        content = {**state.to_checkpoint(), "step": 3, "model_state_dict": weights(config)}
        return write_checkpoint(tmp_path / "test_run", content, texts | (files or {})).parent

    return write


def random_weights(config: Config) -> dict[str, torch.Tensor]:
    """Return initial weights, with larger queries and keys, so that attention is sharp and the soft cap has an effect."""
    weights = {name: weight.clone() for name, weight in new_state(config, CPU).master_weights().items()}
    for projection in ("q_proj", "k_proj"):
        weights[f"recurrent_block.attn.{projection}.weight"] *= 3
    return weights


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
