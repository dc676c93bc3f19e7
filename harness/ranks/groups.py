"""Process groups of some of the ranks: what a layer that is sharded over two axes runs its collectives in."""

from dataclasses import replace

import torch.distributed as dist

from moe_harness.harness.ranks.worker import Rank

_MADE: dict[tuple[int, int], list[dist.ProcessGroup]] = {}  # by world size and number of groups


def member_of_group(me: Rank, groups: int) -> Rank:
    """This rank as a member of one of `groups` equal groups of the world, with its number in there.

    Group g holds the ranks g, g + groups, g + 2 groups, ...: no rank but the first is what it is in the world.
    """
    if groups == 1:
        return me
    if (me.world_size, groups) not in _MADE:  # every rank makes all of them, in the same order
        _MADE[me.world_size, groups] = [
            dist.new_group(list(range(first, me.world_size, groups))) for first in range(groups)
        ]
    group = _MADE[me.world_size, groups][me.rank % groups]
    return replace(me, rank=me.rank // groups, world_size=me.world_size // groups, group=group)
