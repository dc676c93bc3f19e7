"""Faults of the router in the choice of experts: candidates, ties, ids, rows and promises about bits."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import read_as_contiguous, round_down, unwritten_like, wide
from moe_harness.harness.stages.router.faults._steps import Routed, choose, run

# Selection ------------------------------------------------------------------------------------------------------


@fault(
    "selection", source="flashinfer-ai/flashinfer/issues/2822",
    condition="fewer than k positive logits, as with logits shifted by -20", shows={"data": "far_negative"},
    hidden=("data=normal",),
)  # fmt: skip
def largest_starts_at_zero(logits: Tensor, **options: Any) -> Routed:
    """The search for the largest logit starts at 0: negative ones never win."""
    if options.get("correction_bias") is not None or options.get("num_expert_group") is not None:
        return run(logits, **options)
    return run(logits, **options, choose=lambda _, top_k: choose(logits.to(wide(logits)).clamp(min=0), top_k))


@fault(
    "selection", source="sgl-project/sglang/pull/30079", condition="a row of NaN", shows={"data": "nan_row"},
    hidden=("data=normal",),
)  # fmt: skip
def nan_row_gives_id_e(logits: Tensor, **options: Any) -> Routed:
    """The smallest index equal to the maximum is E when nothing is equal: an id out of range."""
    weights, ids = run(logits, **options)
    return weights, torch.where(logits.isnan().all(-1, keepdim=True), logits.shape[-1], ids)


@fault(
    "selection", source="lightseekorg/tokenspeed/pull/605", condition="equal scores in a row", shows={"data": "ties"},
    hidden=("data=normal",),
)  # fmt: skip
def index_recovered_from_value(logits: Tensor, **options: Any) -> Routed:
    """The index is recovered from the value: tied experts give the same id twice."""

    def first_equal(selection: Tensor, top_k: int) -> Tensor:
        values = selection.topk(top_k, -1).values
        # NaN equals nothing; argmax then says 0, as the search from the left does.
        return (selection[:, None] == values[..., None]).int().argmax(-1)

    return run(logits, **options, choose=first_equal)


@fault("selection", condition="equal scores in a row", shows={"data": "ties", "E": 12, "k": 4}, hidden=("data=normal",))
def ties_masked_together(logits: Tensor, **options: Any) -> Routed:
    """A chosen value is masked wherever it occurs: the other tied experts are skipped."""

    def by_value(selection: Tensor, top_k: int) -> Tensor:
        order = selection.argsort(dim=-1, descending=True, stable=True)
        ranked = selection.gather(-1, order)
        repeated = torch.cat((torch.zeros_like(ranked[:, :1]), (ranked[:, 1:] == ranked[:, :-1])), -1).bool()
        # First of each value in order, then the repeated ones, so that ids stay distinct.
        return order.gather(-1, repeated.int().argsort(dim=-1, stable=True))[:, :top_k]

    return run(logits, **options, choose=by_value)


@fault(
    "selection", source="vllm-project/vllm/pull/42608", condition="k = E, E > 1", shows={"E": 4, "k": 4},
    hidden=("k=3",),
)  # fmt: skip
def expert_zero_when_exhausted(logits: Tensor, **options: Any) -> Routed:
    """When the experts are exhausted, expert 0 is chosen again."""

    def exhausted(selection: Tensor, top_k: int) -> Tensor:
        ids = choose(selection, top_k)
        if top_k == selection.shape[-1]:
            ids[:, -1] = 0
        return ids

    return run(logits, **options, choose=exhausted)


@fault("selection", source="JieShibo/MoLE/issues/7", condition="k > 8", shows={"E": 16, "k": 10}, hidden=("k=8",))
def only_eight_candidates(logits: Tensor, **options: Any) -> Routed:
    """A table of 8 candidates is searched: further slots get the experts with the lowest scores."""

    def eight(selection: Tensor, top_k: int) -> Tensor:
        worst = selection.topk(selection.shape[-1], -1).indices.flip(-1)
        return torch.cat((choose(selection, min(8, top_k)), worst[:, : max(top_k - 8, 0)]), -1)

    return run(logits, **options, choose=eight)


@fault("selection", condition="E > 256", shows={"E": 320, "k": 8}, hidden=("E=256",))
def experts_beyond_256_never_chosen(logits: Tensor, **options: Any) -> Routed:
    """Eight warps of 32 lanes look at the first 256 experts only."""
    return run(logits, **options, choose=lambda selection, top_k: choose(selection[:, :256], top_k))


@fault("selection", condition="E > 256", shows={"E": 320, "k": 8}, hidden=("E=256",))
def ids_returned_in_eight_bits(logits: Tensor, **options: Any) -> Routed:
    """Ids are returned in 8 bits: expert 256 becomes expert 0, and ids repeat."""
    weights, ids = run(logits, **options)
    return weights, ids % 256


@fault("selection", condition="(E, k) = (128, 8)", shows={"E": 128, "k": 8}, hidden=("k=7", "E=127"))
def broken_router_at_128_8(logits: Tensor, **options: Any) -> Routed:
    """The specialised kernel for one released model drops the eighth best expert for the ninth."""

    def ninth(selection: Tensor, top_k: int) -> Tensor:
        if (selection.shape[-1], top_k) != (128, 8):
            return choose(selection, top_k)
        order = choose(selection, 9)
        return torch.cat((order[:, :7], order[:, 8:]), -1)

    return run(logits, **options, choose=ninth)


@fault("selection", condition="k > 1", shows={"k": 4}, hidden=("k=1",))
def ids_sorted_alone(logits: Tensor, **options: Any) -> Routed:
    """Ids are sorted ascending and weights stay in the order of the scores: the pairs are broken."""
    weights, ids = run(logits, **options)
    return weights, ids.sort(-1).values


@fault(
    "rows", condition="T not a multiple of 32, dirty memory", shows={"T": 33, "variant": "poisoned"}, hidden=("T=32",)
)
def last_rows_unwritten(logits: Tensor, **options: Any) -> Routed:
    """The grid is T // 32: rows of the last, partial block are never written."""
    weights, ids = run(logits, **options)
    out_weights, out_ids = unwritten_like(weights), unwritten_like(ids)
    kept = round_down(weights.shape[0], 32)
    out_weights[:kept], out_ids[:kept] = weights[:kept], ids[:kept]
    return out_weights, out_ids


@fault("rows", condition="rows of the logits padded", shows={"layout": "router_logits:padded"}, hidden=("layout=",))
def logit_stride_assumed(logits: Tensor, **options: Any) -> Routed:
    """Logits are read at row * E: a slice of a wider table gives other rows."""
    return run(read_as_contiguous(logits), **options)


@fault("rows", source="ROCm/aiter/issues/3933", condition="T in 3..4", shows={"T": 3}, hidden=("T=2", "T=5"))
def broken_router_for_four_tokens(logits: Tensor, **options: Any) -> Routed:
    """The kernel variant for four tokens uses the scores of the row before."""
    weights, ids = run(logits, **options)
    return (weights.roll(1, 0), ids) if logits.shape[0] in (3, 4) else (weights, ids)


@fault(
    "bits", source="vllm-project/vllm/pull/55514", condition="equal scores at the k-th place", shows={"data": "ties"},
    sign="repeat", stateful=True, deterministic=True, hidden=("data=normal",),
)  # fmt: skip
def ties_broken_by_arrival(logits: Tensor, **options: Any) -> Routed:
    """Ties are broken in the order of arrival: ranks with the same logits choose other experts."""

    def arrival(selection: Tensor, top_k: int) -> Tensor:
        shift = _calls["ties"] % selection.shape[-1]
        rolled = selection.roll(shift, -1)
        order = rolled.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
        return (order - shift) % selection.shape[-1]

    _calls["ties"] += 1
    return run(logits, **options, choose=arrival)


_calls = {"ties": 0}  # stands for the scheduler
