"""Everything that a step changes, and its way into a checkpoint and back.

A checkpoint holds fp32 weights whatever the precision (a bf16 weight joined with its lower half), so that a run can go
on in another precision and an export loses nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from savant_ray.config import Config, TrainingConfig
from savant_ray.errors import CheckpointError
from savant_ray.model.transformer import UniversalTransformer
from savant_ray.optim.adamw import AdamW
from savant_ray.optim.gradients import GradientBuffer
from savant_ray.optim.master_weights import MasterWeightOptimizer
from savant_ray.optim.muon import Muon
from savant_ray.training.checkpoint import FORMAT_VERSION
from savant_ray.training.fitting import Fit, retry_on_oom
from savant_ray.training.precision import weights_dtype

LOSS, TOKENS, SKIPPED, STOP, ABANDONED, NO_ROOM = SUMS = range(6)  # what travels with the gradients (training/step.py)


@dataclass
class TrainingState:
    """`step` updates are done, and `position` sequences of the global order are used up."""

    model: UniversalTransformer
    optimizer: MasterWeightOptimizer
    gradients: GradientBuffer
    precision: str
    device: torch.device
    fit: Fit
    step: int = 0
    position: int = 0
    tokens_seen: int = 0
    skipped_micro_batches: int = 0
    skipped_in_a_row: int = 0  # steps without an update
    schedule_offset: int = 0  # updates that the schedule is ahead of `step`
    data_fingerprint: str = ""
    _seen_weights: dict[str, Tensor] = field(default_factory=dict)
    _host_copy: dict[str, Any] = field(default_factory=dict)
    _room: threading.Thread | None = None  # that allocates `_host_copy`

    def master_weights(self) -> dict[str, Tensor]:
        """fp32 weights by name."""
        return {name: self.optimizer.master(p) for name, p in self.model.named_parameters()}

    @property
    def next_in_schedule(self) -> int:
        """Number of the next update in the learning-rate schedule, from 1."""
        return self.step + 1 + self.schedule_offset

    def use(self, fit: Fit) -> None:
        """From the next forward pass on."""
        self.fit = fit
        self.model.recompute_loops = fit.recompute_loops

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Takes over fp32 weights by name.

        Raises:
            CheckpointError: names or shapes differ from the model's; all differences are listed.
        """
        parameters = dict(self.model.named_parameters())
        missing = [f"{name} is missing" for name in parameters.keys() - weights.keys()]
        left_over = [f"{name} is unknown" for name in weights.keys() - parameters.keys()]
        if differences := sorted(missing + left_over) + list(reshaped_weights(parameters, weights).values()):
            raise CheckpointError("the weights do not fit the model: " + "; ".join(differences))
        for name, parameter in parameters.items():
            self.optimizer.set_master(parameter, weights[name].to(self.device, torch.float32))

    def weights_moved(self) -> float | None:
        """Share of the fp32 weights that changed since the last call, of rows that ever had a gradient.

        None at the first call, which only remembers (in host memory, 4 bytes a weight).
        """
        moved = total = 0
        for name, parameter in self.model.named_parameters():
            now = self.optimizer.master(parameter).cpu()
            rows = self.optimizer.had_gradient(parameter).cpu()
            if name in self._seen_weights:
                moved += int((now != self._seen_weights[name]).reshape(len(now), -1)[rows].sum())
                total += int(rows.sum()) * (now.numel() // len(now))
            self._seen_weights[name] = now.clone()
        return moved / total if total else None

    def to_checkpoint(self) -> dict[str, Any]:
        """Step, weights, optimizer and schedule, and `savant` with what else a resumed run needs.

        Of bf16 weights it holds fp32 copies on the device, all at once; `copy_to_host` makes one at a time.
        """
        return self._checkpoint(self.master_weights())

    def _checkpoint(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        return {
            "step": self.step,
            "model_state_dict": weights,
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": {"last_epoch": self.step},
            "savant": {
                "format_version": FORMAT_VERSION,
                "position": self.position,
                "tokens_seen": self.tokens_seen,
                "skipped_micro_batches": self.skipped_micro_batches,
                "skipped_in_a_row": self.skipped_in_a_row,
                "schedule_offset": self.schedule_offset,
                "data_fingerprint": self.data_fingerprint,
                "fit": self.fit.to_record(),
                "torch_rng_state": torch.get_rng_state(),
            },
        }

    def copy_to_host(self) -> dict[str, Any]:
        """`to_checkpoint` as it is now: copies in host memory, 12 bytes a weight, which later steps do not touch.

        The next call writes over them. bf16 weights are joined with their lower halves one tensor at a time, so the
        device needs 4 bytes for each element of the largest one.

        Raises:
            DeviceMemoryError: the device has no memory for that.
        """
        if self._room is not None:
            self._room.join()
        self._host_copy = retry_on_oom(
            self._copied_state, self.device, f"copying step {self.step:,} for its checkpoint"
        )
        return self._host_copy

    def _copied_state(self) -> dict[str, Any]:
        older = self._host_copy.get("model_state_dict", {})
        weights = {
            name: _copied(self.optimizer.master(p), older.get(name)) for name, p in self.model.named_parameters()
        }
        return {**_copied(self._checkpoint({}), self._host_copy), "model_state_dict": weights}

    def make_room_for_copies(self) -> None:
        """Allocates in a thread what the first `copy_to_host` writes to, which then costs no more than the later ones."""
        meta = {name: torch.empty(p.shape, device="meta") for name, p in self.model.named_parameters()}
        like = _shapes(self._checkpoint(meta))
        self._room = threading.Thread(target=self._make_room, args=(like,), name="room-for-copies", daemon=True)
        self._room.start()

    def _make_room(self, like: Any) -> None:
        self._host_copy = _touched(like, pin_memory=self.device.type == "cuda")

    def load_checkpoint(self, content: dict[str, Any], allow_changes: bool = False) -> list[str]:
        """Goes on where `to_checkpoint` was called; returns what could not be taken over, a sentence each.

        Parts that only the model or only the checkpoint has are left as they are; `allow_changes` treats weights of
        another shape alike. The optimizer starts afresh then, and where its state does not fit.

        Raises:
            CheckpointError: weights have other shapes than the model's; all are listed.
        """
        notes = self._load_what_fits(content["model_state_dict"], allow_changes)
        problem = "the model has changed" if notes else self._load_optimizer(content["optimizer_state_dict"])
        if problem:
            notes.append(f"the optimizer starts afresh: {problem}")
        if (epoch := content["scheduler_state_dict"].get("last_epoch")) != content["step"]:
            notes.append(f"the saved schedule stood at {epoch}; it goes on at step {content['step']:,}")
        self._load_counters(content)
        return notes

    def _load_what_fits(self, weights: dict[str, Tensor], allow_changes: bool) -> list[str]:
        mine = dict(self.model.named_parameters())
        reshaped = reshaped_weights(mine, weights)
        if reshaped and not allow_changes:
            raise CheckpointError("the weights have other shapes: " + "; ".join(reshaped.values()))
        fitting = [name for name in mine if name in weights and name not in reshaped]
        for name in fitting:
            self.optimizer.set_master(mine[name], weights[name].to(self.device, torch.float32))
        missing = [f"{name} is not in the checkpoint: a fresh one" for name in mine if name not in weights]
        left_over = [
            f"{name} of the checkpoint has no place in the model: dropped" for name in weights.keys() - mine.keys()
        ]
        return missing + sorted(left_over) + [f"{text}: a fresh one" for text in reshaped.values()]

    def _load_optimizer(self, state_dict: dict[str, Any]) -> str | None:
        """Takes over the state, or says why it does not fit."""
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
        self.use(self.fit.remembered(extra.get("fit")))


def new_state(config: Config, device: torch.device, precision: str | None = None) -> TrainingState:
    """A model in PyTorch's default initialisation, drawn on the CPU from `run.seed`, and an optimizer without past.

    `precision` is the setting's unless the device needs another.
    """
    precision = precision or config.training.precision
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        model = UniversalTransformer(config.model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.to(device, weights_dtype(precision))
    optimizer = new_optimizer(model, config.training)
    gradients = GradientBuffer(model.parameters(), len(SUMS))
    fit = Fit.of(config, device)
    state = TrainingState(model, optimizer, gradients, precision, device, fit)
    state.use(fit)
    state.load_weights(weights)
    return state


def new_optimizer(model: UniversalTransformer, settings: TrainingConfig) -> MasterWeightOptimizer:
    """`training.optimizer` over all of the model's weights."""
    if settings.optimizer == "adamw":
        return AdamW(model.parameters(), settings.learning_rate, settings.weight_decay)
    matrices = [p for p in model.recurrent_block.parameters() if p.ndim == 2]
    of_muon = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in of_muon]
    return Muon(matrices, others, settings.learning_rate, settings.weight_decay)


def reshaped_weights(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Weights whose shape is not the model's, by name: a phrase each."""
    return {
        name: f"{name} is {list(weights[name].shape)}, the model's {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in weights and weights[name].shape != parameter.shape
    }


def _copied(value: Any, into: Any) -> Any:
    """A copy in host memory, in the place of an older one of the same shape: fresh memory costs more than copying."""
    if isinstance(value, Tensor):
        if not isinstance(into, Tensor) or into.shape != value.shape or into.dtype != value.dtype:
            into = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return into.copy_(value)
    if isinstance(value, dict):
        older = into if isinstance(into, dict) else {}
        return {key: _copied(item, older.get(key)) for key, item in value.items()}
    return [_copied(item, None) for item in value] if isinstance(value, list) else value


def _shapes(value: Any) -> Any:
    """The dicts and tensors of a checkpoint without their content."""
    if isinstance(value, dict):
        return {key: _shapes(item) for key, item in value.items()}
    return value.to("meta") if isinstance(value, Tensor) else None


def _touched(like: Any, pin_memory: bool) -> Any:
    """Host memory for these shapes, each page of which is really there; written by one thread, beside training."""
    if isinstance(like, dict):
        return {key: _touched(item, pin_memory) for key, item in like.items()}
    if not isinstance(like, Tensor):
        return None
    # Not `empty_like`: of a meta tensor it imports SymPy, which takes a second of a processor (torch 2.13).
    room = torch.empty(like.shape, dtype=like.dtype, pin_memory=pin_memory)
    room.numpy().fill(0)
    return room
