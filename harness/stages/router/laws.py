"""Laws of the stage `router`.  A law gives a changed call and the way back from its result to that of the first.

Two results of one token agree when they choose the same set with the same weights; another set is right only on a
near-tie, which the judgement of each result decides.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.laws import changed, shuffled

Result = tuple[Tensor, Tensor]  # topk_weights, topk_ids


class Changed(NamedTuple):
    """Two calls, the rows of the first result the second speaks of, and its result in the first call's terms."""

    first: Call
    second: Call
    rows: Tensor | slice
    back: Callable[[Result], Result]


def _same(result: Result) -> Result:
    return result


def token_permutation(call: Call) -> Changed:
    """Permuted tokens give permuted rows."""
    order = shuffled(call.case.T, call.case.seed)
    return Changed(call, changed(call, router_logits=call.args["router_logits"][order]), order, _same)


def expert_relabelling(call: Call) -> Changed:
    """Experts may be renumbered (there are no groups in these cases)."""
    order = shuffled(call.case.E, call.case.seed)
    bias = call.keywords["correction_bias"]
    renamed = changed(call, router_logits=call.args["router_logits"][:, order],
                      **({} if bias is None else {"correction_bias": bias[order]}))  # fmt: skip
    return Changed(call, renamed, slice(None), lambda r: (r[0], order.to(r[1].device)[r[1].long()]))


def batch_split(call: Call) -> Changed:
    """The last two thirds of a batch by themselves."""
    rows = slice(call.case.T // 3, None)
    return Changed(call, changed(call, router_logits=call.args["router_logits"][rows]), rows, _same)


def row_alone(call: Call) -> Changed:
    """One token by itself."""
    row = call.case.seed % call.case.T
    rows = slice(row, row + 1)
    return Changed(call, changed(call, router_logits=call.args["router_logits"][rows]), rows, _same)


def softmax_shift(call: Call) -> Changed:
    """Softmax does not see a constant added to a row; sixteenths in [-7, 7] stay exact under -8 in every dtype."""
    grid = (call.args["router_logits"].float() * 16).round().clamp(-112, 112) / 16
    return Changed(changed(call, router_logits=grid), changed(call, router_logits=grid - 8.0), slice(None), _same)


def scale_is_linear(call: Call) -> Changed:
    """routed_scaling_factor multiplies the weights and nothing else."""
    factor = call.keywords["routed_scaling_factor"]
    scaled = changed(call)
    scaled.keywords["routed_scaling_factor"] = factor * 4.0
    return Changed(call, scaled, slice(None), lambda r: (r[0] / 4.0, r[1]))


def disagreement(first: Result, second: Result) -> tuple[Tensor, Tensor]:
    """(rows that chose the same set, largest relative difference of their weights), both [rows]."""
    (weights_a, ids_a), (weights_b, ids_b) = ((w.double(), i.long()) for w, i in (first, second))
    order_a, order_b = ids_a.argsort(-1), ids_b.argsort(-1)
    same = (ids_a.gather(-1, order_a) == ids_b.gather(-1, order_b)).all(-1)
    a, b = weights_a.gather(-1, order_a), weights_b.gather(-1, order_b)
    scale = torch.maximum(a.abs(), b.abs()).clamp(min=2.0**-120)
    return same, ((a - b).abs() / scale).amax(-1)
