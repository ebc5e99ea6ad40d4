"""The exported folder in transformers gives the results of savant_ray, and in lm-eval the score of `savant evaluate`."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import tokenizers
import torch

from savant_ray.config import Config
from savant_ray.data.conversations import conversation_prompt, plain_form
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.evaluation.from_checkpoint import answers_of, evaluation_result, load_model
from savant_ray.evaluation.logic_suite import NEW_WORDING_SUFFIX, logic_suite
from savant_ray.export.hugging_face import export_hugging_face
from savant_ray.inference.generate import generate, generate_many
from savant_ray.inference.sampling import Sampling
from savant_ray.model.transformer import UniversalTransformer
from tests.data.albert_like import FOLDER
from tests.export.conftest import WriteRun

transformers = pytest.importorskip("transformers")

PROMPT = "Question: what is 1 + 2?"
PROMPTS = [PROMPT, "1", "Question: what is 1 + 2? The answer is 3.\nQuestion: what is"]
MODELS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "rotary": {"positions": "rotary", "n_loops": 3},
    "all loops windowed": {"global_every": 9, "n_loops": 3, "window_size": 1},
    "all loops global": {"global_every": 1},
    "one loop, one head": {"n_loops": 1, "n_heads": 1},
    "heads of one dimension": {"n_heads": 16, "n_loops": 4},
    "strong soft cap": {"soft_cap": 0.5, "positions": "rotary"},
    "window beyond the sequence": {"window_size": 500},
}
MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "what is 1 + 2?"},
    {"role": "assistant", "content": "The answer is 3."},
    {"role": "user", "content": "Question 2\n"},
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Exported:
    """A run, and the model and tokenizer that transformers loads from its export."""

    def __init__(self, run: Path, folder: Path) -> None:
        export_hugging_face(run, folder)
        self.folder = folder
        self.model, self.tokenizer, _ = load_model(run)
        self.their_model = self.load()
        self.their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

    def load(self, folder: Path | None = None, **settings: Any) -> Any:
        load = transformers.AutoModelForCausalLM.from_pretrained
        return load(folder or self.folder, trust_remote_code=True, **settings)

    def sampling(self, max_new_tokens: int) -> Sampling:
        return Sampling.for_tokenizer(self.tokenizer, max_new_tokens, temperature=0.0)

    def their_answer(self, prompt: str, **settings: Any) -> list[int]:
        """Return the ids that transformers generates for one prompt, without the end-of-document token."""
        inputs = self.their_tokenizer(prompt, return_tensors="pt")
        output = self.their_model.generate(**inputs, **{"do_sample": False, **settings})
        return without_end(output[0, inputs.input_ids.shape[1] :].tolist(), self.tokenizer.end_of_document)


Export = Callable[..., Exported]


@pytest.fixture
def export(write_run: WriteRun, tmp_path: Path) -> Export:
    def run_and_export(**settings: Any) -> Exported:
        return Exported(write_run(**settings), tmp_path / "exported")

    return run_and_export


@pytest.fixture
def exported(export: Export) -> Exported:
    return export(model=MODELS["rotary"])


def without_end(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def random_tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(2, 284, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: UniversalTransformer, tokens: torch.Tensor, n_loops: int | None = None) -> torch.Tensor:
    return model.head(model.hidden_states(tokens, n_loops=n_loops))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_logits_and_greedy_tokens_are_those_of_savant_past_windows_and_training_length(
    model: dict[str, Any], export: Export
) -> None:
    exported = export(model=model)
    tokens = random_tokens(2, 100)  # the window has 4 tokens, a training sequence 16
    with torch.no_grad():
        exported_logits = exported.their_model(tokens).logits
    torch.testing.assert_close(exported_logits, logits(exported.model, tokens), rtol=0, atol=1e-5)
    (prompt,) = exported.tokenizer.encode_prompts([PROMPT])
    expected = list(generate(exported.model, prompt, exported.sampling(300)))
    assert len(set(expected)) > 1
    assert exported.their_answer(PROMPT, max_new_tokens=300) == expected


@pytest.mark.parametrize("model", ["defaults", "rotary", "all loops windowed"])
def test_a_batch_with_left_padding_gives_what_each_prompt_gives_alone(model: str, export: Export) -> None:
    exported = export(model=MODELS[model])
    batch = exported.their_tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert not batch.attention_mask[1, 0] and batch.attention_mask[:, -1].all()
    with torch.no_grad():
        together = exported.their_model(**batch).logits
    for row, prompt in zip(together, PROMPTS, strict=True):
        ids = exported.their_tokenizer(prompt, return_tensors="pt").input_ids
        torch.testing.assert_close(row[-ids.shape[1] :], logits(exported.model, ids)[0], rtol=0, atol=1e-5)
    output = exported.their_model.generate(**batch, do_sample=False, max_new_tokens=40)
    end, length = exported.tokenizer.end_of_document, batch.input_ids.shape[1]
    answers = [without_end(row[length:].tolist(), end) for row in output]
    assert answers == [exported.their_answer(prompt, max_new_tokens=40) for prompt in PROMPTS]
    prompts = exported.tokenizer.encode_prompts(PROMPTS)
    assert answers == generate_many(exported.model, prompts, exported.sampling(40))


def test_every_kind_of_cache_gives_the_same_tokens(exported: Exported) -> None:
    expected = exported.their_answer(PROMPT, max_new_tokens=30, use_cache=False)
    assert exported.their_answer(PROMPT, max_new_tokens=30) == expected
    name = (
        "cache"
        if "cache" in transformers.modeling_outputs.CausalLMOutputWithPast.__annotations__
        else "past_key_values"
    )
    all_global = {name: transformers.DynamicCache()}  # without the windows of the configuration
    assert exported.their_answer(PROMPT, max_new_tokens=30, **all_global) == expected
    assert exported.their_answer(PROMPT, max_new_tokens=30, prompt_lookup_num_tokens=3) == expected


def test_a_prompt_in_parts_gives_the_logits_of_the_whole(exported: Exported) -> None:
    tokens = random_tokens(2, 40)
    cache, parts = None, []
    with torch.no_grad():
        for part in tokens.split([7, 1, 20, 12], dim=1):
            output = exported.their_model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), exported.their_model(tokens).logits, rtol=0, atol=1e-5)


def test_a_static_cache_is_refused(exported: Exported) -> None:
    with pytest.raises(ValueError, match="static caches are not supported"):
        exported.their_answer(PROMPT, max_new_tokens=5, cache_implementation="static")


def test_the_loss_is_that_of_the_next_tokens_without_ignored_labels_and_has_gradients(exported: Exported) -> None:
    tokens = random_tokens(2, 20)
    labels = tokens.clone()
    labels[0, :11] = -100
    loss = exported.their_model(tokens, labels=labels).loss
    expected = torch.nn.functional.cross_entropy(
        logits(exported.model, tokens)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in exported.their_model.parameters())


def test_the_trainer_of_transformers_trains_and_evaluates(exported: Exported, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    ids = exported.their_tokenizer(PROMPTS[2]).input_ids
    rows = [{"input_ids": ids, "labels": ids}] * 4
    settings = {"max_steps": 3, "learning_rate": 0.01, "use_cpu": True, "report_to": [], "save_strategy": "no"}
    arguments = transformers.TrainingArguments(str(tmp_path / "trainer"), disable_tqdm=True, **settings)
    trainer = transformers.Trainer(exported.their_model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.1


def test_saving_and_loading_again_keeps_weights_code_and_settings(exported: Exported, tmp_path: Path) -> None:
    again = tmp_path / "again"
    exported.their_model.config.num_loops = 2
    exported.their_model.save_pretrained(again)
    exported.their_tokenizer.save_pretrained(again)
    assert (again / "modeling_savant.py").read_text() == (exported.folder / "modeling_savant.py").read_text()
    assert {"model.safetensors", "chat_template.jinja", "generation_config.json"} <= {p.name for p in again.iterdir()}
    tokens = random_tokens(1, 30)
    with torch.no_grad():
        exported_logits = exported.load(again)(tokens).logits
    torch.testing.assert_close(exported_logits, logits(exported.model, tokens, n_loops=2), rtol=0, atol=1e-5)


def test_the_number_of_loops_can_be_chosen_when_loading(exported: Exported) -> None:
    tokens = random_tokens(1, 30)
    with torch.no_grad():
        exported_logits = exported.load(num_loops=7)(tokens).logits
    torch.testing.assert_close(exported_logits, logits(exported.model, tokens, n_loops=7), rtol=0, atol=1e-5)


def test_settings_that_the_model_cannot_have_are_refused_when_they_are_chosen(exported: Exported) -> None:
    invalid = {"num_loops": 0, "window_size": 0, "global_every": 0, "soft_cap": 0.0, "num_attention_heads": 16}
    for name, value in {**invalid, "positions": "rope", "tie_word_embeddings": True}.items():
        with pytest.raises(ValueError, match=f"{name}={value!r} is invalid"):
            exported.load(**{name: value})
    exported.their_model.config.num_loops = 0
    with pytest.raises(ValueError, match="num_loops=0 is invalid"):
        exported.their_model(random_tokens(1, 3))


def test_an_input_without_tokens_is_refused(exported: Exported) -> None:
    with pytest.raises(ValueError, match="the input has no tokens"):
        exported.their_model(random_tokens(1, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loads_and_generates(dtype: torch.dtype, exported: Exported) -> None:
    model = exported.load(dtype=dtype)
    tokens = random_tokens(1, 30)
    assert model.head.weight.dtype == dtype
    torch.testing.assert_close(model(tokens).logits.float(), logits(exported.model, tokens), rtol=0, atol=0.2)
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape[1] <= 33


def test_outputs_that_transformers_asks_for_are_there(exported: Exported) -> None:
    tokens, model = random_tokens(2, 30), exported.their_model
    output = model(tokens, output_hidden_states=True, labels=tokens)
    assert len(output.hidden_states) == model.config.num_loops + 1
    torch.testing.assert_close(model.head(output.hidden_states[-1]), output.logits)
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, output.logits[:, -2:])
    torch.testing.assert_close(model(inputs_embeds=model.embed(tokens)).logits, output.logits)
    assert model(tokens, labels=tokens, return_dict=False)[0] == output.loss
    model.resize_token_embeddings(330)
    assert model(tokens).logits.shape == (2, 30, 330)


def test_a_pipeline_completes_texts_and_conversations(exported: Exported) -> None:
    complete = transformers.pipeline("text-generation", model=str(exported.folder), trust_remote_code=True)
    (completed,) = complete(PROMPT, max_new_tokens=3)
    assert completed["generated_text"].startswith(PROMPT)
    (answered,) = complete(MESSAGES, max_new_tokens=3)
    assert answered["generated_text"][-1]["role"] == "assistant"


@pytest.mark.parametrize("n_messages", [1, 2, 4])
@pytest.mark.parametrize("prefix", [False, True])
def test_a_conversation_without_a_chat_template_is_in_plain_form(n_messages: int, prefix: bool, export: Export) -> None:
    exported = export(tokenizer_json=(FOLDER / "tokenizer.json").read_text() if prefix else None)
    messages = MESSAGES[:n_messages]
    prompt = conversation_prompt(messages, None)
    assert conversation_ids(exported, messages) == exported.tokenizer.encode_prompts([prompt])[0]
    text = exported.their_tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.removeprefix("[CLS]") == plain_form(messages).text


def test_messages_of_a_conversation_without_a_chat_template_may_be_in_parts_of_text_only(exported: Exported) -> None:
    def text(content: Any, **fields: Any) -> str:
        messages = [{"role": "user", "content": content, **fields}]
        return exported.their_tokenizer.apply_chat_template(messages, tokenize=False)

    parts = [{"type": "text", "text": " good "}, {"type": "text", "text": "day"}]
    assert text(parts) == text("good day") == "Question: good day"
    with pytest.raises(jinja2.TemplateError, match="a part of a message is not text"):
        text([*parts, {"type": "image", "url": "x.png"}])
    with pytest.raises(jinja2.TemplateError, match="has a tool call"):
        text("", tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {}}}])


def test_the_chat_template_of_the_tokenizer_is_exported(export: Export, trained_tokenizer: Tokenizer) -> None:
    inner = tokenizers.Tokenizer.from_str(trained_tokenizer.to_json())
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    settings = json.dumps({"eos_token": "<|im_end|>"})
    files = {"chat_template.jinja": CHATML, "tokenizer_config.json": settings}
    exported = export(tokenizer_json=inner.to_str(), files=files)
    prompt = conversation_prompt(MESSAGES, exported.tokenizer.chat_template)
    assert conversation_ids(exported, MESSAGES) == exported.tokenizer.encode_prompts([prompt], special_tokens=True)[0]
    assert exported.their_tokenizer.eos_token == "<|im_end|>"
    ends = [trained_tokenizer.end_of_document, inner.token_to_id("<|im_end|>")]
    assert exported.their_model.generation_config.eos_token_id == ends


@pytest.mark.parametrize("begin", ["", "{{ bos_token }}", "\n ", "  {% if true %}\n{% endif %}"])
def test_a_conversation_begins_with_the_special_tokens_of_a_text_once(begin: str, export: Export) -> None:
    template = begin + "{% for message in messages %}{{ message['role'] + ':\n' + message['content'] }}\n\n{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
    files = {"chat_template.jinja": template, "tokenizer_config.json": json.dumps({"bos_token": "[CLS]"})}
    exported = export(tokenizer_json=(FOLDER / "tokenizer.json").read_text(), files=files)
    text = exported.their_tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert text == "[CLS]" + conversation_prompt(MESSAGES, exported.tokenizer.chat_template)


def conversation_ids(exported: Exported, messages: list[dict[str, str]]) -> list[int]:
    encoded = exported.their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return encoded["input_ids"]


@pytest.mark.parametrize("adds", ["auto", False])
def test_a_prompt_has_the_same_tokens(adds: Any, export: Export) -> None:
    tokenizer_json = (FOLDER / "tokenizer.json").read_text()
    exported = export(tokenizer_json=tokenizer_json, data={"add_special_tokens": adds})
    texts = ["the red hen", "a Cat, é?", "1"]
    assert exported.their_tokenizer(texts).input_ids == exported.tokenizer.encode_prompts(texts)


@pytest.mark.slow
def test_lm_eval_gives_the_score_of_savant_evaluate(
    write_run: WriteRun, tmp_path: Path, trained_tokenizer: Tokenizer
) -> None:
    pytest.importorskip("lm_eval")
    model = {"dim": 320, "n_heads": 2, "n_loops": 1}
    seen, new = (
        {q.answer for q in logic_suite() if q.template.endswith(NEW_WORDING_SUFFIX) == is_new}
        for is_new in (False, True)
    )
    run = write_run(model=model, weights=that_answer(min(seen & new), trained_tokenizer))
    export_hugging_face(run, tmp_path / "exported")
    savant_result = evaluation_result(list(answers_of(run, logic_suite())))
    command = (tmp_path / "exported/README.md").read_text().split("```sh\n")[1].split("```")[0].strip()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        f"{command} --device cpu --output_path {tmp_path}/scores.json",
        shell=True,
        cwd=tmp_path / "exported",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (scores,) = tmp_path.glob("scores_*.json")
    lm_eval_result = json.loads(scores.read_text())["results"]["savant_logic"]
    assert 0 < savant_result["score"] < 1 and 0 < savant_result["new_wordings"]["score"] < 1
    assert lm_eval_result["score,none"] == pytest.approx(savant_result["score"], abs=1e-9)
    assert lm_eval_result["new_wordings,none"] == pytest.approx(savant_result["new_wordings"]["score"], abs=1e-9)


def that_answer(answer: str, tokenizer: Tokenizer) -> Callable[[Config], dict[str, torch.Tensor]]:
    """Return a function for weights that continue every prompt of the logic suite with the same answer.

    The gates are closed, so that each token determines the next one.
    """

    def weights(config: Config) -> dict[str, torch.Tensor]:
        model = UniversalTransformer(config.model)
        values = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}
        values["recurrent_block.attn.liquid_gate.bias"] -= 100
        values["recurrent_block.liquid_gate_ffn.bias"] -= 100
        values["embed.weight"] = torch.eye(config.model.vocab_size)
        values["ln_f.weight"] += 1
        (last,) = {prompt[-1] for prompt in tokenizer.encode_prompts([question.prompt for question in logic_suite()])}
        chain = [last, *tokenizer.encode(f" {answer}"), tokenizer.end_of_document]
        for token, following in itertools.pairwise(chain):
            values["head.weight"][following, token] = 1
        return values

    return weights
