"""Every setting: default, unit, meaning, check; from YAML, environment and command line.

Later sources win: defaults < YAML file < environment (`SAVANT_TRAINING__MAX_STEPS`) < command line
(`--training.max_steps`). The defaults are the training guide's where it speaks.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from savant_ray.errors import SettingsError
from savant_ray.settings.complaints import explain
from savant_ray.settings.passwords import without_password
from savant_ray.settings.rows import rows_of
from savant_ray.settings.sources import Reading, Setting
from savant_ray.settings.yaml_text import show, to_yaml

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1), AfterValidator(without_password)]
Texts = Text | Annotated[list[Text], Field(min_length=1)]
Auto = Literal["auto"]

MOST_SEED = 10**18 - 1  # as many digits as any 64-bit number holds
WEIGHT_RESOLUTION = 100_000  # a source has at least 1 sequence in this many; as `MAX_PERIOD` in data/order.py
NOT_IN_NAMES = ("Cc", "Zl", "Zp")  # Unicode's control characters, line and paragraph separators
FOLDER_NAME_BYTES = 255
LOGIC_PROMPT = "Question: If X = 5 and Y = 10, what is X + Y?\nAnswer: Let's think step by step:"


class Section(BaseModel):
    """Settings that belong together; `strict`, so that `true` is no number and `"3"` no count."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunConfig(Section):
    """Name, location and seed of the run."""

    name: Text = Field(default="checkpoints_savant", description="name of the run, and of its folder")
    storage_path: Text = Field(
        default=".", description="parent of the run folders; several nodes need one that all of them reach, or s3://…"
    )
    seed: int = Field(default=1337, ge=0, description="seed of all random numbers")
    grace_seconds: Positive = Field(
        default=30.0, description="after a stop request, a step that would take longer than this is abandoned, seconds"
    )
    init_from: Text | None = Field(
        default=None,
        description="start a new run from the weights of this run, checkpoint folder or file of the original; also s3://…",
    )

    @field_validator("seed", mode="before")
    @classmethod
    def _is_a_seed(cls, seed: Any) -> Any:
        if isinstance(seed, int | float) and seed > MOST_SEED:  # files give longer whole numbers as floats
            raise ValueError(f"run.seed: {seed} is not a whole number from 0 to {MOST_SEED}")
        return seed

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        reason = ""
        if (size := len(name.encode())) > FOLDER_NAME_BYTES:
            reason = f"has {size} bytes in UTF-8, and a folder's name at most {FOLDER_NAME_BYTES}"
        if name in (".", "..") or any(c in "/\\" or unicodedata.category(c) in NOT_IN_NAMES for c in name):
            reason = "is not a folder's name; where it lies is run.storage_path"
        if reason:
            raise ValueError(f"run.name: {name!r} {reason}")
        return name


class ModelConfig(Section):
    """Shape of the network."""

    vocab_size: Count = Field(default=32_000, description="number of token ids; at least the tokenizer's")
    dim: Count = Field(default=1024, description="width of the residual stream")
    n_heads: Count = Field(default=16, description="attention heads; must divide dim")
    n_loops: Count = Field(default=12, description="applications of the recurrent block")
    max_seq_len: int = Field(default=1024, ge=2, description="tokens per training sequence")
    window_size: Count = Field(default=256, description="tokens that windowed attention looks back")
    global_every: Count = Field(default=4, description="every n-th loop has global instead of windowed attention")
    positions: Literal["none", "rotary"] = Field(
        default="none", description="positional encoding: none (causal mask and windows only) or rotary embeddings"
    )
    soft_cap: Positive = Field(default=50.0, description="soft cap of the attention scores: cap · tanh(score / cap)")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads

    @model_validator(mode="after")
    def _heads_share_dim(self) -> Self:
        if self.dim % self.n_heads:
            raise ValueError(f"model.n_heads: {self.n_heads} does not divide model.dim = {self.dim}")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"model.positions: rotary needs an even head width, dim / n_heads = {self.head_dim}")
        return self


class SourceConfig(Section):
    """One kind of training text and its share."""

    path: Texts = Field(description="JSONL file, folder, glob or URI, or a list of them; also .gz and .zst")
    weight: Positive = Field(
        description="fraction of the sequences or documents (data.mix_by), relative to the other sources' weights; at "
        "least 1 in 100,000 sequences"
    )
    optional: bool = Field(default=False, description="continue without it if it is missing")


DEFAULT_SOURCES = [
    SourceConfig(path="dataset/savant_dataset_train.jsonl", weight=0.8),
    SourceConfig(path="dataset/genius_dataset.jsonl", weight=0.2, optional=True),
]


class DataConfig(Section):
    """Training and validation text."""

    sources: list[SourceConfig] = Field(
        default=DEFAULT_SOURCES, min_length=1, description="training text: [{path, weight, optional}, …]"
    )
    mix_by: Literal["sequences", "documents"] = Field(
        default="sequences", description="what the weights of the sources are fractions of"
    )
    validation: Texts = Field(default="dataset/savant_dataset_val.jsonl", description="held-out JSONL, like a source")
    tokenizer: Text = Field(
        default="auto",
        description="a tokenizer.json, a Hugging Face name such as albert-base-v2, or train: learn one; "
        "auto: the checkpoint's when going on or with run.init_from, else train",
    )
    end_of_document: Text | None = Field(
        default=None,
        description="the tokenizer's token that ends a document; null: the last one that add_special_tokens puts behind "
        "a text, else the one with a usual name such as </s>",
    )
    add_special_tokens: bool | Auto = Field(
        default="auto",
        description="put the tokenizer's special tokens around each text, such as [CLS] and [SEP]; auto: as the "
        "checkpoint does, else if the tokenizer has a template for them",
    )
    cache_dir: Text = Field(default="cache", description="folder of the tokenized text")
    on_bad_line: Literal["skip", "error"] = Field(
        default="skip", description="skip and count a bad line, or end with an error"
    )
    max_line_mb: Positive = Field(default=64.0, description="longest line, MiB; a longer one is a bad line")
    quickstart: bool = Field(default=False, description="generate the quickstart's text files if they are missing")

    @property
    def learns_tokenizer(self) -> bool:
        """Whether no tokenizer is named, so that one is learnt from the training text if no checkpoint has one."""
        return self.tokenizer in ("auto", "train")

    @model_validator(mode="after")
    def _every_source_occurs(self) -> Self:
        weights = [Fraction(str(source.weight)) for source in self.sources]
        by_sequences = (
            self.mix_by == "sequences"
        )  # otherwise the sizes of the sources decide (driver/data_preparation.py)
        if by_sequences and min(weights) * WEIGHT_RESOLUTION < sum(weights):
            smallest = min(self.sources, key=lambda source: source.weight)
            largest = max(source.weight for source in self.sources)
            raise ValueError(
                f"data.sources: weight {smallest.weight:g} of {show(smallest.path)}, with weights up to {largest:g} beside "
                f"it, is less than 1 sequence in {WEIGHT_RESOLUTION:,}; raise it, or leave the source out"
            )
        return self


class TrainingConfig(Section):
    """Optimization, precision and memory."""

    max_steps: Count = Field(default=80_000, description="optimizer steps of the run")
    batch_size: Count = Field(
        default=12,
        description="sequences per micro-batch, which is one forward and backward pass; a CPU may use fewer",
    )
    accumulation: Count = Field(
        default=16, description="micro-batches per step; the effective batch is batch_size × accumulation"
    )
    learning_rate: Positive = Field(
        default=2e-5, description="peak learning rate, at the end of the warm-up; then cosine to 0"
    )
    warmup_fraction: float = Field(
        default=0.05, ge=0, lt=1, description="fraction of max_steps with rising learning rate"
    )
    weight_decay: float = Field(
        default=0.01, ge=0, description="decoupled weight decay, multiplied by the learning rate"
    )
    gradient_clip: Positive = Field(default=1.0, description="maximum global gradient norm")
    precision: Literal["bf16", "bf16-mixed", "fp32"] = Field(
        default="bf16",
        description="bf16: bf16 weights; bf16-mixed: fp32 weights, bf16 products; fp32: everything in fp32",
    )
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw", description="update rule; muon: Muon for the matrices of the block, AdamW for the rest"
    )
    vram_limit_gb: Positive = Field(default=10.0, description="hard limit of a worker's GPU memory, GiB")
    compile: bool | Auto = Field(
        default="auto", description="compile the model; auto: if a compiler is there and it is faster"
    )
    recompute_loops: bool | Auto = Field(
        default="auto",
        description="recompute each loop in the backward pass instead of keeping its activations: slower, far less memory; "
        "auto: as soon as a micro-batch does not fit under vram_limit_gb",
    )
    max_skipped_steps: Count = Field(default=10, description="abort after this many consecutive skipped steps")

    @property
    def effective_batch(self) -> int:
        """Sequences per step, over all workers."""
        return self.batch_size * self.accumulation

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises."""
        return round(self.warmup_fraction * self.max_steps)


class ValidationConfig(Section):
    """Periodic evaluation."""

    every_steps: Count = Field(default=500, description="steps between validations")
    batches: Count = Field(default=10, description="micro-batches of held-out text per validation")
    logic_problems: int = Field(
        default=60,
        ge=0,
        description="held-out logic problems per validation; all 720 after the last step; 0: never any",
    )
    prompt: Text = Field(default=LOGIC_PROMPT, description="prompt that the model completes at each validation")
    max_new_tokens: Count = Field(default=300, description="maximum length of an answer, tokens")
    temperature: float = Field(default=0.6, ge=0, description="sampling temperature; 0: always the most likely token")


class CheckpointConfig(Section):
    """Periodic checkpoints."""

    every_steps: Count = Field(default=500, description="steps between checkpoints")
    keep: Count = Field(default=3, description="number of newest checkpoints to keep; older ones are deleted")


class ScalingConfig(Section):
    """Workers and their resources."""

    num_workers: Count | Annotated[list[Count], Field(min_length=2, max_length=2)] = Field(
        default=1,
        description="training processes, which divide the sequences of a step; [1, 4]: as many as there is room for",
    )
    use_gpu: bool | Auto = Field(default="auto", description="one GPU per worker; auto: if there are enough GPUs")
    resources_per_worker: dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        default=None, description="Ray resources of a worker, such as {CPU: 4}; null: an equal part of the machine"
    )
    max_failures: int = Field(default=3, ge=0, description="how often lost workers are restarted")

    @property
    def worker_limits(self) -> tuple[int, int]:
        """The fewest, without which training waits, and the most."""
        if isinstance(self.num_workers, int):
            return self.num_workers, self.num_workers
        fewest, most = self.num_workers
        return fewest, most


class ReportingConfig(Section):
    """Experiment trackers, in addition to the record in the run folder."""

    mlflow: Text | None = Field(
        default=None, description="tracking address of MLflow, such as http://host:5000 or sqlite:////data/mlflow.db"
    )
    wandb: Text | None = Field(default=None, description="project name at Weights & Biases")


class Config(Section):
    """All settings of a run; sent to workers as a plain dict."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    scaling: ScalingConfig = ScalingConfig()
    reporting: ReportingConfig = ReportingConfig()

    @model_validator(mode="after")
    def _every_worker_has_work(self) -> Self:
        fewest, workers, sequences = *self.scaling.worker_limits, self.training.effective_batch
        if fewest > workers:
            raise ValueError(f"scaling.num_workers: the fewest, {fewest}, are more than the most, {workers}")
        if workers > sequences:
            raise ValueError(
                f"scaling.num_workers: {workers} is more than the {sequences} sequences of a step "
                "(training.batch_size × training.accumulation)"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and text; the inverse of `from_dict`."""
        return self.model_dump()

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Checks and builds.

        Raises:
            SettingsError: something is unknown, of the wrong type, out of range or contradictory.
        """
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            problems = [f"{name}: {message}" for name, message in explain(error, known_names())]
            raise SettingsError("\n".join(problems)) from error


def load_config(
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    file: Path | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    """Defaults < `file` < `environment` (`os.environ` unless given) < `arguments` (`--training.max_steps 1000`).

    `defaults` replaces single defaults, by dotted name.

    Raises:
        SettingsError: one line for each thing that is wrong, naming file, variable or option.
    """
    reading = Reading(setting_rows(), defaults)
    if file is not None:
        reading.file(file)
    reading.environment(os.environ if environment is None else environment)
    reading.command_line(arguments)
    try:
        config = Config.model_validate(reading.nested())
        if not reading.problems:
            return config
    except ValidationError as error:
        reading.complain(error, known_names())
    raise SettingsError("\n".join(reading.problems))


def explicit_settings(arguments: Sequence[str], file: Path | None = None) -> dict[str, dict[str, Any]]:
    """Return what `file` and `arguments` set, by section, without defaults; values are checked by `Config.from_dict`.

    Raises:
        SettingsError: one line for each that is no setting, or has no value.
    """
    reading = Reading(setting_rows())
    if file is not None:
        reading.file(file)
    reading.command_line(arguments)
    if reading.problems:
        raise SettingsError("\n".join(reading.problems))
    return reading.nested()


def ignored_variables(environment: Mapping[str, str] | None = None) -> list[str]:
    """Return the variables that begin as settings do but neither are settings nor read like misspelt ones."""
    return Reading(setting_rows()).environment(os.environ if environment is None else environment)


def dump_yaml(config: Config) -> str:
    """The complete settings as a file that `load_config` reads back to the same."""
    return to_yaml(config.to_dict(), width=120)


def setting_rows() -> list[Setting]:
    """Every setting with its name, default and meaning, in the order of the sections."""
    return rows_of(Config())


def section_meanings() -> dict[str, str]:
    """Every section's name and what it is about."""
    return {name: type(section).__doc__ or "" for name, section in Config()}


def known_names() -> list[str]:
    """Whatever can be misspelt: sections, settings and the parts of a source."""
    return [*Config.model_fields, *(row.name for row in setting_rows()), *SourceConfig.model_fields]
