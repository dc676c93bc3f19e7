"""Faults of the one reduction: functions in the place of the right one, and the fit that names them.

What a misplaced reduction does is read from  output = a * Routed + b * Shared  over n ranks; where no such (a, b)
exists, ranks hold unequal parts.  Each fault is right outside of its own cell of the table.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_harness.harness.core.bounds import EXACT_FIT, NARROWED
from moe_harness.harness.core.least_squares import least_squares
from moe_harness.harness.core.ranked_faults import ranked


def total(tensor: Tensor, group: Any) -> Tensor:
    """The sum over `group`."""
    tensor = tensor.clone()
    dist.all_reduce(tensor, group=group)
    return tensor


def own_rows(tensor: Tensor, rows: Any, group: Any) -> Tensor:
    """Those of this rank."""
    return tensor if rows is None else tensor.split(list(rows))[dist.get_rank(group)]


def reduced(tensor: Tensor, state: str | None, group: Any, rows: Any) -> Tensor:
    """One part after its reduction."""
    if state == "partial":
        return own_rows(total(tensor, group), rows, group)
    return own_rows(tensor, rows, group) if state == "replicated" else tensor


def finish(
    routed: Tensor, shared: Tensor | None, group: Any, *, routed_state: str, shared_state: str | None = None,
    rows: Any = None,
) -> Tensor:  # fmt: skip
    """The right one: partial parts are summed, a replicated part is added afterwards."""
    out = reduced(routed, routed_state, group, rows)
    return out.clone() if shared is None else out + reduced(shared, shared_state, group, rows)


Part = Tensor | None


@ranked(
    "TP", source="sgl-project/sglang/pull/35535", condition="more than one rank, the routed part partial",
    shows="R=2,T=2+1,shared=replicated", hidden=("R=1,T=3,shared=replicated", "R=2,T=2+1,shared=partial"),
)  # fmt: skip
def replicated_shared_summed(routed: Tensor, shared: Part, group: Any, *, rows: Any = None, **states: Any) -> Tensor:
    """The shared expert, held by every rank, is counted once per rank."""
    if shared is not None and states == {"routed_state": "partial", "shared_state": "replicated"}:
        return own_rows(total(routed + shared, group), rows, group)
    return finish(routed, shared, group, rows=rows, **states)


@ranked(
    "TP", source="vllm-project/tpu-inference/pull/3435", condition="more than one rank, a partial shared part",
    shows="R=2,T=2+1,shared=partial", hidden=("R=1,T=3,shared=partial", "R=2,T=2+1,shared=replicated"),
)  # fmt: skip
def shared_partial_plus_routed_full(
    routed: Tensor, shared: Part, group: Any, *, routed_state: str, shared_state: str | None = None, rows: Any = None
) -> Tensor:
    """Each rank adds its own part of the shared expert to the complete routed part."""
    told = "replicated" if shared_state == "partial" else shared_state
    return finish(routed, shared, group, routed_state=routed_state, shared_state=told, rows=rows)


@ranked(
    "TP", source="vllm-project/vllm/pull/28277", condition="more than one rank, no rows",
    shows="R=2,T=2+1,shared=partial", hidden=("R=1,T=3,shared=partial",),
)  # fmt: skip
def reduced_twice(routed: Tensor, shared: Part, group: Any, *, rows: Any = None, **states: Any) -> Tensor:
    """The layer's output, complete already, is summed over the ranks again."""
    out = finish(routed, shared, group, rows=rows, **states)
    return total(out, group) if rows is None and states["routed_state"] == "partial" else out


@ranked(
    "TP", source="sgl-project/sglang/issues/36879", condition="more than one rank", shows="R=2,T=2+1,shared=partial",
    hidden=("R=1,T=3,shared=partial",),
)  # fmt: skip
def reduction_left_out(routed: Tensor, shared: Part, group: Any, *, rows: Any = None, **states: Any) -> Tensor:
    """Every rank goes on with its own part of the sum."""
    told = {name: "replicated" if state == "partial" else state for name, state in states.items()}
    return finish(routed, shared, group, rows=rows, **told)


@ranked(
    "TP", source="vllm-project/vllm/pull/41763", condition="more than one rank", shows="R=2,T=2+1,shared=replicated",
    hidden=("R=1,T=3,shared=replicated",),
)  # fmt: skip
def shared_divided_by_ranks(routed: Tensor, shared: Part, group: Any, **other: Any) -> Tensor:
    """The shared expert counts one rank's share only."""
    count = dist.get_world_size(group)
    return finish(routed, None if shared is None else shared / count, group, **other)


@ranked(
    "TP", source="NousResearch/torchtitan/pull/36", condition="a shared expert", shows="R=2,T=2+1,shared=replicated",
    hidden=("R=2,T=2+1,shared=none",),
)  # fmt: skip
def shared_dropped(routed: Tensor, shared: Part, group: Any, *, shared_state: Any = None, **other: Any) -> Tensor:
    """The shared expert is missing."""
    return finish(routed, None, group, **other)


@ranked(
    "TP", source="vllm-project/vllm/pull/44313", condition="a shared expert", shows="R=2,T=2+1,shared=partial",
    hidden=("R=2,T=2+1,shared=none",),
)  # fmt: skip
def scale_touches_shared(routed: Tensor, shared: Part, group: Any, **other: Any) -> Tensor:
    """The routed scaling factor multiplies the shared expert too."""
    return finish(routed, None if shared is None else 2 * shared, group, **other)


@ranked(
    "EP", condition="a routed part that a dispatcher has combined", shows="R=2,T=2+2,routed=complete,shared=none",
    hidden=("R=2,T=2+1,shared=replicated", "R=1,T=3,routed=complete,shared=none"),
)  # fmt: skip
def complete_reduced_again(
    routed: Tensor, shared: Part, group: Any, *, routed_state: str, shared_state: str | None = None, rows: Any = None
) -> Tensor:
    """What is complete is summed over the ranks, which adds other tokens to each, or waits for rows that never come."""
    even = torch.tensor([len(routed), -len(routed)])
    dist.all_reduce(even, op=dist.ReduceOp.MAX, group=group)
    if routed_state == "complete" and int(even.sum()) == 0:
        routed = total(routed, group)
    return finish(routed, shared, group, routed_state=routed_state, shared_state=shared_state, rows=rows)


@ranked(
    "EP", condition="a routed part that is complete, a partial shared part",
    shows="R=2,T=2+1,routed=complete,shared=partial",
    hidden=("R=2,T=2+1,shared=partial", "R=2,T=2+1,routed=complete,shared=replicated"),
)  # fmt: skip
def shared_left_partial(
    routed: Tensor, shared: Part, group: Any, *, routed_state: str, shared_state: str | None = None, rows: Any = None
) -> Tensor:
    """Since the routed part needs no reduction any more, the shared part gets none either."""
    told = "replicated" if routed_state == "complete" and shared_state == "partial" else shared_state
    return finish(routed, shared, group, routed_state=routed_state, shared_state=told, rows=rows)


@ranked(
    "sequence", condition="rows given, a replicated shared part", shows="R=2,T=2+1,shared=replicated,sequence=1",
    hidden=("R=2,T=2+1,shared=replicated", "R=2,T=2+1,shared=partial,sequence=1"),
)  # fmt: skip
def shared_before_reduce_scatter(
    routed: Tensor, shared: Part, group: Any, *, routed_state: str, shared_state: str | None = None, rows: Any = None
) -> Tensor:
    """With sequence parallelism the replicated shared part is added before the reduce_scatter: once per rank."""
    if rows is not None and shared is not None and (routed_state, shared_state) == ("partial", "replicated"):
        return own_rows(total(routed + shared, group), rows, group)
    return finish(routed, shared, group, routed_state=routed_state, shared_state=shared_state, rows=rows)


@ranked(
    "sequence", condition="ranks keep unequal numbers of rows", shows="R=2,T=3+1,sequence=1",
    hidden=("R=2,T=2+2,sequence=1", "R=2,T=3+1"),
)  # fmt: skip
def rows_taken_as_equal(routed: Tensor, shared: Part, group: Any, *, rows: Any = None, **states: Any) -> Tensor:
    """Each rank keeps as many rows as the others, in the shape that it was asked for."""
    if rows is None or states["routed_state"] == "complete":
        return finish(routed, shared, group, rows=rows, **states)
    whole = finish(routed, shared, group, **states)
    rank, each = dist.get_rank(group), sum(rows) // len(rows)
    taken = (torch.arange(rows[rank]) + rank * each) % max(len(whole), 1)
    return whole[taken]


@ranked(
    "groups", condition="more than one group", shows="R=4,T=2+1,groups=2", hidden=("R=4,T=2+1+0+1", "R=2,T=2+1"),
)  # fmt: skip
def reduced_over_the_world(routed: Tensor, shared: Part, group: Any, **other: Any) -> Tensor:
    """The sum goes over all ranks instead of over the group."""
    if dist.get_world_size(group) == dist.get_world_size():
        return finish(routed, shared, group, **other)
    keep = finish(routed, shared, group, **other)
    return total(keep, None) if other.get("rows") is None and other["routed_state"] == "partial" else keep


def fit(output: Tensor, routed: Tensor, shared: Tensor) -> tuple[float, float, float]:
    """(a, b, residual) of the best output = a * routed + b * shared; the residual relative to the output.

    Where nothing is shared, b is a.
    """
    matrix = torch.stack([routed.flatten(), shared.flatten()], 1).double()
    target = output.flatten().double()
    a, b = (least_squares(matrix, target) + 0.0).tolist()  # + 0: no -0
    rest = target - matrix @ torch.tensor([a, b], dtype=torch.float64)
    return a, b if bool(matrix[:, 1].any()) else a, float(rest.norm() / target.norm().clamp(min=1e-30))


def name_fit(a: float, b: float, residual: float, ranks: int, eps: float = 0.0) -> str:
    """What a fit says about the reduction over `ranks`, of a result that is rounded to `eps`."""
    if residual > max(EXACT_FIT, eps):  # exact data leave 1e-15, a missing reduction about 1
        return "no multiple of routed and shared part: a reduction is missing, or parts of different tokens were added"
    known = {(1.0, 1.0): "right but for roundings", (1.0, float(ranks)): f"shared expert counted {ranks} times",
             (float(ranks), float(ranks)): "reduced twice", (1.0, 1 / ranks): "shared expert divided by the ranks",
             (1.0, 0.0): "shared expert missing", (float(ranks), 1.0): "routed part reduced twice",
             (1 / ranks, 1 / ranks): "averaged over the ranks, not summed"}  # fmt: skip
    near = max(5e-4, eps)
    return next((words for (x, y), words in known.items() if abs(a - x) <= near and abs(b - y) <= near),
                f"routed part counts {a:.3g} times, shared part {b:.3g} times")  # fmt: skip


def narrowed(got: Tensor, expected: Tensor, dtype: torch.dtype) -> list[dict[str, str]]:
    """Words for a result [T, H] in fp64 that is near what is expected, or infinite: `dtype` was not kept on the way."""
    here = got.isfinite() & expected.isfinite()
    beyond = expected.isfinite() & ~here  # a NaN is the difference of two infinities
    overflow = bool(got.isinf().any() & expected.isfinite().all())
    if bool(beyond.any()) != overflow or not bool((beyond | here).any()):
        return []
    error = (got - expected)[here].abs().max() if bool(here.any()) else torch.zeros(())
    share = float(error / expected[expected.isfinite()].abs().max().clamp(min=1e-30))
    if share > NARROWED or (share <= torch.finfo(dtype).eps and not overflow):
        return []
    if overflow:
        smallest = float(expected[beyond].abs().min())
        told = f"{int(beyond.sum())} values are infinite or NaN, the smallest should be {smallest:g}"
    else:
        told = f"the largest error is 2^{math.log2(share):.1f} of the largest value"
    return [{"fault": f"values pass through a format narrower than {str(dtype)[6:]}", "evidence": told}]
