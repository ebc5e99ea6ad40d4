"""Passes a `StepStream` to each Ray Train worker.

Ray's default `DataConfig` distributes complete blocks. The sequences of a step would then depend on the number of
workers, and a resumed run could not start at a position (ray #37633, #48224, #58658). A `StepStream` reads this rank's
sequences with Ray Data from any position of the global order.
"""

from __future__ import annotations

from typing import Any

import ray.train

from savant_ray.data.stream import StepStream, StreamPlan


class StepDataConfig(ray.train.DataConfig):
    """Data configuration for `TorchTrainer(datasets={name: StreamPlan}, dataset_config=StepDataConfig())`."""

    def __init__(self) -> None:
        super().__init__(datasets_to_split=[])

    def configure(  # type: ignore[override]  # Ray annotates `datasets` as Ray Datasets, but passes on any values
        self,
        datasets: dict[str, StreamPlan],
        world_size: int,
        worker_handles: Any = None,
        worker_node_ids: Any = None,
        **_: Any,
    ) -> list[dict[str, StepStream]]:
        """Return one stream per rank and dataset."""
        return [
            {name: StepStream(plan, rank, world_size) for name, plan in datasets.items()} for rank in range(world_size)
        ]
