"""A checkpoint as a model folder for Hugging Face `transformers`, with a model card and a task for lm-eval.

The weights are those of the checkpoint under the same names. `auto_map` in `config.json` names the classes in
`modeling_savant.py`, a copy of the file in this folder, which does not import savant_ray.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import savant_ray
from savant_ray.config import Config
from savant_ray.data.chat_template import SETTINGS_FILE, TEMPLATE_FILE, TOKENIZER_CLASS
from savant_ray.data.conversations import ChatTemplate, ConversationError
from savant_ray.data.tokenizer import END_NAMES, PADDING_NAMES, TOKENIZER_FILE, Tokenizer
from savant_ray.errors import CheckpointError
from savant_ray.evaluation.from_checkpoint import load_model
from savant_ray.export.logic_task import can_encode_suite, write_logic_task
from savant_ray.export.model_card import model_card
from savant_ray.inference.answer_text import turn_end
from savant_ray.training.checkpoint import find_checkpoint, step_of
from savant_ray.training.safetensors_export import WEIGHTS, new_folder, refuse_existing_output, write_weights

MODELING = Path(__file__).with_name("modeling_savant.py")
# The plain form of conversations (`plain_form` in data/conversations.py), for the messages that training accepts.
PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- if content is sequence and content is not string -%}
{%- if content | rejectattr('type', 'in', ['text', 'input_text', 'output_text']) | list -%}
{{ raise_exception('a part of a message is not text') }}
{%- endif -%}
{%- set content = content | map(attribute='text') | join -%}
{%- endif -%}
{%- if content is not string or message['tool_calls'] -%}
{{ raise_exception('a message has a tool call or no text; without a chat template, conversations are text only') }}
{%- endif -%}
{%- set content = content | trim -%}
{%- if message['role'] in ('system', 'developer') -%}{{ content }}
{%- elif message['role'] == 'user' -%}{{ 'Question: ' + content }}
{%- elif message['role'] == 'assistant' -%}{{ 'Answer: ' + content }}
{%- else -%}{{ raise_exception('without a chat template, conversations have no role ' + message['role']) }}
{%- endif -%}
{%- if not loop.last -%}{{ '\\n' if message['role'] == 'user' else '\\n\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '\\nAnswer:' if messages[-1]['role'] == 'user' else '\\n\\nAnswer:' }}{%- endif -%}
"""


def export_hugging_face(checkpoint: Path, output: Path, raw_weights: bool = False) -> None:
    """Write a checkpoint to the new folder `output`. Does not need `transformers`.

    `checkpoint` may be the folder of a run, which means its newest checkpoint. With `training.ema_decay` the weights are
    the average, or with `raw_weights` those of the last step.

    Raises:
        CheckpointError: there is no complete checkpoint, or `transformers` could not use its tokenizer.
        DataError: the tokenizer has no end-of-document token.
        SavantError: `output` exists already, or cannot be written.
    """
    refuse_existing_output(output)
    folder = find_checkpoint(checkpoint)
    model, tokenizer, config = load_model(folder, raw_weights)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise CheckpointError(
            f"checkpoint {folder.name}: its tokenizer has {tokenizer.vocab_size:,} ids, its model only "
            f"{config.model.vocab_size:,}, so a text could have tokens that the model does not know"
        )
    special = _special_tokens(tokenizer)
    files = {
        "config.json": _model_config(config),
        "generation_config.json": _generation_config(config, tokenizer, special),
        TOKENIZER_FILE: tokenizer.prompt_json(),
        SETTINGS_FILE: {
            "tokenizer_class": TOKENIZER_CLASS,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": config.model.max_seq_len,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            **special,
        },
        TEMPLATE_FILE: _chat_template(tokenizer, folder.name),
        "README.md": model_card(folder, step_of(folder), config, tokenizer),
    }
    with new_folder(output) as temporary:
        write_weights({name: weight.cpu() for name, weight in model.state_dict().items()}, temporary / WEIGHTS)
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (temporary / name).write_text(text, encoding="utf-8")
        shutil.copyfile(MODELING, temporary / MODELING.name)
        if can_encode_suite(tokenizer):
            write_logic_task(temporary / "lm_eval", config, tokenizer)


def _model_config(config: Config) -> dict[str, Any]:
    model = config.model
    return {
        "model_type": "savant",
        "architectures": ["SavantForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODELING.stem}.SavantConfig",
            "AutoModelForCausalLM": f"{MODELING.stem}.SavantForCausalLM",
        },
        "dtype": "float32",
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "num_attention_heads": model.n_heads,
        "num_loops": model.n_loops,
        "max_position_embeddings": model.max_seq_len,
        "window_size": model.window_size,
        "global_every": model.global_every,
        "positions": model.positions,
        "soft_cap": model.soft_cap,
        "tie_word_embeddings": False,
        "savant_ray_version": savant_ray.__version__,
    }


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the entries of `tokenizer_config.json` that name special tokens; the chat template's variables take precedence.

    The end-of-document token is left out if it is neither a special token nor named like one, because `transformers` would
    make it a special token and leave it out of decoded text; `generation_config.json` has its id.
    """
    names = {}
    if tokenizer.prefix:
        names["bos_token"] = tokenizer.token_name(tokenizer.prefix[0])
    end = tokenizer.token_name(tokenizer.end_of_document)
    if tokenizer.end_of_document in tokenizer.special_ids or end in END_NAMES or re.fullmatch(r"<.+>|\[.+\]", end):
        names["eos_token"] = names["pad_token"] = end
    for name in reversed(PADDING_NAMES):  # the first name has precedence
        if tokenizer.id_of(name) is not None:
            names["pad_token"] = name
    template = tokenizer.chat_template
    variables = {} if template is None else dict(template.variables)
    return names | {name: text for name, text in variables.items() if tokenizer.id_of(text) is not None}


def _generation_config(config: Config, tokenizer: Tokenizer, special: dict[str, str]) -> dict[str, Any]:
    """Return the run's generation settings; generation ends at the end of a document, and where `turn_end` has a token."""
    temperature = config.validation.temperature
    ends = list(dict.fromkeys([tokenizer.end_of_document, *turn_end(tokenizer).tokens]))
    ids: dict[str, Any] = {"eos_token_id": ends if len(ends) > 1 else ends[0]}
    ids |= {f"{name}_id": tokenizer.id_of(special[name]) for name in ("bos_token", "pad_token") if name in special}
    # The default of transformers would sample from the 50 most likely tokens only.
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    never = {*tokenizer.never_sampled, *range(tokenizer.vocab_size, config.model.vocab_size)}
    return {**ids, "do_sample": bool(temperature), **sampling, "suppress_tokens": sorted(never) or None}


def _chat_template(tokenizer: Tokenizer, checkpoint: str) -> str:
    """Return the tokenizer's template, or that of the plain form, with the tokenizer's prefix at the beginning.

    The prefix is included because `transformers` adds no special tokens to a text that a chat template has rendered.

    Raises:
        CheckpointError: the template could not be read.
    """
    template = tokenizer.chat_template
    if template is not None and template.problem:
        raise CheckpointError(f"checkpoint {checkpoint}: {template.problem}")
    source = PLAIN_TEMPLATE if template is None else template.source
    prefix = "".join(map(tokenizer.token_name, tokenizer.prefix))
    if not prefix or (template is not None and _begins_with(prefix, template)):
        return source
    return (
        f"{{{{ {json.dumps(prefix)} }}}}{{# special tokens before a text #}}\n{source}"  # trim_blocks drops the newline
    )


def _begins_with(prefix: str, template: ChatTemplate) -> bool:
    """Return whether a conversation that the template renders begins with the prefix."""
    conversation = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]
    try:
        return dataclasses.replace(template, prefix="", suffix="").render(conversation).text.startswith(prefix)
    except ConversationError:  # the template refuses this conversation and is not changed
        return True
