"""Faults of the one reduction: functions in the place of the right one, and the fit that names them.

Each takes (routed, shared, group, rows) with `.tensor` and `.state.name` (PARTIAL, REPLICATED, COMPLETE) and returns
this rank's output.  What a misplaced reduction does is read from  output = a * Routed + b * Shared  over n ranks; where
no such (a, b) exists, ranks hold unequal parts.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_harness.harness.core.bounds import EXACT_FIT
from moe_harness.harness.core.ranked_faults import ranked


def total(tensor: Tensor, group: Any) -> Tensor:
    """The sum over `group`."""
    tensor = tensor.clone()
    dist.all_reduce(tensor, group=group)
    return tensor


def finish(routed: Any, shared: Any, group: Any, rows: Any) -> Tensor:
    """The right one: partial parts are summed, together where both are; a replicated part is added afterwards."""
    if shared.state.name == "PARTIAL":
        return total(routed.tensor + shared.tensor, group)
    return total(routed.tensor, group) + shared.tensor


@ranked(
    "TP", source="sgl-project/sglang/pull/35535", condition="more than one rank", shows="R=2,T=3,shared=replicated",
    hidden=("R=1,T=3,shared=replicated",),
)  # fmt: skip
def replicated_shared_summed(routed: Any, shared: Any, group: Any, rows: Any) -> Tensor:
    """The shared expert, held by every rank, is counted once per rank."""
    return total(routed.tensor + shared.tensor, group)


@ranked(
    "TP", source="vllm-project/tpu-inference/pull/3435", condition="more than one rank",
    shows="R=2,T=3,shared=sharded", hidden=("R=1,T=3,shared=sharded",),
)  # fmt: skip
def shared_partial_plus_routed_full(routed: Any, shared: Any, group: Any, rows: Any) -> Tensor:
    """Each rank adds its own part of the shared expert to the complete routed part."""
    return total(routed.tensor, group) + shared.tensor


@ranked(
    "TP", source="vllm-project/vllm/pull/28277", condition="more than one rank", shows="R=2,T=3,shared=sharded",
    hidden=("R=1,T=3,shared=sharded",),
)  # fmt: skip
def reduced_twice(routed: Any, shared: Any, group: Any, rows: Any) -> Tensor:
    """The layer's output, complete already, is summed over the ranks again."""
    return total(total(routed.tensor + shared.tensor, group), group)


@ranked(
    "TP", source="sgl-project/sglang/issues/36879", condition="more than one rank", shows="R=2,T=3,shared=sharded",
    hidden=("R=1,T=3,shared=sharded",),
)  # fmt: skip
def reduction_left_out(routed: Any, shared: Any, group: Any, rows: Any) -> Tensor:
    """Every rank goes on with its own part of the sum."""
    return routed.tensor + shared.tensor


@ranked(
    "TP", source="vllm-project/vllm/pull/41763", condition="more than one rank", shows="R=2,T=3,shared=replicated",
    hidden=("R=1,T=3,shared=replicated",),
)  # fmt: skip
def shared_divided_by_ranks(routed: Any, shared: Any, group: Any, rows: Any) -> Tensor:
    """The shared expert counts one rank's share only."""
    count = dist.get_world_size(group)
    return total(routed.tensor + shared.tensor / count / count, group)


@ranked("TP", source="NousResearch/torchtitan/pull/36", condition="a shared expert", shows="R=2,T=3,shared=replicated")
def shared_dropped(routed: Any, shared: Any, group: Any, rows: Any) -> Tensor:
    """The shared expert is missing."""
    return total(routed.tensor, group)


@ranked("TP", source="vllm-project/vllm/pull/44313", condition="a shared expert", shows="R=2,T=3,shared=sharded")
def scale_touches_shared(routed: Any, shared: Any, group: Any, rows: Any) -> Tensor:
    """The routed scaling factor multiplies the shared expert too."""
    return total(routed.tensor + 2 * shared.tensor, group)


def fit(output: Tensor, routed: Tensor, shared: Tensor) -> tuple[float, float, float]:
    """(a, b, residual) of the best output = a * routed + b * shared; the residual relative to the output."""
    matrix = torch.stack([routed.flatten(), shared.flatten()], 1).double()
    target = output.flatten().double()
    a, b = torch.linalg.lstsq(matrix, target[:, None]).solution.flatten().tolist()
    rest = target - matrix @ torch.tensor([a, b], dtype=torch.float64)
    return a, b, float(rest.norm() / target.norm().clamp(min=1e-30))


def name_fit(a: float, b: float, residual: float, ranks: int) -> str:
    """What a fit says about the reduction over `ranks`."""
    if residual > EXACT_FIT:  # exact data leave 1e-15, a missing reduction about 1
        return "no multiple of routed and shared part: a reduction is missing, or parts of different tokens were added"
    known = {(1.0, 1.0): "right", (1.0, float(ranks)): f"shared expert counted {ranks} times",
             (float(ranks), float(ranks)): "reduced twice", (1.0, 1 / ranks): "shared expert lost on all ranks but one",
             (1.0, 0.0): "shared expert missing", (float(ranks), 1.0): "routed part reduced twice"}  # fmt: skip
    nearest = (round(a, 3), round(b, 3))
    return next((words for pair, words in known.items() if nearest == tuple(round(p, 3) for p in pair)),
                f"routed part counts {a:.3g} times, shared part {b:.3g} times")  # fmt: skip
