"""How long a checkpoint stalls training, against a blocking `torch.save` followed by `report()`.

One worker of a Ray Train job alternates between both for a model of 68.5 M weights (fp32, two moments each: 800 MB). No
step runs while the checkpoint is written in the background; the stall is the duration of `Saver.begin`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from savant_ray.benchmarks.registry import Figures, alternate, figure, seconds
from savant_ray.cluster.session import ray_session

ROUNDS = 5
MODEL = {"vocab_size": 32_000, "dim": 896, "n_heads": 14}  # 68.5 M weights
RESULT = "result.json"


def run() -> Figures:
    """Measure the stall relative to the blocking checkpoint."""
    return measure_stall(MODEL, ROUNDS)


def measure_stall(model: dict[str, int], rounds: int) -> Figures:
    """Measure with a model of any size; connects to Ray."""
    with tempfile.TemporaryDirectory(prefix="stall") as folder, ray_session():
        from ray.train import CheckpointConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from savant_ray.storage.tolerant_file_system import tolerant_file_system

        TorchTrainer(
            _measure,
            train_loop_config={"folder": folder, "model": model, "rounds": rounds},
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                name="run",
                storage_path=folder,
                # The saver wraps the file system of its checkpoints like this, and Ray requires both to be equal.
                storage_filesystem=tolerant_file_system(None),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        ).fit()
        stalls, blocking, size = json.loads(Path(folder, RESULT).read_text())
    stall_ms, blocking_ms = (1000 * statistics.median(times) for times in (stalls, blocking))
    detail = f"{stall_ms:.0f} against {blocking_ms:.0f} ms for {size / 1e6:.0f} MB"
    return {"checkpoint_stall": figure([a / b for a, b in zip(stalls, blocking, strict=True)], detail)}


def _measure(settings: dict[str, Any]) -> None:
    import ray.train
    import torch

    from savant_ray.config import Config
    from savant_ray.storage.local import LocalStorage
    from savant_ray.training.host_copies import HostCopy
    from savant_ray.training.state import new_state
    from savant_ray.worker.saving import Saver

    config = Config.from_dict({"model": settings["model"]})
    state = new_state(config, torch.device("cpu"), "fp32")
    saver = Saver(LocalStorage(Path(settings["folder"], "run")), {}, [], lambda event: 0)
    host_copy = HostCopy()
    scratch = Path(settings["folder"], "scratch")
    scratch.mkdir()

    def in_background() -> float:
        state.step += 1
        stall = seconds(lambda: saver.begin(state.step, "periodic", lambda: host_copy.update(state), {}))
        saver.finish()
        return stall

    def blocking() -> None:
        state.step += 1
        torch.save(state.to_checkpoint(), scratch / "state.pt")
        ray.train.report({"step": state.step}, checkpoint=ray.train.Checkpoint.from_directory(scratch))

    stalls, blocked = alternate(settings["rounds"], in_background, lambda: seconds(blocking))
    size = (scratch / "state.pt").stat().st_size
    Path(settings["folder"], RESULT).write_text(json.dumps([stalls, blocked, size]))
