"""Bytes that each scheme has to send for given ids, per rank; the recorded calls are held against them.

With s, s_w, s_i bytes per element of hidden states, weights and ids, n_r tokens or copies that rank r sends to others:

    naive                   (R-1) T_r (H s + k (s_w + s_i))  +  2 (R-1)/R N H s
    allgather_reducescatter (R-1) T_r (H s + k (s_w + s_i))  +  (N - T_r) H s
    local_allreduce         2 (R-1)/R T H s
    all_to_all              n_r (H s + s_w + s_i)            +  copies received from others * H s
    all_to_all_dedup        n_r (H s + k (s_w + s_i))        +  tokens received from others * H s

The masked form sends a fixed bound instead.  Counts of tokens are extra: a few integers per peer.
"""

from collections.abc import Sequence

from torch import Tensor

from moe_harness.reference.dispatcher import SCHEMES, Batch, dispatch

CONTROL_BYTES = 32  # per other rank: up to four 64-bit counts


def floor(scheme: str, batches: Sequence[Batch], owner: Tensor, rank: int) -> float | None:
    """Bytes that `rank` has to send in dispatch and combine; None where the scheme has no such number."""
    layout, ranks, own = SCHEMES.get(scheme), len(batches), batches[rank]
    row = own.hidden_states.shape[1] * own.hidden_states.element_size()
    slot = own.topk_weights.element_size() + own.topk_ids.element_size()
    slots = own.topk_ids.shape[1] * slot
    total = sum(len(batch.hidden_states) for batch in batches)
    if layout == "replicated":
        return 2 * (ranks - 1) / ranks * len(own.hidden_states) * row
    if layout == "gathered":
        out = (ranks - 1) * len(own.hidden_states) * (row + slots)
        back = 2 * (ranks - 1) / ranks * total if scheme == "naive" else total - len(own.hidden_states)
        return out + back * row
    if layout in ("copies", "deduplicated"):
        received = dispatch(scheme, batches, owner)
        sent = sum(int((r.source_rank == rank).sum()) for q, r in enumerate(received) if q != rank)
        returned = int((received[rank].source_rank != rank).sum())
        return sent * (row + (slot if layout == "copies" else slots)) + returned * row
    return None
