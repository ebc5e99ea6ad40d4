"""Every shipped settings file loads by path and by name, and contains only settings that differ from the defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from savant_ray.cli import main
from savant_ray.config import LOGIC_PROMPT, Config, load_config
from savant_ray.data.documents import rule_of
from savant_ray.data.records import Record
from savant_ray.errors import SettingsError
from savant_ray.settings.files import settings_file, shipped_files
from tests.tracked_files import tracked_files

# A record of each data set of the original, with the columns that its card on Hugging Face lists.
STORY = {
    **{"text": "Once upon a time", "prompt": "Write a story.", "text_token_length": 4},
    **{"seed_data": "ultrachat", "format": "story_children", "audience": "young_children"},
}
WORD_PROBLEM = {"question": "1 + 1?", "answer": "2"}
PROGRAM = {
    **{"prompt": "Add.", "main_topic": "sums", "subtopic": "numbers", "adjective": "High", "action_verb": "Create"},
    **{"scenario": "for Engineer", "target_audience": "Beginners", "programming_language": "Python"},
    **{"common_sense_topic": "Time", "idx": 1, "response": "a + b"},
}
FOLDER = Path(__file__).parents[1] / "configs"
SHIPPED = tracked_files("configs/*.yaml")


def stated(path: Path) -> dict[str, Any]:
    """Return the settings in the file by dotted name."""
    sections = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}


def test_the_documented_files_exist() -> None:
    names = {"savant.yaml", "quickstart.yaml", "cluster.yaml", "original_data.yaml", "chat.yaml"}
    assert names <= {path.name for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_loads_and_states_only_what_differs(path: Path) -> None:
    config, defaults = load_config((), {}, path).to_dict(), Config().to_dict()
    for name in stated(path):
        section, field = name.split(".")
        assert config[section][field] != defaults[section][field], f"{name} is the default"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_states_purpose_hardware_duration_and_result(path: Path) -> None:
    header = path.read_text(encoding="utf-8")
    assert all(f"# {topic}:" in header for topic in ("Purpose", "Hardware", "Duration", "Result"))


def test_savant_yaml_has_the_values_of_the_training_guide() -> None:
    config = load_config((), {}, FOLDER / "savant.yaml")
    training, validation, checkpoint = config.training, config.validation, config.checkpoint
    assert (training.batch_size, training.accumulation, training.effective_batch) == (12, 16, 192)
    assert (training.learning_rate, training.max_steps) == (2e-5, 80_000)
    assert (training.warmup_fraction, training.n_warmup_steps) == (0.05, 4_000)
    assert (training.vram_limit_gb, training.gradient_clip, training.precision) == (10.0, 1.0, "bf16")
    assert config.model.soft_cap == 50.0
    assert (validation.every_steps, validation.batches) == (500, 10)
    assert (validation.max_new_tokens, validation.temperature) == (300, 0.6)
    assert validation.prompt == LOGIC_PROMPT
    assert LOGIC_PROMPT == "Question: If X = 5 and Y = 10, what is X + Y?\nAnswer: Let's think step by step:"
    assert (checkpoint.every_steps, checkpoint.keep, config.run.name) == (500, 3, "checkpoints_savant")
    assert [(s.path, s.weight, s.optional) for s in config.data.sources] == [
        ("dataset/savant_dataset_train.jsonl", 0.8, False),
        ("dataset/genius_dataset.jsonl", 0.2, True),
    ]


def test_original_data_yaml_has_the_texts_and_proportions_of_the_original() -> None:
    data = load_config((), {}, FOLDER / "original_data.yaml").data
    sampled = [source.model_copy(update={"sample": 1.0}) for source in data.sources]
    rules = [rule_of(source, held_out=data.held_out.fraction) for source in sampled]
    records = (STORY, WORD_PROBLEM, PROGRAM, WORD_PROBLEM)
    stories, problems, code, logic = (
        rule.documents([Record(1, record)]) for rule, record in zip(rules, records, strict=True)
    )
    assert [document.text for document in stories] == ["Once upon a time"]
    assert {document.text for document in (*problems, *logic)} == {"Question: 1 + 1?\nAnswer: 2"}
    assert [document.text for document in code] == ["Programming Task:\nAdd.\n\nSolution:\na + b"]
    *weights, of_logic = [source.weight for source in data.sources]
    documents = [333_333, 200_035, 50_000]
    assert of_logic == 0.2
    assert weights == pytest.approx([0.8 * n / sum(documents) for n in documents], abs=1e-4)
    assert sum(weights) == pytest.approx(0.8)
    assert [source.limit for source in data.sources] == [333_333, None, 50_000, None]
    assert [source.sample for source in data.sources] == [1, 1, 1, 0.025], "5,000 of 200,035"
    assert (data.mix_by, data.held_out.fraction) == ("documents", 0.05)


def test_chat_yaml_continues_the_model_of_the_quickstart_with_conversations() -> None:
    chat, quickstart = (load_config((), {}, FOLDER / f"{name}.yaml") for name in ("chat", "quickstart"))
    assert (chat.run.init_from, chat.model) == (quickstart.run.name, quickstart.model)
    assert rule_of(chat.data.sources[0], held_out=chat.data.held_out.fraction).train_on == "assistant"


def test_the_quickstart_reads_the_files_that_it_generates() -> None:
    config = load_config((), {}, FOLDER / "quickstart.yaml")
    assert config.data.quickstart
    assert [s.path for s in config.data.sources] == [s.path for s in Config().data.sources]


# --- by name


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_name(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Return `run.name` as `savant config` prints it, and the notes."""
    assert main(["config", *arguments]) == 0
    printed = capsys.readouterr()
    return yaml.safe_load(printed.out)["run"]["name"], printed.err


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_can_be_named_in_any_folder(path: Path, empty_folder: Path) -> None:
    assert settings_file(Path(path.stem)).read_bytes() == path.read_bytes()
    assert set(shipped_files()) == {path.stem for path in SHIPPED}


def test_a_file_in_the_current_folder_is_used_instead_of_the_shipped_one_with_a_note(
    empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_name("--config", "quickstart", capsys=capsys) == ("checkpoints_quickstart", "")
    (empty_folder / "quickstart.yaml").write_text("run: {name: mine}")
    name, notes = run_name("--config", "quickstart", capsys=capsys)
    assert name == "mine" and notes.startswith("note: --config quickstart is quickstart.yaml in this folder, not the ")
    (empty_folder / "other.yaml").write_text("run: {name: other}")
    assert run_name("--config", "other", capsys=capsys) == ("other", "")


def test_a_folder_of_the_name_does_not_hide_the_shipped_file(
    empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (empty_folder / "quickstart").mkdir()
    assert run_name("--config", "quickstart", capsys=capsys) == ("checkpoints_quickstart", "")


def test_a_checkout_does_not_note_that_its_own_file_is_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(FOLDER)
    assert run_name("--config", "quickstart", capsys=capsys) == ("checkpoints_quickstart", "")


@pytest.mark.parametrize(
    ("misspelt", "message"),
    [
        ("quikstart", "quikstart: no such file .*; did you mean --config quickstart, which is shipped"),
        ("configs/quickstart.yaml", "configs/quickstart.yaml: no such file .*; did you mean --config quickstart"),
        ("xyzzy", "xyzzy: no such file .*; the shipped files are chat, cluster, "),
        ("x" * 300, "xxx: file name too long"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_right_one(misspelt: str, message: str, empty_folder: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        load_config((), {}, settings_file(Path(misspelt)))
