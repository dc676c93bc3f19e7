"""A sampler whose random numbers start from one word for seed and position.

Mistake: the position has 16 bits of it, so that a position beyond them draws as a neighbouring seed did.
"""

import torch


def packed_key(logits, *, temperature, top_k=None, top_p=None, seeds, positions):
    if not len(logits):
        return torch.zeros(0, dtype=torch.int64)
    warm = torch.where(temperature > 0, temperature, 1.0)[:, None].double()
    ordered, order = (logits.double() / warm).sort(dim=1, descending=True, stable=True)
    p, rank = ordered.softmax(1), torch.arange(logits.shape[1])
    if top_k is not None:
        p = p * ((rank < top_k[:, None]) | (top_k < 1)[:, None])
    if top_p is not None:
        p = p / p.sum(1, keepdim=True)
        p = p * ((p.cumsum(1) - p < top_p[:, None].double()) | (top_p >= 1)[:, None] | (rank == 0))
    h = ((seeds.long() << 16) + positions.long())[:, None] * -7046029254386353131 + order * 3935559000370003845
    for factor in (-49064778989728563, -4265267296055464877):
        h = (h ^ (h >> 33 & (1 << 31) - 1)) * factor
    noise = ((h ^ (h >> 33 & (1 << 31) - 1)) >> 11 & (1 << 53) - 1).double().add(0.5) / 2.0**53
    drawn = (p.log() - (-noise.log()).log()).argmax(1)
    return order.gather(1, torch.where(temperature > 0, drawn, 0)[:, None])[:, 0]
