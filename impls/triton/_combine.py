r"""Weighted sum over the slots of each token.

    out[t] = sum over j of w[t, j] * y[t * k + j]        in fp32, j ascending, masked slots left out

A slot is left out before its weight or its row is looked at: both may be NaN.  A token without a slot gives zero.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_harness.impls.launching import empty, launch
from moe_harness.impls.triton._common import after_previous, early_start, interpreting, narrow, on
from moe_harness.impls.triton.alignment import local_expert


@triton.jit
def _combine(
    y, weights, ids, emap, out, H, E, map_len, id_row, id_col, r_row, r_col,
    HAS_MAP: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, UNROLL: tl.constexpr, WIDEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[t, BN columns]; UNROLL rows are loaded before the first is added."""
    t = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    after_previous(PDL)
    acc = tl.zeros((BN,), tl.float32)
    for first in range(0, K, UNROLL):
        for i in tl.static_range(UNROLL):
            j = first + i
            slot = t * K + j
            e = local_expert(ids, emap, slot, slot < (t + 1) * K, K, id_row, id_col, map_len, E, HAS_MAP)
            here = e >= 0
            weight = tl.load(weights + t.to(tl.int64) * r_row + j * r_col, mask=here, other=0.0).to(tl.float32)
            row = tl.load(y + slot.to(tl.int64) * H + n, mask=n < tl.where(here, H, 0), other=0.0).to(tl.float32)
            acc += weight * row
    tl.store(out + t.to(tl.int64) * H + n, narrow(acc, out.dtype.element_ty, WIDEN), mask=n < H)


def combine(y: Tensor, weights: Tensor, ids: Tensor, experts: int, expert_map: Tensor | None) -> Tensor:
    """[T, H] from y [T * k, H] (slot order), weights and ids [T, k]."""
    (tokens, top_k), hidden = ids.shape, y.shape[1]
    out = empty(y, tokens, hidden)
    emap = ids if expert_map is None else expert_map.contiguous()
    # Small batches are cut into narrow pieces so that every multiprocessor gets some; wide ones amortise the ids.
    block = min(triton.next_power_of_2(hidden), 1024 if tokens >= 512 else 512)
    early = early_start(y.device)
    with on(y.device):
        launch(
            _combine, (tokens, triton.cdiv(hidden, block)),
            y, weights, ids, emap, out, hidden, experts, emap.numel(), *ids.stride(), *weights.stride(),
            HAS_MAP=expert_map is not None, K=top_k, BN=block, UNROLL=min(4, triton.next_power_of_2(top_k)),
            WIDEN=interpreting(), PDL=early, launch_pdl=early, num_warps=max(1, min(8, block // 256)),
        )  # fmt: skip
    return out
