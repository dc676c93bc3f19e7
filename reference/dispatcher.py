r"""Dispatch and combine over all ranks at once: pure functions over one tensor per rank, no process group.

    y_r[t] = sum_j w_r[t, j] f_id(x_r[t]) = sum over ranks q of m_q,   m_q: the part of the sum whose experts q owns

A scheme decides which rows travel to which rank:

    replicated   every rank holds the same tokens already (local_allreduce)             all rows of the one batch
    gathered     all_gather of hidden states and routing (naive, allgather_reducescatter)  rows of all ranks, by rank
    copies       one row per (token, slot) to the owner of its expert (all_to_all)      copies, by source rank
    deduplicated each token once per rank that owns one of its experts                  tokens, by source rank
    masked       copies in [E_local, capacity] slots per rank, the rest is padding      [E_local * capacity]

Whatever the scheme, a received row carries local expert ids (-1 for a slot that is not this rank's), its weights, and
the sum over ranks of the local weighted sums is the layer.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SCHEMES = {
    "naive": "gathered",
    "allgather_reducescatter": "gathered",
    "local_allreduce": "replicated",
    "all_to_all": "copies",
    "all_to_all_dedup": "deduplicated",
    "masked": "masked",
    "deepep": "deduplicated",
}

ExpertFunction = Callable[[int, Tensor], Tensor]  # (global expert id, rows [n, H]) -> [n, H]


class Batch(NamedTuple):
    """The tokens of one rank and their routing, ids global, -1 for a masked slot."""

    hidden_states: Tensor  # [T_r, H]
    topk_weights: Tensor  # [T_r, k]
    topk_ids: Tensor  # [T_r, k]


class Received(NamedTuple):
    """The rows one rank must run, and where each came from; padding rows have source -1."""

    hidden_states: Tensor  # [S, H]
    topk_weights: Tensor  # [S, k']
    topk_ids: Tensor  # [S, k'], local ids, -1: not this rank's
    source_rank: Tensor  # [S]
    source_token: Tensor  # [S]


def owned_experts(owner: Tensor, rank: int) -> Tensor:
    """Global ids of the experts of `rank`, ascending; the position in it is the local id."""
    return (owner == rank).nonzero().flatten()


def local_ids(topk_ids: Tensor, owner: Tensor, rank: int) -> Tensor:
    """Global ids -> local ids on `rank`, -1 for experts of other ranks and for -1 itself."""
    table = torch.full((len(owner) + 1,), -1, dtype=torch.int64)  # the last entry serves the id -1
    mine = owned_experts(owner, rank)
    table[mine] = torch.arange(len(mine))
    return table[topk_ids.long()]


def dispatch(scheme: str, batches: Sequence[Batch], owner: Tensor, *, capacity: int | None = None) -> list[Received]:
    """What every rank has to run.

    Args:
        scheme: a key of SCHEMES.
        batches: one per rank, of any lengths.
        owner: int [E], the rank that holds each expert.
        capacity: slots per expert of the masked scheme; the number of all tokens by default.

    Raises:
        ValueError: unknown scheme; replicated tokens that differ; more rows for an expert than `capacity`.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme is {scheme!r}, but should be one of {', '.join(SCHEMES)}")
    layout = SCHEMES[scheme]
    if layout == "masked":
        return [_masked(batches, owner, rank, capacity) for rank in range(len(batches))]
    return [_LAYOUTS[layout](batches, owner, rank) for rank in range(len(batches))]


def _rows(batch: Batch, tokens: Tensor, source: int, ids: Tensor, weights: Tensor) -> Received:
    return Received(batch.hidden_states[tokens], weights, ids, torch.full_like(tokens, source), tokens)


def _joined(parts: Sequence[Received]) -> Received:
    return Received(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _gathered(batches: Sequence[Batch], owner: Tensor, rank: int) -> Received:
    """Every row of every rank; slots of other ranks' experts become -1."""
    parts = []
    for source, batch in enumerate(batches):
        tokens = torch.arange(len(batch.hidden_states))
        parts.append(_rows(batch, tokens, source, local_ids(batch.topk_ids, owner, rank), batch.topk_weights))
    return _joined(parts)


def _replicated(batches: Sequence[Batch], owner: Tensor, rank: int) -> Received:
    """The rank's own copy of the one batch."""
    first = batches[0]
    for other in batches[1:]:
        same = all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, other, strict=True))
        if not same:
            raise ValueError("local_allreduce needs the same tokens, weights and ids on every rank")
    return _gathered(batches[rank : rank + 1], owner, rank)._replace(
        source_rank=torch.full((len(first.hidden_states),), rank)
    )


def _copies(batches: Sequence[Batch], owner: Tensor, rank: int) -> Received:
    """One row per (token, slot) whose expert lives here, in the order of tokens and slots; k' = 1."""
    parts = []
    for source, batch in enumerate(batches):
        ids = local_ids(batch.topk_ids, owner, rank)
        tokens, slots = (ids >= 0).nonzero(as_tuple=True)
        parts.append(_rows(batch, tokens, source, ids[tokens, slots, None], batch.topk_weights[tokens, slots, None]))
    return _joined(parts)


def _deduplicated(batches: Sequence[Batch], owner: Tensor, rank: int) -> Received:
    """Each token once, if any of its experts lives here; the other slots are -1."""
    parts = []
    for source, batch in enumerate(batches):
        ids = local_ids(batch.topk_ids, owner, rank)
        tokens = (ids >= 0).any(-1).nonzero().flatten()
        parts.append(_rows(batch, tokens, source, ids[tokens], batch.topk_weights[tokens]))
    return _joined(parts)


def _masked(batches: Sequence[Batch], owner: Tensor, rank: int, capacity: int | None) -> Received:
    """The copies of each local expert in its own run of `capacity` rows; rows beyond its count are padding."""
    copies = _copies(batches, owner, rank)
    capacity = sum(batch.topk_ids.numel() for batch in batches) if capacity is None else capacity
    experts = len(owned_experts(owner, rank))
    source = torch.full((experts * capacity,), -1)
    for expert in range(experts):
        rows = (copies.topk_ids[:, 0] == expert).nonzero().flatten()
        if len(rows) > capacity:
            raise ValueError(f"expert {expert} of rank {rank} gets {len(rows)} rows, but has {capacity} slots")
        source[expert * capacity : expert * capacity + len(rows)] = rows
    return _spread(copies, source)


def _spread(copies: Received, source: Tensor) -> Received:
    """Row s of the result is row source[s] of `copies`, or padding where that is -1."""
    valid = (source >= 0).nonzero().flatten()
    padded = [tensor.new_zeros(len(source), *tensor.shape[1:]) for tensor in copies]
    for tensor in padded[2:]:
        tensor.fill_(-1)
    for tensor, values in zip(padded, copies, strict=True):
        tensor[valid] = values[source[valid]]
    return Received(*padded)


_LAYOUTS = {"gathered": _gathered, "replicated": _replicated, "copies": _copies, "deduplicated": _deduplicated}


def run_experts(received: Received, owner: Tensor, rank: int, function: ExpertFunction) -> Tensor:
    """The local weighted sum of each received row, [S, H]: what a rank hands to combine."""
    out = torch.zeros_like(received.hidden_states)
    for local, expert in enumerate(owned_experts(owner, rank).tolist()):
        rows, slots = (received.topk_ids == local).nonzero(as_tuple=True)
        weights = received.topk_weights[rows, slots, None].to(out.dtype)
        out.index_add_(0, rows, weights * function(expert, received.hidden_states[rows]))
    return out


def combine(
    scheme: str, expert_outputs: Sequence[Tensor], received: Sequence[Received], batches: Sequence[Batch]
) -> list[Tensor]:
    """Sum every row's partial results back at its source: one [T_r, H] per rank, in the dtype of the outputs."""
    results = [torch.zeros_like(batch.hidden_states, dtype=expert_outputs[0].dtype) for batch in batches]
    for output, rows in zip(expert_outputs, received, strict=True):
        real = rows.source_token >= 0
        if SCHEMES[scheme] == "replicated":  # every rank's partial sum belongs to every rank
            for result in results:
                result.index_add_(0, rows.source_token[real], output[real])
            continue
        for source, result in enumerate(results):
            here = real & (rows.source_rank == source)
            result.index_add_(0, rows.source_token[here], output[here])
    return results


def dense(batch: Batch, function: ExpertFunction) -> Tensor:
    """The layer on one rank that holds every expert: what any scheme has to return for `batch`, [T_r, H]."""
    out = torch.zeros_like(batch.hidden_states)
    for expert in batch.topk_ids[batch.topk_ids >= 0].unique().tolist():
        tokens, slots = (batch.topk_ids == expert).nonzero(as_tuple=True)
        weights = batch.topk_weights[tokens, slots, None].to(out.dtype)
        out.index_add_(0, tokens, weights * function(expert, batch.hidden_states[tokens]))
    return out
