"""Faults of the grouped linear: group bookkeeping, tiles, strides, bias and precision."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import (
    BLOCK,
    flat_storage,
    matmul_rounding_sums,
    pad_last,
    read_as_contiguous,
    read_past,
    round_down,
    round_up,
    to_tf32,
    unwritten_like,
    wide,
)
from moe_harness.harness.stages.grouped_linear.faults._steps import RIGHT, Steps, biased, owners, run

# Groups ---------------------------------------------------------------------------------------------------------


THREE = {"S": 15, "E": 3, "sizes": "4+5+6"}


@fault(
    "groups", source="deepseek-ai/DeepGEMM/issues/15", condition="a group whose size is not a multiple of 16",
    shows={"S": 15, "E": 3, "sizes": "5+7+3"}, hidden=("S=64,sizes=16+32+16",),
)  # fmt: skip
def expert_of_first_row_in_block(*call: Tensor, **options: Any) -> Tensor:
    """Every block of 16 rows takes the expert of its first row."""

    def of_block(group_sizes: Tensor, rows: int) -> Tensor:
        return owners(group_sizes, rows)[::BLOCK].repeat_interleave(BLOCK)[:rows]

    return run(*call, **options, owners=of_block)


@fault(
    "groups", condition="an empty group before a full one", shows={"S": 10, "E": 3, "sizes": "4+0+6"},
    hidden=("sizes=4+6+0",),
)  # fmt: skip
def empty_groups_shift_weights(*call: Tensor, **options: Any) -> Tensor:
    """Empty groups are removed from the list of sizes and not from the weights."""
    return run(*call, **options, owners=lambda sizes, rows: owners(sizes[sizes > 0], rows))


@fault("groups", condition="two or more groups with rows", shows=THREE, hidden=("sizes=first",))
def first_row_to_group_before(*call: Tensor, **options: Any) -> Tensor:
    """Boundaries are compared with <=: the first row of a group belongs to the one before."""

    def inclusive(group_sizes: Tensor, rows: int) -> Tensor:
        before = (torch.arange(rows, device=group_sizes.device) - 1).clamp(min=0)
        return torch.searchsorted(group_sizes.long().cumsum(0), before, right=True)

    return run(*call, **options, owners=inclusive)


@fault("groups", condition="two or more groups with rows", shows=THREE, hidden=("sizes=first",))
def sizes_taken_for_ends(*call: Tensor, **options: Any) -> Tensor:
    """Sizes are taken for the ends of the groups: rows beyond the largest size get nothing."""

    def ends(group_sizes: Tensor, rows: int) -> Tensor:
        return torch.searchsorted(
            group_sizes.long().cummax(0).values, torch.arange(rows, device=group_sizes.device), right=True
        )

    return run(*call, **options, owners=ends)


@fault("groups", condition="the last group has rows", shows=THREE, hidden=("S=9,sizes=4+5+0",))
def last_group_dropped(x: Tensor, weight: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """The loop ends one group early: the last expert's rows stay 0."""

    def fewer(group_sizes: Tensor, rows: int) -> Tensor:
        experts = owners(group_sizes, rows)
        return experts.masked_fill(experts == weight.shape[0] - 1, -1)

    return run(x, weight, *call, **options, owners=fewer)


@fault(
    "groups", source="vllm-project/vllm/pull/26162", condition="sizes of dtype int64",
    shows=THREE, hidden=("ints=int32",),
)  # fmt: skip
def int64_sizes_read_as_int32(x: Tensor, weight: Tensor, group_sizes: Tensor, **options: Any) -> Tensor:
    """int64 sizes are read as int32: every second one is 0."""
    if group_sizes.dtype == torch.int64:
        group_sizes = group_sizes.contiguous().view(torch.int32)[: len(group_sizes)]
    return run(x, weight, group_sizes, **options)


@fault(
    "groups", condition="S > 32767", shows={"S": 32776, "E": 2, "sizes": "32760+16", "K": 4, "N": 4},
    hidden=("S=32767,sizes=32760+7",),
)  # fmt: skip
def offsets_in_sixteen_bits(x: Tensor, weight: Tensor, group_sizes: Tensor, **options: Any) -> Tensor:
    """Offsets are summed in 16 bits: rows beyond 32767 belong to nobody."""

    def narrow(sizes: Tensor, rows: int) -> Tensor:
        # A wrapped offset is negative; the kernel's loop over such a group does nothing.
        wrapped = sizes.long().cumsum(0) > 32767
        experts = owners(sizes, rows)
        return torch.where(wrapped[experts], -1, experts)

    return run(x, weight, group_sizes, **options, owners=narrow)


@fault(
    "groups", condition="a group of more than 128 rows", shows={"S": 133, "E": 2, "sizes": "130+3"},
    hidden=("S=131,sizes=128+3",),
)  # fmt: skip
def one_block_per_group(*call: Tensor, **options: Any) -> Tensor:
    """The grid has one block of 128 rows per expert: the rest of a popular expert stays 0."""

    def capped(group_sizes: Tensor, rows: int) -> Tensor:
        experts = owners(group_sizes, rows)
        starts = group_sizes.long().cumsum(0) - group_sizes
        return experts.masked_fill(torch.arange(rows, device=group_sizes.device) - starts[experts] >= 128, -1)

    return run(*call, **options, owners=capped)


@fault(
    "tuning", source="ROCm/aiter/issues/3933", condition="a group of 3 or 4 rows", hidden=("S=7,sizes=2+5",),
    shows={"S": 11, "E": 2, "sizes": "3+8"},
)  # fmt: skip
def broken_group_of_four(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The kernel variant for groups of four loses its last block of K."""

    def variant(rows: Tensor, weight: Tensor) -> Tensor:
        kept = round_up(rows.shape[1]) - BLOCK if rows.shape[0] in (3, 4) else rows.shape[1]
        return steps.matmul(rows[:, :kept], weight[:, :kept])

    return run(*call, **options, steps=steps, multiply=variant)


@fault("groups", condition="E > 256", shows={"E": 259, "sizes": "last", "K": 8, "N": 8}, hidden=("E=2",))
def groups_beyond_256_dropped(*call: Tensor, **options: Any) -> Tensor:
    """One program per expert, 256 at most: the rows of further experts stay 0."""

    def capped(group_sizes: Tensor, rows: int) -> Tensor:
        experts = owners(group_sizes, rows)
        return experts.masked_fill(experts >= 256, -1)

    return run(*call, **options, owners=capped)


# Tiles ----------------------------------------------------------------------------------------------------------


@fault(
    "tiles", source="huggingface/kernels-community/pull/1154", condition="N not a multiple of 16, two or more rows",
    shows={"N": 40}, hidden=("N=48",),
)  # fmt: skip
def n_overhang_into_next_row(x: Tensor, weight: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """Tiles are masked in rows only: the overhang of a row is stored into the next one."""
    out = run(x, weight, *call, **options)
    overhang = min(round_up(out.shape[1]) - out.shape[1], out.shape[1])
    if overhang:
        out[1:, :overhang] = out[:-1, -overhang:].clone()
    return out


@fault(
    "tiles", source="triton-lang/triton/issues/630", condition="K not a multiple of 16", shows={"K": 40},
    hidden=("K=48",),
)  # fmt: skip
def k_tail_added(x: Tensor, weight: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """The K tail is loaded without a mask on both operands: what lies behind the rows is added."""
    width = round_up(x.shape[1])
    return run(read_past(x, width), read_past(weight, width), *call, **options)


@fault(
    "tiles", source="triton-lang/triton/issues/10772",
    condition="K not a multiple of 16, NaN or infinity behind the rows of weight",
    shows={"K": 40, "layout": "weight:padded"}, hidden=("K=48",),  # memory is fenced in: no layout hides it
)  # fmt: skip
def k_tail_of_weight_unmasked(x: Tensor, weight: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """Only x is masked in the K tail: 0 times what lies behind a weight row is NaN when that is NaN."""
    width = round_up(x.shape[1])
    return run(pad_last(x, width), read_past(weight, width), *call, **options)


@fault(
    "tiles", source="axolotl-ai-cloud/axolotl/pull/3410", condition="N not a multiple of 16, dirty memory",
    shows={"N": 40, "variant": "poisoned"}, hidden=("N=48",),
)  # fmt: skip
def n_tail_unwritten(x: Tensor, weight: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """The grid is N // block: the last columns are never written."""
    right = run(x, weight, *call, **options)
    out = unwritten_like(right)
    kept = round_down(right.shape[1])
    out[:, :kept] = right[:, :kept]
    return out


@fault("tiles", condition="K not a multiple of 32", shows={"K": 40}, hidden=("K=64",))
def k_tail_in_no_split(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """Split-K divides with floor: the last partial chunk is in no split."""

    def floored(rows: Tensor, weight: Tensor) -> Tensor:
        kept = round_down(rows.shape[1], 32)
        return steps.matmul(rows[:, :kept], weight[:, :kept])

    return run(*call, **options, steps=steps, multiply=floored)


@fault(
    "tiles", source="huggingface/transformers/issues/48644",
    condition="a row of K elements not a multiple of 16 bytes", shows={"K": 33}, hidden=("K=32",),
)  # fmt: skip
def unsupported_stride_accepted(x: Tensor, weight: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """Strides that the kernel does not support are not rejected: rows are read at rounded strides."""
    whole = 16 // x.element_size()
    kept = round_down(x.shape[1], whole)
    shifted = weight if kept == x.shape[1] else read_past(weight.contiguous(), round_up(x.shape[1], whole))
    return run(x[:, :kept], shifted[..., shifted.shape[-1] - kept :], *call, **options)


@fault("layout", source="ModelTC/LightX2V/pull/1153", condition="N == K", shows={"K": 32, "N": 32}, hidden=("N=48",))
def transposed_if_square(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """Square expert weights are taken for the other layout and used transposed."""

    def guessed(rows: Tensor, weight: Tensor) -> Tensor:
        return steps.matmul(rows, weight.T if weight.shape[0] == weight.shape[1] else weight)

    return run(*call, **options, steps=steps, multiply=guessed)


# Strides --------------------------------------------------------------------------------------------------------


@fault(
    "strides", source="ml-explore/mlx/issues/4253", condition="rows of x padded", shows={"layout": "x:padded"},
    hidden=("layout=",),
)  # fmt: skip
def row_stride_is_k(x: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """Rows are read at row * K: a view gives other rows."""
    return run(read_as_contiguous(x), *call, **options)


@fault(
    "strides", condition="weight transposed or padded", shows={"layout": "weight:padded"},
    hidden=("layout=",),
)  # fmt: skip
def weight_read_as_contiguous(x: Tensor, weight: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """The weight is read as contiguous [E, N, K] whatever its strides are."""
    return run(x, read_as_contiguous(weight), *call, **options)


@fault(
    "strides", source="flashinfer-ai/flashinfer/issues/3103", condition="x transposed and N == K",
    shows={"layout": "x:transposed", "K": 32, "N": 32}, hidden=("layout=", "N=48"),
)  # fmt: skip
def output_strides_assumed(x: Tensor, weight: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """The output takes the strides of x and is written as if it were contiguous."""
    right = run(x, weight, *call, **options)
    if right.shape != x.shape:
        return right
    out = unwritten_like(x)
    flat_storage(out)[: right.numel()] = right.flatten()
    return out


# Bias -----------------------------------------------------------------------------------------------------------


@fault("bias", condition="bias given", shows={"bias": True}, hidden=("bias=0",))
def linear_bias_ignored(*call: Tensor, **options: Any) -> Tensor:
    """The bias is accepted and never added."""
    return run(*call, **options, add=lambda rows, bias, expert: rows)


@fault(
    "bias", condition="bias given, rows beyond the first group", shows={"bias": True},
    hidden=("bias=0", "sizes=first"),
)  # fmt: skip
def bias_of_expert_zero(*call: Tensor, **options: Any) -> Tensor:
    """The bias pointer is not moved with the expert: all rows get expert 0's bias."""
    return run(*call, **options, add=lambda rows, bias, expert: biased(rows, bias, 0))


@fault("bias", condition="bias given, K > 16", shows={"bias": True, "K": 40}, hidden=("bias=0", "K=16"))
def bias_added_by_every_split(*call: Tensor, **options: Any) -> Tensor:
    """Every K split adds the bias to its partial sum."""
    splits = -(-call[0].shape[1] // BLOCK)

    def each(rows: Tensor, bias: Tensor | None, expert: int) -> Tensor:
        return rows if bias is None else rows + splits * bias[expert].to(rows.dtype)

    return run(*call, **options, add=each)


# Values and precision -------------------------------------------------------------------------------------------


@fault(
    "special values", condition="NaN in the weights of one expert", shows={"data": "expert_nan"},
    hidden=("data=normal",),
)  # fmt: skip
def masked_by_multiplication(
    x: Tensor, weight: Tensor, group_sizes: Tensor, *, bias: Tensor | None = None, steps: Steps = RIGHT
) -> Tensor:
    """Every expert runs on every row and is masked by multiplication: NaN reaches all rows."""
    experts = owners(group_sizes, x.shape[0])
    total = torch.zeros(x.shape[0], weight.shape[1], dtype=wide(x), device=x.device)
    for expert in range(weight.shape[0]):
        mine = (experts == expert).to(wide(x))[:, None]
        total = total + mine * biased(steps.matmul(x, weight[expert]), bias, expert)
    return total.to(x.dtype)


@fault("precision", condition="bf16 inputs, long K", shows={"dtype": "bf16", "K": 512}, hidden=("dtype=fp32",))
def bf16_running_sum(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The running sum over K is kept in bf16."""

    def rounded(rows: Tensor, weight: Tensor) -> Tensor:
        if rows.dtype != torch.bfloat16:
            return steps.matmul(rows, weight)
        return matmul_rounding_sums(rows, weight, torch.bfloat16)

    return run(*call, **options, steps=steps, multiply=rounded)


@fault("precision", condition="fp32 inputs", hidden=("dtype=bf16",))
def silent_tf32(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """fp32 operands are rounded to tf32 without saying so."""

    def tensor_cores(rows: Tensor, weight: Tensor) -> Tensor:
        if rows.dtype != torch.float32:
            return steps.matmul(rows, weight)
        return steps.matmul(to_tf32(rows), to_tf32(weight))

    return run(*call, **options, steps=steps, multiply=tensor_cores)


# State and contract ---------------------------------------------------------------------------------------------

_kept: dict[tuple[Any, ...], Any] = {}  # what the stateful faults keep between calls


@fault(
    "state", source="flashinfer-ai/flashinfer/issues/1856",
    condition="a second call with the same rows and other sizes", before={"seed": 1}, stateful=True,
)  # fmt: skip
def schedule_cached_by_rows(x: Tensor, weight: Tensor, group_sizes: Tensor, **options: Any) -> Tensor:
    """The schedule is cached by the number of rows: the second call runs the first one's groups."""
    key = ("schedule", tuple(x.shape), tuple(weight.shape), x.device)
    return run(x, weight, _kept.setdefault(key, group_sizes.clone()), **options)


@fault("tuning", source="triton-lang/triton/issues/3004", condition="the first call of a shape", stateful=True)
def both_configurations_add(x: Tensor, weight: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """Two configurations are timed on the real output, and each adds into it."""
    key = ("tuned", tuple(x.shape), tuple(weight.shape), x.dtype, x.device)
    times = 1 if _kept.get(key) else 2
    _kept[key] = True
    return run(x, weight, *call, **options) * times


@fault("state", condition="a second call with the same shapes", sign="earlier", stateful=True)
def linear_output_reused(*call: Tensor, **options: Any) -> Tensor:
    """One output buffer per shape is handed out again: earlier results change."""
    right = run(*call, **options)
    key = ("output", tuple(right.shape), right.dtype, right.device)
    return _kept.setdefault(key, unwritten_like(right)).copy_(right)


@fault("inputs", sign="inputs")
def sizes_summed_in_place(x: Tensor, weight: Tensor, group_sizes: Tensor, **options: Any) -> Tensor:
    """The group sizes are turned into offsets in place."""
    out = run(x, weight, group_sizes, **options)
    group_sizes.copy_(group_sizes.cumsum(0))
    return out


@fault("contract", condition="16-bit inputs", shows={"dtype": "bf16"}, sign="dtype", hidden=("dtype=fp32",))
def linear_returns_fp32(x: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """The fp32 sums are returned without the cast."""
    return run(x.to(wide(x)), *call, **options)


@fault(
    "contract", source="pytorch/pytorch/pull/192497", condition="S = 0", shows={"S": 0}, sign="raises", hidden=("S=1",),
)  # fmt: skip
def raises_without_rows(x: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """A call without rows fails in the stride validation."""
    if not x.shape[0]:
        raise RuntimeError("strides should be multiple of 16 bytes")
    return run(x, *call, **options)
