"""What Qwen3-Next's attention asks of the kernels beside their stages: a part of a head turned, norms of 1 + a weight
kept in fp32, and an output gated by every element.

The turned part is within the stage's bound, its elements brought into the order of two halves.  Norms of rows whose
root mean square is a power of two are exact, so that a weight that was rounded first shows.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.harness.stages.rope_cache.bound import rotated_heads, untouched
from moe_harness.impls.torch.rope_cache import rope_cache as plain_turn
from moe_harness.impls.torch.sigmoid_gate import sigmoid_gate as plain_gate
from moe_harness.impls.triton.rms_norm import norm_of_parts, rms_norm
from moe_harness.impls.triton.rope_cache import rope_cache, rope_cache_of_step
from moe_harness.impls.triton.sigmoid_gate import sigmoid_gate
from moe_harness.impls.triton.sum_norm import sum_norm
from moe_harness.reference.rope_cache import angles
from moe_harness.suites.triton import DEVICE, runnable

pytestmark = runnable
EPS, THETA, TOKENS, HEADS, KEYS = 1e-6, 1e4, 5, 6, 2
POSITIONS = torch.tensor([0, 3, 70, 511, 9000])
SLOTS = torch.tensor([4, -1, 0, 7, 2])
EXACT = torch.tensor([7.0, 7, 5, 1, 1, -1, 1, -1])  # of root mean square 4
Turn = Callable[..., Tensor]


def normal(*size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def exact_rows(count: int, width: int) -> Tensor:
    """bf16 [count, width] of root mean square 4."""
    return torch.stack([EXACT.roll(row).repeat(width // len(EXACT)) for row in range(count)]).to(DEVICE, torch.bfloat16)


def fine_weight(width: int) -> Tensor:
    """fp32 [width] near 1, between two numbers of bf16."""
    return (1 + normal(width, seed=9) * 0.1).float()


def in_halves(x: Tensor, turned: int) -> Tensor:
    """x [..., D] with the turned planes in front of the others in both halves."""
    half, kept = turned // 2, (x.shape[-1] - turned) // 2
    first, second, rest, last = x.split((half, half, kept, kept), dim=-1)
    return torch.cat((first, rest, second, last), dim=-1)


def worst(turn: Turn, width: int, turned: int, dtype: torch.dtype, given: int | None = None) -> float:
    """Largest |z| of queries, keys and values where `given` elements of a head are said to be turned.

    q is every second head of a projection, the weights of the norms are fp32.
    """
    qkv = normal(TOKENS, 2 * HEADS + 2 * KEYS, width, seed=1, dtype=dtype)
    q, k, v = qkv[:, : 2 * HEADS : 2], qkv[:, 2 * HEADS : -KEYS], qkv[:, -KEYS:]
    of_q, of_k = 1 + normal(width, seed=2) * 0.2, 1 + normal(width, seed=3) * 0.2
    keys, values = torch.zeros(2, 3, 4, KEYS, width, dtype=dtype, device=DEVICE)
    out = turn(
        q, k, v, POSITIONS.to(DEVICE), SLOTS.to(DEVICE), keys, values, q_norm=of_q, k_norm=of_k, eps=EPS, theta=THETA,
        turned=turned if given is None else given,
    )  # fmt: skip
    assert out.is_contiguous()
    held, held_values = (cache.flatten(0, 1).cpu() for cache in (keys, values))
    assert not held[[1, 3, 5]].any(), "a slot was written that is nobody's"
    angle = torch.zeros(TOKENS, width // 2, dtype=torch.float64)
    angle[:, : turned // 2] = angles(POSITIONS, turned, THETA)
    kept, options = SLOTS >= 0, {"eps": EPS, "rounds": frozenset(), "dtype": dtype}
    q, of_q, k, of_k, out, own = (in_halves(part.cpu(), turned) for part in (q, of_q, k, of_k, out, held[SLOTS[kept]]))
    found = (
        rotated_heads(q, angle, of_q, **options).z(out), rotated_heads(k[kept], angle[kept], of_k, **options).z(own),
        untouched(v.cpu()[kept]).z(held_values[SLOTS[kept]]),
    )  # fmt: skip
    return max(float(z.abs().nan_to_num(torch.inf).max()) for z in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("width", "turned"), [(32, 8), (24, 4), (20, 18), (16, 16), (256, 64)])
@pytest.mark.parametrize("turn", [rope_cache, rope_cache_of_step, plain_turn], ids=["triton", "step", "torch"])
def test_a_part_of_a_head_is_turned(turn: Turn, width: int, turned: int, dtype: torch.dtype) -> None:
    assert worst(turn, width, turned, dtype) <= bounds.max_limit()


@pytest.mark.parametrize("turned", [32, 10, 6])
def test_the_bound_sees_another_part_turned(turned: int) -> None:
    for turn in (rope_cache, plain_turn):
        assert worst(turn, 32, 8, torch.bfloat16, given=turned) > bounds.max_limit()


@pytest.mark.parametrize("turned", [0, 7, 34])
def test_a_part_that_is_none_is_refused(turned: int) -> None:
    with pytest.raises(ValueError, match="turned is"):
        worst(rope_cache, 32, 8, torch.float32, given=turned)


def test_weights_of_norms_stay_in_fp32() -> None:
    """Every kernel with a norm gives the one right number, which the same weight in bf16 does not give."""
    x, weight = exact_rows(4, 64), fine_weight(64)
    wanted = (x.double() / 4 * weight.double()).bfloat16()
    assert not torch.equal(wanted, (x.double() / 4 * weight.bfloat16().double()).bfloat16())
    none, once = torch.zeros_like(x), torch.ones(4, 1, device=DEVICE)
    assert torch.equal(rms_norm(x, weight, eps=0.0), wanted)
    found = [
        rms_norm(x, weight, eps=0.0, residual=none), norm_of_parts(x.float()[None], weight, none, eps=0.0),
        sum_norm(x, once, once.int() * 0, none, weight, num_experts=1, eps=0.0),
    ]  # fmt: skip
    for out, total in found:
        assert torch.equal(out, wanted)
        assert torch.equal(total, x)
    at, slots, heads = torch.zeros(2, device=DEVICE).int(), torch.arange(2, device=DEVICE), x.unflatten(0, (2, 2))
    keys, values = torch.zeros(2, 1, 2, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    out = rope_cache(heads, heads, heads, at, slots, keys, values, q_norm=weight, k_norm=weight, eps=0.0, theta=THETA)
    assert torch.equal(out, wanted.view_as(out))
    assert torch.equal(keys[0], out)


def test_other_dtypes_of_weights_are_refused() -> None:
    x, weight = exact_rows(1, 64), fine_weight(64).half()
    with pytest.raises(TypeError, match="weights of norms"):
        rms_norm(x, weight, eps=EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("heads", "width"), [(3, 40), (2, 7), (9, 256)])
def test_an_output_is_gated_by_every_element(heads: int, width: int, dtype: torch.dtype) -> None:
    """Within one rounding of the value and few of the sigmoid, of gates that saturate too."""
    both = normal(4, 2 * heads, width, seed=5, dtype=dtype) * 8
    x, gate = both[:, 0::2], both[:, 1::2]
    value = x.double() * gate.double().sigmoid()
    variance = 4 * bounds.store(value, torch.float32)
    for function in (sigmoid_gate, plain_gate):
        z = (function(x, gate).double() - value) / bounds.finish(value, variance, dtype).sqrt()
        assert z.abs().max() <= bounds.max_limit()
        wrong = (function(x, gate.flip(-1)).double() - value) / bounds.finish(value, variance, dtype).sqrt()
        assert wrong.abs().max() > bounds.max_limit()
    with pytest.raises(ValueError, match="should both be"):
        sigmoid_gate(x, gate[:1])
