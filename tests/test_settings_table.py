"""Every setting with every kind of invalid value, from every source: one line that names it and what was found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from savant_ray.config import SourceConfig, all_settings, load_config
from savant_ray.errors import SettingsError
from savant_ray.settings.table import Setting
from savant_ray.settings.yaml_text import show

ANY = (None, True, 3, 2.5, "some word", ["a"], {"a": 1})  # what a file may hold


@dataclass(frozen=True)
class Kind:
    """What a setting may be: in the words of its refusal, what of ANY it takes, and what lies out of its range."""

    expected: str
    takes: tuple[type, ...]
    outside: tuple[tuple[Any, str], ...] = ()
    takes_any_text: bool = False  # so that on a command line nothing is of the wrong type


NOT_FINITE = (
    (float("nan"), "expected a finite number, found .nan"),
    (float("inf"), "expected a finite number, found .inf"),
)
EMPTY = ("", "'' must not be empty")
NEGATIVE = (-1, "-1 has to be at least 0")
TEXT = Kind("text", (str,), (EMPTY,), takes_any_text=True)
OPTIONAL_TEXT = Kind("text", (str, type(None)), (EMPTY,), takes_any_text=True)
NAME = Kind(
    "text",
    (str,),
    (
        EMPTY,
        ("a/b", "'a/b' is not a valid name of a folder; the folder above it is run.storage_path"),
        ("..", "'..' is not a valid name of a folder; the folder above it is run.storage_path"),
    ),
    takes_any_text=True,
)
COUNT = Kind("a whole number", (int,), ((0, "0 has to be at least 1"), (-5, "-5 has to be at least 1")))
COUNT_OR_NONE = Kind("a whole number", (int,), (NEGATIVE,))
TWO_OR_MORE = Kind("a whole number", (int,), ((1, "1 has to be at least 2"),))
POSITIVE = Kind(
    "a number",
    (int, float),
    ((0, "0 has to be greater than 0"), (-0.5, "-0.5 has to be greater than 0"), *NOT_FINITE),
)
NOT_NEGATIVE = Kind("a number", (int, float), (NEGATIVE, *NOT_FINITE))
SHARE = Kind(
    "a number",
    (float,),
    (
        NEGATIVE,
        (1, "1 has to be less than 1"),
        (3, "3 has to be less than 1"),
        (2.5, "2.5 has to be less than 1"),
        *NOT_FINITE,
    ),
)
FRACTION = Kind(
    "a number",
    (int, float),
    (NEGATIVE, (3, "3 has to be at most 1"), (1.5, "1.5 has to be at most 1"), *NOT_FINITE),
)
PART = Kind(
    "a number",
    (float,),
    (
        (0, "0 has to be greater than 0"),
        (-1, "-1 has to be greater than 0"),
        (3, "3 has to be at most 1"),
        (2.5, "2.5 has to be at most 1"),
        *NOT_FINITE,
    ),
)
DECAY = Kind(
    "a number",
    (float, type(None)),
    (
        (0, "0 has to be greater than 0"),
        (1, "1 has to be less than 1"),
        (3, "3 has to be less than 1"),
        (2.5, "2.5 has to be less than 1"),
        *NOT_FINITE,
    ),
)
COUNT_OR_NONE_OR_NULL = Kind("a whole number", (int, type(None)), (NEGATIVE,))
YES_OR_NO = Kind("true or false", (bool,))
SWITCH = Kind("true, false or auto", (bool,))


def choice(words: str) -> Kind:
    return Kind(words, ())


TABLE: dict[str, Kind] = {
    "run.name": NAME,
    "run.storage_path": TEXT,
    "run.seed": COUNT_OR_NONE,
    "run.grace_seconds": POSITIVE,
    "run.init_from": OPTIONAL_TEXT,
    "run.continue_from": OPTIONAL_TEXT,
    "model.vocab_size": COUNT,
    "model.dim": COUNT,
    "model.n_heads": COUNT,
    "model.n_loops": COUNT,
    "model.max_seq_len": TWO_OR_MORE,
    "model.window_size": COUNT,
    "model.global_every": COUNT,
    "model.positions": choice("none or rotary"),
    "model.soft_cap": POSITIVE,
    "data.sources": Kind("a list", (list,), (([], "[] needs a length of at least 1"),)),
    "data.mix_by": choice("sequences or documents"),
    "data.deduplicate": YES_OR_NO,
    "data.validation": Kind(
        "text, a list or names with values",
        (str, list, dict),
        (EMPTY, ([], "[] needs a length of at least 1")),
        takes_any_text=True,
    ),
    "data.tokenizer": TEXT,
    "data.end_of_document": OPTIONAL_TEXT,
    "data.add_special_tokens": SWITCH,
    "data.cache_dir": TEXT,
    "data.on_bad_line": choice("skip or error"),
    "data.max_line_mb": POSITIVE,
    "data.quickstart": YES_OR_NO,
    "training.max_steps": COUNT,
    "training.batch_size": COUNT,
    "training.accumulation": COUNT,
    "training.learning_rate": POSITIVE,
    "training.warmup_fraction": SHARE,
    "training.warmup_steps": COUNT_OR_NONE_OR_NULL,
    "training.schedule": choice("cosine or wsd"),
    "training.decay_fraction": PART,
    "training.double_loops_fraction": FRACTION,
    "training.weight_decay": NOT_NEGATIVE,
    "training.gradient_clip": POSITIVE,
    "training.ema_decay": DECAY,
    "training.precision": choice("bf16, bf16-mixed or fp32"),
    "training.optimizer": choice("adamw or muon"),
    "training.vram_limit_gb": POSITIVE,
    "training.compile": SWITCH,
    "training.recompute_loops": SWITCH,
    "training.deterministic": SWITCH,
    "training.compare_ranks_every": COUNT_OR_NONE,
    "training.max_skipped_steps": COUNT,
    "training.on_spike": choice("warn, skip or rewind"),
    "training.profile": Kind("names with values", (dict, type(None))),
    "validation.every_steps": COUNT,
    "validation.batches": COUNT,
    "validation.logic_problems": COUNT_OR_NONE,
    "validation.prompt": TEXT,
    "validation.max_new_tokens": COUNT,
    "validation.temperature": NOT_NEGATIVE,
    "checkpoint.every_steps": COUNT,
    "checkpoint.keep": COUNT,
    "scaling.num_workers": Kind(
        "a whole number or a list",
        (int, list),
        (
            (0, "0 has to be at least 1"),
            ([1], "[1] needs a length of at least 2"),
            ([1, 2, 3], "[1, 2, 3] needs a length of at most 2"),
        ),
    ),
    "scaling.use_gpu": SWITCH,
    "scaling.resources_per_worker": Kind("names with values", (dict, type(None))),
    "scaling.threads_per_worker": Kind(
        "a whole number or auto", (int,), (*COUNT.outside, (20_000, "20000 has to be at most 1024"))
    ),
    "scaling.max_failures": COUNT_OR_NONE,
    "scaling.hang_seconds": Kind(
        "a number or auto",
        (int, float, type(None)),
        ((0, "0 has to be at least 5"), (2.5, "2.5 has to be at least 5"), (1e6, "1000000.0 has to be at most 604800")),
    ),
    "reporting.mlflow": OPTIONAL_TEXT,
    "reporting.wandb": OPTIONAL_TEXT,
}

# what stands inside a setting: the setting, its value, the part that is wrong, and the message about it
INSIDE: list[tuple[str, Any, str, str]] = [
    ("data.sources", [{"weight": 1}], "[0].path", "is missing"),
    ("data.sources", [{"path": "a"}], "[0].weight", "is missing"),
    ("data.sources", [{"path": "a", "weight": 0}], "[0].weight", "0 has to be greater than 0"),
    ("data.sources", [{"path": "a", "weight": "x"}], "[0].weight", "expected a number, found x"),
    ("data.sources", [{"path": "a", "weight": True}], "[0].weight", "expected a number, found true"),
    ("data.sources", [{"path": "", "weight": 1}], "[0].path", "'' must not be empty"),
    ("data.sources", [{"path": [], "weight": 1}], "[0].path", "[] needs a length of at least 1"),
    ("data.sources", [{"path": 3, "weight": 1}], "[0].path", "expected text or a list, found 3"),
    ("data.sources", [{"path": ["a", None], "weight": 1}], "[0].path[1]", "expected text, found null"),
    ("data.sources", [{"path": "a", "weight": 1, "optional": "x"}], "[0].optional", "expected true or false, found x"),
    (
        "data.sources",
        [{"path": "a", "weight": 1, "optoinal": True}],
        "[0].optoinal",
        "no such setting; did you mean optional?",
    ),
    (
        "data.sources",
        [{"path": "a", "weight": 1}, "b"],
        "[1]",
        "expected names with values, found b; write {path: PATH, weight: 1}",
    ),
    *(
        ("data.sources", [{"path": "a", "weight": 1, **fields}], f"[0]{part}", message)
        for fields, part, message in [
            ({"text": ""}, ".text", "'' must not be empty"),
            ({"text": 3}, ".text", "expected text, found 3"),
            ({"messages": ["a"]}, ".messages", "expected text, found [a]"),
            ({"format": "xml"}, ".format", "expected auto, jsonl, json, parquet, arrow, csv or text, found xml"),
            ({"text_blocks": "x"}, ".text_blocks", "expected true or false, found x"),
            ({"quotes": "x"}, ".quotes", "expected true or false, found x"),
            ({"split": ""}, ".split", "'' must not be empty"),
            ({"train_on": "user"}, ".train_on", "expected assistant or all, found user"),
            ({"template": "no field"}, ".template", "no field contains no field, such as {question}"),
            ({"template": "{a"}, ".template", "'{a' has a brace without its counterpart; write {{ or }} for a brace"),
            ({"template": "a}"}, ".template", "a} has a brace without its counterpart; write {{ or }} for a brace"),
            (
                {"template": "x {a:>3}"},
                ".template",
                "x {a:>3} has {a:>3}, which is not the name of a field; write {{ or }} for a brace",
            ),
            (
                {"template": "x {a!r}"},
                ".template",
                "x {a!r} has {a!r}, which is not the name of a field; write {{ or }} for a brace",
            ),
            (
                {"template": "x {}"},
                ".template",
                "x {} has {}, which is not the name of a field; write {{ or }} for a brace",
            ),
            ({"text": "a", "template": "{b}"}, "", "text and template exclude each other; keep one of them"),
            ({"text": "a", "messages": "auto"}, "", "text and messages exclude each other; keep one of them"),
            (
                {"text": "a", "train_on": "assistant"},
                "",
                "train_on, assistant, is for conversations (messages), but there is text; remove one",
            ),
            ({"sample": 0}, ".sample", "0 has to be greater than 0"),
            ({"sample": 1.5}, ".sample", "1.5 has to be at most 1"),
            ({"limit": 0}, ".limit", "0 has to be at least 1"),
            ({"filter": 3}, ".filter", "expected names with values, found 3"),
            ({"filter": {"min_char": 3}}, ".filter.min_char", "no such setting; did you mean min_chars?"),
            ({"filter": {"min_chars": 3, "max_chars": 2}}, ".filter", "min_chars, 3, is greater than max_chars, 2"),
            (
                {"filter": {"equals": {"lang": {"a": 1}}}},
                ".filter.equals.lang",
                "expected true, false, a whole number, a number or text, found {a: 1}",
            ),
        ]
    ),
    ("data.validation", {"fraction": 0}, ".fraction", "0 has to be greater than 0"),
    ("data.validation", {"fraction": 0.6}, ".fraction", "0.6 has to be at most 0.5"),
    ("data.validation", {"fractoin": 0.1}, ".fractoin", "no such setting; did you mean fraction?"),
    ("data.validation", {"text": "a"}, "", "needs either a path or a fraction of the sources' documents"),
    (
        "data.validation",
        {"path": "a", "fraction": 0.1},
        "",
        "needs either a path or a fraction of the sources' documents",
    ),
    ("data.validation", {"fraction": 0.1, "text": "a"}, "", "text has no effect with fraction; set it in data.sources"),
    (
        "data.validation",
        {"fraction": 0.1, "quotes": False},
        "",
        "quotes has no effect with fraction; set it in data.sources",
    ),
    ("data.validation", ["a", 3], "[1]", "expected text, found 3"),
    ("data.validation", ["a", ""], "[1]", "'' must not be empty"),
    ("training.profile", {"first_step": 0}, ".first_step", "0 has to be at least 1"),
    ("training.profile", {"first_step": 1, "steps": 0}, ".steps", "0 has to be at least 1"),
    ("training.profile", {"steps": 2}, ".first_step", "is missing"),
    ("training.profile", {"first_step": 1, "ranks": 1}, ".ranks", "expected 0 or all, found 1"),
    ("training.profile", {"first_step": 1, "ranks": True}, ".ranks", "expected 0 or all, found true"),
    ("training.profile", {"first_step": 1, "stepps": 2}, ".stepps", "no such setting; did you mean steps?"),
    ("scaling.num_workers", [0, 2], "[0]", "0 has to be at least 1"),
    ("scaling.num_workers", [1, "x"], "[1]", "expected a whole number, found x"),
    ("scaling.resources_per_worker", {"CPU": -1}, ".CPU", "-1 has to be at least 0"),
    ("scaling.resources_per_worker", {"CPU": "x"}, ".CPU", "expected a number, found x"),
    ("scaling.resources_per_worker", {"CPU": True}, ".CPU", "expected a number, found true"),
]

CONTRADICTIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"model.dim": 512, "model.n_heads": 7}, "model.n_heads", "7 does not divide model.dim = 512"),
    (
        {"model.positions": "rotary", "model.dim": 6, "model.n_heads": 2},
        "model.positions",
        "rotary needs an even head width, dim / n_heads = 3",
    ),
    ({"scaling.num_workers": [2, 1]}, "scaling.num_workers", "the minimum, 2, is greater than the maximum, 1"),
    (
        {"scaling.num_workers": 7, "training.batch_size": 2, "training.accumulation": 3},
        "scaling.num_workers",
        "7 is more than the 6 sequences of a step (training.batch_size × training.accumulation)",
    ),
    (
        {"scaling.num_workers": [1, 193]},
        "scaling.num_workers",
        "193 is more than the 192 sequences of a step (training.batch_size × training.accumulation)",
    ),
    (
        {"data.sources": [{"path": "a.jsonl", "weight": 2000000}, {"path": "b.jsonl", "weight": 1}]},
        "data.sources",
        "weight 1 of b.jsonl, beside weights up to 2e+06, is less than 1 sequence in 100,000; raise it, or leave "
        "the source out",
    ),
]

ROWS = {row.name: row for row in all_settings()}


def in_yaml(value: Any) -> str:
    """As somebody types it."""
    return (
        value
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    )


def refusals(given: dict[str, Any], file: Path, named: str) -> Iterator[tuple[str, str, str]]:
    """(source, what it calls the setting `named`, what it says) for a file, the environment and the command line."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in given.items():
        section, _, field = name.partition(".")
        sections.setdefault(section, {})[field] = value
    file.write_text(yaml.safe_dump(sections), encoding="utf-8")
    variables = {Setting(name, None, "", ()).variable: in_yaml(value) for name, value in given.items()}
    options = [part for name, value in given.items() for part in (f"--{name}", in_yaml(value))]
    sources: list[tuple[str, tuple[list[str], dict[str, str], Path | None], str]] = [
        ("file", ([], {}, file), f"{file}: {named}"),
        ("environment", ([], variables, None), Setting(named, None, "", ()).variable),
        ("command line", (options, {}, None), f"--{named}"),
    ]
    for source, arguments, called in sources:
        with pytest.raises(SettingsError) as error:
            load_config(*arguments)
        assert error.value.exit_code == 2
        yield source, called, str(error.value)


def test_the_table_has_every_setting() -> None:
    assert list(TABLE) == list(ROWS)
    assert {part.rpartition(".")[2] for name, _, part, _ in INSIDE if name == "data.sources"} >= set(
        SourceConfig.model_fields
    )


@pytest.mark.parametrize(("name", "kind"), TABLE.items())
def test_a_value_of_the_wrong_type_is_reported_in_one_line_from_every_source(
    name: str, kind: Kind, tmp_path: Path
) -> None:
    wrong = [value for value in ANY if type(value) not in kind.takes]
    assert wrong
    if float in kind.takes and int not in kind.takes:
        wrong.remove(3)
    for value in wrong:
        text, types = in_yaml(value), ROWS[name].types
        stays_text = str in types and not isinstance(value, types)
        for source, called, printed in refusals({name: value}, tmp_path / "settings.yaml", name):
            found = show(text) if stays_text and source != "file" else show(value)
            advice = "; write [{path: PATH, weight: 1}]" if name == "data.sources" and isinstance(value, str) else ""
            assert printed == f"{called}: expected {kind.expected}, found {found}{advice}"
            if kind.takes_any_text:
                break


@pytest.mark.parametrize(("name", "kind"), TABLE.items())
def test_a_value_out_of_range_is_reported_in_one_line_from_every_source(name: str, kind: Kind, tmp_path: Path) -> None:
    for value, message in kind.outside:
        if value == "" and type(None) in kind.takes:  # on a command line nothing is null, as behind a name in a file
            assert load_config([f"--{name}="], {ROWS[name].variable: ""}) == load_config((), {})
            continue
        for source, called, printed in refusals({name: value}, tmp_path / "settings.yaml", name):
            assert printed == f"{called}: {message}", source


@pytest.mark.parametrize("name", TABLE)
def test_a_misspelt_name_is_reported_with_the_right_one_from_every_source(name: str, tmp_path: Path) -> None:
    section, field = name.split(".")
    for typo in (name[:-1], f"{section}.{field[1]}{field[0]}{field[2:]}", f"{section[:-1]}.{field}"):
        for source, called, printed in refusals({typo: 1}, tmp_path / "settings.yaml", typo):
            wrong, right = called, ROWS[name].variable if source == "environment" else name
            if source == "file" and not typo.startswith(f"{section}."):
                wrong, right = called.rpartition(".")[0], section
            assert printed == f"{wrong}: no such setting; did you mean {right}?"


@pytest.mark.parametrize(("name", "value", "part", "message"), INSIDE)
def test_an_invalid_part_of_a_setting_is_reported_in_one_line_from_every_source(
    name: str, value: Any, part: str, message: str, tmp_path: Path
) -> None:
    for source, called, printed in refusals({name: value}, tmp_path / "settings.yaml", name):
        assert printed == f"{called}{part}: {message}", source


@pytest.mark.parametrize(("given", "named", "message"), CONTRADICTIONS)
def test_a_contradiction_is_reported_in_one_line_from_every_source(
    given: dict[str, Any], named: str, message: str, tmp_path: Path
) -> None:
    for source, called, printed in refusals(given, tmp_path / "settings.yaml", named):
        assert printed == f"{called}: {message}", source
