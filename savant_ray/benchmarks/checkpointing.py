"""How long training stands still for a checkpoint, against `torch.save` and `report()` one after the other.

One worker of a real Ray Train job takes turns: the state of a model of 67 M weights (fp32, two moments each: 800 MB).
While a checkpoint is written beside it, no step is computed here: the stall is what `Saver.begin` takes.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from savant_ray.benchmarks.rounds import Figures, figure, in_turn, seconds
from savant_ray.cluster.session import ray_session

ROUNDS = 5
MODEL = {"vocab_size": 32_000, "dim": 896, "n_heads": 14}  # 68.5 M weights
RESULT = "result.json"


def run() -> Figures:
    """The stall as a share of the blocking way's."""
    return stall(MODEL, ROUNDS)


def stall(model: dict[str, int], rounds: int) -> Figures:
    """The same for a model of another size; connects to Ray."""
    with tempfile.TemporaryDirectory(prefix="stall") as folder, ray_session():
        from ray.train import CheckpointConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from savant_ray.cluster.forgiving import forgiving

        TorchTrainer(
            _measure,
            train_loop_config={"folder": folder, "model": model, "rounds": rounds},
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                name="run",
                storage_path=folder,
                storage_filesystem=forgiving(None),  # the saver's checkpoints are there
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        ).fit()
        stalls, blocking, size = json.loads(Path(folder, RESULT).read_text())
    ours, blocked = (1000 * statistics.median(each) for each in (stalls, blocking))
    detail = f"{ours:.0f} against {blocked:.0f} ms for {size / 1e6:.0f} MB"
    return {"checkpoint_stall": figure([a / b for a, b in zip(stalls, blocking, strict=True)], detail)}


def _measure(settings: dict[str, Any]) -> None:
    import ray.train
    import torch

    from savant_ray.cluster.disk import Disk
    from savant_ray.cluster.saving import Saver
    from savant_ray.config import Config
    from savant_ray.training.state import new_state

    config = Config.from_dict({"model": settings["model"]})
    state = new_state(config, torch.device("cpu"), "fp32")
    saver = Saver(Disk(Path(settings["folder"], "run")), {}, lambda event: None)
    scratch = Path(settings["folder"], "scratch")
    scratch.mkdir()

    def ours() -> float:
        state.step += 1
        stall = seconds(lambda: saver.begin(state.step, "periodic", state.copy_to_host, {}))
        saver.finish()
        return stall

    def blocking() -> None:
        state.step += 1
        torch.save(state.to_checkpoint(), scratch / "state.pt")
        ray.train.report({"step": state.step}, checkpoint=ray.train.Checkpoint.from_directory(scratch))

    stalls, blocked = in_turn(settings["rounds"], ours, lambda: seconds(blocking))
    size = (scratch / "state.pt").stat().st_size
    Path(settings["folder"], RESULT).write_text(json.dumps([stalls, blocked, size]))
