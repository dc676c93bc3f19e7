"""Right rotations and cache writes as strangers write them."""

import torch


def _norm(x, weight, eps, kind):
    if weight is None:
        return x
    wide = x.float()
    return weight.to(kind) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(kind)


def _store(cache, slots, rows):
    live = slots >= 0
    at = slots[live].long()
    cache[at // cache.shape[1], at % cache.shape[1]] = rows[live].to(cache.dtype)


def as_the_model_code(q, k, v, positions, slots, key_cache, value_cache, *, q_norm=None, k_norm=None, eps=1e-6, theta):
    """Every step in the model's dtype, cosines too; frequencies in fp32."""
    inverse = 1.0 / (theta ** (torch.arange(0, q.shape[-1], 2).float() / q.shape[-1]))
    angles = positions[:, None].float() * inverse
    angles = torch.cat([angles, angles], -1)[:, None]
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)

    def turned(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    _store(key_cache, slots, turned(_norm(k, k_norm, eps, k.dtype)))
    _store(value_cache, slots, v)
    return turned(_norm(q, q_norm, eps, q.dtype)).contiguous()


def as_complex_numbers(q, k, v, positions, slots, key_cache, value_cache, *, q_norm=None, k_norm=None, eps=1e-6, theta):
    """Planes as complex numbers times e^(i angle), in fp32."""
    half = q.shape[-1] // 2
    angles = positions[:, None].double() * theta ** -(torch.arange(half).double() / half)
    factor = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)[:, None]

    def turned(x):
        z = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * factor
        return torch.cat([z.real, z.imag], -1)

    _store(key_cache, slots, turned(_norm(k.float(), k_norm, eps, torch.float32)))
    _store(value_cache, slots, v)
    return turned(_norm(q.float(), q_norm, eps, torch.float32)).to(q.dtype)


as_complex_numbers.rounds = ()


def from_a_table(q, k, v, positions, slots, key_cache, value_cache, *, q_norm=None, k_norm=None, eps=1e-6, theta):
    """Cosines from a table of the model's dtype with a row for each position, norm rounded before the rotation."""
    longest = int(positions.max()) + 1 if len(positions) else 0
    inverse = torch.exp(
        torch.arange(0, q.shape[-1], 2).double() * (-torch.log(torch.tensor(theta).double()) / q.shape[-1])
    )
    table = torch.outer(torch.arange(longest).float(), inverse.float())
    cos, sin = (t.to(q.dtype)[positions.long()][:, None].float() for t in (table.cos(), table.sin()))

    def turned(x, weight):
        first, second = _norm(x, weight, eps, x.dtype).float().chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    _store(key_cache, slots, turned(k, k_norm))
    _store(value_cache, slots, v)
    return turned(q, q_norm).to(q.dtype)
