"""Fused experts with a second way for some batches: each is right on all others, and passed until a case asked."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh")}


def _local(topk_ids, expert_map):
    ids = topk_ids.long()
    return ids if expert_map is None else torch.where(ids < 0, ids, expert_map.long()[ids.clamp(min=0)])


def _slots(x, w13, w2, ids, activation, product=torch.matmul):
    """Each slot's output [T, k, H] in fp32, unweighted; 0 where the slot is masked."""
    out = torch.zeros(*ids.shape, x.shape[1])
    for e in ids[ids >= 0].unique().tolist():
        t, j = torch.where(ids == e)
        g, u = product(x[t].float(), w13[e].float().mT).chunk(2, dim=-1)
        out[t, j] = product(ACTIVATIONS[activation](g) * u, w2[e].float().mT)
    return out


def _weighted(slots, weights, ids):
    return slots * torch.where(ids < 0, 0.0, weights.float())[..., None]


def _halves(a, b):
    """A product split over its depth."""
    cut = a.shape[-1] // 2
    return a[:, :cut] @ b[:cut] + a[:, cut:] @ b[cut:]


def _row_by_row(a, b):
    return torch.stack([row @ b for row in a]) if len(a) else a @ b


def split_over_the_depth_in_large_batches(x, w13, w2, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    """Says that it is batch invariant."""
    ids = _local(topk_ids, expert_map)
    slots = _slots(x, w13, w2, ids, activation, _halves if len(x) > 128 else _row_by_row)
    return _weighted(slots, topk_weights, ids).sum(1).to(x.dtype)


split_over_the_depth_in_large_batches.batch_invariant = True


_calls = [0]


def slots_in_any_order_in_large_batches(x, w13, w2, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    """Says that it is deterministic; sums slots forwards and backwards in turn."""
    ids = _local(topk_ids, expert_map)
    parts = _weighted(_slots(x, w13, w2, ids, activation), topk_weights, ids)
    _calls[0] += 1
    order = range(ids.shape[1]) if len(x) < 64 or _calls[0] % 2 else reversed(range(ids.shape[1]))
    total = torch.zeros(x.shape)
    for slot in order:
        total = total + parts[:, slot]
    return total.to(x.dtype)


slots_in_any_order_in_large_batches.deterministic = True


def few_tokens_meet_in_a_product(x, w13, w2, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    """Two to four tokens are summed by a matrix of zeros and ones, through which a NaN reaches every row."""
    ids = _local(topk_ids, expert_map)
    parts = _weighted(_slots(x, w13, w2, ids, activation), topk_weights, ids)
    if 2 <= len(x) <= 4:
        owner = torch.arange(len(x)).repeat_interleave(ids.shape[1])
        return (F.one_hot(owner, len(x)).float().mT @ parts.flatten(0, 1)).to(x.dtype)
    return parts.sum(1).to(x.dtype)


def one_token_runs_every_expert(x, w13, w2, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    """With weight 0 where it was not chosen."""
    ids = _local(topk_ids, expert_map)
    if len(x) != 1:
        return _weighted(_slots(x, w13, w2, ids, activation), topk_weights, ids).sum(1).to(x.dtype)
    everywhere = torch.arange(len(w13))[None]
    weights = torch.zeros(1, len(w13))
    for e, w in zip(ids[0].tolist(), topk_weights[0].float(), strict=True):
        if e >= 0:
            weights[0, e] += w
    return (_slots(x, w13, w2, everywhere, activation) * weights[..., None]).sum(1).to(x.dtype)


def weights_end_at_sixteen(x, w13, w2, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    ids = _local(topk_ids, expert_map)
    return _weighted(_slots(x, w13, w2, ids, activation), topk_weights.clamp(max=16), ids).sum(1).to(x.dtype)


def tiny_weights_are_skipped(x, w13, w2, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    ids = _local(topk_ids, expert_map)
    ids = torch.where(topk_weights.float().abs() < 1e-5, -1, ids)
    return _weighted(_slots(x, w13, w2, ids, activation), topk_weights, ids).sum(1).to(x.dtype)


def ids_of_nine_bits(x, w13, w2, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    ids = _local(topk_ids, expert_map)
    ids = torch.where(ids < 0, ids, ids & 511)
    return _weighted(_slots(x, w13, w2, ids, activation), topk_weights, ids).sum(1).to(x.dtype)


def sum_as_wide_as_the_weights(x, w13, w2, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    """With 16-bit weights the running sum has 16 bits, which it does not say."""
    ids = _local(topk_ids, expert_map)
    parts = _weighted(_slots(x, w13, w2, ids, activation), topk_weights, ids)
    total = torch.zeros(x.shape, dtype=torch.promote_types(topk_weights.dtype, x.dtype))
    for slot in range(ids.shape[1]):
        total = (total.float() + parts[:, slot]).to(total.dtype)
    return total.to(x.dtype)


sum_as_wide_as_the_weights.rounds = ("activation",)
