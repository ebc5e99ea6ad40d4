"""Exchange between ranks; all functions except `n_ranks` are collective.

`sum_trees` gives the same bits on any number of ranks. Each rank has added its own leaves (micro-batches) in the tree of
`optim/tree_sum.py`, and holds a few of its nodes, each as large as all gradients. Each rank then receives one shard of the
nodes of all ranks (all-to-all), adds it in the order of the tree, and all ranks gather the sums (all-gather). If each rank
has one node, that moves as many bytes as a ring all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from savant_ray.optim.tree_sum import Node, TreeSum, largest_nodes
from savant_ray.training.progress import PROGRESS

SEGMENT = 1 << 22  # elements that are exchanged at a time: 16 MiB, which bounds the memory of the exchange


def n_ranks() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over all ranks in place."""
    if n_ranks() > 1:
        PROGRESS.enter_collective()
        dist.all_reduce(values)
    return values


def from_rank_0(value: Tensor) -> Tensor:
    """Set `value` on every rank to that of rank 0 in place. On a GPU the host does not wait."""
    if n_ranks() > 1:
        PROGRESS.enter_collective()
        dist.broadcast(value, src=0)
    return value


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set on some rank."""
    return bool(all_reduce_sum(torch.tensor(float(flag), device=device)))


def broadcast_from_rank_0(decide: Callable[[], str | None]) -> str | None:
    """Call `decide` on rank 0 and return its result on every rank."""
    if not dist.is_initialized():
        return decide()
    decision = [decide() if dist.get_rank() == 0 else None]
    PROGRESS.enter_collective()
    dist.broadcast_object_list(decision, src=0)
    return decision[0]


def gather(values: Sequence[int], device: torch.device) -> list[list[int]]:
    """Return the integers (64 bits) of each rank, in the order of the ranks; each rank passes the same number of them."""
    if n_ranks() == 1:
        return [list(values)]
    own = torch.tensor(values, dtype=torch.int64, device=device)
    rows = own.new_empty(n_ranks(), len(own))
    PROGRESS.enter_collective()
    dist.all_gather(list(rows), own)
    gathered: list[list[int]] = rows.tolist()
    return gathered


def sum_trees(tree: TreeSum, leaves: Sequence[range], result: Tensor, segment: int = SEGMENT) -> None:
    """Write the sum of all leaves of all ranks to `result`, a flat tensor, with equal bits on any number of ranks.

    `tree` has this rank's leaves; it is empty afterwards. `leaves` are the consecutive leaves of each rank; a rank may have
    none. `segment` is the number of elements that are exchanged at a time.
    """
    if not any(leaves):
        result.zero_()
    elif len(leaves) == 1:
        result.copy_(tree.total())
    else:
        PROGRESS.enter_collective()
        nodes = [largest_nodes(of_rank) for of_rank in leaves]
        for part in result.split(segment):
            start = part.storage_offset() - result.storage_offset()
            own = [total[start : start + len(part)] for total in tree.totals]
            _exchange(own, nodes, part)
    tree.clear()


def _exchange(own: Sequence[Tensor], nodes: Sequence[Sequence[Node]], result: Tensor) -> None:
    """Write the sum of the nodes of all ranks to `result`; `own` are this rank's nodes, shaped like `result`."""
    n, n_own = len(nodes), len(own)
    shard = -(-len(result) // n)
    padding = n * shard - len(result)
    sent = torch.stack([F.pad(values, (0, padding)).view(n, shard) for values in own], 1) if own else result[:0]
    received = result.new_empty(sum(map(len, nodes)), shard)
    dist.all_to_all_single(
        received.flatten(),
        sent.flatten(),
        output_split_sizes=[len(of_rank) * shard for of_rank in nodes],
        input_split_sizes=[n_own * shard] * n,
    )
    tree = TreeSum()
    for node, values in zip((node for of_rank in nodes for node in of_rank), received, strict=True):
        tree.add(node, values)
    gathered = result.new_empty(n, shard)
    dist.all_gather(list(gathered), tree.total())
    result.copy_(gathered.flatten()[: len(result)])
