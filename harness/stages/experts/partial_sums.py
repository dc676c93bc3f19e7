r"""Data on which a sum over slots that is rounded on its way is wrong, whatever else is rounded.

The exact data of `exact`, with two experts that every token has in two of its slots, and that cancel: the first and the
last, so that in the order of experts too others come between,
    o_first = 2^m h,   o_last = -2 o_first,   weights 1/2 and 1/4        h an integer in 45..51
Wherever values are stored in 16 bits, 2^m h stays as it is.  A partial sum of it and of what other slots add does not:
it takes more bits than the dtype has.  So with k > 2 one rounding alone shows, `partial_sum`, and no number of others
hides it, while the statistics of ordinary data see it only where little else is permitted.

Codes cannot hold all that: there the scales are larger by 2^m.  A block computes its weights, so that none but equal
ones are exact: there k = E, the router's weights are 0 and o_last = -o_first, both twice as large.

With k = 2 the one partial sum is the first slot's weighted output: to round it is what `weighted` permits, so that no
data can tell the two.  There o_first itself takes more bits than the dtype has, and its sum with o_last does not.
"""

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import Declared, permitted
from moe_harness.harness.core.call import Builder
from moe_harness.harness.stages.experts.cases import ExpertsCase

# Small, so that the data can tell wrong results from right ones also where the sum may be rounded; a partial sum then
# has neighbours at a distance of 1, and what the other slots add comes in quarters.
BITS = {"fp32": 9, "fp16": 6, "bf16": 3}
SPOILING = {2: {"partial_sum", "weighted", "expert_output"}}  # by k; more slots: a partial sum's rounding alone
MORE = {"partial_sum"}


def pair_up(ids: Tensor, experts: int, draw: Builder) -> Tensor:
    """ids [T, k] that hold the first and the last expert in two slots of every row, and others in the rest.

    Of the first row these are the first and the last slot: in others they may be next to each other, and lose nothing.
    """
    tokens, slots = ids.shape
    others = 1 + draw.distinct(tokens, experts - 2, slots - 2)
    first, last = (torch.full((tokens, 1), expert) for expert in (0, experts - 1))
    order = draw.uniform(tokens, slots).argsort(1)
    order[0] = torch.arange(slots)
    return torch.cat([first, others, last], dim=1).gather(1, order)


def others(ids: Tensor, experts: int) -> Tensor:
    """The ids of what is left when the two have cancelled, -1 for those."""
    return ids.masked_fill((ids == 0) | (ids == experts - 1), -1)


def oppose(gate_up: Tensor, down: Tensor) -> None:
    """Make the last expert's output the first one's with its sign changed, in place."""
    gate_up[-1], down[-1] = gate_up[0], -down[0]


def weigh(case: ExpertsCase, ids: Tensor, weights: Tensor) -> None:
    """Give both their weights, in place."""
    weights[ids == 0], weights[ids == case.E - 1] = 0.5, 0.25


def cancel(case: ExpertsCase, ids: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> None:
    """Make exact data of that kind, in place."""
    oppose(gate_up, down)
    weigh(case, ids, weights)
    small = down[0].roll(1, dims=-1)
    down[0] *= 2.0 ** BITS[case.dtype]
    down[-1] *= 2.0 ** (BITS[case.dtype] + 1)
    if case.k == 2:
        down[0] += small


def is_exact(case: ExpertsCase, declared: Declared) -> bool:
    """Whether none of the roundings permitted to an implementation changes anything on these data."""
    return case.dtype == "fp32" or not permitted(declared) & SPOILING.get(case.k, MORE)
