"""Settings: sources, their precedence, and the messages about invalid ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from savant_ray.config import Config, ModelConfig, all_settings, dump_yaml, ignored_variables, load_config
from savant_ray.errors import SettingsError
from savant_ray.settings.table import PREFIX
from savant_ray.storage.paths import with_absolute_paths


def refusal(
    *arguments: str, environment: dict[str, str] | None = None, file: Path | None = None, yaml: str | None = None
) -> list[str]:
    """Return the error messages about invalid settings, one per line."""
    if yaml is not None:
        assert file is not None
        file.write_text(yaml, encoding="utf-8")
    with pytest.raises(SettingsError) as error:
        load_config(arguments, environment or {}, file)
    assert error.value.exit_code == 2
    return str(error.value).splitlines()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "settings.yaml"


def test_later_sources_override_earlier_ones(file: Path) -> None:
    file.write_text("training: {max_steps: 1, batch_size: 1, accumulation: 1}\n")
    environment = {"SAVANT_TRAINING__BATCH_SIZE": "2", "SAVANT_TRAINING__ACCUMULATION": "2"}
    training = load_config(["--training.accumulation", "3"], environment, file).training
    assert (training.max_steps, training.batch_size, training.accumulation) == (1, 2, 3)
    assert training.learning_rate == 2e-5


def test_the_environment_is_that_of_the_process_unless_another_one_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAVANT_RUN__SEED", "5")
    assert load_config().run.seed == 5
    assert load_config(environment={}).run.seed == 1337


def test_an_option_takes_its_value_after_a_space_or_an_equals_sign() -> None:
    spaced = load_config(["--training.max_steps", "7", "--training.weight_decay", "0"], {})
    assert spaced == load_config(["--training.max_steps=7", "--training.weight_decay=0"], {})


def test_the_last_of_two_equal_options_is_used() -> None:
    assert load_config(["--run.seed=1", "--run.seed=2"], {}).run.seed == 2


@pytest.mark.parametrize("text", ["2e-5", "2.0e-05", "0.00002", ".00002", "2E-5"])
def test_a_number_has_the_same_value_from_every_source(text: str, file: Path) -> None:
    file.write_text(f"training: {{learning_rate: {text}}}\n")
    from_file = load_config((), {}, file)
    assert from_file.training.learning_rate == 2e-5
    assert from_file == load_config(["--training.learning_rate", text], {})
    assert from_file == load_config((), {"SAVANT_TRAINING__LEARNING_RATE": text})


def test_a_setting_that_is_a_number_or_a_word_takes_whole_numbers_from_every_source(file: Path) -> None:
    file.write_text("scaling: {hang_seconds: 90}\n")
    from_file = load_config((), {}, file)
    assert from_file.scaling.hang_seconds == 90
    assert from_file == load_config(["--scaling.hang_seconds", "90"], {})
    assert from_file == load_config((), {"SAVANT_SCALING__HANG_SECONDS": "90"})


def test_text_on_the_command_line_is_not_interpreted_as_yaml() -> None:
    prompt = "Question: {a: 1}, [b] # no comment\n- 012 'x'"
    config = load_config(["--validation.prompt", prompt, "--run.name", "012"], {})
    assert (config.validation.prompt, config.run.name) == (prompt, "012")


def test_lists_and_names_with_values_are_given_as_yaml_or_json() -> None:
    sources = '[{"path": ["a.jsonl", "b/*.jsonl"], "weight": 1}, {path: c, weight: .5, optional: true}]'
    resources = "{CPU: 2, GPU: 0.5}"
    config = load_config(["--data.sources", sources, "--scaling.resources_per_worker", resources], {})
    assert [source.path for source in config.data.sources] == [["a.jsonl", "b/*.jsonl"], "c"]
    assert [source.optional for source in config.data.sources] == [False, True]
    assert config.scaling.resources_per_worker == {"CPU": 2, "GPU": 0.5}
    assert load_config(["--data.validation", "[a, b]"], {}).data.validation == ["a", "b"]


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("true", True), ("false", False)])
def test_a_switch_is_auto_true_or_false(text: str, value: str | bool) -> None:
    assert load_config(["--training.compile", text], {}).training.compile is value


def test_null_resets_an_optional_setting(file: Path) -> None:
    file.write_text("run: {init_from: other}\n")
    assert load_config(["--run.init_from", "null"], {}, file).run.init_from is None


@pytest.mark.parametrize("text", ["", "# only a comment\n", "training:\n", "\ufefftraining:\n  # nothing\n"])
def test_an_empty_file_changes_no_default(text: str, file: Path) -> None:
    file.write_text(text, encoding="utf-8")
    assert load_config((), {}, file) == Config()


def test_dumped_settings_load_to_the_same_values(file: Path) -> None:
    prompt = "Zeile 1\n\n  “U+2028: \u2028” # kein Kommentar\n"
    config = load_config(["--validation.prompt", prompt, "--training.learning_rate", "1e-7"], {})
    file.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config((), {}, file) == config
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "name", ["2e-5", "1e5", "08", "012", "1:30", "yes", "~", "a\x85b", "a\u2028b", "\ufeffa", "=", "<<"]
)
def test_text_that_looks_like_another_type_is_dumped_and_loaded_as_text(name: str, file: Path) -> None:
    config = Config.from_dict({"run": {"storage_path": name}})
    file.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config((), {}, file) == config
    assert yaml.safe_load(dump_yaml(config))["run"]["storage_path"] == name, "as every other program reads it"


def test_every_setting_can_be_given_by_every_source(file: Path) -> None:
    for row in all_settings():
        text = row.default if isinstance(row.default, str) else yaml.safe_dump(row.default, default_flow_style=True)
        assert load_config([f"--{row.name}", text], {}) == load_config((), {row.variable: text}) == Config()


def test_every_setting_has_a_description() -> None:
    assert all(row.description and row.name.count(".") == 1 for row in all_settings())
    assert all(row.variable == PREFIX + row.name.upper().replace(".", "__") for row in all_settings())


def test_an_unknown_name_is_refused_with_a_suggestion_from_every_source(file: Path) -> None:
    environment = {"SAVANT_TRAINING__MAX_STEP": "1", "SAVANT_TRAINING_BATCH_SIZE": "1", "HOME": "/"}
    yaml = "trainig: {max_steps: 3}\nmodel: {n_head: 2}\ndata: {sources: [{path: a, weigth: 1, weight: 1}]}\n"
    assert refusal("--training.max_step", "1", "--max_steps=1", environment=environment, file=file, yaml=yaml) == [
        f"{file}: trainig: no such setting; did you mean training?",
        f"{file}: model.n_head: no such setting; did you mean model.n_heads?",
        "SAVANT_TRAINING_BATCH_SIZE: no such setting; did you mean SAVANT_TRAINING__BATCH_SIZE?",
        "SAVANT_TRAINING__MAX_STEP: no such setting; did you mean SAVANT_TRAINING__MAX_STEPS?",
        "--training.max_step: no such setting; did you mean training.max_steps?",
        "--max_steps: no such setting; did you mean training.max_steps?",
        f"{file}: data.sources[0].weigth: no such setting; did you mean weight?",
    ]


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("training.max_steps: 5", "training.max_steps: settings are nested in a file; write training: {max_steps: 5}"),
        ("--run.name: x", "--run.name: settings are nested in a file; write run: {name: x}"),
        (
            "SAVANT_DATA__VALIDATION: [a, b]",
            "SAVANT_DATA__VALIDATION: settings are nested in a file; write data: {validation: [a, b]}",
        ),
        (
            "training.max-step: 5",
            "training.max-step: no such setting; did you mean training: {max_steps: 5}?",
        ),
        ("max_steps: 5", "max_steps: no such setting; did you mean training: {max_steps: 5}?"),
        ("trainig: {max_steps: 5}", "trainig: no such setting; did you mean training?"),
        ("xyzzy: 5", "xyzzy: no such setting"),
    ],
)
def test_a_setting_that_is_not_nested_in_a_file_is_refused_with_the_nested_form(
    yaml: str, message: str, file: Path
) -> None:
    assert refusal(file=file, yaml=yaml) == [f"{file}: {message}"]


# --- variables


SERVICES = {
    "SAVANT_HEAD_SVC_SERVICE_HOST": "10.0.0.1",
    "SAVANT_HEAD_SVC_SERVICE_PORT": "6379",
    "SAVANT_HEAD_SVC_SERVICE_PORT_GCS_SERVER": "6379",
    "SAVANT_HEAD_SVC_PORT": "tcp://10.0.0.1:6379",
    "SAVANT_HEAD_SVC_PORT_6379_TCP": "tcp://10.0.0.1:6379",
    "SAVANT_HEAD_SVC_PORT_6379_TCP_ADDR": "10.0.0.1",
    "SAVANT_HEAD_SVC_PORT_6379_TCP_PORT": "6379",
    "SAVANT_HEAD_SVC_PORT_6379_TCP_PROTO": "tcp",
    "SAVANT_HEAD_SVC_PORT_53_UDP_ADDR": "10.0.0.1",
    "SAVANT_SERVICE_HOST": "10.0.0.2",
    "SAVANT_PORT": "tcp://10.0.0.2:80",
    "SAVANT_TRAINING_SERVICE_HOST": "10.0.0.3",
    "SAVANT_DATA_PORT": "udp://10.0.0.3:53",
    "SAVANT_A__B_SERVICE_HOST": "10.0.0.4",
    "SAVANT_NAME": "/web/savant",
    "SAVANT_DB_ENV_VERSION": "3",
}


def test_variables_that_kubernetes_and_docker_add_for_services_are_not_settings() -> None:
    assert load_config((), SERVICES) == Config()
    assert ignored_variables(SERVICES) == []


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("SAVANT_TRAINING__MAX_STEP", "SAVANT_TRAINING__MAX_STEPS"),
        ("SAVANT_TRAINING_MAX_STEPS", "SAVANT_TRAINING__MAX_STEPS"),
        ("SAVANT_TRAINING_MAX_STEP", "SAVANT_TRAINING__MAX_STEPS"),
        ("SAVANT_TRAINING___MAX_STEPS", "SAVANT_TRAINING__MAX_STEPS"),
        ("SAVANT_TRAIN_MAX_STEPS", "SAVANT_TRAINING__MAX_STEPS"),
        ("SAVANT_TRAINING.MAX_STEPS", "SAVANT_TRAINING__MAX_STEPS"),
        ("savant_training__max_steps", "SAVANT_TRAINING__MAX_STEPS"),
        ("SAVANT_Training__Max_Steps", "SAVANT_TRAINING__MAX_STEPS"),
        ("SAVANT_MAX_STEPS", "SAVANT_TRAINING__MAX_STEPS"),
        ("SAVANT_SEED", "SAVANT_RUN__SEED"),
        ("SAVANT_VALIDATION_EVERY_STEPS", "SAVANT_VALIDATION__EVERY_STEPS"),
        ("SAVANT_CHECKPOINT_EVERY_STEPS", "SAVANT_CHECKPOINT__EVERY_STEPS"),
    ],
)
def test_a_misspelt_variable_is_refused_with_the_right_one(variable: str, meant: str) -> None:
    assert refusal(environment={variable: "5"}) == [f"{variable}: no such setting; did you mean {meant}?"]


def test_a_variable_of_the_form_section_and_name_is_refused_even_if_no_setting_is_similar() -> None:
    assert refusal(environment={"SAVANT_XYZZY__QQQ": "5"}) == ["SAVANT_XYZZY__QQQ: no such setting"]


def test_other_variables_are_ignored_and_listed() -> None:
    others = {"SAVANT_HOME": "/srv", "SAVANT_IMAGE_TAG": "1.2", "SAVANT_MODEL_DIR": "/data", "SAVANT_PORT": "8080"}
    assert load_config((), others | SERVICES | {"SAVANT_PORT": "8080"}) == Config()
    assert ignored_variables(others) == sorted(others)


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("SAVANT_RUN__NAME", '"my run"', "my run"),
        ("SAVANT_RUN__NAME", "'my run'", "my run"),
        ("SAVANT_RUN__NAME", "it's", "it's"),
        ("SAVANT_RUN__NAME", "my run\r", "my run"),
        ("SAVANT_RUN__NAME", '"my run"\r', "my run"),
        ("SAVANT_RUN__NAME", '"', '"'),
        ("SAVANT_RUN__NAME", "'a' and 'b'", "'a' and 'b'"),
        ("SAVANT_VALIDATION__PROMPT", '"one\\ntwo"', "one\ntwo"),
        ("SAVANT_DATA__CACHE_DIR", '"C:\\Data"', "C:\\Data"),
        ("SAVANT_TRAINING__MAX_STEPS", '"5"', 5),
        ("SAVANT_TRAINING__COMPILE", "'true'", True),
        ("SAVANT_SCALING__NUM_WORKERS", '"[1, 4]"', [1, 4]),
        ("SAVANT_RUN__INIT_FROM", '""', None),
    ],
)
def test_quotes_that_an_env_file_keeps_around_a_value_are_removed(variable: str, text: str, value: Any) -> None:
    section, field = variable.removeprefix(PREFIX).lower().split("__")
    assert load_config((), {variable: text}).to_dict()[section][field] == value


def test_a_variable_or_an_option_that_is_not_utf_8_is_named() -> None:
    undecodable = b"\xe9\xe8".decode(errors="surrogateescape")
    assert refusal(environment={"SAVANT_RUN__NAME": undecodable}) == ["SAVANT_RUN__NAME: not UTF-8 text"]
    assert refusal("--run.storage_path", undecodable) == ["--run.storage_path: not UTF-8 text"]
    with pytest.raises(SettingsError, match=r"^run\.storage_path: .* is not text that UTF-8 can hold$"):
        Config.from_dict({"run": {"storage_path": undecodable}})
    assert load_config((), {"SOMEBODY_ELSES": undecodable}) == Config()


# --- values and options


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("training.max_steps", "1e3", "expected a whole number, found 1000.0; write 1000"),
        ("training.max_steps", "8,000", "expected a whole number, found 8,000; write 8000"),
        ("training.max_steps", "1'234'567", "expected a whole number, found 1'234'567; write 1234567"),
        ("training.max_steps", "80 000", "expected a whole number, found 80 000; write 80000"),
        ("training.max_steps", "80k", "expected a whole number, found 80k; write 80000"),
        ("training.max_steps", "1,5", "expected a whole number, found 1,5"),
        ("training.learning_rate", "0,5", "expected a number, found 0,5; write 0.5"),
        ("training.learning_rate", "0,001", "expected a number, found 0,001; write 0.001"),
        ("training.learning_rate", "2,5e-5", "expected a number, found 2,5e-5; write 2.5e-5"),
        (
            "training.max_steps",
            "“5”",
            "expected a whole number, found “5”; use ' or \" instead of typographic quotes",
        ),
        ("training.max_steps", "", "a value is missing"),
        ("data.sources", "a.jsonl", "expected a list, found a.jsonl; write [{path: PATH, weight: 1}]"),
        ("data.quickstart", "", "a value is missing"),
        ("scaling.num_workers", "", "a value is missing"),
    ],
)
def test_a_number_in_another_notation_is_refused_with_the_right_one(name: str, text: str, message: str) -> None:
    variable = PREFIX + name.replace(".", "__").upper()
    assert refusal(f"--{name}", text) == [f"--{name}: {message}"]
    assert refusal(environment={variable: text}) == [f"{variable}: {message}"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("data.sources", "[{path: a.jsonl weight: 1}]", " line 1: not valid YAML: expected ',' or '}', but got ':'"),
        ("data.sources", "[{path: *.jsonl, weight: 1}]", "but found '.'; a text that begins with * needs quotes"),
        ("training.profile", "{steps: 1, steps: 2}", " line 1: steps was already given in line 1"),
        ("scaling.num_workers", "[1, 4", " line 1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_a_list_or_mapping_that_is_not_valid_yaml_is_refused_with_the_reason(
    name: str, text: str, message: str
) -> None:
    variable = PREFIX + name.replace(".", "__").upper()
    (of_option,) = refusal(f"--{name}", text)
    (of_variable,) = refusal(environment={variable: text})
    assert of_option.startswith(f"--{name} line 1: ") and of_option.endswith(message)
    assert of_variable == of_option.replace(f"--{name}", variable)


def test_underscores_may_separate_thousands() -> None:
    assert load_config(["--training.max_steps", "1_000"], {}).training.max_steps == 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["–training.max_steps", "5"], "–training.max_steps: an option begins with two plain hyphens; write {}"),
        (["—training.max_steps=5"], "—training.max_steps: an option begins with two plain hyphens; write {}"),
        (["−−training.max_steps", "5"], "−−training.max_steps: an option begins with two plain hyphens; write {}"),
        (["-training.max_steps", "5"], "-training.max_steps: an option begins with two plain hyphens; write {}"),
        (["five”"], "five”: expected --section.setting VALUE; use ' or \" instead of typographic quotes"),
        (["--no-data.quickstart"], "--no-data.quickstart: no such setting; did you mean --data.quickstart false?"),
        (["--no-training.compile"], "--no-training.compile: no such setting; did you mean --training.compile false?"),
        (["--Training.Max-Steps", "5"], "--Training.Max-Steps: no such setting; did you mean training.max_steps?"),
        (["--data.quickstart"], "--data.quickstart: a value is missing: true or false"),
        (["-5"], "-5: expected --section.setting VALUE"),
    ],
)
def test_an_option_with_other_dashes_or_a_guessed_name_is_refused_with_the_right_one(
    arguments: list[str], message: str
) -> None:
    assert refusal(*arguments) == [message.format("--training.max_steps")]


def test_a_name_that_resembles_no_setting_is_refused_without_a_suggestion() -> None:
    assert refusal("--xyzzy", "1") == ["--xyzzy: no such setting"]


def test_a_duplicate_key_is_refused_with_both_lines(file: Path) -> None:
    yaml = "training:\n  max_steps: 1\n  max_steps: 2\nmodel: {}\ntraining: {}\n"
    assert sorted(refusal(file=file, yaml=yaml)) == [
        f"{file} line 3: max_steps was already given in line 2",
        f"{file} line 5: training was already given in line 1",
    ]


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        (
            "a:\n  b: **/*.jsonl\n",
            " line 2: not valid YAML: expected alphabetic or numeric character, but found '*'; a text that begins with * "
            "needs quotes",
        ),
        (
            "a: Question: {x}\n",
            " line 1: not valid YAML: mapping values are not allowed here; check the indentation, or quote a text that "
            "contains ': '",
        ),
        ("a: [1\nb: 2\n", " line 2: not valid YAML: expected ',' or ']', but got ':'"),
        (
            "run:\n\tname: x\n",
            " line 2: not valid YAML: found character '\\t' that cannot start any token; write spaces instead of tabs",
        ),
        ("run: {seed: !!int x}\n", " line 1: not valid YAML: x is not a whole number"),
        ("run: {seed: !!int 9999999999999999999}\n", " line 1: not valid YAML: '9999999999999999999' is not a whole"),
        ("model:\n  soft_cap: !!float ''\n", " line 2: not valid YAML: '' is not a number"),
        ("training: {compile: !!bool x}\n", " line 1: not valid YAML: x is not true or false"),
        ("run: !!map [name]\n", " line 1: not valid YAML: expected a mapping node, but found sequence"),
        ('run: {name: "\\UFFFFFFFF"}\n', ": not valid YAML: "),
        ("run: !!python/object:os.system x\n", " line 1: not valid YAML: could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", " line 2: not valid YAML: but found another document"),
        ("[" * 5000, " line 1: not valid YAML: nested more than 50 levels deep"),
        (f"run: {{seed: {'[' * 400}{']' * 400}}}\n", " line 1: not valid YAML: nested more than 50 levels deep"),
        ("- a\n", ": expected sections with settings, found [a]"),
        ("[]\n", ": expected sections with settings, found []"),
        ("false\n", ": expected sections with settings, found false"),
        ("training: 3\n", ": training: expected settings below it, found 3"),
    ],
)
def test_an_invalid_settings_file_is_refused_with_the_line(yaml: str, message: str, file: Path) -> None:
    (line,) = refusal(file=file, yaml=yaml)
    assert line.startswith(f"{file}{message}")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, file: Path) -> None:
    assert refusal(file=tmp_path / "none.yaml") == [f"{tmp_path}/none.yaml: no such file or directory"]
    assert refusal(file=tmp_path) == [f"{tmp_path}: is a directory"]
    file.write_bytes(b"run: {name: \xff}")
    assert refusal(file=file) == [f"{file} line 1: not UTF-8 text; save the file as UTF-8"]
    file.write_bytes(b"# a comment\nrun:\n  name: \xe9\xe8\n")
    assert refusal(file=file) == [f"{file} line 3: not UTF-8 text; save the file as UTF-8"]
    file.write_bytes(bytes(range(256)))
    assert refusal(file=file) == [f"{file}: not a text file"]
    file.write_bytes(b'{"text": "one two"}\n' * 100_000)
    assert refusal(file=file) == [f"{file}: larger than 1 MiB, so probably not a settings file"]
    assert refusal(file=Path("~nobody-of-that-name/a.yaml")) == [
        "~nobody-of-that-name/a.yaml: there is no such user, or no home folder"
    ]


def test_a_missing_file_is_named_with_the_folder_that_was_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(file=Path("a.yaml")) == [f"a.yaml: no such file or directory ({tmp_path}/a.yaml)"]
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert refusal(file=Path("a.yaml")) == ["a.yaml: no such file or directory"]


def test_a_file_in_the_home_folder_can_be_named_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("run: {seed: 5}\n")
    assert load_config((), {}, Path("~/mine.yaml")).run.seed == 5


@pytest.mark.parametrize(
    "content",
    [
        b"training:\r\n  max_steps: 5\r\nrun:\r\n  name: x\r\n",
        b"training:\r  max_steps: 5\rrun:\r  name: x\r",
        b"\xef\xbb\xbftraining: {max_steps: 5}\r\nrun: {name: x}\r\n",
        "training: {max_steps: 5}\r\nrun: {name: x}\r\n".encode("utf-16"),
        b'{"training": {"max_steps": 5}, "run": {"name": "x"}}',
        b'{\n\t"training": {\n\t\t"max_steps": 5\n\t},\n\t"run": {\n\t\t"name": "x"\n\t}\n}\n',
        b"--- # settings\ntraining: {max_steps: 5}\nrun: {\"name\": 'x'}\n...\n",
    ],
    ids=["CRLF", "CR", "BOM", "UTF-16", "JSON", "JSON with tabs", "marks"],
)
def test_encoding_and_line_ends_of_a_file_do_not_matter(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    assert load_config((), {}, file) == load_config(["--training.max_steps=5", "--run.name=x"], {})


def test_json_escapes_are_read_and_duplicate_keys_are_refused(file: Path) -> None:
    file.write_text('{"run": {"name": "\\ud83d\\ude00"}, "training": {"learning_rate": 1e-5}}')
    config = load_config((), {}, file)
    assert (config.run.name, config.training.learning_rate) == ("😀", 1e-5)
    assert refusal(file=file, yaml='{\n\t"run": {"seed": 1, "seed": 2}\n}') == [f"{file}: seed is given twice"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("training.batch_size", "true", "expected a whole number, found true"),
        ("training.batch_size", "1.5", "expected a whole number, found 1.5"),
        ("training.batch_size", "many", "expected a whole number, found many"),
        ("training.batch_size", "9" * 5000, "expected a whole number, found .inf"),
        ("run.seed", "1000000000000000000", "1e+18 is not a whole number from 0 to 999999999999999999"),
        ("run.seed", "9" * 30, "1e+30 is not a whole number from 0 to 999999999999999999"),
        ("run.seed", "-1", "-1 has to be at least 0"),
        ("training.batch_size", "0", "0 has to be at least 1"),
        ("training.learning_rate", ".nan", "expected a finite number, found .nan"),
        ("training.learning_rate", ".inf", "expected a finite number, found .inf"),
        ("data.max_line_mb", "1e308", "1.0e+308 has to be at most 1e+12"),
        ("model.soft_cap", "1e39", "1.0e+39 has to be at most 1e+30"),
        ("training.learning_rate", "-1", "-1 has to be greater than 0"),
        ("training.learning_rate", "true", "expected a number, found true"),
        ("training.warmup_fraction", "1", "1 has to be less than 1"),
        ("training.precision", "fp16", "expected bf16, bf16-mixed or fp32, found fp16"),
        ("training.compile", "1", "expected true, false or auto, found '1'"),
        ("data.sources", "[]", "[] needs a length of at least 1"),
        ("data.validation", "", "'' must not be empty"),
        ("data.on_bad_line", "ignore", "expected skip or error, found ignore"),
        ("run.name", "a/b", "'a/b' is not a valid name of a folder; the folder above it is run.storage_path"),
        ("run.name", "..", "'..' is not a valid name of a folder; the folder above it is run.storage_path"),
        ("run.name", "a\x7f", "'a\\x7f' is not a valid name of a folder"),
        ("run.name", "a\u2028b", "'a\\u2028b' is not a valid name of a folder"),
        ("run.name", "é" * 128, f"'{'é' * 128}' has 256 bytes in UTF-8; a folder's name has at most 255"),
        ("scaling.resources_per_worker", "4", "expected names with values, found 4"),
        ("scaling.num_workers", "x", "expected a whole number or a list, found x"),
        ("scaling.num_workers", "[1, 2, 3]", "[1, 2, 3] needs a length of at most 2"),
        ("scaling.num_workers", "[2, 1]", "the minimum, 2, is greater than the maximum, 1"),
        ("scaling.num_workers", "193", "193 is more than the 192 sequences of a step "),
    ],
)
def test_an_invalid_value_is_refused_with_the_option_or_variable_that_set_it(
    name: str, text: str, message: str
) -> None:
    variable = PREFIX + name.replace(".", "__").upper()
    (option_line,) = refusal(f"--{name}", text)
    (variable_line,) = refusal(environment={variable: text})
    assert option_line.startswith(f"--{name}: {message}")
    assert variable_line.startswith(f"{variable}: {message}")


def test_types_in_a_file_are_not_converted(file: Path) -> None:
    assert refusal(file=file, yaml='run: {name: 7, seed: "7"}\n') == [
        f"{file}: run.name: expected text, found 7",
        f"{file}: run.seed: expected a whole number, found '7'",
    ]


def test_an_invalid_item_of_a_list_is_named(file: Path) -> None:
    yaml = "data: {validation: [a, 3], sources: [{path: a, weight: -1}, {weight: 1}]}\n"
    assert refusal(file=file, yaml=yaml) == [
        f"{file}: data.sources[0].weight: -1 has to be greater than 0",
        f"{file}: data.sources[1].path: is missing",
        f"{file}: data.validation[1]: expected text, found 3",
    ]


def test_settings_that_contradict_each_other_are_refused(file: Path) -> None:
    yaml = "model: {dim: 512, n_heads: 7}\n"
    assert refusal(file=file, yaml=yaml) == [f"{file}: model.n_heads: 7 does not divide model.dim = 512"]
    assert refusal("--model.dim", "500") == ["model.n_heads: 16 does not divide model.dim = 500 (--model.dim)"]


def test_a_dict_is_validated_like_every_other_source() -> None:
    with pytest.raises(SettingsError, match=r"^trainig: no such setting; did you mean training\?$"):
        Config.from_dict({"trainig": {}})
    with pytest.raises(SettingsError, match=r"^model\.n_heads: 7 does not divide model\.dim = 512$"):
        Config.from_dict({"model": {"n_heads": 7, "dim": 512}})


def test_settings_are_validated_when_they_are_loaded_and_not_again_on_the_way_to_the_workers() -> None:
    sources = "[{path: [a.jsonl, s3://b/c.jsonl], weight: 1}, {path: d.jsonl, weight: .5, optional: true}]"
    config = load_config(["--data.sources", sources, "--scaling.num_workers", "[1, 4]"], {})
    rebuilt = Config.from_validated(json.loads(json.dumps(config.to_dict())))
    assert rebuilt == config and rebuilt.data.sources[0].path == ["a.jsonl", "s3://b/c.jsonl"]

    unvalidated = config.model_copy(update={"training": config.training.model_copy(update={"max_steps": 0})})
    with pytest.raises(SettingsError, match=r"training\.max_steps: 0 has to be at least 1"):
        Config.from_dict(unvalidated.to_dict())
    resolved = with_absolute_paths(unvalidated, Path("/in"), Path("/out"))
    received = Config.from_validated(resolved.to_dict())
    assert received == resolved and received.training.max_steps == 0


def test_an_option_without_a_value_or_a_value_without_an_option_is_refused() -> None:
    assert refusal("stray", "--run.seed", "--run.name") == [
        "stray: expected --section.setting VALUE",
        "--run.seed: a value is missing",
        "--run.name: a value is missing",
    ]


def test_settings_are_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().run.seed = 3


def test_derived_values_are_computed_from_the_settings() -> None:
    config = Config()
    assert (config.training.effective_batch, config.training.n_warmup_steps) == (192, 4000)
    assert ModelConfig(dim=64, n_heads=4).head_dim == 16


@pytest.mark.parametrize(
    ("name", "value", "option"),
    [
        ("run.storage_path", "s3://key:secret@bucket/runs", "run.storage_path"),
        ("run.init_from", "s3://key:secret@bucket/runs/a", "run.init_from"),
        ("data.validation", "s3://key:secret@bucket/held_out.jsonl", "data.validation"),
        ("data.sources", "[{path: [a, 's3://key:secret@bucket/x.jsonl'], weight: 1}]", "data.sources[0].path[1]"),
        ("reporting.mlflow", "postgresql://user:secret@host/mlflow", "reporting.mlflow"),
    ],
)
def test_an_address_with_a_password_is_refused_and_not_repeated(name: str, value: str, option: str) -> None:
    (message,) = refusal(f"--{name}", value)
    assert message.startswith(f"--{option}: the address contains a password") and "secret@" not in message


def test_an_address_without_a_password_may_name_a_user_and_a_port() -> None:
    assert load_config(["--run.storage_path", "hdfs://user@host:8020/runs?a=b:c"], {}).run.storage_path


def test_the_largest_seed_that_is_accepted_seeds_everything() -> None:
    config = load_config(["--run.seed", "9" * 18])
    assert config.run.seed == 10**18 - 1
    for too_large in (10**18, 2**64):
        with pytest.raises(SettingsError, match="run.seed"):
            Config.from_dict({"run": {"seed": too_large}})
