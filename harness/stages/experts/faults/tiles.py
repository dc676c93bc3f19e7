"""Faults of the experts stage in rows, tiles, strides, shape ranges and special values."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import (
    BLOCK,
    flat_storage,
    pad_last,
    read_as_contiguous,
    read_past,
    round_down,
    round_up,
    unwritten_like,
    wide,
)
from moe_harness.harness.stages.experts.faults._steps import RIGHT, Steps, halves, live, locate, run, select

# Rows and shapes ------------------------------------------------------------------------------------------------


@fault("rows", condition="the last token, E > 1", hidden=("E=1,k=1",))
def one_slot_to_next_expert(hidden_states: Tensor, gate_up_proj: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """One slot of one token runs the next expert: an off-by-one at the end of the batch."""

    def shifted(ids: Tensor, expert_map: Tensor | None) -> Tensor:
        ids = locate(ids, expert_map).clone()
        last = ids[-1:, :1]
        ids[-1:, :1] = torch.where(last < 0, last, (last + 1) % gate_up_proj.shape[0])
        return ids

    return run(hidden_states, gate_up_proj, *call, **options, locate=shifted)


@fault("rows", condition="two or more tokens with another order by expert", shows={"T": 7}, hidden=("T=1",))
def permutation_for_its_inverse(*call: Tensor, **options: Any) -> Tensor:
    """Rows sorted by expert are put back with the permutation instead of its inverse."""

    def scattered(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        order = ids.flatten().argsort(stable=True)
        weighted = (live(topk_weights, ids, slots.dtype)[..., None] * slots).flatten(0, 1)
        return weighted[order][order].view_as(slots).sum(1)

    return run(*call, **options, combine=scattered)


@fault(
    "rows",
    condition="an expert without tokens before one that has some",
    shows={"routing": "last"},
    hidden=("E=1,k=1",),
)
def idle_experts_not_counted(*call: Tensor, **options: Any) -> Tensor:
    """Weights are indexed by the rank among the busy experts instead of by the expert."""

    def ranked(ids: Tensor, expert_map: Tensor | None) -> Tensor:
        ids = locate(ids, expert_map)
        busy = ids[ids >= 0].unique()
        return torch.where(ids < 0, -1, torch.searchsorted(busy, ids.contiguous()))

    return run(*call, **options, locate=ranked)


def _without_rows(options: dict[str, Any], keep: Callable[[int], int]) -> dict[str, Any]:
    """Options for `run` under which an expert with n rows computes only the first keep(n) of them."""

    def fewer(ids: Tensor, expert: int) -> tuple[Tensor, Tensor]:
        tokens, slots = select(ids, expert)
        kept = keep(len(tokens))
        return tokens[:kept], slots[:kept]

    return {**options, "select": fewer}


@fault(
    "tiles", source="intel/intel-xpu-backend-for-triton/pull/7776", condition="an expert with more than 8 rows",
    shows={"T": 40}, hidden=("T=5",),
)  # fmt: skip
def grid_from_another_config(*call: Tensor, **options: Any) -> Tensor:
    """The grid comes from a looked-up block of 16 rows while the kernel runs with 8: rows are missed."""
    return run(*call, **_without_rows(options, lambda rows: -(-rows // 16) * 8))


@fault(
    "tiles", condition="an expert with more than twice its fair share of rows",
    shows={"T": 40, "routing": "one", "k": 1}, hidden=("T=1",),
)  # fmt: skip
def rows_beyond_capacity_dropped(hidden_states: Tensor, gate_up_proj: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """A capacity sized for balanced routing drops the rows beyond it."""
    capacity = max(16, 2 * call[-1].numel() // gate_up_proj.shape[0])
    return run(hidden_states, gate_up_proj, *call, **_without_rows(options, lambda rows: min(rows, capacity)))


@fault(
    "tiles", source="ml-explore/mlx-lm/pull/1585", condition="T*k > 32768 and not a multiple of 64",
    shows={"T": 4097, "H": 16, "I": 8, "k": 8, "E": 9}, hidden=("T=4096", "T=5"),
)  # fmt: skip
def tail_beyond_32768_rows(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The last partial tile of the large-batch path is computed at a wrong offset."""

    def tail(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        rows = ids.numel()
        if rows > 32768 and rows % 64:
            slots.view(rows, -1)[round_down(rows, 64) :] = slots.view(rows, -1)[: rows % 64].clone()
        return steps.combine(slots, topk_weights, ids)

    return run(*call, **options, steps=steps, combine=tail)


@fault("tiles", condition="T > 64 and not a multiple of 64", shows={"T": 65}, hidden=("T=64", "T=128"))
def large_batch_tail_zero(hidden_states: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """The kernel for large batches forgets the last, partial block of tokens."""
    out = run(hidden_states, *call, **options)
    if out.shape[0] > 64:
        out[round_down(out.shape[0], 64) :] = 0
    return out


@fault("tuning", source="ROCm/aiter/issues/3933", condition="T in 3..4", shows={"T": 3}, hidden=("T=2", "T=5"))
def broken_bucket_of_four_tokens(hidden_states: Tensor, *call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The table of tuned kernels maps one bucket of tokens to a broken variant."""
    first = _without_last_k_block(steps) if hidden_states.shape[0] in (3, 4) else steps.matmul
    return run(hidden_states, *call, **options, steps=steps, first=first)


def _without_last_k_block(steps: Steps) -> Callable[[Tensor, Tensor], Tensor]:
    """A product that loses its last, possibly partial, block of K."""

    def first(rows: Tensor, weight: Tensor) -> Tensor:
        kept = round_up(rows.shape[1]) - BLOCK
        return steps.matmul(rows[:, :kept], weight[:, :kept])

    return first


@fault(
    "tuning", source="ROCm/aiter/issues/5049", condition="(E, k) = (128, 8)", shows={"E": 128, "k": 8, "I": 8},
    hidden=("k=7", "E=127"),
)  # fmt: skip
def broken_only_at_128_8(
    hidden_states: Tensor, gate_up_proj: Tensor, *call: Tensor, steps: Steps = RIGHT, **options: Any
) -> Tensor:
    """The kernel tuned for one released model is wrong, and right for every other shape."""
    experts = gate_up_proj.shape[0] if options.get("expert_map") is None else len(options["expert_map"])
    broken = (experts, call[-1].shape[1]) == (128, 8)
    return run(
        hidden_states,
        gate_up_proj,
        *call,
        **options,
        steps=steps,
        first=_without_last_k_block(steps) if broken else steps.matmul,
    )


@fault("tuning", source="flashinfer-ai/flashinfer/pull/4158", condition="T = 1", shows={"T": 1}, hidden=("T=2",))
def single_token_half_of_h(hidden_states: Tensor, *call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The candidate for one token is not guarded and reads the second half of H as zero."""

    def half(rows: Tensor, weight: Tensor) -> Tensor:
        kept = -(-rows.shape[1] // 2) if hidden_states.shape[0] == 1 else rows.shape[1]
        return steps.matmul(rows[:, :kept], weight[:, :kept])

    return run(hidden_states, *call, **options, steps=steps, first=half)


@fault(
    "tiles", source="databricks/megablocks/pull/47", condition="I > 4096",
    shows={"T": 2, "E": 2, "k": 1, "H": 16, "I": 4104}, hidden=("I=4096",),
)  # fmt: skip
def columns_beyond_4096_lost(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """Each program covers a bounded count of columns: those of I beyond 4096 are lost."""
    return run(
        *call, **options, steps=steps, second=lambda rows, weight: steps.matmul(rows[:, :4096], weight[:, :4096])
    )


@fault(
    "ids", source="vllm-project/vllm/pull/26162", condition="ids of dtype int64", hidden=("ints=int32",),
)  # fmt: skip
def int64_ids_read_as_int32(*call: Tensor, **options: Any) -> Tensor:
    """int64 ids are read as int32: every second id is the upper half of its neighbour."""

    def reread(ids: Tensor, expert_map: Tensor | None) -> Tensor:
        if ids.dtype == torch.int64:
            ids = ids.contiguous().view(torch.int32).view(-1)[: ids.numel()].view_as(ids)
        return locate(ids, expert_map)

    return run(*call, **options, locate=reread)


@fault("ids", condition="E > 256", shows={"E": 300, "routing": "last", "I": 8}, hidden=("E=256",))
def ids_held_in_eight_bits(*call: Tensor, **options: Any) -> Tensor:
    """Expert ids are held in 8 bits: expert 256 is expert 0."""

    def eight_bits(ids: Tensor, expert_map: Tensor | None) -> Tensor:
        ids = locate(ids, expert_map)
        return torch.where(ids < 0, ids, ids % 256)

    return run(*call, **options, locate=eight_bits)


@fault("tiles", condition="I not a multiple of 16", shows={"I": 23}, hidden=("I=32",))
def intermediate_tail_dropped(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The last, partial block of the intermediate columns is never summed."""

    def floored(rows: Tensor, weight: Tensor) -> Tensor:
        kept = round_down(rows.shape[1])
        return steps.matmul(rows[:, :kept], weight[:, :kept])

    return run(*call, **options, steps=steps, second=floored)


@fault("tiles")
def last_intermediate_column_lost(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The last column of I is lost to an off-by-one."""
    return run(*call, **options, steps=steps, second=lambda rows, weight: steps.matmul(rows[:, :-1], weight[:, :-1]))


@fault(
    "tiles", source="axolotl-ai-cloud/axolotl/pull/3410", condition="H not a multiple of 16",
    shows={"H": 40, "variant": "poisoned"}, hidden=("H=48",),
)  # fmt: skip
def output_tail_unwritten(*call: Tensor, **options: Any) -> Tensor:
    """The grid is H // block: the last columns of the output are never written."""
    right = run(*call, **options)
    out = unwritten_like(right)
    kept = round_down(right.shape[1])
    out[:, :kept] = right[:, :kept]
    return out


@fault(
    "tiles", source="vllm-project/vllm/pull/49087", condition="H not a multiple of 64", shows={"H": 72},
    hidden=("H=64",),
)  # fmt: skip
def output_tail_zero(*call: Tensor, **options: Any) -> Tensor:
    """The grid is H // 64 over a zeroed output: the last columns are 0, all of them for small H."""
    out = run(*call, **options)
    out[:, round_down(out.shape[1], 64) :] = 0
    return out


@fault(
    "tiles", source="huggingface/kernels-community/pull/1154", condition="H not a multiple of 16 and T > 1",
    shows={"H": 40}, hidden=("H=48", "T=1"),
)  # fmt: skip
def output_overhang_into_next_row(*call: Tensor, **options: Any) -> Tensor:
    """Tiles are masked in rows only: the overhang of a row is stored into the next one."""
    out = run(*call, **options).contiguous()
    overhang = round_up(out.shape[1]) - out.shape[1]
    if overhang and out.shape[1]:
        start = round_down(out.shape[1])
        out[1:, : min(overhang, start)] = out[:-1, start - min(overhang, start) : start].clone()
    return out


@fault(
    "tiles", source="triton-lang/triton/issues/630", condition="H not a multiple of 16", shows={"H": 40},
    hidden=("H=48",),
)  # fmt: skip
def k_tail_unmasked(hidden_states: Tensor, gate_up_proj: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """The K tail is loaded without a mask on both operands: what lies behind the rows is added."""
    width = round_up(hidden_states.shape[1])
    return run(read_past(hidden_states, width), read_past(gate_up_proj, width), *call, **options)


@fault(
    "tiles", source="triton-lang/triton/issues/10772",
    condition="H not a multiple of 16, NaN or infinity behind the rows",
    shows={"H": 40, "layout": "hidden_states:padded"}, hidden=("H=48",),
)  # fmt: skip
def k_tail_masked_on_one_side(hidden_states: Tensor, gate_up_proj: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """Only one operand of the K tail is masked: garbage times 0 is NaN when the garbage is NaN."""
    width = round_up(hidden_states.shape[1])
    return run(read_past(hidden_states, width), pad_last(gate_up_proj, width), *call, **options)


@fault(
    "tiles", source="lightseekorg/tokenspeed/pull/605", condition="H of at most two tiles", shows={"H": 32},
    hidden=("H=48",),
)  # fmt: skip
def pipeline_deeper_than_k(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """A pipeline three tiles deep wraps around when K has fewer: the first tile counts twice."""

    def wrapped(rows: Tensor, weight: Tensor) -> Tensor:
        out = steps.matmul(rows, weight)
        return out + steps.matmul(rows[:, :BLOCK], weight[:, :BLOCK]) if rows.shape[1] <= 2 * BLOCK else out

    return run(*call, **options, steps=steps, first=wrapped)


@fault(
    "tiles", source="sgl-project/sglang-jax/issues/1193", condition="T odd and above 1", shows={"T": 5},
    hidden=("T=6", "T=1"),
)  # fmt: skip
def odd_token_lost(*call: Tensor, **options: Any) -> Tensor:
    """Tokens are packed in pairs: the last one of an odd batch comes out as 0."""
    out = run(*call, **options)
    if out.shape[0] > 1 and out.shape[0] % 2:
        out[-1] = 0
    return out


# Strides --------------------------------------------------------------------------------------------------------


@fault(
    "strides", source="ml-explore/mlx/issues/4253", condition="rows of hidden_states padded",
    shows={"layout": "hidden_states:padded"}, hidden=("layout=",),
)  # fmt: skip
def token_stride_assumed(hidden_states: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """Tokens are read at row * H: a slice of a wider buffer gives other rows."""
    return run(read_as_contiguous(hidden_states), *call, **options)


@fault(
    "strides", condition="gate_up_proj or down_proj not contiguous", shows={"layout": "all:padded"},
    hidden=("layout=",),
)  # fmt: skip
def weight_strides_assumed(hidden: Tensor, gate_up: Tensor, down: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """Expert weights are read as contiguous: transposed or padded ones give garbage."""
    return run(hidden, read_as_contiguous(gate_up), read_as_contiguous(down), *call, **options)


@fault(
    "strides", condition="topk_ids or topk_weights not contiguous", shows={"layout": "all:padded"},
    hidden=("layout=",),
)  # fmt: skip
def routing_strides_assumed(*call: Tensor, **options: Any) -> Tensor:
    """The router's outputs are read as contiguous: a slice of a wider table is misread."""
    *rest, topk_weights, topk_ids = call
    ids = read_as_contiguous(topk_ids)
    known = int(topk_ids.max()) if topk_ids.numel() else 0
    # What lies between the rows may be no id at all; a kernel would read out of bounds there.
    return run(*rest, read_as_contiguous(topk_weights), ids.clamp(-1, known), **options)


@fault(
    "strides", source="flashinfer-ai/flashinfer/issues/3103", condition="hidden_states transposed",
    shows={"layout": "hidden_states:transposed"}, hidden=("layout=",),
)  # fmt: skip
def output_layout_assumed(hidden_states: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """The output takes the strides of the input and is written as if it were contiguous."""
    right = run(hidden_states, *call, **options)
    out = unwritten_like(hidden_states)
    flat_storage(out)[: right.numel()] = right.flatten()
    return out


# Special values -------------------------------------------------------------------------------------------------


@fault(
    "special values", condition="NaN or infinity in the weights of an expert that some tokens use",
    shows={"data": "expert_nan"}, hidden=("data=normal",),
)  # fmt: skip
def every_expert_on_every_token(
    hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor, topk_weights: Tensor, topk_ids: Tensor, *,
    activation: str = "silu", expert_map: Tensor | None = None, steps: Steps = RIGHT,
) -> Tensor:  # fmt: skip
    """Every expert runs on every token and is masked by a weight of 0: 0 * NaN spreads everywhere."""
    ids = locate(topk_ids, expert_map)
    x, out = hidden_states.to(wide(hidden_states)), 0 * hidden_states.to(wide(hidden_states))
    for expert in range(gate_up_proj.shape[0]):
        share = torch.where(ids == expert, topk_weights, 0).to(x.dtype).sum(1, keepdim=True)
        hidden = steps.gated(*halves(steps.matmul(x, gate_up_proj[expert])), activation)
        out = out + share * steps.matmul(hidden, down_proj[expert])
    return out.to(hidden_states.dtype)


@fault(
    "special values", condition="NaN or infinity in one token", shows={"data": "token_nan", "T": 9},
    hidden=("data=normal",),
)  # fmt: skip
def gathered_by_one_hot_product(hidden_states: Tensor, *call: Tensor, **options: Any) -> Tensor:
    # What the product of T x T zeros and ones with the tokens gives, without it: 0 * NaN and 0 * inf are NaN.
    """Tokens are gathered by a product with a one-hot matrix: one bad token spoils all."""
    bad = ~hidden_states.isfinite()
    gathered = hidden_states.masked_fill(bad.sum(0) > bad.int(), torch.nan)
    return run(gathered, *call, **options)


@fault("special values", condition="NaN in a token or an expert", shows={"data": "token_nan"}, hidden=("data=normal",))
def nan_swallowed(*call: Tensor, **options: Any) -> Tensor:
    """NaN is replaced by 0 on the way out: a broken model looks healthy."""
    return run(*call, **options).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


@fault("special values", condition="infinite outputs", shows={"data": "down_inf"}, hidden=("data=normal",))
def infinity_clamped(*call: Tensor, **options: Any) -> Tensor:
    """Infinities are clamped to the largest finite number."""
    out = run(*call, **options)
    return out.clamp(torch.finfo(out.dtype).min, torch.finfo(out.dtype).max)
