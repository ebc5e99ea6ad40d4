"""Checkpoints of models that give a known answer: the next token depends on the last one only, and tokens are bytes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import tokenizers
import torch

from savant_ray.config import Config, dump_yaml
from savant_ray.data.tokenizer import END_OF_DOCUMENT, Tokenizer, train_tokenizer
from savant_ray.training.checkpoint import write_checkpoint
from savant_ray.training.state import new_state
from tests.training.tiny import CPU

END_OF_TURN = "<|im_end|>"
SPECIAL = ["<|im_start|>", END_OF_TURN, "[END]"]
VOCABULARY = 258 + len(SPECIAL) + 1  # even, because the model has two heads
CHATML = """\
{%- for message in messages %}
    {%- if message.role == 'system' and refuse_system is defined %}{{ raise_exception('no system role') }}{% endif %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}"""


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer whose tokens are bytes and special tokens."""
    inner = tokenizers.Tokenizer.from_str(train_tokenizer(iter(["a"]), 258).to_json())
    inner.add_special_tokens(SPECIAL)
    return Tokenizer(inner)


def write_run(
    folder: Path,
    answer: str,
    after: str = ":",
    end: str | None = END_OF_DOCUMENT,
    template: str = "",
    weight: float = 1.0,
    **settings: dict[str, Any],
) -> Path:
    """Write a run whose model answers `answer` after a prompt that ends with the byte `after`.

    No byte may occur twice in `after` and `answer`. The answer is followed by the token `end`; None: by `after` and itself.
    """
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(after + answer)
    assert len(set(ids)) == len(ids), "a byte occurs twice"
    last = ids[0] if end is None else tokenizer.encode_prompts([end], special_tokens=True)[0][0]
    shape = {
        "vocab_size": VOCABULARY,
        "dim": VOCABULARY,
        "n_heads": 2,
        "n_loops": 1,
        "max_seq_len": 256,
        "window_size": 4,
    }
    sections = {
        "model": shape | settings.get("model", {}),
        "training": {"precision": "fp32"},
        "validation": {"temperature": 0.0} | settings.get("validation", {}),
        "data": settings.get("data", {}),
    }
    config = Config.from_dict(sections)
    content = {**new_state(config, CPU).to_checkpoint(), "step": 3}
    weights = content["model_state_dict"]
    for gate in ("recurrent_block.attn.liquid_gate", "recurrent_block.liquid_gate_ffn"):
        weights[f"{gate}.weight"].zero_()
        weights[f"{gate}.bias"].fill_(-1e4)  # the recurrent block changes nothing
    weights["embed.weight"].copy_(torch.eye(VOCABULARY) * weight)
    weights["head.weight"].zero_()
    for token, successor in itertools.pairwise([*ids, last]):
        weights["head.weight"][successor, token] = 1
    texts = {"config.yaml": dump_yaml(config), "tokenizer.json": tokenizer.to_json()}
    if template:
        texts["chat_template.jinja"] = template
    return write_checkpoint(folder / "run", content, texts).parent
