"""Faults of norm, rotation and the write to the cache: right steps, one of them replaced; `shows` and `hidden` name
fields of a case.
"""

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import read_as_contiguous
from moe_harness.harness.stages.rope_cache.faults._steps import angle, norm, run, turn, write

EVERY = {"slots": "all", "positions": "random"}


@fault("rotation", condition="D above 2", shows=EVERY, hidden=("D=2",))
def neighbours_turned(*call: Tensor, **options: object) -> Tensor:
    """Neighbours form the planes, as in GPT-J, instead of the halves."""

    def turn(x: Tensor, angles: Tensor) -> Tensor:
        cos, sin = angles.cos().float(), angles.sin().float()
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)

    return run(*call, **options, turn=turn)


@fault("rotation", condition="a position above 0", shows=EVERY, hidden=("positions=zero",))
def turned_the_other_way(*call: Tensor, **options: object) -> Tensor:
    """The rotation has the wrong sense."""
    return run(*call, **options, turn=lambda x, angles: turn(x, -angles))


@fault(
    "rotation",
    condition="a theta that is not 10,000",
    shows=EVERY,
    hidden=("theta=10000.0",),
)
def theta_ignored(*call: Tensor, **options: object) -> Tensor:
    """The base of the frequencies is that of the first models, and the checkpoint's is ignored."""
    return run(*call, **options | {"theta": 1e4})


@fault("rotation", shows=EVERY, hidden=("D=2",))
def exponents_halved(*call: Tensor, **options: object) -> Tensor:
    """Frequencies fall with i / D instead of 2 i / D."""
    return run(*call, **options, angle=lambda p, width, theta: angle(p, width, theta**0.5))


@fault(
    "rotation",
    source="sgl-project/sglang-jax/issues/1472",
    condition="16 bits, positions above 256",
    shows=EVERY | {"dtype": "bf16", "positions": "far", "D": 128},
    hidden=("dtype=fp32",),
)
def frequencies_in_16_bits(q: Tensor, *call: Tensor, **options: object) -> Tensor:
    """Frequencies are rounded to the dtype of the model before they meet the positions."""

    def rounded(positions: Tensor, width: int, theta: float) -> Tensor:
        frequency = angle(torch.ones(1, device=positions.device), width, theta).to(q.dtype).double()
        return positions.double()[:, None, None] * frequency

    return run(q, *call, **options, angle=rounded)


@fault(
    "rotation",
    source="EleutherAI/gpt-neox/issues/1003",
    condition="16 bits, positions above 256",
    shows=EVERY | {"dtype": "bf16", "positions": "far", "D": 128},
    hidden=("dtype=fp32",),
)
def angles_in_16_bits(q: Tensor, *call: Tensor, **options: object) -> Tensor:
    """Angles are rounded to the dtype of the model: 257 is 256 in bf16."""

    def rounded(positions: Tensor, width: int, theta: float) -> Tensor:
        return angle(positions, width, theta).float().to(q.dtype).double()

    return run(q, *call, **options, angle=rounded)


@fault("rotation", condition="a position above 2,047", shows=EVERY | {"positions": "far"}, hidden=("positions=row",),
       variants={"rows": (2048, 4096, 8192, 32768, 40960, 65536), "beyond": ("last", "wraps")})  # fmt: skip
def table_of_2048_positions(*call: Tensor, rows: int = 2048, beyond: str = "last", **options: object) -> Tensor:
    """Cosines come from a table of 2,048 positions, whose last row serves all beyond."""

    def looked_up(positions: Tensor, width: int, theta: float) -> Tensor:
        return angle(positions.clamp(max=rows - 1) if beyond == "last" else positions % rows, width, theta)

    return run(*call, **options, angle=looked_up)


@fault("rotation", condition="positions that are not 0, 1, 2, ...", shows=EVERY, hidden=("positions=row",))
def row_for_position(*call: Tensor, **options: object) -> Tensor:
    """The row of the batch stands in for the position: right for one prompt from its start."""
    return run(*call, **options, angle=lambda p, width, theta: angle(torch.arange(len(p)), width, theta))


@fault("rotation", shows=EVERY)
def position_one_ahead(*call: Tensor, **options: object) -> Tensor:
    """Positions are counted from 1."""
    return run(*call, **options, angle=lambda p, width, theta: angle(p + 1, width, theta))


@fault("rotation", shows=EVERY)
def keys_not_turned(*call: Tensor, **options: object) -> Tensor:
    """Keys are not turned."""
    return run(*call, **options, k_turn=lambda x, angles: x)


@fault("norm", condition="a norm", shows=EVERY, hidden=("norms=none",))
def normalised_after_the_rotation(
    q: Tensor, *call: Tensor, q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6,
    **options: object,
) -> Tensor:  # fmt: skip
    """Heads are turned first and normalised then: the weight meets the wrong elements."""
    out = run(q, *call, **options, k_turn=lambda x, angles: norm(turn(x, angles), k_norm, eps))
    return norm(out.float(), q_norm, eps).to(q.dtype).contiguous()


@fault("norm", condition="a norm, two or more heads", shows=EVERY | {"norms": "q"}, hidden=("norms=none", "Hq=1"))
def query_heads_normalised_together(*call: Tensor, **options: object) -> Tensor:
    """The mean of squares is taken over all heads of a token."""

    def together(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        if weight is None or not x.numel():
            return x
        return x * torch.rsqrt(x.square().mean((-2, -1), keepdim=True) + eps) * weight.float()

    return run(*call, **options, norm=together)


@fault("norm", condition="two norms", shows=EVERY, hidden=("norms=none",))
def weight_of_queries_for_keys(*call: Tensor, q_norm: Tensor | None = None, k_norm: Tensor | None = None,
                               **options: object) -> Tensor:  # fmt: skip
    """The weight of the queries' norm serves the keys too."""
    both = q_norm is not None and k_norm is not None
    return run(*call, q_norm=q_norm, k_norm=q_norm if both else k_norm, **options)


@fault("norm", condition="a norm of the keys alone", shows=EVERY | {"norms": "k"}, hidden=("norms=both", "norms=none"))
def keys_follow_the_queries_norm(*call: Tensor, q_norm: Tensor | None = None, k_norm: Tensor | None = None,
                                 **options: object) -> Tensor:  # fmt: skip
    """Keys are normalised only where queries are."""
    return run(*call, q_norm=q_norm, k_norm=None if q_norm is None else k_norm, **options)


@fault("norm", condition="eps matters", shows=EVERY | {"data": "tiny", "eps": 1e-05}, hidden=("eps=1e-06",))
def eps_ignored(*call: Tensor, **options: object) -> Tensor:
    """eps is that of the default, whatever is asked for."""
    return run(*call, **options | {"eps": 1e-6})


@fault(
    "cache",
    condition="a slot of -1",
    shows={"slots": "some"},
    hidden=("slots=all",),
)
def minus_one_wraps(*call: Tensor, **options: object) -> Tensor:
    """-1 is the last slot: pad rows overwrite what another request keeps there."""

    def wrapping(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
        last = cache.shape[0] * cache.shape[1] - 1
        write(cache, torch.where(slots < 0, last, slots), rows)

    return run(*call, **options, write=wrapping)


@fault("cache", condition="a slot of -1", shows={"slots": "some"}, hidden=("slots=all",))
def minus_one_is_slot_0(*call: Tensor, **options: object) -> Tensor:
    """-1 is taken for slot 0: pad rows overwrite the first page."""
    return run(*call, **options, write=lambda cache, slots, rows: write(cache, slots.clamp(min=0), rows))


@fault("cache", condition="pages of another size than 16", shows=EVERY, hidden=("page=16",),
       variants={"beyond": ("wraps", "last", "lost"), "size": (16, 1, 32, 64, 128)})  # fmt: skip
def slots_of_pages_of_16(*call: Tensor, size: int = 16, beyond: str = "wraps", **options: object) -> Tensor:
    """Slots are divided by 16, the page size the kernel was written for."""

    def assuming(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
        pages, most = cache.shape[0], cache.shape[1]
        page, offset = slots // size, slots % size
        outside = (slots < 0) | ((page >= pages) | (offset >= most) if beyond == "lost" else slots < 0)
        page, offset = (page % pages, offset % most) if beyond == "wraps" else (page, offset)
        at = page.clamp(max=pages - 1) * most + offset.clamp(max=most - 1)
        write(cache, torch.where(outside, -1, at), rows)

    return run(*call, **options, write=assuming)


@fault("cache", shows=EVERY)
def values_turned(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *call: Tensor, **options: object) -> Tensor:
    """Values are turned as keys are."""
    turned = turn(v.float(), angle(positions, v.shape[-1], options["theta"])).to(v.dtype)
    return run(q, k, turned, positions, *call, **options)


@fault("cache", shows=EVERY)
def keys_kept_as_values(q: Tensor, k: Tensor, v: Tensor, *call: Tensor, **options: object) -> Tensor:
    """Keys are written into both caches."""
    return run(q, k, k, *call, **options)


@fault("cache", shows=EVERY)
def raw_keys_kept(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, key_cache: Tensor,
                  value_cache: Tensor, **options: object) -> Tensor:  # fmt: skip
    """Keys are kept before norm and rotation."""
    out = run(q, k, v, positions, slots, key_cache, value_cache, **options)
    write(key_cache, slots, k)
    return out


@fault("cache", condition="slots that are not in order", shows=EVERY, hidden=("T=1",))
def slots_taken_as_a_run(*call: Tensor, **options: object) -> Tensor:
    """Rows are written one after the other from the first slot on."""

    def run_of_slots(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
        if len(slots):
            most = cache.shape[0] * cache.shape[1]
            write(cache, torch.where(slots < 0, -1, (slots[:1] + torch.arange(len(slots))) % most), rows)

    return run(*call, **options, write=run_of_slots)


@fault(
    "cache",
    condition="two or more key/value heads, pages of two or more, head by head",
    shows=EVERY | {"order": "head"},
    hidden=("order=token",),
)
def cache_written_as_contiguous(*call: Tensor, **options: object) -> Tensor:
    """The cache is written as if it lay token by token."""

    def assuming(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
        pages, page, heads, width = cache.shape
        flat = torch.as_strided(cache, (pages * page, heads * width), (heads * width, 1))
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                flat[slot] = rows[token].flatten().to(cache.dtype)

    return run(*call, **options, write=assuming)


@fault(
    "cache",
    condition="a value cache laid out unlike the key cache",
    shows=EVERY | {"layout": "value_cache:padded"},
    hidden=("layout=",),
)
def value_cache_has_the_key_caches_strides(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor,
    **options: object,
) -> Tensor:  # fmt: skip
    """Both caches are written with the strides of the first."""
    values = torch.as_strided(value_cache, value_cache.shape, key_cache.stride())
    return run(q, k, v, positions, slots, key_cache, values, **options)


@fault(
    "rows",
    condition="queries that are a view of a projection",
    shows=EVERY | {"layout": "q:padded"},
    hidden=("layout=",),
)
def query_strides_assumed(q: Tensor, *call: Tensor, **options: object) -> Tensor:
    """Queries are read as contiguous."""
    return run(read_as_contiguous(q), *call, **options)


@fault("rows", shows=EVERY, sign="inputs")
def queries_turned_in_place(q: Tensor, *call: Tensor, **options: object) -> Tensor:
    """Queries are turned in place."""
    out = run(q, *call, **options)
    q.copy_(out)
    return out


@fault("rows", condition="a slot of -1", shows={"slots": "some"}, hidden=("slots=all",))
def queries_without_slot_not_turned(q: Tensor, *call: Tensor, **options: object) -> Tensor:
    """Tokens without a slot are skipped altogether: their queries stay as they were."""
    out = run(q, *call, **options)
    return torch.where(call[3][:, None, None] < 0, q, out)


@fault("rows", condition="more query heads than key/value heads", shows=EVERY, hidden=("Hq=2",))
def query_heads_beyond_the_keys_not_turned(q: Tensor, k: Tensor, *call: Tensor, **options: object) -> Tensor:
    """Only as many query heads are turned as there are key heads."""
    out = run(q, k, *call, **options).clone()
    out[:, k.shape[1] :] = q[:, k.shape[1] :]
    return out
