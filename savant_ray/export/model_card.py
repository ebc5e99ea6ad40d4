"""The model card of an export: what the model is, figures of its run, and how to use it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import savant_ray
from savant_ray.config import Config
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.events import LogicScored, StepDone, ValidationDone
from savant_ray.export.logic_task import can_encode_suite, lm_eval_command
from savant_ray.model.transformer import n_parameters
from savant_ray.reporting.record import METRICS, intact_events
from savant_ray.reporting.wording import figure, percent
from savant_ray.training.checkpoint import NO_FINGERPRINT, RECORDS, read_manifest

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [savant, recurrent-depth]
---

# {name}

A Savant language model: one transformer block with gated residual connections, applied {n_loops} times with the same
weights. {origin} with savant_ray {version}.

{figures}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)  # runs modeling_savant.py

inputs = tokenizer({prompt}, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens={max_new_tokens})
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

`from_pretrained(…, num_loops=8)` applies the block a different number of times, for experiments: {trained_loops}.
Batches are padded on the left. Generation may continue past the {max_seq_len:,} tokens of a training sequence.
"""
PROMPT = "Question: If X = 5 and Y = 10, what is X + Y?\nAnswer:"
EVALUATION = """
## Evaluate

The folder `lm_eval` has the logic suite as a task of lm-eval:

```sh
{command}
```
"""


def model_card(folder: Path, step: int, config: Config, tokenizer: Tokenizer) -> str:
    """Return the model card of the checkpoint in `folder`; paths of the training text are left out.

    If it was converted from a file of the original script, which does not contain the settings of its training, they are
    left out, too.
    """
    training, figures = config.training, {"parameters": f"{n_parameters(config.model):,}"}
    if read_manifest(folder)["data_fingerprint"] == NO_FINGERPRINT:
        origin = "It was trained with the original script and exported"
        figures |= {"training": f"up to step {step:,}"}
    else:
        origin = "It was trained and exported"
        figures |= {
            "training": f"{step:,} of {training.max_steps:,} steps of {training.effective_batch:,} sequences of "
            f"{config.model.max_seq_len:,} tokens",
            "optimizer": f"{training.optimizer}, peak learning rate {training.learning_rate:g}",
            **_figures_of_run(folder, step),
        }
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    has_suite = can_encode_suite(tokenizer)
    card = CARD.format(
        name=_escaped(config.run.name),
        n_loops=config.model.n_loops,
        trained_loops=_trained_loops(config),
        origin=origin,
        version=savant_ray.__version__,
        figures=f"| | |\n|---|---|\n{rows}",
        max_new_tokens=config.validation.max_new_tokens,
        max_seq_len=config.model.max_seq_len,
        prompt=json.dumps(PROMPT if has_suite else config.validation.prompt, ensure_ascii=False),
    )
    return card + EVALUATION.format(command=lm_eval_command(".", config, tokenizer)) if has_suite else card


def _trained_loops(config: Config) -> str:
    """Return a clause about the numbers of loops that the model is trained with."""
    n_loops = config.model.n_loops
    if config.training.double_loops_fraction:
        return f"the model is trained with\n{n_loops} and with {2 * n_loops}"
    return f"the model is trained with\n{n_loops} and answers well only with {n_loops}"


def _figures_of_run(folder: Path, step: int) -> dict[str, str]:
    """Return the last losses and scores up to the step, from the record of the run, or, without one, of the checkpoint."""
    figures: dict[str, str] = {}
    for event in _events(folder.parent / METRICS) or _events(folder / RECORDS):
        if event["event"] in FIGURES and event["step"] <= step:
            name, text_of = FIGURES[event["event"]]
            with suppress(KeyError, TypeError, ValueError):  # a damaged line
                figures[name] = text_of(event)
    return {name: figures[name] for name, _ in FIGURES.values() if name in figures}


def _events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a record; none if there is no record, or it cannot be read."""
    try:
        return list(intact_events(path))
    except OSError:
        return []


def _training_loss(event: dict[str, Any]) -> str:
    return f"{figure(event['train_loss'])} nats per token (step {event['step']:,})"


def _validation_loss(event: dict[str, Any]) -> str:
    loss, bits = figure(event["validation_loss"]), figure(event["bits_per_byte"])
    return f"{loss} nats per token, {bits} bits per byte (step {event['step']:,})"


def _score(event: dict[str, Any]) -> str:
    interval = f"95 % interval {percent(event['low'])} – {percent(event['high'])}"
    return f"{percent(event['score'])} of {event['n']:,} held-out problems, {interval} (step {event['step']:,})"


def _escaped(text: str) -> str:
    """Escape the characters that have a meaning in Markdown."""
    return re.sub(r"[\\`*\[\]<>&#~|!$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


# Kind of event -> name of the figure, and the function that returns its text.
FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    StepDone.kind: ("training loss", _training_loss),
    ValidationDone.kind: ("validation loss", _validation_loss),
    LogicScored.kind: ("logic suite", _score),
}
