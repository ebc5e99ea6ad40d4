"""Ray Train's configurations of a run and of its data, adapted to this program.

Ray Train sends them to actors of its own, which import this module to unpickle them. It therefore does not import torch,
which would take seconds in each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ray.train

# Also exported by `ray.train`, where a type checker sees the class of Ray Train v1.
from ray.train.v2.api.config import RunConfig

from savant_ray.data.stream import StepStream, StreamPlan
from savant_ray.ray_internals import storage_context


@dataclass
class StoredRunConfig(RunConfig):
    """A `RunConfig` with a setting for the run's folder.

    Ray would call the folder `name`, but also uses `name` in metrics and requires it to be ASCII.
    """

    folder: str = ""  # below `storage_path`

    @cached_property
    def storage_context(self) -> Any:
        """Return where Ray Train stores the run: in `folder` instead of `name`."""
        return storage_context(str(self.storage_path), self.folder, self.storage_filesystem)


class StepDataConfig(ray.train.DataConfig):
    """Passes a `StepStream` to each worker, for `TorchTrainer(datasets={name: StreamPlan}, …)`.

    Ray's default `DataConfig` distributes complete blocks. The sequences of a step would then depend on the number of
    workers, and a resumed run could not start at a position (ray #37633, #48224, #58658). A `StepStream` reads this rank's
    sequences with Ray Data from any position of the global order.
    """

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
