"""The training state: what a step changes, how it is saved in a checkpoint, and how it is restored.

A checkpoint holds fp32 weights in every precision (a bf16 weight is joined with its lower half), so that a run can continue
in another precision and an export loses nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from savant_ray.config import AUTO, Config, TrainingConfig
from savant_ray.errors import CheckpointError, MemoryCapError
from savant_ray.model.transformer import UniversalTransformer
from savant_ray.optim.adamw import AdamW, MasterWeightOptimizer
from savant_ray.optim.averaging import WeightAverage
from savant_ray.optim.gradients import GradientBuffer
from savant_ray.optim.muon import Muon
from savant_ray.training.checkpoint import AVERAGE, FORMAT_VERSION, NO_FINGERPRINT
from savant_ray.training.device import Precision, weights_dtype
from savant_ray.training.progress import PROGRESS
from savant_ray.training.spikes import SpikeWindow

# Indices of the sums that are reduced together with the gradients (training/step.py).
LOSS, TOKENS = SUMS = range(2)
# Largest tokens x dim of a micro-batch on a CPU: 4 sequences of 256 tokens at dim 128. Compared with that, a step of 8 such
# sequences takes 1 to 2 % less time in micro-batches of 8, and 8 % more in micro-batches of 2. Smaller micro-batches can be
# divided among more ranks.
MAX_CPU_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class BatchFit:
    """Micro-batch size and recomputation chosen to fit the memory limit, and the settings they were chosen for.

    If a step does not fit, first each loop is recomputed in the backward pass (activation checkpointing, arXiv
    1604.06174), then micro-batches are halved, down to one sequence. The effective batch and the order of sequences
    stay the same. On a CPU micro-batches are small from the start: larger ones are hardly faster and take more memory.
    """

    device: str  # "cpu" or "cuda"
    limit_gb: float  # GiB
    batch_size: int
    may_recompute: bool
    rows: int  # sequences of a micro-batch at most
    recompute_loops: bool

    @classmethod
    def from_config(cls, config: Config, device: torch.device) -> BatchFit:
        """Return the largest micro-batches that the settings allow and that are useful on the device."""
        settings, rows = config.training, config.training.batch_size
        if device.type == "cpu":
            rows = min(rows, max(1, MAX_CPU_ELEMENTS // (config.model.max_seq_len * config.model.dim)))
        return cls(
            device=device.type,
            limit_gb=settings.vram_limit_gb,
            batch_size=settings.batch_size,
            may_recompute=settings.recompute_loops is not False,
            rows=rows,
            recompute_loops=settings.recompute_loops is True,
        )

    def smaller(self) -> BatchFit:
        """Return the next choice, which needs less memory.

        Raises:
            MemoryCapError: there is none: this is one sequence, with recomputation if the settings allow it.
        """
        if self.may_recompute and not self.recompute_loops:
            return dataclasses.replace(self, recompute_loops=True)
        if self.rows == 1:
            raise MemoryCapError(
                f"not even one sequence fits under training.vram_limit_gb = {self.limit_gb:g}; raise it, or lower "
                "model.max_seq_len, model.dim or model.vocab_size"
                + ("" if self.recompute_loops else "; or set training.recompute_loops to auto")
            )
        return dataclasses.replace(self, rows=(self.rows + 1) // 2)

    def restored(self, record: dict[str, Any] | None) -> BatchFit:
        """Return the choice recorded in a checkpoint if it was made for the same settings, else this one."""
        saved = BatchFit(**record) if record else self
        settings = ("device", "limit_gb", "batch_size", "may_recompute")
        if any(getattr(saved, name) != getattr(self, name) for name in settings):
            return self
        return dataclasses.replace(
            saved,
            rows=min(saved.rows, self.rows),  # older versions chose more on a CPU
            recompute_loops=saved.recompute_loops or self.recompute_loops,
        )

    def __str__(self) -> str:
        loops = "loops recomputed in the backward pass" if self.recompute_loops else "loops kept for the backward pass"
        return f"micro-batches of {self.rows}, {loops}"


@dataclass(frozen=True)
class StepSettings:
    """How all steps of an attempt are computed."""

    device: torch.device
    precision: Precision
    deterministic: bool  # gradients are added in the order of a tree
    updates_on_spike: bool  # false: a step that is a spike does not update the weights


@dataclass
class TrainingState:
    """What a step changes, after `step` steps, with `position` sequences of the global order consumed."""

    settings: StepSettings  # no step changes these, nor the data fingerprint
    model: UniversalTransformer
    optimizer: MasterWeightOptimizer
    gradients: GradientBuffer
    batch_fit: BatchFit
    spike_window: SpikeWindow
    average: WeightAverage | None = None  # with `training.ema_decay`
    step: int = 0
    position: int = 0
    tokens_seen: int = 0
    skipped_micro_batches: int = 0
    skipped_in_a_row: int = 0  # consecutive steps without an update
    schedule_offset: int = 0  # number of updates by which the schedule is ahead of `step`
    left_out: tuple[tuple[int, int], ...] = ()  # by rewinds: (first position, number of sequences), see data/order.py
    data_fingerprint: str = ""  # of the text that `position` refers to

    @property
    def device(self) -> torch.device:
        """Return the device of all tensors."""
        return self.settings.device

    def master_weights(self) -> dict[str, Tensor]:
        """Return fp32 weights by name."""
        return {name: self.optimizer.master(p) for name, p in self.model.named_parameters()}

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors that updates change: weights, optimizer state, and average."""
        return itertools.chain(self.optimizer.tensors(), self.average.weights.values() if self.average else ())

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Put the average in place of the weights within the `with` block; without an average, do nothing."""
        if self.average is None:
            yield
            return
        self.average.exchange()
        try:
            yield
        finally:
            self.average.exchange()

    @property
    def next_in_schedule(self) -> int:
        """Return the number of the next update in the learning-rate schedule, from 1."""
        return self.step + 1 + self.schedule_offset

    def set_batch_fit(self, batch_fit: BatchFit) -> None:
        """Set micro-batch size and recomputation for the following forward passes."""
        PROGRESS.expect_compilation()
        self.batch_fit = batch_fit
        self.model.recompute_loops = batch_fit.recompute_loops

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Load fp32 weights by name.

        Raises:
            CheckpointError: names or shapes differ from the model's; all differences are listed.
        """
        parameters = dict(self.model.named_parameters())
        missing = [f"{name} is missing" for name in parameters.keys() - weights.keys()]
        unknown = [f"{name} is unknown" for name in weights.keys() - parameters.keys()]
        if differences := sorted(missing + unknown) + list(reshaped_weights(parameters, weights).values()):
            raise CheckpointError("the weights do not fit the model: " + "; ".join(differences))
        for name, parameter in parameters.items():
            self.optimizer.set_master(parameter, weights[name].to(self.device, torch.float32))
        if self.average is not None:
            self.average.restart()

    def to_checkpoint(self, weights: dict[str, Tensor] | None = None) -> dict[str, Any]:
        """Return the checkpoint: the four keys of the original script's files, and `savant` for all else that is resumed.

        The average of the weights, if there is one, has a key of its own. The tensors are the state's own, except for joined
        bf16 weights: fp32 copies on the device, 4 bytes a weight. `HostCopy` joins one weight at a time instead and passes
        its own `weights`.
        """
        return {
            "step": self.step,
            "model_state_dict": self.master_weights() if weights is None else weights,
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": {"last_epoch": self.step},
            **({} if self.average is None else {AVERAGE: self.average.weights}),
            "savant": {
                "format_version": FORMAT_VERSION,
                "position": self.position,
                "tokens_seen": self.tokens_seen,
                "skipped_micro_batches": self.skipped_micro_batches,
                "skipped_in_a_row": self.skipped_in_a_row,
                "schedule_offset": self.schedule_offset,
                "data_fingerprint": self.data_fingerprint,
                "left_out": [list(positions) for positions in self.left_out],
                "spike_window": self.spike_window.to_record(),
                "fit": dataclasses.asdict(self.batch_fit),
                "threads": torch.get_num_threads(),
                **({} if self.average is None else {"average_updates": self.average.n_updates}),
                "torch_rng_state": torch.get_rng_state(),
            },
        }

    def load_checkpoint(self, content: dict[str, Any], allow_changes: bool = False) -> list[str]:
        """Restore the state of `to_checkpoint`; return one sentence for each part that was not restored.

        Weights that only the model has keep their initial values; weights that only the checkpoint has are ignored. With
        `allow_changes`, the same applies to weights whose shapes differ. If any weight was not restored or was ignored, or
        the optimizer's state does not fit, the optimizer starts from its initial state. The average of the weights begins
        with the loaded weights if the checkpoint has no average or belongs to a different model. The spike window stays
        empty if weights, optimizer or schedule were not restored, or if the text (`data_fingerprint`) or the effective batch
        is different, because losses and norms may then differ.

        Raises:
            CheckpointError: weights have other shapes than the model's; all are listed.
        """
        notes = self._load_matching_weights(content["model_state_dict"], allow_changes)
        average_note = self._load_average(content, is_changed=bool(notes))
        problem = "the model has changed" if notes else self._load_optimizer(content["optimizer_state_dict"])
        if problem:
            self.optimizer.restart()  # a rewind loads the checkpoint after steps with this optimizer
            notes.append(f"the optimizer starts from its initial state: {problem}")
        if (epoch := content["scheduler_state_dict"].get("last_epoch")) != content["step"]:
            notes.append(f"the saved schedule is at {epoch}; it continues at step {content['step']:,}")
        self._load_counters(content)
        self._load_spikes(content["savant"], is_changed=bool(notes))
        return notes + average_note

    def _load_matching_weights(self, weights: dict[str, Tensor], allow_changes: bool) -> list[str]:
        parameters = dict(self.model.named_parameters())
        reshaped = reshaped_weights(parameters, weights)
        if reshaped and not allow_changes:
            raise CheckpointError("the weights have other shapes: " + "; ".join(reshaped.values()))
        for name, parameter in parameters.items():
            if name in weights and name not in reshaped:
                self.optimizer.set_master(parameter, weights[name].to(self.device, torch.float32))
        missing = [f"{name} is not in the checkpoint: newly initialized" for name in parameters if name not in weights]
        unknown = [
            f"{name} of the checkpoint is not in the model: ignored" for name in weights.keys() - parameters.keys()
        ]
        return missing + sorted(unknown) + [f"{text}: newly initialized" for text in reshaped.values()]

    def _load_average(self, content: dict[str, Any], is_changed: bool) -> list[str]:
        """Load the average of the weights, or begin it with the loaded weights; return notes."""
        if self.average is None:
            return ["the average of the weights is dropped: training.ema_decay is null"] if AVERAGE in content else []
        if AVERAGE in content and not is_changed:
            self.average.load(content[AVERAGE], content["savant"]["average_updates"])
            return []
        self.average.restart()
        reason = "the model has changed" if AVERAGE in content else "the checkpoint has none"
        return [f"the average of the weights begins at step {content['step']:,}: {reason}"]

    def _load_optimizer(self, state_dict: dict[str, Any]) -> str | None:
        """Load the optimizer's state, or return why it does not fit."""
        try:
            self.optimizer.load_state_dict(state_dict)
        except CheckpointError as problem:
            return str(problem)
        return None

    def _load_counters(self, content: dict[str, Any]) -> None:
        extra = content["savant"]
        if "torch_rng_state" in extra:  # absent in a converted checkpoint
            torch.set_rng_state(extra["torch_rng_state"].cpu())
        self.step = content["step"]
        self.position = extra["position"]
        self.tokens_seen = extra["tokens_seen"]
        self.skipped_micro_batches = extra["skipped_micro_batches"]
        self.skipped_in_a_row = extra["skipped_in_a_row"]
        self.schedule_offset = extra.get("schedule_offset", 0)  # absent in older checkpoints
        self.set_batch_fit(self.batch_fit.restored(extra.get("fit")))

    def _load_spikes(self, extra: dict[str, Any], is_changed: bool) -> None:
        """Load the window, and what spikes have left out, from a checkpoint's `savant`; older ones have neither."""
        same_text = self.data_fingerprint in (NO_FINGERPRINT, extra["data_fingerprint"])
        self.left_out = tuple((first, n) for first, n in extra.get("left_out", ())) if same_text else ()
        self.spike_window = self.spike_window.restored(
            extra.get("spike_window") if same_text and not is_changed else None
        )


def new_state(config: Config, device: torch.device, precision: Precision | None = None) -> TrainingState:
    """Return the state before the first step: PyTorch's default initialization from `run.seed`, drawn on the CPU.

    `precision` replaces the setting on a device that does not support it.
    """
    precision = precision or config.training.precision
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        model = UniversalTransformer(config.model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.to(device, weights_dtype(precision))
    optimizer = new_optimizer(model, config.training)
    decay = config.training.ema_decay
    average = None if decay is None else WeightAverage(dict(model.named_parameters()), optimizer, decay)
    batch_fit = BatchFit.from_config(config, device)
    state = TrainingState(
        StepSettings(device, precision, is_deterministic(config, device), config.training.on_spike == "warn"),
        model,
        optimizer,
        GradientBuffer(model.parameters(), len(SUMS)),
        batch_fit,
        SpikeWindow(config.training.effective_batch),
        average,
    )
    state.set_batch_fit(batch_fit)
    state.load_weights(weights)
    return state


def is_deterministic(config: Config, device: torch.device) -> bool:
    """Return whether steps have equal bits on any number of ranks (`training.deterministic`); auto: on a CPU."""
    setting = config.training.deterministic
    return device.type == "cpu" if setting == AUTO else bool(setting)


def micro_batch_size(config: Config, device: torch.device) -> int:
    """Return the number of sequences of a micro-batch; it does not depend on the number of ranks."""
    return BatchFit.from_config(config, device).rows if is_deterministic(config, device) else config.training.batch_size


def new_optimizer(model: UniversalTransformer, settings: TrainingConfig) -> MasterWeightOptimizer:
    """Return the optimizer of `training.optimizer` for all weights of the model."""
    if settings.optimizer == "adamw":
        return AdamW(model.parameters(), settings.learning_rate, settings.weight_decay)
    matrices = [p for p in model.recurrent_block.parameters() if p.ndim == 2]
    matrix_ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in matrix_ids]
    return Muon(matrices, others, settings.learning_rate, settings.weight_decay)


def reshaped_weights(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Describe each weight whose shape differs from the parameter of its name."""
    return {
        name: f"{name} is {list(weights[name].shape)}, the model's {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in weights and weights[name].shape != parameter.shape
    }
