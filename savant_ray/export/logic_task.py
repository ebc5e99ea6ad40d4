"""The logic suite as a task of lm-eval (EleutherAI's lm-evaluation-harness), with the same rule for correct answers.

The task is `savant_logic.yaml`, its questions `savant_logic.jsonl`. `savant_logic.py` reads them and decides whether an
answer is correct; it is a copy of `evaluation/answer_matching.py` and the two functions that lm-eval calls.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import yaml

from savant_ray.config import Config
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.errors import DataError
from savant_ray.evaluation import answer_matching
from savant_ray.evaluation.logic_suite import NEW_WORDING_SUFFIX, logic_suite

TASK = "savant_logic"
# Each question counts towards one of the two metrics only.
FUNCTIONS = f'''

def questions(**_: object) -> dict[str, object]:
    """Return the questions as the split `test`."""
    import json
    from pathlib import Path

    from datasets import Dataset

    lines = Path(__file__).with_name("{TASK}.jsonl").read_text(encoding="utf-8").splitlines()
    return {{"test": Dataset.from_list([json.loads(line) for line in lines])}}


def score(question: dict[str, str], answers: list[str]) -> dict[str, float]:
    """Return 1 if the answer is correct, else 0, as the metric `new_wordings` or `score`."""
    metric = "new_wordings" if question["template"].endswith("{NEW_WORDING_SUFFIX}") else "score"
    return {{metric: float(is_correct(answers[0], question["answer"]))}}
'''


def write_logic_task(folder: Path, config: Config, tokenizer: Tokenizer) -> None:
    """Write the three files of the task into a new folder."""
    folder.mkdir()
    questions = logic_suite()
    lines = (json.dumps({"template": q.template, "prompt": q.prompt, "answer": q.answer}) for q in questions)
    (folder / f"{TASK}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / f"{TASK}.py").write_text(inspect.getsource(answer_matching) + FUNCTIONS, encoding="utf-8")
    task = {
        "task": TASK,
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "num_fewshot": 0,
        "generation_kwargs": {
            "until": [tokenizer.token_name(tokenizer.end_of_document)],
            "max_gen_toks": config.validation.max_new_tokens,
            "do_sample": False,
        },
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("score", "new_wordings")
        ],
        "metadata": {"version": 1.0},
    }
    functions = f"custom_dataset: !function {TASK}.questions\nprocess_results: !function {TASK}.score\n"
    text = yaml.safe_dump(task, sort_keys=False, allow_unicode=True)
    (folder / f"{TASK}.yaml").write_text(text + functions, encoding="utf-8")


def can_encode_suite(tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer can encode the questions; one that was made for another kind of text may not."""
    try:
        tokenizer.encode_prompts([question.prompt for question in logic_suite()])
    except DataError:
        return False
    return True


def lm_eval_command(folder: str, config: Config, tokenizer: Tokenizer) -> str:
    """Return the command that scores the exported model in `folder`.

    lm-eval cuts prompts so that prompt and answer fit into the length of a training sequence. If that is too short for the
    suite, the command sets a larger `max_length`; the model can generate more tokens than a training sequence has.
    """
    prompts = tokenizer.encode_prompts([question.prompt for question in logic_suite()])
    needed = max(map(len, prompts)) + config.validation.max_new_tokens
    max_length = f",max_length={needed}" if needed > config.model.max_seq_len else ""
    return (
        f"lm_eval --model hf --model_args pretrained={folder},trust_remote_code=True{max_length} \\\n"
        f"    --include_path {folder}/lm_eval --tasks {TASK} --batch_size 64"
    )
