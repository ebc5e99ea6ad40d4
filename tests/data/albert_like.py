"""A small tokenizer with ALBERT's normalizer, special tokens, ids and template, in `albert_like/tokenizer.json`.

`python -m tests.data.albert_like` rewrites it. It has 50 entries, the vocabulary size of the model in
`tests/original/program.py`.
"""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from savant_ray.data.tokenizer import Tokenizer

FOLDER = Path(__file__).with_suffix("")
SPECIAL = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]  # ids 0 to 4
CLS, SEP = 2, 3
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role + ':\n' + message.content + eos_token }}{% endfor %}"
)
PIECES = [
    "▁the",
    "▁a",
    "▁re",
    "▁on",
    "▁is",
    "▁",
    "at",
    "en",
    "he",
    "an",
    "ed",
    "or",
    "in",
    "er",
    ".",
    ",",
    "?",
    "'",
    ":",
]


def write() -> None:
    entries = [(token, 0.0) for token in SPECIAL]
    entries += [(piece, -3.0 - number / 10) for number, piece in enumerate(PIECES)]
    entries += [(letter, -6.0) for letter in string.ascii_lowercase]
    tokenizer = tokenizers.Tokenizer(models.Unigram(entries, unk_id=SPECIAL.index("<unk>")))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace("\n", " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    FOLDER.mkdir(exist_ok=True)
    tokenizer.save(str(FOLDER / "tokenizer.json"))


def with_chat_template(folder: Path, name: str = "tokenizer_config.json") -> Tokenizer:
    """Return the tokenizer with a chat template, from a new folder that has it in a file of this name."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(FOLDER / "tokenizer.json", folder / "tokenizer.json")
    settings = {"bos_token": "[CLS]", "eos_token": {"content": "[SEP]"}, "pad_token": None}
    if name == "tokenizer_config.json":
        settings["chat_template"] = CHAT_TEMPLATE
    else:
        (folder / name).write_text(CHAT_TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.load(folder)


if __name__ == "__main__":
    write()
