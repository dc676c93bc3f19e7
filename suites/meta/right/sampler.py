"""Right samplers as strangers write them: other random numbers, other ways to draw."""

import torch


def _kept(logits, temperature, top_k, top_p):
    """Softmax weights, fp32, with 0 for what is cut."""
    scaled = logits.float() / torch.where(temperature > 0, temperature, 1.0)[:, None].float()
    p = torch.softmax(scaled, -1)
    order = p.argsort(dim=1, descending=True, stable=True)
    p = p.gather(1, order)
    rank = torch.arange(p.shape[1])
    if top_k is not None:
        p = p.masked_fill((rank >= top_k[:, None]) & (top_k > 0)[:, None], 0.0)
    if top_p is not None:
        share = p / p.sum(1, keepdim=True)
        p = p.masked_fill((share.cumsum(1) - share >= top_p[:, None]) & (top_p < 1)[:, None] & (rank > 0), 0.0)
    return torch.zeros_like(p).scatter(1, order, p)


def _finish(logits, temperature, drawn):
    return torch.where(temperature > 0, drawn, logits.argmax(1)) if len(logits) else drawn


def a_generator_a_row(logits, *, temperature, top_k=None, top_p=None, seeds, positions):
    """torch.multinomial with a generator of its own for each row."""
    weights = _kept(logits, temperature, top_k, top_p)
    drawn = torch.zeros(len(logits), dtype=torch.int64)
    for row, (seed, position) in enumerate(zip(seeds.tolist(), positions.tolist(), strict=True)):
        generator = torch.Generator().manual_seed((seed * 6364136223846793005 + position * 1442695040888963407) % 2**63)
        drawn[row] = torch.multinomial(weights[row], 1, generator=generator)
    return _finish(logits, temperature, drawn)


def _hashed(seeds, positions):
    """One uniform number for each row, from 32-bit mixing."""
    h = seeds.long() * 0x9E3779B1 + positions.long() * 0x85EBCA77 + (positions.long() << 17)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x46AC12FD), (13, 0x68E31DA4 | 1)):
        h = ((h & 0xFFFFFFFF) ^ ((h & 0xFFFFFFFF) >> shift)) * factor
    h = (h & 0xFFFFFFFF) ^ ((h & 0xFFFFFFFF) >> 16)
    return (h.double() + 0.5) / 2**32


def by_cumulative_sum(logits, *, temperature, top_k=None, top_p=None, seeds, positions):
    """One random number a row, looked up in the running sum of the weights; int32 tokens."""
    weights = _kept(logits, temperature, top_k, top_p).double()
    sums = weights.cumsum(1)
    if not len(logits):
        return torch.zeros(0, dtype=torch.int32)
    target = _hashed(seeds, positions)[:, None] * sums[:, -1:]
    drawn = torch.searchsorted(sums, target, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    return _finish(logits, temperature, drawn).to(torch.int32)


def without_cuts(logits, *, temperature, seeds, positions):
    """A sampler that knows neither top_k nor top_p: those cases are unsupported."""
    return a_generator_a_row(logits, temperature=temperature, seeds=seeds, positions=positions)
