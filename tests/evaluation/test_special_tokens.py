"""A checkpoint generates and is evaluated with the special tokens that it was trained with."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from savant_ray.cli import main
from savant_ray.config import Config, dump_yaml
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.errors import SettingsError
from savant_ray.evaluation.from_checkpoint import answers_of, by_depth, stream_answer
from savant_ray.evaluation.logic_suite import Question
from savant_ray.evaluation.validator import Validator
from savant_ray.events import Event, SampleGenerated
from savant_ray.inference.generate import generate
from savant_ray.inference.sampling import Sampling
from savant_ray.model.transformer import UniversalTransformer
from savant_ray.training.checkpoint import read_checkpoint, read_settings, write_checkpoint
from savant_ray.training.state import new_state
from tests.data.albert_like import CLS, FOLDER, SEP
from tests.training.tiny import CPU, MODEL, rank_micro_batches

PROMPT = "a red hen"
WORDS = ["the", "a", "on", "is"]  # one token each
ALBERT = Tokenizer.load(FOLDER)
OLDER = "older"  # its settings do not name the choice
CHOICES = [("auto", [CLS]), (True, [CLS]), (False, []), (OLDER, [])]
EACH = pytest.mark.parametrize(("choice", "before"), CHOICES, ids=[str(choice) for choice, _ in CHOICES])


def written(folder: Path, choice: bool | str, head: float = 1.0, likely: Sequence[int] = ()) -> Path:
    """A checkpoint of an untrained model with this `data.add_special_tokens`; `head` scales its logits."""
    (folder / "held_out.jsonl").write_text(json.dumps({"text": PROMPT}) + "\n")
    data = {"validation": str(folder / "held_out.jsonl"), "add_special_tokens": "auto" if choice == OLDER else choice}
    config = Config.from_dict({"model": MODEL, "data": data, "training": {"precision": "fp32"}})
    content = {**new_state(config, CPU).to_checkpoint(), "step": 3}
    content["model_state_dict"]["head.weight"] *= head
    content["model_state_dict"]["head.weight"][list(likely)] *= 50
    settings = dump_yaml(config)
    if choice == OLDER:
        settings, removed = re.subn(r"\n +add_special_tokens: .*", "", settings)
        assert removed == 1
    return write_checkpoint(folder / "run", content, {"config.yaml": settings, "tokenizer.json": ALBERT.to_json()})


def model_of(checkpoint: Path) -> UniversalTransformer:
    model = UniversalTransformer(read_settings(checkpoint).model)
    model.load_state_dict(read_checkpoint(checkpoint)["model_state_dict"])
    return model


def answer_to(checkpoint: Path, ids: list[int]) -> str:
    """Return what a greedy answer adds to the text of the prompt `ids`."""
    new_ids = list(generate(model_of(checkpoint), ids, Sampling.for_tokenizer(ALBERT, 12, temperature=0.0)))
    return ALBERT.decode([*ids, *new_ids]).removeprefix(ALBERT.decode(ids))


@EACH
def test_a_prompt_has_the_special_tokens_of_the_beginning_of_a_document(
    choice: bool | str, before: list[int], tmp_path: Path
) -> None:
    checkpoint = written(tmp_path, choice)
    expected = answer_to(checkpoint, [*before, *ALBERT.encode(PROMPT)])
    assert expected != answer_to(checkpoint, [*([] if before else [CLS]), *ALBERT.encode(PROMPT)])
    assert "".join(stream_answer(checkpoint, PROMPT, max_new_tokens=12, temperature=0.0)) == expected
    (answer,) = answers_of(checkpoint, [Question("mine", PROMPT, "4")], max_new_tokens=12)
    assert answer.text == expected


def test_an_answer_that_begins_a_new_word_begins_with_a_space(tmp_path: Path) -> None:
    words = [ALBERT.encode(word)[0] for word in WORDS]
    checkpoint = written(tmp_path, choice=True, likely=words)
    model, greedy = model_of(checkpoint), Sampling.for_tokenizer(ALBERT, 12, temperature=0.0)
    first_ids = {prompt: next(generate(model, [CLS, *ALBERT.encode(prompt)], greedy)) for prompt in WORDS}
    prompt = next(prompt for prompt, first_id in first_ids.items() if first_id in words)

    streamed = "".join(stream_answer(checkpoint, prompt, max_new_tokens=12, temperature=0.0))
    (answer,) = answers_of(checkpoint, [Question("mine", prompt, "4")], max_new_tokens=12)
    assert streamed == answer.text == sample_of(checkpoint, prompt)
    assert re.match(" [a-z]", streamed)


def sample_of(checkpoint: Path, prompt: str) -> str:
    """Return the text of a validation's sample."""
    settings = read_settings(checkpoint).to_dict()
    settings["validation"] |= {"prompt": prompt, "max_new_tokens": 12, "temperature": 0.0}
    config = Config.from_dict(settings)
    state = new_state(config, CPU)
    state.load_weights(read_checkpoint(checkpoint)["model_state_dict"])
    events: list[Event] = []
    batches = rank_micro_batches(0, 4, 0, 1, 4)
    counts = dict(target_tokens=1, trained_bytes=1)
    Validator(config, ALBERT, batches, **counts, rank=0, emit=events.append, stop_requested=lambda: False)(state)
    return next(event.text for event in events if isinstance(event, SampleGenerated))


@EACH
def test_held_out_text_has_the_special_tokens_of_training(
    choice: bool | str, before: list[int], tmp_path: Path
) -> None:
    checkpoint = written(tmp_path, choice)
    tokens = torch.tensor([[*before, *ALBERT.encode(PROMPT), SEP]])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model_of(checkpoint)(tokens)[0, :-1], tokens[0, 1:])
    (depth,) = by_depth(checkpoint, [Question("mine", PROMPT, "4")], [MODEL["n_loops"]], max_new_tokens=1)
    assert depth["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_the_end_token_ends_an_answer_and_the_begin_token_is_never_sampled(tmp_path: Path) -> None:
    checkpoint = written(
        tmp_path, True, head=0.0
    )  # all tokens are as likely, so the first one that is allowed is chosen
    assert SEP == CLS + 1
    assert "".join(stream_answer(checkpoint, PROMPT, temperature=0.0)) == ""


def test_a_prompt_without_tokens_is_refused_even_if_documents_have_a_begin_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = written(tmp_path, True)
    with pytest.raises(SettingsError, match="--prompt: the prompt has no tokens"):
        next(stream_answer(checkpoint, ""))
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"prompt": "\u0301", "answer": 2}) + "\n")
    assert main(["evaluate", str(checkpoint), "--problems", str(own)]) != 0
    assert "has no tokens in the checkpoint's tokenizer" in capsys.readouterr().err


def test_a_checkpoint_of_an_older_version_keeps_its_settings(tmp_path: Path) -> None:
    assert read_settings(written(tmp_path, OLDER)).data.add_special_tokens is False
    assert read_settings(written(tmp_path, "auto")).data.add_special_tokens == "auto"
