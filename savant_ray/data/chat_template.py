"""Reads and writes the chat template of a tokenizer.

It is in `chat_template.jinja` or `tokenizer_config.json`, beside the tokenizer or on Hugging Face.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson

from savant_ray.data.conversations import ChatTemplate
from savant_ray.locations import error_text

TEMPLATE_FILE, SETTINGS_FILE = "chat_template.jinja", "tokenizer_config.json"
DEFAULT_NAME = "default"  # name of the template that is used if a tokenizer has several
SHOWN_CHARACTERS = 200  # of an error message
TOKENIZER_CLASS = "PreTrainedTokenizerFast"  # with which `transformers` loads any tokenizer.json


def load_chat_template(origin: Path | str) -> ChatTemplate | None:
    """Return the chat template in a folder, or of the Hugging Face model with this name; None if there is none.

    If it cannot be read or fetched, a template is returned that refuses all conversations with the reason, because texts do
    not need it.
    """
    read = _read_file if isinstance(origin, Path) else _fetch
    try:
        settings = _settings(read(origin, SETTINGS_FILE))
        source = (read(origin, TEMPLATE_FILE) or b"").decode() or _template_in(settings)
    except (OSError, ValueError) as error:  # also the errors of huggingface_hub
        reason = " ".join(error_text(error).split())[:SHOWN_CHARACTERS]
        return ChatTemplate("", problem=f"the chat template of the tokenizer {origin} cannot be read ({reason})")
    if not source:
        return None
    tokens = ((name, _token(value)) for name, value in sorted(settings.items()) if name.endswith("_token"))
    return ChatTemplate(source, tuple((name, text) for name, text in tokens if text is not None))


def chat_template_files(template: ChatTemplate | None) -> dict[str, str]:
    """Return the files from which `load_chat_template` loads the template, as text by name; none without a template.

    `transformers` reads them, too.
    """
    if template is None or template.problem:
        return {}
    settings = {"tokenizer_class": TOKENIZER_CLASS, **dict(template.variables)}
    return {TEMPLATE_FILE: template.source, SETTINGS_FILE: json.dumps(settings, indent=2, ensure_ascii=False) + "\n"}


def _read_file(folder: Path | str, name: str) -> bytes | None:
    """Return the content of a file in a folder, None if it does not exist."""
    try:
        return (Path(folder) / name).read_bytes()
    except FileNotFoundError:
        return None


def _fetch(model: Path | str, name: str) -> bytes | None:
    """Return the content of a file of a model on Hugging Face, None if it does not exist; without network from the cache."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(model), name)).read_bytes()
    except LocalEntryNotFoundError:  # there is no network, and the file is not in the cache
        if try_to_load_from_cache(str(model), name) is None:
            raise
        return None  # the cache knows that the model has no such file
    except EntryNotFoundError:
        return None


def _settings(content: bytes | None) -> dict[str, Any]:
    settings = orjson.loads(content) if content else {}
    return settings if isinstance(settings, dict) else {}


def _template_in(settings: dict[str, Any]) -> str:
    """Return the template in `tokenizer_config.json`, a text or several with names; "" if there is none.

    Raises:
        ValueError: there are templates, but not the default one.
    """
    template = settings.get("chat_template")
    if isinstance(template, list) and template:
        template = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        if not template.get(DEFAULT_NAME):
            names = f" ({', '.join(map(str, template))})" if template else ""
            raise ValueError(f"of its chat templates{names} none is named {DEFAULT_NAME}")
        template = template[DEFAULT_NAME]
    if template and not isinstance(template, str):
        raise ValueError("chat_template is not a text")
    return template or ""


def _token(value: Any) -> str | None:
    """Return the text of a special token, which may be an object with a `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
