"""All settings with default, unit, description and validation, and their loading.

Later sources override earlier ones: defaults < YAML file < environment (`SAVANT_TRAINING__MAX_STEPS`) < command line
(`--training.max_steps`). Settings that are constants in the original script (docs/from_the_original.md) have these constants
as defaults.
"""

from __future__ import annotations

import os
import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from savant_ray.errors import SettingsError
from savant_ray.settings.messages import validation_messages
from savant_ray.settings.reader import SettingsReader, SettingValue
from savant_ray.settings.table import Setting, list_settings
from savant_ray.settings.yaml_text import show, to_yaml

MAX_INTEGER = 10**18 - 1  # YAML integers of more digits are loaded as floats, because they may not fit into 64 bits
MIN_HANG_SECONDS = 5  # workers send their progress once a second
MAX_HANG_SECONDS = 604_800  # a week; gloo and NCCL, which wait 20 times as long, count nanoseconds in 64 bits
MAX_THREADS = 1024  # of a worker; OpenMP ends the process if it cannot start the requested number of threads
WEIGHT_RESOLUTION = 100_000  # smallest weight: 1 sequence in this many; equal to `MAX_PERIOD` in data/order.py
CONTROL_CATEGORIES = ("Cc", "Zl", "Zp")  # of Unicode: control characters, line and paragraph separators
MAX_FOLDER_NAME_BYTES = 255
VALIDATION_SPLITS = ("validation", "test", "train")  # the first one that the data set has is the validation text
LOGIC_PROMPT = "Question: If X = 5 and Y = 10, what is X + Y?\nAnswer: Let's think step by step:"
_PASSWORD = re.compile(r"://[^/\s]*:[^/\s]*@")  # as in scheme://user:password@host


def _refuse_password(text: str) -> str:
    """Return `text` unchanged if it contains no password.

    Settings are stored in the run folder and in checkpoints, and Ray's dashboard shows them.

    Raises:
        ValueError: `text` is an address that contains a password; the message does not repeat it.
    """
    if _PASSWORD.search(text):
        raise ValueError(
            "the address contains a password, which everybody who can read the run could see; set it in the environment: "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return text


Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1), AfterValidator(_refuse_password)]
Texts = Text | Annotated[list[Text], Field(min_length=1)]
Auto = Literal["auto"]
AUTO: Auto = "auto"


class Section(BaseModel):
    """Group of settings; validated in strict mode, so that `true` is not a number and `"3"` not an integer."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def from_validated(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild the section whose `model_dump()` is `values`, without validating the values again."""
        fields = {name: field.annotation for name, field in cls.model_fields.items() if name in values}
        return cls.model_construct(**{name: _rebuilt(annotation, values[name]) for name, annotation in fields.items()})


def _rebuilt(annotation: Any, value: Any) -> Any:
    """Return a dumped value with each dict that stands for a section replaced by the section, also in lists.

    `annotation` is the type of the field that holds the value. All members of a union are tried, because those that are not
    sections leave the value as it is.
    """
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation.from_validated(value) if isinstance(value, Mapping) else value
    for member in get_args(annotation):
        value = [_rebuilt(member, item) for item in value] if isinstance(value, list) else _rebuilt(member, value)
    return value


class RunConfig(Section):
    """Name, location and seed of the run."""

    name: Text = Field(default="checkpoints_savant", description="name of the run and of its folder")
    storage_path: Text = Field(
        default=".", description="parent of the run folders; with several nodes a shared file system or s3://…"
    )
    seed: int = Field(default=1337, ge=0, description="seed of all random numbers")
    grace_seconds: Positive = Field(
        default=30.0,
        description="time after a stop request to finish and save the current step, seconds; a longer step is abandoned",
    )
    init_from: Text | None = Field(
        default=None,
        description="start a new run from the weights in this run folder, checkpoint folder or file of the original script; "
        "also s3://…",
    )
    continue_from: Text | None = Field(
        default=None,
        description="start a new run that continues from this checkpoint folder of another run with its complete state: "
        "weights, optimizer, step and position in the text; a run folder stands for its newest checkpoint; also s3://…",
    )

    @field_validator("seed", mode="before")
    @classmethod
    def _check_seed(cls, seed: Any) -> Any:
        if isinstance(seed, int | float) and seed > MAX_INTEGER:
            raise ValueError(f"run.seed: {seed} is not a whole number from 0 to {MAX_INTEGER}")
        return seed

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        reason = ""
        if (size := len(name.encode())) > MAX_FOLDER_NAME_BYTES:
            reason = f"has {size} bytes in UTF-8; a folder's name has at most {MAX_FOLDER_NAME_BYTES}"
        if name in (".", "..") or any(c in "/\\" or unicodedata.category(c) in CONTROL_CATEGORIES for c in name):
            reason = "is not a valid name of a folder; the folder above it is run.storage_path"
        if reason:
            raise ValueError(f"run.name: {name!r} {reason}")
        return name

    @model_validator(mode="after")
    def _check_start(self) -> Self:
        if self.init_from is not None and self.continue_from is not None:
            raise ValueError("run.init_from and run.continue_from exclude each other; keep one of them")
        return self


class ModelConfig(Section):
    """Shape of the network."""

    vocab_size: Count = Field(default=32_000, description="number of token ids; at least as many as the tokenizer has")
    dim: Count = Field(default=1024, description="width of the residual stream")
    n_heads: Count = Field(default=16, description="attention heads; must divide dim")
    n_loops: Count = Field(default=12, description="number of times that the recurrent block is applied")
    max_seq_len: int = Field(default=1024, ge=2, description="tokens per training sequence")
    window_size: Count = Field(
        default=256, description="how many tokens back windowed attention sees, besides the token itself"
    )
    global_every: Count = Field(default=4, description="every n-th loop uses global instead of windowed attention")
    positions: Literal["none", "rotary"] = Field(
        default="none", description="positional encoding: none (causal mask and windows only) or rotary embeddings"
    )
    soft_cap: float = Field(
        default=50.0, gt=0, le=1e30, description="soft cap of the attention scores: cap · tanh(score / cap)"
    )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if self.dim % self.n_heads:
            raise ValueError(f"model.n_heads: {self.n_heads} does not divide model.dim = {self.dim}")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"model.positions: rotary needs an even head width, dim / n_heads = {self.head_dim}")
        return self


Scalar = bool | int | float | str
TrainOn = Literal["assistant", "all"]
TemplatePart = tuple[str, str | None]  # literal text, and the name of the field after it


def parse_template(template: str) -> list[TemplatePart]:
    """Return the parts of a template such as `Question: {question}`; `{{` and `}}` stand for braces.

    Raises:
        ValueError: a brace has no counterpart, or what is between two braces is not the name of a field.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"{show(template)} has a brace without its counterpart; write {{{{ or }}}} for a brace"
        ) from error
    for _, name, format_spec, conversion in parts:
        if name is not None and (not name.strip() or format_spec or conversion or set("{}") & set(name)):
            between = f"{name}{f'!{conversion}' if conversion else ''}{f':{format_spec}' if format_spec else ''}"
            raise ValueError(
                f"{show(template)} has {{{between}}}, which is not the name of a field; write {{{{ or }}}} for a brace"
            )
    if all(name is None for _, name, _, _ in parts):
        raise ValueError(f"{show(template)} contains no field, such as {{question}}")
    return [(literal, name) for literal, name, _, _ in parts]


_REQUIRED = object()  # instead of the default of a field that has none


class TextConfig(Section):
    """Files, and how a record of them becomes a document."""

    path: Texts | None = None
    format: Literal["auto", "jsonl", "json", "parquet", "arrow", "csv", "text"] = Field(
        default="auto",
        description="format of the files; auto: detected by content, and by the suffix where that could be CSV or text",
    )
    text_blocks: bool = Field(
        default=False, description="of plain text: blocks of lines between blank lines are documents, not whole files"
    )
    quotes: bool = Field(
        default=True,
        description="of CSV: a field can be in quotes; false: quotes are ordinary characters, as in many .tsv files",
    )
    split: Text = Field(
        default="train",
        description="split of a data set of the Hugging Face Hub (hf://datasets/…), of a folder that datasets.save_to_disk "
        "has written, or of a folder whose files are named after splits, such as a clone of a data set",
    )
    text: Text | None = Field(
        default=None,
        description="name of the field with the text; a.b is the field b of the object a, a.0 the first element of the "
        "array a; null: the field text if it is a string, otherwise a conversation as in messages: auto",
    )
    template: Text | None = Field(
        default=None,
        description='text with the names of fields, such as "Question: {question}\\nAnswer: {answer}"; {{ and }} are braces',
    )
    messages: Text | None = Field(
        default=None,
        description="name of the field with a conversation, a list of {role, content} or {from, value}; auto: the field "
        "messages or conversations, or the fields instruction, input and output, or prompt and completion; rendered by the "
        "tokenizer's chat template, otherwise as Question: … and Answer: …",
    )
    train_on: TrainOn | None = Field(
        default=None,
        description="tokens of a conversation that are trained on; assistant: those of the assistant's messages, except in "
        "a prompt and in messages with weight 0; null: assistant. All tokens of other documents are trained on",
    )

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of which the first one that exists is used."""
        return (self.split,)

    @model_serializer(mode="wrap")
    def _without_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the fields that have their default, of which there are many."""
        defaults = {name: field.default for name, field in type(self).model_fields.items() if not field.is_required()}
        values: dict[str, Any] = dump(self)
        return {name: value for name, value in values.items() if getattr(self, name) != defaults.get(name, _REQUIRED)}

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str | None) -> str | None:
        if template is not None:
            parse_template(template)
        return template

    @model_validator(mode="after")
    def _check_text(self) -> Self:
        chosen = [name for name in ("text", "template", "messages") if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other; keep one of them")
        if self.train_on == "assistant" and chosen and chosen != ["messages"]:
            raise ValueError(
                f"train_on, assistant, is for conversations (messages), but there is {chosen[0]}; remove one"
            )
        return self


class FilterConfig(Section):
    """Conditions on the documents of a source; other documents are left out."""

    min_chars: Count | None = Field(default=None, description="minimum number of characters of a document")
    max_chars: Count | None = Field(default=None, description="maximum number of characters of a document")
    equals: dict[str, Scalar] | None = Field(
        default=None,
        description="values that fields must have, such as {lang: en}; a number or boolean also equals a text that is "
        "written like it, as in CSV; a document without the field is left out",
    )

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.min_chars and self.max_chars and self.min_chars > self.max_chars:
            raise ValueError(f"min_chars, {self.min_chars}, is greater than max_chars, {self.max_chars}")
        return self


class SourceConfig(TextConfig):
    """Training text and its weight in the mixture."""

    path: Texts = Field(
        description="file, folder, glob or URI, or a list of them; JSON lines, Parquet, Arrow, CSV or text"
    )
    weight: Positive = Field(
        description="fraction of the sequences or documents (data.mix_by), relative to the weights of the other sources; at "
        "least 1 in 100,000 sequences"
    )
    optional: bool = Field(default=False, description="continue without this source if it is missing")
    filter: FilterConfig = Field(
        default=FilterConfig(), description="documents to use: {min_chars: 50, max_chars: 10000, equals: {lang: en}}"
    )
    sample: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="fraction of the documents to use, chosen by a hash of their text, so the same documents are chosen in "
        "any order and in any file",
    )
    limit: Count | None = Field(
        default=None,
        description="number of documents to take, after filter and sample and before duplicates and held-out documents are "
        "left out: the first ones in the order of the files' names",
    )


class HeldOutConfig(TextConfig):
    """Validation text: files, or a fraction of the documents of the sources."""

    path: Texts | None = Field(default=None, description="held-out text; same forms as the path of a source")
    split: Text = Field(
        default=AUTO,
        description="split, as for a source; auto: validation, otherwise test, otherwise train",
    )
    fraction: float | None = Field(
        default=None,
        gt=0,
        le=0.5,
        description="fraction of the documents of all sources that is not trained on, chosen by a hash of their text",
    )

    @property
    def splits(self) -> tuple[str, ...]:
        """As in `TextConfig`; with `auto` those of `VALIDATION_SPLITS`."""
        return VALIDATION_SPLITS if self.split == AUTO else (self.split,)

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        if (self.path is None) == (self.fraction is None):
            raise ValueError("needs either a path or a fraction of the sources' documents")
        if self.fraction is not None and self.model_fields_set - {"fraction", "path"}:
            others = sorted(
                name
                for name in self.model_fields_set - {"fraction", "path"}
                if getattr(self, name) or getattr(self, name) != type(self).model_fields[name].default
            )
            if others:
                raise ValueError(f"{others[0]} has no effect with fraction; set it in data.sources")
        return self


DEFAULT_SOURCES = [
    SourceConfig(path="dataset/savant_dataset_train.jsonl", weight=0.8),
    SourceConfig(path="dataset/genius_dataset.jsonl", weight=0.2, optional=True),
]


class DataConfig(Section):
    """Training and validation text."""

    sources: list[SourceConfig] = Field(
        default=DEFAULT_SOURCES, min_length=1, description="training text: [{path, weight, …}, …]"
    )
    mix_by: Literal["sequences", "documents"] = Field(
        default="sequences", description="whether the weights are fractions of the sequences or of the documents"
    )
    deduplicate: bool = Field(
        default=False,
        description="leave out documents whose text has occurred before, in the order of the sources, their files and "
        "lines; the text is read twice",
    )
    validation: Texts | HeldOutConfig = Field(
        default="dataset/savant_dataset_val.jsonl",
        description="held-out text; same forms as the path of a source, or {path, text, …}, or {fraction: 0.01} of the "
        "documents of the sources",
    )
    tokenizer: Text = Field(
        default="auto",
        description="a tokenizer.json, the name of a Hugging Face model such as albert-base-v2, or train: train one on the "
        "training text; auto: that of the checkpoint when resuming or with run.init_from, otherwise train",
    )
    end_of_document: Text | None = Field(
        default=None,
        description="token that ends a document; null: the last token that the tokenizer's template for special tokens adds "
        "to a text, otherwise the token with a common name such as </s>",
    )
    add_special_tokens: bool | Auto = Field(
        default="auto",
        description="add the tokenizer's special tokens around each text, such as [CLS] and [SEP]; auto: as in the "
        "checkpoint, otherwise if the tokenizer has a template for them",
    )
    cache_dir: Text = Field(default="cache", description="folder for the tokenized text")
    on_bad_line: Literal["skip", "error"] = Field(
        default="skip", description="skip and count invalid lines, or end with an error"
    )
    max_line_mb: float = Field(
        default=64.0, gt=0, le=1e12, description="maximum length of a line, MiB; a longer line counts as invalid"
    )
    quickstart: bool = Field(default=False, description="generate the quickstart's text files if they are missing")

    @property
    def held_out(self) -> HeldOutConfig:
        """The validation text in its long form."""
        if isinstance(self.validation, HeldOutConfig):
            return self.validation
        return HeldOutConfig.model_construct({"path"}, path=self.validation)  # the path has been validated

    @property
    def max_line_bytes(self) -> int:
        """`max_line_mb` in bytes."""
        return int(self.max_line_mb * (1 << 20))

    @property
    def trains_tokenizer(self) -> bool:
        """Whether a tokenizer is trained on the training text unless there is a checkpoint with one."""
        return self.tokenizer in ("auto", "train")

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        weights = [Fraction(str(source.weight)) for source in self.sources]
        # With `documents` this limit depends on the sizes of the sources, so driver/data_preparation.py checks it.
        if self.mix_by == "sequences" and min(weights) * WEIGHT_RESOLUTION < sum(weights):
            smallest = min(self.sources, key=lambda source: source.weight)
            largest = max(source.weight for source in self.sources)
            raise ValueError(
                f"data.sources: weight {smallest.weight:g} of {show(smallest.path)}, beside weights up to "
                f"{largest:g}, is less than 1 sequence in {WEIGHT_RESOLUTION:,}; raise it, or leave the source out"
            )
        return self


class ProfileConfig(Section):
    """Steps and ranks of a profile."""

    first_step: Count = Field(description="first step of the profile")
    steps: Count = Field(default=1, description="number of steps")
    ranks: Literal[0, "all"] = Field(default=0, description="workers that are profiled: 0 (the first) or all")


class TrainingConfig(Section):
    """Optimization, precision and memory."""

    max_steps: Count = Field(default=80_000, description="optimizer steps of the run")
    batch_size: Count = Field(
        default=12,
        description="sequences per micro-batch (one forward and backward pass); on a CPU micro-batches may be smaller, "
        "because large ones are hardly faster there",
    )
    accumulation: Count = Field(
        default=16, description="micro-batches per step; the effective batch is batch_size × accumulation"
    )
    learning_rate: Positive = Field(default=2e-5, description="peak learning rate, at the end of the warm-up")
    warmup_fraction: float = Field(
        default=0.05, ge=0, lt=1, description="fraction of max_steps in which the learning rate rises linearly"
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="steps in which the learning rate rises linearly, so that a change of max_steps does not change them; "
        "null: warmup_fraction of max_steps",
    )
    schedule: Literal["cosine", "wsd"] = Field(
        default="cosine",
        description="learning rate after the warm-up; cosine: falls to 0 as a cosine; wsd: constant, then falls linearly to "
        "0 in the last steps (warm-up, stable, decay), so that a run can be lengthened until the decay begins",
    )
    decay_fraction: float = Field(
        default=0.2, gt=0, le=1, description="with schedule wsd: fraction of max_steps in which the learning rate falls"
    )
    double_loops_fraction: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="fraction of the steps, chosen at random, which are trained with 2 × model.n_loops, so that the "
        "model also answers with more loops than model.n_loops; such steps take more time; 0: none",
    )
    weight_decay: float = Field(
        default=0.01, ge=0, description="decoupled weight decay, multiplied by the learning rate"
    )
    gradient_clip: Positive = Field(default=1.0, description="maximum global gradient norm")
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="keep an exponential moving average (EMA) of the weights with this decay per step, such as 0.999, and "
        "validate, generate and export with it; takes 4 bytes a weight; null: none",
    )
    precision: Literal["bf16", "bf16-mixed", "fp32"] = Field(
        default="bf16",
        description="bf16: bf16 weights, updated in fp32 (the optimizer keeps their lower halves); bf16-mixed: fp32 "
        "weights, bf16 products; fp32: everything in fp32",
    )
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="optimizer; muon: Muon for the matrices of the block and AdamW for the other weights",
    )
    vram_limit_gb: Positive = Field(default=10.0, description="hard limit of a worker's GPU memory, GiB")
    compile: bool | Auto = Field(
        default="auto",
        description="compile the model with torch.compile; auto: if an installed compiler supports the device and the "
        "precision, except in fp32 on a CPU",
    )
    recompute_loops: bool | Auto = Field(
        default="auto",
        description="recompute the activations of each loop in the backward pass instead of storing them: slower, needs far "
        "less memory; auto: once a micro-batch does not fit into vram_limit_gb",
    )
    deterministic: bool | Auto = Field(
        default="auto",
        description="losses and weights have the same bits on any number of workers; takes memory for more gradients, and "
        "each worker computes whole micro-batches; auto: true on CPUs, false on GPUs",
    )
    compare_ranks_every: int = Field(
        default=100,
        ge=0,
        description="steps between comparisons of the weights and optimizer states of all workers, which are also compared "
        "before each checkpoint; if they differ, the workers are restarted from the newest checkpoint; 0: never",
    )
    max_skipped_steps: Count = Field(default=10, description="abort after this many consecutive skipped steps")
    on_spike: Literal["warn", "skip", "rewind"] = Field(
        default="warn",
        description="what follows a loss or gradient norm far above those of recent steps; warn: a message; skip: the step "
        "does not update the weights; rewind: training goes back to the last checkpoint and leaves the step's sequences out",
    )
    profile: ProfileConfig | None = Field(
        default=None,
        description="write a trace of some steps, on a GPU also of its memory: {first_step: 3, steps: 2}; null: none",
    )

    @property
    def effective_batch(self) -> int:
        """Sequences per step, over all workers."""
        return self.batch_size * self.accumulation

    @property
    def n_warmup_steps(self) -> int:
        """Steps over which the learning rate rises."""
        return round(self.warmup_fraction * self.max_steps) if self.warmup_steps is None else self.warmup_steps

    @property
    def n_decay_steps(self) -> int | None:
        """Steps over which the learning rate falls with schedule wsd, at least 1; None with cosine."""
        return max(1, round(self.decay_fraction * self.max_steps)) if self.schedule == "wsd" else None

    @property
    def last_stable_step(self) -> int | None:
        """The step after which the decay of schedule wsd begins; None with cosine."""
        return None if self.n_decay_steps is None else self.max_steps - self.n_decay_steps


class ValidationConfig(Section):
    """Periodic evaluation."""

    every_steps: Count = Field(default=500, description="steps between validations")
    batches: Count = Field(default=10, description="micro-batches of held-out text per validation")
    logic_problems: int = Field(
        default=60,
        ge=0,
        description="held-out logic problems per validation; all 720 after the last step; 0: none at any time",
    )
    prompt: Text = Field(default=LOGIC_PROMPT, description="prompt that the model completes at each validation")
    max_new_tokens: Count = Field(default=300, description="maximum length of an answer, tokens")
    temperature: float = Field(default=0.6, ge=0, description="sampling temperature; 0: always the most likely token")


class CheckpointConfig(Section):
    """Periodic checkpoints."""

    every_steps: Count = Field(default=500, description="steps between checkpoints")
    keep: Count = Field(default=3, description="number of checkpoints to keep; older ones are deleted")


class ScalingConfig(Section):
    """Workers and their resources."""

    num_workers: Count | Annotated[list[Count], Field(min_length=2, max_length=2)] = Field(
        default=1,
        description="number of training processes, which divide the sequences of a step; [1, 4]: between 1 and 4, as many "
        "as the cluster has room for",
    )
    use_gpu: bool | Auto = Field(default="auto", description="use one GPU per worker; auto: if there are enough GPUs")
    resources_per_worker: dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        default=None,
        description="Ray resources of a worker, such as {CPU: 4}; null: the largest number of cores "
        "with which all workers fit",
    )
    threads_per_worker: Annotated[int, Field(ge=1, le=MAX_THREADS)] | Auto = Field(
        default="auto",
        description="threads of a worker on a CPU; rounding may depend on their number; auto: OMP_NUM_THREADS if it is set, "
        "otherwise the number of its cores; a run resumed with training.deterministic uses no more than before",
    )
    max_failures: int = Field(default=3, ge=0, description="number of times that workers are restarted after a failure")
    hang_seconds: Annotated[float, Field(ge=MIN_HANG_SECONDS, le=MAX_HANG_SECONDS)] | Auto | None = Field(
        default="auto",
        description="a worker without progress for this time is killed, and training continues from the last checkpoint; "
        "auto: 20 median steps, at least 60 s; 10 times as long while it starts, compiles, begins to read its sequences or "
        "validates, 60 times while it reads or writes checkpoints; null: no limit",
    )

    @property
    def worker_limits(self) -> tuple[int, int]:
        """Minimum and maximum number of workers; training waits for the minimum."""
        if isinstance(self.num_workers, int):
            return self.num_workers, self.num_workers
        minimum, maximum = self.num_workers
        return minimum, maximum


class ReportingConfig(Section):
    """Experiment trackers, in addition to the files in the run folder."""

    mlflow: Text | None = Field(
        default=None, description="MLflow tracking URI, such as http://host:5000 or sqlite:////data/mlflow.db"
    )
    wandb: Text | None = Field(default=None, description="name of the Weights & Biases project")


class Config(Section):
    """All settings of a run.

    They are validated once, when they are loaded (`load_config`) or passed to `savant_ray.train`. Other processes of the run
    receive them as `to_dict()` and rebuild them by `from_validated`.
    """

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    scaling: ScalingConfig = ScalingConfig()
    reporting: ReportingConfig = ReportingConfig()

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        minimum, maximum, sequences = *self.scaling.worker_limits, self.training.effective_batch
        if minimum > maximum:
            raise ValueError(f"scaling.num_workers: the minimum, {minimum}, is greater than the maximum, {maximum}")
        if maximum > sequences:
            raise ValueError(
                f"scaling.num_workers: {maximum} is more than the {sequences} sequences of a step "
                "(training.batch_size × training.accumulation)"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and strings, from which `from_dict` builds the same settings."""
        return self.model_dump()

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Validate nested settings and build a `Config`.

        Raises:
            SettingsError: a setting is unknown, of the wrong type, out of range or contradictory.
        """
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            problems = [f"{name}: {message}" for name, message in validation_messages(error, known_names())]
            raise SettingsError("\n".join(problems)) from error


def load_config(
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    file: Path | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    """Load the settings: defaults < `file` < `environment` < `arguments`.

    Args:
        arguments: such as `["--training.max_steps", "1000"]`.
        environment: variables; None: `os.environ`.
        file: a YAML file.
        defaults: values by dotted name, which replace the defaults of the settings that they name.

    Raises:
        SettingsError: one line per error, with the file, variable or option.
    """
    reader = SettingsReader(all_settings(), defaults)
    if file is not None:
        reader.read_file(file)
    reader.read_environment(os.environ if environment is None else environment)
    reader.read_command_line(arguments)
    try:
        config = Config.model_validate(reader.to_dict())
        if not reader.problems:
            return config
    except ValidationError as error:
        reader.add_validation_error(error, known_names())
    raise SettingsError("\n".join(reader.problems))


def setting_errors(settings: Mapping[str, Any], origins: Mapping[str, str]) -> list[str]:
    """Return one message per error in nested settings; `origins` has what messages call a setting, by dotted name."""
    reader = SettingsReader(all_settings())
    reader.values = {name: SettingValue(None, origin) for name, origin in origins.items()}
    try:
        Config.model_validate(settings)
    except ValidationError as error:
        reader.add_validation_error(error, known_names())
    return reader.problems


def explicit_settings(arguments: Sequence[str], file: Path | None = None) -> dict[str, dict[str, Any]]:
    """Return the settings of `file` and `arguments` by section, without defaults and without validating the values.

    Raises:
        SettingsError: one line for each unknown setting and each option without a value.
    """
    reader = SettingsReader(all_settings())
    if file is not None:
        reader.read_file(file)
    reader.read_command_line(arguments)
    if reader.problems:
        raise SettingsError("\n".join(reader.problems))
    return reader.to_dict()


def ignored_variables(environment: Mapping[str, str] | None = None) -> list[str]:
    """Return the variables that begin with `SAVANT_` but are neither settings nor similar to one."""
    return SettingsReader(all_settings()).read_environment(os.environ if environment is None else environment)


def dump_yaml(config: Config) -> str:
    """Return all settings as YAML from which `load_config` restores them."""
    return to_yaml(config.to_dict(), width=120)


@cache
def all_settings() -> tuple[Setting, ...]:
    """Return all settings with name, default and description, in the order of the sections."""
    return tuple(list_settings(Config()))


def section_descriptions() -> dict[str, str]:
    """Return the description of each section by its name."""
    return {name: type(section).__doc__ or "" for name, section in Config()}


def known_names() -> list[str]:
    """Return the names of sections, settings and fields of nested settings, for suggestions."""
    nested = (SourceConfig, FilterConfig, HeldOutConfig, ProfileConfig)
    return [
        *Config.model_fields,
        *(setting.name for setting in all_settings()),
        *dict.fromkeys(name for section in nested for name in section.model_fields),
    ]
