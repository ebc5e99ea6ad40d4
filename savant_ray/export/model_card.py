"""The model card of an export: what the model is, figures of its run, and how to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import savant_ray
from savant_ray.config import Config
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.events import LogicScored, StepDone, ValidationDone
from savant_ray.export.logic_task import lm_eval_command
from savant_ray.model.transformer import n_parameters
from savant_ray.reporting.record import METRICS, parsed
from savant_ray.reporting.wording import percent
from savant_ray.training.checkpoint import RECORDS

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [savant, recurrent-depth]
---

# {name}

A Savant language model: one transformer block with gated residual connections, applied {n_loops} times with the same
weights. It was trained and exported with savant_ray {version}.

{figures}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)  # runs modeling_savant.py

inputs = tokenizer("Question: If X = 5 and Y = 10, what is X + Y?\\nAnswer:", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens={max_new_tokens})
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

`from_pretrained(…, num_loops=8)` applies the block another number of times than in training. Batches are padded on the
left. Generation may continue past the {max_seq_len:,} tokens of a training sequence.

## Evaluate

The folder `lm_eval` has the logic suite as a task of lm-eval:

```sh
{command}
```
"""


def model_card(folder: Path, step: int, config: Config, tokenizer: Tokenizer) -> str:
    """Return the model card of the checkpoint in `folder`; paths of the training text are left out."""
    figures = {
        "parameters": f"{n_parameters(config.model):,}",
        "training": f"{step:,} of {config.training.max_steps:,} steps of {config.training.effective_batch:,} sequences of "
        f"{config.model.max_seq_len:,} tokens",
        "optimizer": f"{config.training.optimizer}, peak learning rate {config.training.learning_rate:g}",
        **_figures_of_run(folder, step),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    return CARD.format(
        name=config.run.name,
        n_loops=config.model.n_loops,
        version=savant_ray.__version__,
        figures=f"| | |\n|---|---|\n{rows}",
        max_new_tokens=config.validation.max_new_tokens,
        max_seq_len=config.model.max_seq_len,
        command=lm_eval_command(".", config, tokenizer),
    )


def _figures_of_run(folder: Path, step: int) -> dict[str, str]:
    """Return the last losses and scores up to the step, from the record of the run or else that in the checkpoint."""
    last: dict[str, dict[str, Any]] = {}
    for event in _events(folder.parent / METRICS) or _events(folder / RECORDS):
        if event.get("step", step + 1) <= step:
            last[event["event"]] = event
    figures = {}
    if trained := last.get(StepDone.kind):
        figures["training loss"] = f"{_number(trained['train_loss'])} nats per token (step {trained['step']:,})"
    if validated := last.get(ValidationDone.kind):
        loss, bits = _number(validated["validation_loss"]), _number(validated["bits_per_byte"])
        figures["validation loss"] = f"{loss} nats per token, {bits} bits per byte (step {validated['step']:,})"
    if scored := last.get(LogicScored.kind):
        interval = f"95 % interval {percent(scored['low'])} – {percent(scored['high'])}"
        correct = f"{percent(scored['score'])} of {scored['n']:,} held-out problems"
        figures["logic suite"] = f"{correct}, {interval} (step {scored['step']:,})"
    return figures


def _events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a record; none if there is no record."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [event for line in lines if (event := parsed(line)) is not None]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
