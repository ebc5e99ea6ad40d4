"""A cluster of nodes that can be drained, killed and added."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from tests.cluster.conftest import Head, running_cluster


class Nodes:
    """A cluster of a head without CPUs, and nodes with one CPU, thus one worker, each."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.head = Head(cluster.address, "", can_drain=True)

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=100 << 20)

    def kill(self, node: Any) -> None:
        """Kill every process of the node, as a power failure does."""
        self.cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any, deadline_ms: int = 0) -> None:
        """Drain the node, as a cloud provider does before it reclaims a spot instance; 0: without a deadline."""
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why_not = GcsClient(address=self.cluster.address).drain_node(
            node.node_id, reason, "reclaimed", deadline_ms
        )
        assert accepted, why_not


@contextmanager
def running_nodes() -> Iterator[Nodes]:
    """Yield a cluster without nodes for workers."""
    with running_cluster(num_cpus=0, object_store_memory=100 << 20, include_dashboard=False) as cluster:
        yield Nodes(cluster)
