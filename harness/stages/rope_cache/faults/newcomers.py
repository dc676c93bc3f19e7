"""Mistakes of first kernels of rotation and cache: planes, angles, norms, and the places that are written."""

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.stages.rope_cache.faults._steps import angle, norm, run, turn, write

EVERY = {"slots": "all", "positions": "random"}
DTYPES = {"to": (torch.bfloat16, torch.float16)}


@fault("rotation", condition="a position above 0", shows=EVERY, hidden=("positions=zero",))
def both_halves_added(*call: Tensor, **options: object) -> Tensor:
    """The minus of the first half is missing: a cos + b sin and b cos + a sin."""

    def unsigned(x: Tensor, angles: Tensor) -> Tensor:
        cos, sin = angles.cos().float(), angles.sin().float()
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos + second * sin, second * cos + first * sin], -1)

    return run(*call, **options, turn=unsigned)


@fault("rotation", shows=EVERY)
def sine_and_cosine_exchanged(*call: Tensor, **options: object) -> Tensor:
    """The table holds sines where cosines are expected: position 0 is a quarter turn."""
    quarter = torch.pi / 2
    return run(*call, **options, turn=lambda x, angles: turn(x, quarter - angles))


@fault("rotation", condition="D above 2", shows=EVERY, hidden=("D=2",))
def frequencies_in_reverse(*call: Tensor, **options: object) -> Tensor:
    """The planes take the frequencies from the last to the first."""
    return run(*call, **options, angle=lambda p, width, theta: angle(p, width, theta).flip(-1))


@fault("rotation", condition="D above 2", shows=EVERY, hidden=("D=2",))
def one_frequency_for_all(*call: Tensor, **options: object) -> Tensor:
    """All planes turn by the position itself, the angle of the first."""

    def first(positions: Tensor, width: int, theta: float) -> Tensor:
        return angle(positions, width, theta)[..., :1].expand(-1, -1, width // 2)

    return run(*call, **options, angle=first)


@fault("rotation", condition="D of 4 or more", shows=EVERY, hidden=("D=2",))
def half_of_each_head_turned(*call: Tensor, **options: object) -> Tensor:
    """The first half of a head's elements is turned alone, as in models with a partial rotation."""

    def partly(x: Tensor, angles: Tensor) -> Tensor:
        kept = max(2, x.shape[-1] // 4 * 2)
        return torch.cat([turn(x[..., :kept], angles[..., : kept // 2]), x[..., kept:]], -1)

    def of_part(positions: Tensor, width: int, theta: float) -> Tensor:
        return angle(positions, max(2, width // 4 * 2), theta)

    return run(*call, **options, turn=partly, angle=of_part)


@fault("rotation", condition="positions above 0", shows=EVERY, hidden=("positions=zero",))
def position_one_behind(*call: Tensor, **options: object) -> Tensor:
    """Every row but those at 0 is turned as the position before its own."""
    return run(*call, **options, angle=lambda p, width, theta: angle((p - 1).clamp(min=0), width, theta))


@fault("rotation", condition="rows of other positions", shows=EVERY, hidden=("positions=zero", "T=1"))
def position_of_the_first_row(*call: Tensor, **options: object) -> Tensor:
    """The position of the first row serves all."""
    return run(*call, **options, angle=lambda p, width, theta: angle(p[:1].expand(len(p)), width, theta))


@fault("rotation", condition="positions that do not follow each other", shows=EVERY, hidden=("positions=row", "T=1"))
def positions_counted_from_the_first(*call: Tensor, **options: object) -> Tensor:
    """Positions go on from that of the first row: right for one chunk, wrong for a batch of sequences."""

    def counted(positions: Tensor, width: int, theta: float) -> Tensor:
        return angle(positions[:1] + torch.arange(len(positions)), width, theta)

    return run(*call, **options, angle=counted)


@fault("rotation", condition="a position above 0", shows=EVERY, hidden=("positions=zero",),
       variants={"factor": (2, 4, 8, 0.5)})  # fmt: skip
def positions_scaled(*call: Tensor, factor: float = 2, **options: object) -> Tensor:
    """Positions are divided by a factor, as in a model whose context was stretched."""
    return run(*call, **options, angle=lambda p, width, theta: angle(p, width, theta) / factor)


@fault("rotation", condition="a position above 0", shows=EVERY, hidden=("positions=zero",))
def queries_not_turned(q: Tensor, *call: Tensor, q_norm: Tensor | None = None, eps: float = 1e-6,
                       **options: object) -> Tensor:  # fmt: skip
    """Keys are turned and queries are not."""
    run(q, *call, q_norm=q_norm, eps=eps, **options)
    return norm(q.float(), q_norm, eps).to(q.dtype, copy=True).contiguous()


@fault("rotation", condition="a position above 0", shows=EVERY, hidden=("positions=zero",))
def keys_turned_twice(*call: Tensor, **options: object) -> Tensor:
    """Keys are turned once more when they are written."""
    return run(*call, **options, k_turn=lambda x, angles: turn(turn(x, angles), angles))


@fault("rotation", condition="positions above 256, or another dtype than bf16", shows=EVERY | {"D": 64},
       hidden=("positions=zero",), variants=DTYPES)  # fmt: skip
def angles_in_bf16(*call: Tensor, to: torch.dtype = torch.bfloat16, **options: object) -> Tensor:
    """Angles are rounded to bf16 whatever the dtype of the model: positions and frequencies were cast for autocast."""
    return run(*call, **options, angle=lambda p, width, theta: angle(p, width, theta).to(to).double())


@fault("rotation", condition="a position above 0", shows=EVERY | {"D": 64}, hidden=("positions=zero",),
       variants=DTYPES)  # fmt: skip
def frequencies_in_bf16(*call: Tensor, to: torch.dtype = torch.bfloat16, **options: object) -> Tensor:
    """Frequencies are rounded to bf16 whatever the dtype of the model, and far positions magnify that."""

    def rounded(positions: Tensor, width: int, theta: float) -> Tensor:
        return positions.double()[:, None, None] * angle(torch.ones(1), width, theta).to(to).double()

    return run(*call, **options, angle=rounded)


@fault("rotation", condition="fp32, a position above 0", shows=EVERY | {"dtype": "fp32"},
       hidden=("positions=zero", "dtype=bf16"), variants=DTYPES)  # fmt: skip
def cosines_in_bf16(*call: Tensor, to: torch.dtype = torch.bfloat16, **options: object) -> Tensor:
    """The table of cosines and sines is kept in bf16 for a model in fp32."""

    def rounded(x: Tensor, angles: Tensor) -> Tensor:
        cos, sin = (t.to(to).float() for t in (angles.cos(), angles.sin()))
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    return run(*call, **options, turn=rounded)


@fault("norm", condition="a norm", shows=EVERY, hidden=("norms=none",))
def norms_left_out(*call: Tensor, q_norm: Tensor | None = None, k_norm: Tensor | None = None,
                   **options: object) -> Tensor:  # fmt: skip
    """Heads are turned as they are, although the model has norms."""
    return run(*call, **options)


@fault("norm", condition="a norm", shows=EVERY, hidden=("norms=none",))
def norms_without_weight(*call: Tensor, **options: object) -> Tensor:
    """Heads are divided by their root and not multiplied by the weight."""

    def bare(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return norm(x, None if weight is None else torch.ones_like(weight), eps)

    return run(*call, **options, norm=bare)


@fault("norm", condition="a norm", shows=EVERY, hidden=("norms=none",))
def one_added_to_the_norms_weight(*call: Tensor, **options: object) -> Tensor:
    """1 + weight, as in Gemma."""

    def more(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return norm(x, None if weight is None else 1 + weight.float(), eps)

    return run(*call, **options, norm=more)


@fault("norm", condition="a norm of the keys", shows=EVERY, hidden=("norms=none",))
def values_normalised(q: Tensor, k: Tensor, v: Tensor, *call: Tensor, k_norm: Tensor | None = None, eps: float = 1e-6,
                      **options: object) -> Tensor:  # fmt: skip
    """Values go through the norm of the keys."""
    return run(q, k, norm(v.float(), k_norm, eps).to(v.dtype), *call, k_norm=k_norm, eps=eps, **options)


@fault("cache", shows=EVERY)
def slots_one_ahead(*call: Tensor, **options: object) -> Tensor:
    """Every row is written one slot too far on."""

    def ahead(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
        write(cache, torch.where(slots < 0, -1, (slots + 1) % (cache.shape[0] * cache.shape[1])), rows)

    return run(*call, **options, write=ahead)


@fault("cache", shows=EVERY)
def page_and_offset_exchanged(*call: Tensor, **options: object) -> Tensor:
    """The remainder of the division is taken for the page and the quotient for the place in it."""

    def exchanged(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
        pages, page = cache.shape[:2]
        at = slots % page % pages * page + slots // page % page
        write(cache, torch.where(slots < 0, -1, at), rows)

    return run(*call, **options, write=exchanged)


@fault("cache", condition="a batch of two or more", shows=EVERY, hidden=("T=1",))
def first_row_written_alone(*call: Tensor, **options: object) -> Tensor:
    """One row is written, as in a kernel for decoding a single sequence."""
    return run(*call, **options, write=lambda cache, slots, rows: write(cache, slots[:1], rows[:1]))


@fault("cache", condition="two or more key/value heads", shows=EVERY, hidden=("Hk=1",))
def first_key_head_written_alone(*call: Tensor, **options: object) -> Tensor:
    """The grid has no axis for the key heads: those behind the first keep what lay there."""
    return run(*call, **options, write=lambda cache, slots, rows: write(cache[:, :, :1], slots, rows[:, :1]))


@fault("cache", shows=EVERY)
def values_not_written(*call: Tensor, **options: object) -> Tensor:
    """Values are not written."""
    values = call[6]

    def keys_alone(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
        if cache.data_ptr() != values.data_ptr():
            write(cache, slots, rows)

    return run(*call, **options, write=keys_alone)


@fault("cache", shows=EVERY)
def caches_exchanged(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, key_cache: Tensor,
                     value_cache: Tensor, **options: object) -> Tensor:  # fmt: skip
    """Keys are written into the value cache, and values into that of the keys."""
    return run(q, k, v, positions, slots, value_cache, key_cache, **options)


@fault("cache", condition="something lay in the cache", shows=EVERY)
def rows_added_to_the_cache(*call: Tensor, **options: object) -> Tensor:
    """Rows are added to what lies in the cache, as by an atomic add, and not stored."""

    def added(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                cache[slot // cache.shape[1], slot % cache.shape[1]] += rows[token].to(cache.dtype)

    return run(*call, **options, write=added)
