r"""Top-k routing in one launch, from logits to weights and ids.

    scores  = softmax(logits)  or  sigmoid(logits)            fp32, a whole row in registers
    chosen  = the top_k experts by  scores + correction_bias  inside the best groups, smaller id first among equals
    weights = scores[chosen]  (/ their sum)  * routed_scaling_factor

The choice is made on integers: the bits of the selection score, made to compare like the number.  A maximum over
integers is one instruction per warp; the smallest lane that holds it is the expert, so ties have one answer.  A NaN
counts as -inf, and lanes behind the last expert, like those already chosen, hold an integer that no score reaches.

`router_from_hidden` runs the gate's product first: one more launch, parallel over rows, experts and, for few tokens,
parts of the hidden dimension, which the routing adds up in order; logits in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_harness.impls.launching import Repeated, empty, launch
from moe_harness.impls.triton._common import (
    after_previous,
    early_start,
    exact_exp,
    exact_sigmoid,
    interpreting,
    let_next_start,
    narrow,
    on,
    require,
)
from moe_harness.impls.triton.projection import Plan, run

__all__ = ["router"]  # what is registered; router_from_hidden starts from the hidden states

LEAST: tl.constexpr = tl.constexpr(-2147483648)
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
FEW = 512  # tokens up to which the gate's product is cut into PARTS: a whole row is 16 steps one after the other
PARTS = 8


@triton.jit
def _ordered(value):
    """int32 that compares like the fp32 value; NaN counts as -inf, and nothing reaches LEAST."""
    value = tl.where(value == value, value, float("-inf")) + 0.0  # + 0.0 turns -0 into 0
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _best(keys, lane, NONE: tl.constexpr):
    """Lane [BM] of the largest key in each row of keys [BM, lanes], the smallest lane among equals."""
    return tl.min(tl.where(keys == tl.max(keys, 1)[:, None], lane[None, :], NONE), 1)


@triton.jit
def _allowed(selection, lane, E, GROUPS: tl.constexpr, TOP: tl.constexpr, SUM2: tl.constexpr, BLOCK_G: tl.constexpr):
    """Selection scores [BM, BE] with every expert outside the best TOP of GROUPS runs at -inf."""
    size = E // GROUPS
    group = lane // size
    groups = tl.arange(0, BLOCK_G)
    minus: tl.constexpr = float("-inf")
    scores = tl.full((selection.shape[0], BLOCK_G), minus, tl.float32)
    for g in range(GROUPS):
        inside = tl.where((group == g)[None, :], selection, minus)
        best = tl.max(inside, 1)
        if SUM2:
            first = tl.min(tl.where(inside == best[:, None], lane[None, :], E), 1)
            best += tl.max(tl.where(lane[None, :] == first[:, None], minus, inside), 1)
        scores = tl.where(groups[None, :] == g, best[:, None], scores)
    keys = tl.where(groups[None, :] < GROUPS, _ordered(scores), LEAST)
    keep = tl.zeros((selection.shape[0], selection.shape[1]), tl.int1)
    for _ in range(TOP):
        chosen = _best(keys, groups, BLOCK_G)
        keep = keep | (group[None, :] == chosen[:, None])
        keys = tl.where(groups[None, :] == chosen[:, None], LEAST, keys)
    return tl.where(keep, selection, minus)


@triton.jit
def _router(
    logits, bias, pads, weights, ids, T, E, scale, l_part, l_row, l_col, b_col, pad_row, K,
    BM: tl.constexpr, BE: tl.constexpr, BLOCK_K: tl.constexpr, SIGMOID: tl.constexpr, RENORM: tl.constexpr,
    BIAS: tl.constexpr, GROUPS: tl.constexpr, TOP: tl.constexpr, BLOCK_G: tl.constexpr, PARTS: tl.constexpr,
    ROUND: tl.constexpr, PADS: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BM rows: weights fp32 [T, K] and ids int64 [T, K], -1 in rows with a negative pad."""
    after_previous(PDL)
    let_next_start(PDL)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    lane = tl.arange(0, BE)
    real = (lane < E)[None, :]
    mask = (row < T)[:, None] & real
    at = logits + row[:, None].to(tl.int64) * l_row + lane[None, :].to(tl.int64) * l_col
    x = tl.load(at, mask=mask, other=float("-inf")).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        x += tl.load(at + part * l_part, mask=mask, other=0.0)
    if ROUND is not None:
        x = narrow(x, ROUND, WIDEN).to(tl.float32)
    if SIGMOID:
        scores = tl.where(real, exact_sigmoid(x), 0.0)
    else:
        shifted = exact_exp(x - tl.max(x, 1)[:, None])
        shifted = tl.where(real, shifted, 0.0)
        scores = shifted / tl.sum(shifted, 1)[:, None]
    selection = scores
    if BIAS:
        selection += tl.load(bias + lane.to(tl.int64) * b_col, mask=lane < E, other=0.0).to(tl.float32)[None, :]
    if GROUPS > 0:
        selection = _allowed(tl.where(real, selection, float("-inf")), lane, E, GROUPS, TOP, BIAS, BLOCK_G)
    keys = tl.where(real, _ordered(selection), LEAST)
    slot = tl.arange(0, BLOCK_K)[None, :]
    chosen_ids = tl.zeros((BM, BLOCK_K), tl.int32)
    for j in range(K):
        chosen = _best(keys, lane, BE)
        keys = tl.where(lane[None, :] == chosen[:, None], LEAST, keys)
        chosen_ids = tl.where(slot == j, chosen[:, None], chosen_ids)
    w = tl.where(slot < K, tl.gather(scores, chosen_ids, 1), 0.0)
    if RENORM:
        total = tl.sum(w, 1)
        w = w / tl.where(total == 0.0, 1.0, total)[:, None]
    out = row[:, None].to(tl.int64) * K + slot
    live = (row < T)[:, None] & (slot < K)
    tl.store(weights + out, w * scale, mask=live)
    if PADS:
        dead = tl.load(pads + row.to(tl.int64) * pad_row, mask=row < T, other=0) < 0
        chosen_ids = tl.where(dead[:, None], -1, chosen_ids)
    tl.store(ids + out, chosen_ids.to(tl.int64), mask=live)


def _check(experts: int, top_k: int, scoring: str, num_expert_group: int | None, topk_group: int | None) -> None:
    """Refuse options that no routing satisfies."""
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring is {scoring!r}, but should be 'softmax' or 'sigmoid'")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k}, but should be in 1..{experts}")
    if (num_expert_group is None) != (topk_group is None):
        raise ValueError("num_expert_group and topk_group should be given together")
    if num_expert_group is not None and experts % num_expert_group:
        raise ValueError(f"num_expert_group is {num_expert_group}, but should divide the {experts} experts")


def router(
    router_logits: Tensor,
    *,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = True,
    correction_bias: Tensor | None = None,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts for each token.

    Args:
        router_logits: [T, E], fp32, fp16 or bf16, any strides.
        correction_bias: [E], any floating dtype, added for the selection only.

    Returns:
        topk_weights fp32 [T, k] and topk_ids int64 [T, k], highest selection score first.  Scores that are all zero are
        not renormalised (their weights are 0).

    Raises:
        ValueError: unknown scoring, top_k or groups that do not fit E.
        TypeError, NotImplementedError: dtype or device the kernel does not run on.
    """
    return _route(
        (router_logits, correction_bias, None), top_k, scoring, renormalize, num_expert_group, topk_group,
        routed_scaling_factor, None,
    )  # fmt: skip


@Repeated
def _route(
    router_logits: Tensor, correction_bias: Tensor | None, pads: Tensor | None, top_k: int, scoring: str,
    renormalize: bool, num_expert_group: int | None, topk_group: int | None, routed_scaling_factor: float,
    rounded: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`router` with every argument by position, of logits [T, E] or of parts [n, T, E] whose sum they are.

    Rows with a negative number in `pads` get the id -1.  Logits are rounded to the dtype `rounded` first.
    """
    tokens, experts = router_logits.shape[-2:]
    _check(experts, top_k, scoring, num_expert_group, topk_group)
    require(router_logits)
    weights = empty(router_logits, tokens, top_k, dtype=torch.float32)
    ids = empty(router_logits, tokens, top_k, dtype=torch.int64)
    if tokens == 0:
        return weights, ids
    block_e = max(16, triton.next_power_of_2(experts))
    rows, warps = _rows(tokens, block_e)
    groups = num_expert_group or 0
    early = early_start(router_logits.device)
    bias, skip = (router_logits if given is None else given for given in (correction_bias, pads))
    parts = router_logits if router_logits.ndim == 3 else router_logits[None]
    with on(router_logits.device):
        launch(
            _router, (triton.cdiv(tokens, rows),), router_logits, bias, skip, weights, ids,
            tokens, experts, routed_scaling_factor, *parts.stride(),
            0 if correction_bias is None else bias.stride(0), 0 if pads is None else skip.stride(0), top_k,
            BM=rows, BE=block_e, BLOCK_K=triton.next_power_of_2(top_k), SIGMOID=scoring == "sigmoid",
            RENORM=renormalize, BIAS=correction_bias is not None, GROUPS=groups, TOP=topk_group or 0,
            BLOCK_G=triton.next_power_of_2(max(groups, 1)), PARTS=len(parts),
            ROUND=None if rounded is None else TYPES[rounded],
            PADS=pads is not None, WIDEN=interpreting(), PDL=early, launch_pdl=early, num_warps=warps,
        )  # fmt: skip
    return weights, ids


def _rows(tokens: int, block_e: int) -> tuple[int, int]:
    """Rows per program and warps: one warp per row, so that the k maxima need no barrier."""
    if interpreting():
        return min(16, triton.next_power_of_2(tokens)), 1
    if block_e > 1024:
        return 1, 4
    return (1, 1) if tokens <= 512 or block_e > 256 else (4, 4)


def router_from_hidden(
    hidden_states: Tensor, gate_weight: Tensor, *, pads: Tensor | None = None, rounded: bool = False, top_k: int,
    scoring: str = "softmax", renormalize: bool = True, correction_bias: Tensor | None = None,
    num_expert_group: int | None = None, topk_group: int | None = None, routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Route hidden_states [T, H] with the gate's weight [E, H]; options and results as of `router`.

    Args:
        pads: int [T]; rows with a negative one get the id -1, and what they hold changes nothing.  Given in a decoding
            step, where `gate_weight` is a parameter: it is read as early as the weight of `projection`.
        rounded: whether logits are rounded to the dtype of hidden_states, as a model does that calls its gate apart;
            kept in fp32 they may choose another expert.
    """
    logits = _logits(hidden_states, gate_weight, pads is not None)
    return _route(
        (logits, correction_bias, pads), top_k, scoring, renormalize, num_expert_group, topk_group,
        routed_scaling_factor, hidden_states.dtype if rounded else None,
    )  # fmt: skip


def _logits(hidden_states: Tensor, gate_weight: Tensor, ahead: bool) -> Tensor:
    """fp32 parts [n, T, E] whose sum is hidden_states [T, H] times gate_weight [E, H]."""
    tokens, depth = hidden_states.shape
    step = 32 if hidden_states.element_size() == 4 else 128
    steps = max(1, triton.cdiv(depth, step))
    rows, columns = 16 if tokens <= 2048 else 64, 16 if tokens <= 1024 else 64
    if tokens <= FEW:
        steps, columns = triton.cdiv(steps, PARTS), 32
    require(hidden_states, gate_weight)
    return run((hidden_states, gate_weight), Plan(rows, columns, step, steps, 4, 3, ahead and tokens <= FEW))


router.deterministic = True
router.graph_capturable = True
router.rounds = ()
router.batch_invariant = True
