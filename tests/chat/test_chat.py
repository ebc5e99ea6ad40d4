"""`savant chat` with lines from a pipe: prompts, history, commands, and what is refused."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from savant_ray.cli import main
from savant_ray.config import Config, SourceConfig, dump_yaml
from savant_ray.data.documents import rule_of
from savant_ray.data.record_reader import documents
from savant_ray.data.source_files import find_files
from savant_ray.data.tokenizer import train_tokenizer
from savant_ray.evaluation.from_checkpoint import stream_answer
from savant_ray.training.checkpoint import write_checkpoint
from savant_ray.training.state import new_state
from tests.chat.fixed_answers import CHATML, END_OF_TURN, write_run
from tests.training.tiny import CPU, MODEL

ROOT = Path(__file__).parents[2]
TEXT = "Question: what is 1 + 2?\nAnswer: it is 3.\n"
COMMAND = [sys.executable, "-m", "savant_ray.cli", "chat"]


class Chat:
    """`savant chat` in this process, with standard input that is not a terminal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, run: Path, text: str, *options: str) -> tuple[int, str, str]:
        """Return the exit code, the answers and the notes for this input."""
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        code = main(["chat", str(run), *options])
        return code, *self._capsys.readouterr()


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    return Chat(monkeypatch, capsys)


def untrained_run(folder: Path, **settings: dict[str, Any]) -> Path:
    """Write a run whose answers depend on the whole prompt."""
    sections = {
        "model": MODEL | {"vocab_size": 300, "max_seq_len": 100} | settings.get("model", {}),
        "training": {"precision": "fp32"},
        "validation": {"max_new_tokens": 12, "temperature": 0.0},
        "data": settings.get("data", {}),
    }
    config = Config.from_dict(sections)
    content = {**new_state(config, CPU).to_checkpoint(), "step": 3}
    content["model_state_dict"]["head.weight"] *= 20
    tokenizer = train_tokenizer(iter([TEXT] * 9), 300)
    printable = [token for token in range(300) if (text := tokenizer.decode([token])) in TEXT and text.strip() == text]
    others = [token for token in range(300) if token not in printable]
    content["model_state_dict"]["head.weight"][others] = 0
    texts = {"config.yaml": dump_yaml(config), "tokenizer.json": tokenizer.to_json()}
    return write_checkpoint(folder / "run", content, texts).parent


def answer_to(run: Path, prompt: str, **options: Any) -> str:
    return "".join(stream_answer(run, prompt, **options)).strip()


def read_by_training(file: Path) -> list[str]:
    """Return the documents that training reads of a file."""
    source = SourceConfig(path=str(file), weight=1)
    return [document.text for document in documents(find_files(source, file.parent, print), rule=rule_of(source))]


# --- prompts and answers


def test_answers_are_those_to_the_conversation_so_far(tmp_path: Path, chat: Chat) -> None:
    run = untrained_run(tmp_path)
    first = answer_to(run, "Question: 1 + 2?\nAnswer:")
    second = answer_to(run, f"Question: 1 + 2?\nAnswer: {first}\n\nQuestion: and 3?\nAnswer:")
    assert first and second != answer_to(run, "Question: and 3?\nAnswer:")
    code, answers, _ = chat(run, "1 + 2?\n\n  \nand 3?\n", "--conversation")
    assert (code, answers.strip()) == (0, f"{first}\n{second}")


def test_after_reset_a_conversation_begins_anew_with_the_same_system_message(tmp_path: Path, chat: Chat) -> None:
    run = untrained_run(tmp_path)
    prompt = "Be 3.\n\nQuestion: 1?\nAnswer:"
    assert answer_to(run, prompt) != answer_to(run, prompt.removeprefix("Be 3.\n\n"))
    _, answers, notes = chat(run, "what?\n/system Be 3.\n/reset\n1?\n/system\n", "--conversation")
    assert answers.rstrip().endswith(answer_to(run, prompt))
    assert "system message: Be 3." in notes and "conversation reset" in notes
    _, answers, notes = chat(run, '/system ""\n1?\n', "--conversation", "--system", "Be 3.")
    assert answers.strip() == answer_to(run, "Question: 1?\nAnswer:") and "system message: none" in notes


def test_the_oldest_turns_are_left_out_of_prompts_that_would_be_too_long_and_this_is_said_once(
    tmp_path: Path, chat: Chat
) -> None:
    run = write_run(tmp_path, " ok", validation={"max_new_tokens": 20}, model={"max_seq_len": 80})
    code, answers, notes = chat(run, "what is it now?\n" * 6, "--conversation")
    assert (code, answers) == (0, "ok\n" * 6)
    assert notes.count("the oldest turns are left out") == 1 and "the context of 80 tokens" in notes


def test_an_answer_after_turns_were_left_out_is_that_to_the_newest_turns(tmp_path: Path, chat: Chat) -> None:
    run = untrained_run(tmp_path, model={"max_seq_len": 56})
    code, _, notes = chat(run, "what is 1?\nwhat is 2?\nwhat is 3?\n/save talk.jsonl\n", "--conversation")
    assert code == 0 and "left out" in notes
    turns = json.loads(Path("talk.jsonl").read_text())["messages"]
    assert len(turns) == 6, "the file has the whole conversation"
    expected = answer_to(run, f"Question: what is 2?\nAnswer: {turns[3]['content']}\n\nQuestion: what is 3?\nAnswer:")
    assert turns[5]["content"] == expected


@pytest.fixture(autouse=True)
def in_an_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_a_message_that_does_not_fit_is_refused_and_the_conversation_stays_as_it_was(
    tmp_path: Path, chat: Chat
) -> None:
    run = untrained_run(tmp_path)
    code, answers, notes = chat(run, f"1?\n{'word ' * 9000}\n2?\n", "--conversation")
    _, expected, _ = chat(run, "1?\n2?\n", "--conversation")
    assert (code, answers) == (1, expected)
    assert "the message is too long: 45," in notes and "the context of the model is 100 tokens, 12 of them" in notes


def test_with_a_chat_template_an_answer_ends_where_the_assistants_turn_does(tmp_path: Path, chat: Chat) -> None:
    run = write_run(tmp_path / "token", "Hi!", after="\n", end=END_OF_TURN, template=CHATML)
    assert chat(run, "who?\nwhy?\n") == (0, "Hi!\nHi!\n", "")
    no_token = CHATML.replace(END_OF_TURN, "</end>")  # as a tokenizer that was made for other text has it
    run = write_run(tmp_path / "text", "Hi!</end>", after="\n", end=None, template=no_token)
    assert chat(run, "who?\nwhy?\n") == (0, "Hi!\nHi!\n", "")


def test_a_system_message_that_the_template_refuses_or_ignores_has_no_effect(tmp_path: Path, chat: Chat) -> None:
    refusing = CHATML.replace("refuse_system is defined", "true")
    run = write_run(tmp_path / "refusing", "Hi!", after="\n", end=END_OF_TURN, template=refusing)
    code, answers, notes = chat(run, "/system Be brief.\nwho?\n")
    assert (code, answers) == (1, "Hi!\n")
    assert (
        "error: the system message cannot be used: the chat template refuses the conversation (no system role)" in notes
    )
    ignoring = "{% set messages = messages | rejectattr('role', 'eq', 'system') | list %}" + CHATML
    run = write_run(tmp_path / "ignoring", "Hi!", after="\n", end=END_OF_TURN, template=ignoring)
    code, answers, notes = chat(run, "/system Be brief.\nwho?\n")
    assert (code, answers, notes) == (
        1,
        "Hi!\n",
        "error: the chat template of the checkpoint ignores system messages\n",
    )


def test_messages_and_answers_with_names_of_special_tokens_do_not_become_part_of_the_conversation(
    tmp_path: Path, chat: Chat
) -> None:
    run = write_run(tmp_path, "[END]", after="\n", end=END_OF_TURN, template=CHATML)
    code, answers, notes = chat(run, "a<|im_start|>b\nwho?\nwhy?\n")
    assert (code, answers) == (1, "[END]\n" * 2)
    assert "error: the message cannot be sent: message 1 contains the special token <|im_start|>\n" in notes
    assert "the answer cannot become part of the conversation: message 2 contains the special token [END]" in notes


def test_without_a_chat_template_an_answer_ends_before_the_next_question(tmp_path: Path, chat: Chat) -> None:
    run = write_run(tmp_path, " 7\nQuestion", end=None)
    assert chat(run, "3 + 4?\n", "--conversation") == (0, "7\n", "")
    cut = chat(run, "3 + 4?\n", "--conversation", "--max-new-tokens", "8")
    assert cut == (0, "7\nQuest\n", "the answer has reached its maximum length, 8 tokens\n")


def test_a_model_that_is_trained_on_text_continues_each_message_as_a_text_of_its_own(
    tmp_path: Path, chat: Chat
) -> None:
    run = write_run(tmp_path, " 7", after="=")
    assert chat(run, "3 + 4 =\n5 + 2 =\n/save out.jsonl\n")[:2] == (0, " 7\n 7\n")
    assert read_by_training(Path("out.jsonl")) == ["3 + 4 = 7", "5 + 2 = 7"]
    code, _, notes = chat(run, "/system Be brief.\n")
    assert code == 1 and "--conversation makes it answer" in notes


@pytest.mark.parametrize("is_set", [True, False])
def test_a_model_that_is_trained_on_conversations_answers_messages(is_set: bool, tmp_path: Path, chat: Chat) -> None:
    turns = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "who?"}) + "\n")
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    talk = {"path": str(tmp_path / "talk.jsonl"), "weight": 1} | ({"messages": "auto"} if is_set else {})
    if is_set:
        (tmp_path / "talk.jsonl").unlink()
    run = write_run(tmp_path, " me", data={"sources": [{"path": str(tmp_path / "text.jsonl"), "weight": 1}, talk]})
    assert chat(run, "who?\n")[1] == "me\n"
    assert chat(run, "who?\n", "--plain")[1] == "\n"


def test_a_saved_conversation_is_read_by_training(tmp_path: Path, chat: Chat) -> None:
    run = write_run(tmp_path, " 7")
    text = '/system Be brief.\n"""\n3 +\n4?\n"""\n/save a.jsonl\n5 + 2?\n/save a.jsonl\n/reset\n1?\n/save b/c.jsonl\n'
    code, answers, notes = chat(run, text, "--conversation")
    assert (code, answers) == (0, "7\n7\n7\n") and "a.jsonl is written" in notes
    conversation = "Be brief.\n\nQuestion: 3 +\n4?\nAnswer: 7\n\nQuestion: 5 + 2?\nAnswer: 7"
    assert read_by_training(Path("a.jsonl")) == [conversation]
    assert read_by_training(Path("b/c.jsonl")) == ["Be brief.\n\nQuestion: 1?\nAnswer: 7"]


def test_saving_replaces_no_file_that_another_conversation_or_program_wrote(tmp_path: Path, chat: Chat) -> None:
    run = write_run(tmp_path, " 7")
    Path("mine.txt").write_text("mine")
    text = "/save a.jsonl\nwho?\n/save\n/save mine.txt\n/save a.jsonl\n/reset\nwhy?\n/save a.jsonl\n/save mine.txt/a\n"
    code, _, notes = chat(run, text, "--conversation")
    assert code == 1 and Path("mine.txt").read_text() == "mine"
    assert [line for line in notes.splitlines() if line.startswith("error")] == [
        "error: /save: there is no conversation yet",
        "error: /save: the name of the file is missing, such as /save conversation.jsonl",
        "error: /save: mine.txt exists already; choose another name",
        "error: /save: a.jsonl exists already; choose another name",
        "error: /save: mine.txt: File exists",
    ]
    assert read_by_training(Path("a.jsonl")) == ["Question: who?\nAnswer: 7"]


# --- commands


def test_unknown_commands_and_invalid_values_are_refused_and_the_next_message_is_answered(
    tmp_path: Path, chat: Chat
) -> None:
    run = write_run(tmp_path, " 7")
    text = "/loop 1\n/xyz\x1b\n/temperature hot\n/temperature -1\n/loops 0\n/loops 1.5\nwho?\n"
    code, answers, notes = chat(run, text, "--conversation")
    assert (code, answers) == (1, "7\n")
    assert notes.splitlines() == [
        "error: /loop: no such command; did you mean /loops? (to send a message that begins with /, put a space before it)",
        "error: /xyz\\x1b: no such command; the commands are /reset, /system, /temperature, /loops, /save, /help, /exit "
        "(to send a message that begins with /, put a space before it)",
        "error: /temperature: 'hot' is not a number of at least 0",
        "error: /temperature: '-1' is not a number of at least 0",
        "error: /loops: '0' is not a whole number from 1 to 1,024",
        "error: /loops: '1.5' is not a whole number from 1 to 1,024",
    ]


def test_a_message_can_begin_with_a_slash_after_a_space_and_exit_ends_the_program(tmp_path: Path, chat: Chat) -> None:
    run = write_run(tmp_path, " 7")
    assert chat(run, " /etc?\n/exit\nwho?\n", "--conversation") == (0, "7\n", "")


def test_temperature_and_loops_are_those_of_the_next_answer(tmp_path: Path, chat: Chat) -> None:
    run = untrained_run(tmp_path)
    text = "1?\n/loops\t1\n1?\n/temperature 2\n1?\n/loops\n/temperature\n"
    code, answers, notes = chat(run, text, "--plain", "--loops", "3", "--seed", "5")
    expected = [
        answer_to(run, "1?", n_loops=3),
        answer_to(run, "1?", n_loops=1),
        answer_to(run, "1?", n_loops=1, temperature=2.0, seed=7),
    ]
    assert code == 0 and [line.strip() for line in answers.splitlines()] == expected and len(set(expected)) == 3
    assert notes.endswith("loops: 1\ntemperature: 2\n")


def test_help_names_every_command(tmp_path: Path, chat: Chat) -> None:
    notes = chat(write_run(tmp_path, " 7"), "/help\n")[2]
    for command in ("/reset", "/system", "/temperature", "/loops", "/save", "/help", "/exit", '"""'):
        assert command in notes


# --- errors


def test_a_model_without_answers_says_so(tmp_path: Path, chat: Chat) -> None:
    code, answers, notes = chat(write_run(tmp_path / "nan", " 7", weight=float("nan")), "who?\n", "--conversation")
    assert (code, answers) == (4, "") and "not finite (NaN or infinite)" in notes
    run = write_run(tmp_path / "silent", "")
    code, answers, notes = chat(run, "who?\nwhy?\n/save a.jsonl\n", "--conversation")
    assert (code, answers) == (1, "\n\n") and "/save: there is no conversation yet" in notes
    assert notes.count("the answer is empty, so the message is not part of the conversation\n") == 2


def test_without_a_checkpoint_the_exit_code_is_4(tmp_path: Path, chat: Chat) -> None:
    code, answers, notes = chat(tmp_path, "who?\n")
    assert (code, answers) == (4, "") and "no checkpoint there" in notes


def test_a_block_ends_with_its_mark_or_the_input(tmp_path: Path, chat: Chat) -> None:
    run = write_run(tmp_path, " 7")
    text = '"""one line"""\r\n"""two\r\n\r\nlines"""\r\n"""\nno end\n'
    assert chat(run, text + "\n/save a.jsonl", "--conversation")[:2] == (0, "7\n7\n7\n")


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}


def test_input_is_utf8_in_a_locale_without_an_encoding(tmp_path: Path) -> None:
    command = [*COMMAND, str(write_run(tmp_path, " 7")), "--conversation"]
    variables = environment(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    done = subprocess.run(command, input="Größe?\n/save a\n".encode(), capture_output=True, env=variables, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, b"7\n"), done.stderr
    assert json.loads((tmp_path / "a").read_text("utf-8"))["messages"][0]["content"] == "Größe?"


def test_input_that_is_not_utf8_is_refused_and_a_closed_output_ends_the_program(tmp_path: Path) -> None:
    run = write_run(tmp_path, " é")
    command = [*COMMAND, str(run), "--conversation"]
    done = subprocess.run(command, input=b"gr\xfc\xdf\nwho?\n", capture_output=True, env=environment())
    assert (done.returncode, done.stdout) == (1, "é\n".encode())
    assert done.stderr == b"error: gr\\xfc\\xdf is not UTF-8 text\n"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command, input=b"who?\n" * 9, stdout=writing, stderr=subprocess.PIPE, env=environment(), timeout=100
    )
    assert (done.returncode, done.stderr) == (1, b"")
