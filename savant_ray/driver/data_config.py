"""Hands each Ray Train worker its share of every step.

Ray's stock `DataConfig` deals whole blocks, so the sequences of a step depend on the number of workers, and a resumed
run cannot ask for a position (ray #37633, #48224, #58658). Here a worker gets a `StepStream`, which starts a Ray Data
read at any position of the one global order.
"""

from __future__ import annotations

from typing import Any

import ray.train

from savant_ray.data.stream import StepStream, StreamPlan


class StepDataConfig(ray.train.DataConfig):
    """For `TorchTrainer(datasets={name: StreamPlan}, dataset_config=StepDataConfig())`."""

    def __init__(self) -> None:
        super().__init__(datasets_to_split=[])

    def configure(  # type: ignore[override]  # Ray passes on whatever it is given, but names its own
        self,
        datasets: dict[str, StreamPlan],
        world_size: int,
        worker_handles: Any = None,
        worker_node_ids: Any = None,
        **_: Any,
    ) -> list[dict[str, StepStream]]:
        """One stream per rank and dataset."""
        return [
            {name: StepStream(plan, rank, world_size) for name, plan in datasets.items()} for rank in range(world_size)
        ]
