r"""Data on which the experts are exact, whatever the order of summation and wherever values are stored.

silu(g) == g bitwise in fp32 for every integer g >= 17, and gelu saturates too.  So let
    g = 48 + three signs           in {45, 47, 49, 51}
    u = a sign                     hence |act(g) * u| <= 51
    o = a few hidden values        one or more entries +-1 in each row of down_proj
    w = 2^0, 2^-1 or 2^-2
and let, in each column, only so many experts be active that sum |w o| stays within the integers the dtype holds
exactly (256 in bf16), in units of the smallest weight.  Any indexing, masking, weighting or layout fault is then
certain.
"""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.call import Builder
from moe_harness.harness.stages.experts.cases import ExpertsCase
from moe_harness.reference.experts import local_ids, routed_rows

EXACT_INTEGERS = {"fp32": 1 << 22, "fp16": 1 << 11, "bf16": 1 << 8}
LARGEST_GATE = 51
WEIGHTS = (1.0, 0.5, 0.25)


def draw(
    case: ExpertsCase, builder: Builder, ids: Tensor, weights: Tensor, expert_map: Tensor | None, local: Tensor,
    parts: int = 1, gates: str = "signs",
) -> tuple:  # fmt: skip
    """(hidden_states, gate_up_proj, down_proj, topk_weights), as CPU tensors in the dtype of the case.

    `parts`: the 48 of a gate is that many times 48 / parts, for weights of few bits.
    `gates`: 48 and "signs", "alike" (48 everywhere), or "halves" (24 or 48, as a sign tells).
    """
    ones = _constant_columns(case.H, builder)
    hidden = builder.signs(case.T, case.H)
    hidden[:, ones] = 1.0
    spread = max(1, min(-(-case.I // case.H), EXACT_INTEGERS[case.dtype] // (4 * LARGEST_GATE)))
    weights = _weights(case, ids, spread, builder)
    active = _active_columns(case, local_ids(ids, expert_map), weights, len(local), spread, builder)
    gate_up = _gate_up(case, ones, len(local), builder, min(parts, len(ones)), gates)
    down = _down(case, active, spread, builder)
    return hidden.to(builder.dtype), gate_up, down, weights


def value(
    hidden_states: Tensor, gate_up_proj: Any, down_proj: Any, topk_weights: Tensor, topk_ids: Tensor,
    *, activation: str, expert_map: Tensor | None, gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The exact result, [T, H] in fp64; act(g) is g here, so that the value owes nothing to any exp.

    Both weights may be anything that gives the matrix of an expert by its number.
    """
    x, out = hidden_states.double(), torch.zeros(hidden_states.shape, dtype=torch.float64, device=hidden_states.device)
    for expert, tokens, slots in routed_rows(local_ids(topk_ids, expert_map)):
        first = x[tokens] @ gate_up_proj[expert].double().T
        gate, up = (first if gate_up_bias is None else first + gate_up_bias[expert].double()).chunk(2, dim=-1)
        rows = (gate * up) @ down_proj[expert].double().T
        if down_bias is not None:
            rows = rows + down_bias[expert].double()
        out.index_add_(0, tokens, topk_weights[tokens, slots, None].double() * rows)
    return out


def _weights(case: ExpertsCase, ids: Tensor, spread: int, builder: Builder) -> Tensor:
    """[T, k] of powers of two; where the dtype has little room, only so uneven that all slots fit into one column.

    Five slots of bf16 fit with equal weights, two with the largest and the smallest; columns have to be switched off
    only beyond that, since each one switched off tells less.
    """
    tokens, slots = ids.shape
    room = EXACT_INTEGERS[case.dtype] // (LARGEST_GATE * spread)
    largest = int(WEIGHTS[0] / WEIGHTS[-1])
    if case.layout.endswith(":expanded"):  # other rows are read than are drawn here: the same weights for each
        units = torch.tensor([largest, 1])[torch.arange(slots).clamp(max=1)].expand(tokens, slots)
    elif room >= largest * slots:
        units = torch.tensor([largest, largest // 2, 1])[builder.integers(0, 3, (tokens, slots))]
    else:
        units = torch.ones(tokens, slots, dtype=torch.int64)
        spare = max(1, room - slots)
        heavy = builder.integers(0, slots, (tokens, 1))
        units.scatter_(1, heavy, largest if spare >= largest - 1 else 2)
    return units * WEIGHTS[-1]


def _constant_columns(width: int, builder: Builder) -> Tensor:
    """Columns of the hidden states that are 1 for every token; never the last one unless it is the only one."""
    if width == 1:
        return torch.zeros(1, dtype=torch.int64)
    order = torch.randperm(width - 1, generator=builder.generator)
    return order[: max(1, width // 4)]


def _gate_up(case: ExpertsCase, ones: Tensor, experts: int, builder: Builder, parts: int, gates: str) -> Tensor:
    inner, width = case.I, case.H
    out = torch.zeros(experts, 2 * inner, width, dtype=builder.dtype)
    free = torch.tensor(sorted(set(range(width)) - set(ones.tolist())) or [0])
    shape = (experts, inner, 1)
    bias_at = ones[(builder.integers(0, len(ones), shape) + torch.arange(parts)) % len(ones)]
    constant = 48.0
    if gates == "halves":
        constant = 36.0
        out[:, :inner].scatter_(2, free[builder.integers(0, len(free), shape)], 12.0)
    elif gates == "signs" and width > 1:
        for _ in range(3):  # a column met twice adds to 2, -2 or 0: still an integer within 45..51
            at = free[builder.integers(0, len(free), shape)]
            out[:, :inner].scatter_add_(2, at, builder.signs(*shape).to(out.dtype))
    out[:, :inner].scatter_(2, bias_at, constant / parts)
    # The up rows walk the columns from the last one down, so that the end of every row is read.
    at = (width - 1 - (torch.arange(inner).view(1, -1, 1) + builder.integers(0, 2, (experts, 1, 1)))) % width
    out[:, inner:].scatter_(2, at, builder.signs(*shape).to(out.dtype))
    return out


def _down(case: ExpertsCase, active: Tensor, spread: int, builder: Builder) -> Tensor:
    """[E, H, I] with `spread` entries +-1 in each active row; the rows walk the columns from the last one down."""
    experts, width = active.shape
    out = torch.zeros(experts, width, case.I, dtype=builder.dtype)
    step = builder.integers(0, case.I, (experts, 1, 1))
    step[::2] = 0
    for n in range(min(spread, case.I)):
        at = (case.I - 1 - (torch.arange(width).view(1, -1, 1) + step + n * width)) % case.I
        signs = builder.signs(experts, width, 1) * active[..., None]
        out.scatter_(2, at, signs.to(out.dtype))
    return out


def _active_columns(
    case: ExpertsCase, ids: Tensor, weights: Tensor, experts: int, spread: int, builder: Builder
) -> Tensor:
    """[E_local, H] of 0 and 1: where an expert's rows of down_proj hold anything."""
    active = torch.ones(experts, case.H)
    room = EXACT_INTEGERS[case.dtype] / (LARGEST_GATE * spread)
    size = weights.masked_fill(ids < 0, 0.0) / min(WEIGHTS)  # in units of the smallest weight
    if not len(ids) or float(size.sum(-1).max()) <= room:
        return active
    active = (builder.uniform(experts, case.H) < max(0.35, 1.5 * room / float(size.sum(-1).max()))).float()
    chosen = ids.clamp(min=0)
    # Switch experts off in every column that holds too much, in an order of the column's own that all tokens share:
    # tokens that went each by its own shares would between them switch off every expert that they have in common.
    rank = builder.uniform(experts, case.H)
    for _ in range(ids.shape[1]):
        shares = size[:, :, None] * active[chosen]
        token, column = (shares.sum(1) > room).nonzero(as_tuple=True)
        if not len(token):
            break
        ranks = rank[chosen[token], column[:, None]].masked_fill(shares[token, :, column] == 0, torch.inf)
        active[chosen[token, ranks.argmin(-1)], column] = 0.0
    return active
