"""Small right and wrong SPMD programs for the tests of the rank pool."""

import torch
import torch.distributed as dist

from moe_harness.harness.core.ranked_subject import load
from moe_harness.harness.core.ranked_task import Rank


def two_sums(me: Rank, spec: object, seed: int) -> list[float]:
    x = torch.ones(4) * (me.rank + 1)
    dist.all_reduce(x)
    dist.all_reduce(x)
    return x.tolist()


def skips(me: Rank, spec: object, seed: int) -> None:
    if me.rank != 1:
        dist.all_reduce(torch.ones(3))


def other_operation(me: Rank, spec: object, seed: int) -> None:
    dist.all_reduce(torch.ones(3)) if me.rank else dist.broadcast(torch.ones(3), 0)


def other_size(me: Rank, spec: object, seed: int) -> None:
    dist.all_reduce(torch.ones(3 if me.rank else 4))


def swapped(me: Rank, spec: object, seed: int) -> None:
    a, b = torch.ones(3), torch.zeros(3)
    steps = [lambda: dist.all_reduce(a), lambda: _second(b)]
    for step in steps if me.rank else steps[::-1]:
        step()


def _second(x: torch.Tensor) -> None:
    dist.all_reduce(x)


def disagreeing_splits(me: Rank, spec: object, seed: int) -> None:
    rows = torch.ones(3 if me.rank == 0 else 2)
    dist.all_to_all_single(torch.empty(2), rows, [1, 1], [1, 2] if me.rank == 0 else [1, 1])


def crossed_receives(me: Rank, spec: object, seed: int) -> None:
    dist.recv(torch.empty(2), 1 - me.rank)


def raises(me: Rank, spec: object, seed: int) -> None:
    dist.all_reduce(torch.ones(3))
    if me.rank == 1:
        raise KeyError("missing")
    dist.all_reduce(torch.ones(3))


def asynchronous(me: Rank, spec: object, seed: int) -> float:
    x = torch.ones(2)
    work = dist.all_reduce(x, async_op=True)
    work.wait()
    return float(x[0])


def sub_groups(me: Rank, spec: object, seed: int) -> float:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    x = torch.tensor([float(me.rank)])
    dist.all_reduce(x, group=groups[me.rank // 2])
    return float(x)


def every_operation(me: Rank, spec: object, seed: int) -> None:
    ranks, x = me.world_size, torch.ones(4)
    dist.broadcast(x, 1)
    dist.reduce(x, 0)
    dist.all_gather([torch.empty(4) for _ in range(ranks)], x)
    dist.reduce_scatter(torch.empty(4), [torch.ones(4) for _ in range(ranks)])
    dist.all_to_all_single(torch.empty(6), torch.ones(6))
    dist.gather(x, [torch.empty(4) for _ in range(ranks)] if me.rank == 0 else None, dst=0)
    dist.scatter(x, [torch.empty(4) for _ in range(ranks)] if me.rank == 0 else None, src=0)
    dist.barrier()
    if me.rank < 2:
        work = dist.isend(x, 1) if me.rank == 0 else dist.irecv(x, 0)
        work.wait()
    dist.all_gather_object([None] * ranks, {"rank": me.rank})


def distinct_tokens(me: Rank, spec: dict, seed: int) -> str:
    """What the dispatcher `spec["impl"]` says to tokens that differ between ranks, in values or in number."""
    kind = load("dispatcher", spec["impl"])
    dispatcher = kind(me.group, num_experts=2, owner=torch.tensor([0, me.world_size - 1]), **spec.get("options", {}))
    rows = spec["tokens"][me.rank]
    hidden = torch.full((rows, 4), float(me.rank if spec["differ"] else 1))
    try:
        dispatcher.dispatch(hidden, torch.ones(rows, 1), torch.zeros(rows, 1, dtype=torch.int64))
    except ValueError as error:
        return str(error)
    return ""
