"""Right fused experts of unusual build: persistent programs, split along I, operands swapped or in three parts."""

import torch
import torch.nn.functional as F

from moe_harness.suites.meta.right.experts import ACTIVATIONS, _by_expert, to_local


def persistent_programs(x, w13, w2, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    """Three programs take every third of the sorted tiles of 16 rows, padded by a row of zeros; fp32 atomics."""
    ids = to_local(topk_ids, expert_map)
    rows = torch.cat([x.float(), x.new_zeros(1, x.shape[1], dtype=torch.float32)])
    weights = torch.cat([topk_weights.float().flatten(), topk_weights.new_zeros(1, dtype=torch.float32)])
    out, k = torch.zeros_like(rows), ids.shape[1]
    tiles = []
    for e in range(len(w13)):
        slots = (ids.flatten() == e).nonzero()[:, 0]
        padded = F.pad(slots, (0, -len(slots) % 16), value=ids.numel())
        tiles += [(e, tile) for tile in padded.split(16)] if len(slots) else []
    for program in range(3):
        for e, slots in tiles[program::3]:
            tokens = slots.div(max(k, 1), rounding_mode="floor")
            g, u = (rows[tokens] @ w13[e].float().mT).chunk(2, dim=-1)
            y = (ACTIVATIONS[activation](g) * u) @ w2[e].float().mT
            out.index_add_(0, tokens, y * weights[slots, None])
    return out[:-1].to(x.dtype)


persistent_programs.rounds = ()


def split_along_i(x, w13, w2, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    """Chunks of 32 tokens; programs of 20 columns of I add their parts of the output to fp32, hidden values stored."""
    ids = to_local(topk_ids, expert_map)
    out = torch.zeros(x.shape)
    inner = w2.shape[-1]
    for first in range(0, len(x), 32):
        near = ids[first : first + 32]
        for e in near[near >= 0].unique().tolist():
            t, j = torch.where(near == e)
            t = t + first
            for at in range(0, inner, 20):
                part = slice(at, min(at + 20, inner))
                g = x[t].float() @ w13[e, :inner][part].float().mT
                u = x[t].float() @ w13[e, inner:][part].float().mT
                hidden = (ACTIVATIONS[activation](g) * u).to(x.dtype).float()
                out.index_add_(0, t, hidden @ w2[e][:, part].float().mT * topk_weights[t, j, None].float())
    return out.to(x.dtype)


split_along_i.rounds = ("activation",)


def weighted_hidden_stored(x, *call, **options):
    """The routing weight is folded into the hidden values before these are stored for the down projection."""
    return _by_expert(x, *call, **options, weighted=lambda hidden: hidden.to(x.dtype).float())


weighted_hidden_stored.rounds = ("weighted",)


def operands_swapped(x, w13, w2, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    """Weights from the left and tokens as columns, as few tokens want it; the result is a view of [H, T]."""
    ids = to_local(topk_ids, expert_map)
    out = torch.zeros(x.shape[1], len(x))
    columns = x.float().mT
    for e in ids[ids >= 0].unique().tolist():
        t, j = torch.where(ids == e)
        g, u = (w13[e].float() @ columns[:, t]).chunk(2)
        out.index_add_(1, t, w2[e].float() @ (ACTIVATIONS[activation](g) * u) * topk_weights[t, j].float())
    return out.to(x.dtype).mT


def three_parts_of_bf16(x, *call, **options):
    """Products of fp32 from bf16 tensor cores: operands are sums of three parts, of nine products six are made."""

    def parts(a):
        high = a.bfloat16().float()
        rest = (a - high).nan_to_num(0.0, 0.0, 0.0)
        middle = rest.bfloat16().float()
        return high, middle, (rest - middle).bfloat16().float()

    def mm(a, b):
        (a0, a1, a2), (b0, b1, b2) = parts(a), parts(b)
        small = a0 @ b2.mT + a1 @ b1.mT + a2 @ b0.mT
        return small + (a0 @ b1.mT + a1 @ b0.mT) + a0 @ b0.mT

    return _by_expert(x, *call, **options, mm=mm)
