"""Causes of first kernels around attention, written as strangers write them: the mistake is named, with its number.

None is built from the catalogue's parts, and each is judged on a case on which a run sees it first.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.catalogue import get
from moe_harness.harness.core.contracts import Declarations, Subject, load
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.diagnosis.search import explain
from moe_harness.harness.stages.paged_attention.cases import PagedAttentionCase
from moe_harness.harness.stages.rms_norm.cases import RmsNormCase
from moe_harness.harness.stages.rope_cache.cases import RopeCacheCase
from moe_harness.harness.stages.router.cases import RouterCase
from moe_harness.harness.stages.sampler.cases import SamplerCase
from moe_harness.harness.stages.sampler.causes import Account, _told
from moe_harness.reference import router as reference

GENEROUS = 600.0  # seconds; the verdict of a test must not depend on how busy the machine is


def causes(function: Callable[..., Any], case: Case) -> list[dict[str, str]]:
    trial = Trial(Subject(case.stage, function.__name__, function, Declarations.of(function), None), "cpu")
    return explain(trial, case, GENEROUS)


# Attention ----------------------------------------------------------------------------------------------------------


def attention(one: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Head by head and query by query: `one(q, keys, values, scale)` for a single query and the keys that it sees."""

    def kernel(q, key_cache, value_cache, block_table, query_start, context_len, *, scale):
        out, group = torch.zeros_like(q), q.shape[1] // key_cache.shape[2]
        for s, length in enumerate(context_len.tolist()):
            start, end = query_start[s : s + 2].tolist()
            pages = block_table[s, : -(-length // key_cache.shape[1])].long()
            keys, values = (cache[pages].flatten(0, 1)[:length].double() for cache in (key_cache, value_cache))
            for token in range(start, end) if length else ():
                seen = length - (end - token) + 1
                for head in range(q.shape[1]):
                    part = (t[:seen, head // group] for t in (keys, values))
                    out[token, head] = one(q[token, head].double(), *part, scale).to(q.dtype)
        return out

    return kernel


def in_halves_of_64(q, keys, values, scale):
    parts = zip(keys.split(64), values.split(64), strict=True)
    return torch.stack([((k @ q * scale).softmax(0) @ v) for k, v in parts]).mean(0)


def last_256_keys(q, keys, values, scale):
    return (keys[-256:] @ q * scale).softmax(0) @ values[-256:]


def powers_of_two(q, keys, values, scale):
    scores = keys @ q * scale
    weights = (scores - scores.max()).exp2()
    return weights @ values / weights.sum()


def not_divided(q, keys, values, scale):
    scores = keys @ q * scale
    return (scores - scores.max()).exp() @ values


PAGED = PagedAttentionCase(S=2, length=130, page=16, D=32)


@pytest.mark.parametrize(
    ("one", "case", "cause", "form"),
    [
        (in_halves_of_64, PAGED, "parts_averaged", "size=64"),
        (last_256_keys, PAGED.but(length=300), "window_of_128", "size=256"),
        (powers_of_two, PAGED.but(length=40), "base_two_without_log2e", ""),
        (not_divided, PAGED.but(length=40), "weights_not_normalised", ""),
    ],
)
def test_attention(one: Callable[..., Tensor], case: Case, cause: str, form: str) -> None:
    told = causes(attention(one), case)
    assert told and told[0]["fault"] == cause and form in told[0]["evidence"], told


# Router -------------------------------------------------------------------------------------------------------------


def first_again_beyond_16(router_logits: Tensor, *, top_k: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Registers for 16 experts: those beyond are read from the first again."""
    weights, ids = reference.router(router_logits.float(), top_k=top_k, **options)
    return weights.float(), torch.cat([ids[:, :16], ids[:, : top_k - 16]], 1)


@pytest.mark.parametrize("case", [RouterCase(seed=641, T=3, E=64, k=17), RouterCase(seed=647, T=3, E=128, k=22)])
def test_a_choice_that_wavers_explains_no_choice_that_it_never_makes(case: RouterCase) -> None:
    """bf16 logits tie: on other roundings faults of ties chose otherwise, and so were equal to whatever was got."""
    assert causes(first_again_beyond_16, case.but(dtype="bf16")) == []


def weights_of_32_slots(router_logits: Tensor, *, top_k: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Registers for 32 weights: those beyond stay 0."""
    weights, ids = reference.router(router_logits.float(), top_k=top_k, **options)
    return weights.float() * (torch.arange(top_k) < 32), ids


def test_a_choice_that_wavers_explains_no_weights_that_it_never_gives() -> None:
    """The choices of faults of ties waver at k = 40 in bf16, and whatever weights were got counted as theirs."""
    assert causes(weights_of_32_slots, RouterCase(seed=731, T=5, k=40, dtype="bf16")) == []


# Rotation and norm --------------------------------------------------------------------------------------------------


def rotation(
    angle: Callable[[Tensor, int, float], Tensor], place: Callable[[int, Tensor], tuple] = lambda slot, cache: divmod(
        slot, cache.shape[1]
    )
) -> Callable[..., Tensor]:  # fmt: skip
    """Token by token: `angle(position, width, theta)` [D / 2], `place(slot, cache)` the page and the offset."""

    def kernel(
        q, k, v, positions, slots, key_cache, value_cache, *, q_norm=None, k_norm=None, eps=1e-6, theta
    ):  # fmt: skip
        out = torch.empty(q.shape, dtype=q.dtype)
        for t in range(len(q)):
            turn = torch.polar(torch.ones(q.shape[2] // 2, dtype=torch.float64), angle(positions[t], q.shape[2], theta))
            turned = []
            for x, weight in ((q[t].double(), q_norm), (k[t].double(), k_norm)):
                if weight is not None:
                    x = F.rms_norm(x, x.shape[-1:], weight.double(), eps)
                plane = torch.complex(*x.chunk(2, -1)) * turn
                turned.append(torch.cat([plane.real, plane.imag], -1))
            out[t] = turned[0].to(q.dtype)
            if slots[t] >= 0:
                at = place(int(slots[t]), key_cache)
                if at[0] < len(key_cache) and at[1] < key_cache.shape[1]:
                    key_cache[at], value_cache[at] = turned[1].to(k.dtype), v[t]
        return out

    return kernel


def right_angle(position: Tensor, width: int, theta: float) -> Tensor:
    return position.double() * theta ** (-torch.arange(0, width, 2).double() / width)


def of_a_bf16_table(position: Tensor, width: int, theta: float) -> Tensor:
    return right_angle(position, width, theta).bfloat16().double()


ROPE = RopeCacheCase(T=11, D=64)


@pytest.mark.parametrize(
    ("kernel", "case", "cause", "form"),
    [
        (rotation(of_a_bf16_table), ROPE, "angles_in_bf16", ""),
        (rotation(right_angle, lambda slot, cache: divmod(slot, 32)), ROPE, "slots_of_pages_of_16", "size=32"),
        (rotation(lambda p, width, theta: right_angle(p.clamp(max=4095), width, theta)), ROPE.but(positions="far"),
         "table_of_2048_positions", "rows=4096"),
    ],
    ids=["angles_in_bf16", "pages_of_32", "table_of_4096"],
)  # fmt: skip
def test_rotation(kernel: Callable[..., Tensor], case: Case, cause: str, form: str) -> None:
    told = causes(kernel, case)
    assert told and told[0]["fault"] == cause and form in told[0]["evidence"], told


def padded_mean(x, weight, *, eps, residual=None):
    """The block is as wide as the next power of two, and the mean is taken over it."""
    total = x if residual is None else x + residual
    wide = F.pad(total.double(), (0, (1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]))
    out = (total.double() / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()).to(x.dtype)
    return out if residual is None else (out, total.contiguous())


def test_norm() -> None:
    told = causes(padded_mean, RmsNormCase(lead="5", H=72, residual=True))
    assert told and told[0]["fault"] == "mean_over_the_padded_width", told


# Samplers -----------------------------------------------------------------------------------------------------------


def spread(numbers: Tensor) -> Tensor:
    """A number in (0, 1) of each integer, by the finaliser of MurmurHash3."""
    h = numbers * -7046029254386353131
    for factor in (-49064778989728563, -4265267296055464877):
        h = (h ^ (h >> 33 & (1 << 31) - 1)) * factor
    return ((h ^ (h >> 33 & (1 << 31) - 1)) >> 11 & (1 << 53) - 1).double() / 2.0**53


def sampler_of(
    key: Callable[[Tensor, Tensor], Tensor] = lambda seeds, positions: seeds * 1_000_003 + positions * 7919,
    warm: Callable[[Tensor], Tensor] = lambda temperature: temperature, more: int = 0, whole: bool = False,
    crossing: bool = True,
) -> Callable[..., Tensor]:  # fmt: skip
    """Through the running sum of sorted probabilities; right as it is, `more` tokens than top_k, the nucleus of the
    `whole` vocabulary, without the `crossing` token, and with random numbers that start from `key`.
    """

    def sampler(logits, *, temperature, top_k=None, top_p=None, seeds, positions):
        ordered, order = logits.double().sort(1, descending=True)
        p = (ordered / torch.where(temperature > 0, warm(temperature), 1.0)[:, None]).softmax(1)
        rank, all_ = torch.arange(p.shape[1]), p
        if top_k is not None:
            p = p * ((rank < top_k[:, None] + more) | (top_k < 1)[:, None])
        if top_p is not None:
            of = all_ if whole else p
            sums = (of / of.sum(1, keepdim=True)).cumsum(1)
            reached = sums - of / of.sum(1, keepdim=True) if crossing else sums
            p = p * ((reached < top_p.double()[:, None]) | (top_p >= 1)[:, None] | (rank == 0))
        sums = (p / p.sum(1, keepdim=True)).cumsum(1)
        u = spread(key(seeds.long(), positions.long()))[:, None]
        place = torch.searchsorted(sums, u * sums[:, -1:])[:, 0].clamp(max=p.shape[1] - 1)
        return order.gather(1, torch.where(temperature > 0, place, 0)[:, None])[:, 0]

    return sampler


DRAWS = SamplerCase(B=4096, V=17, data="draws")


@pytest.mark.parametrize(
    ("sampler", "case", "cause"),
    [
        (sampler_of(lambda seeds, positions: positions), DRAWS, "seed_ignored"),
        (sampler_of(lambda seeds, positions: seeds), DRAWS.but(vary="positions"), "position_ignored"),
        (sampler_of(lambda seeds, positions: seeds + positions), DRAWS.but(vary="grid"), "seed_and_position_added"),
        (sampler_of(more=1), DRAWS.but(cut="k"), "one_more_than_top_k"),
        (sampler_of(crossing=False), DRAWS.but(cut="p"), "crossing_token_dropped"),
        (sampler_of(whole=True), DRAWS.but(cut="both"), "top_p_of_the_whole_vocabulary"),
        (sampler_of(warm=torch.ones_like), DRAWS, "temperature_ignored"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_sampler_with_random_numbers_of_its_own(sampler: Callable[..., Tensor], case: Case, cause: str) -> None:
    told = causes(sampler, case)
    assert told and told[0]["fault"] == cause, told


@pytest.mark.parametrize("case", [DRAWS.but(cut="rows", vary="grid", temperature=-1.0), SamplerCase(cut="both")])
def test_a_right_sampler_has_no_cause(case: Case) -> None:
    assert causes(sampler_of(), case) == []


def test_of_faults_that_explain_a_sampler_the_likeliest_come_first() -> None:
    """Each once, in whichever form, and how far the others are behind where that says something."""
    seed, place, kept = (get(name) for name in ("seed_ignored", "position_ignored", "one_more_than_top_k"))
    other = replace(seed, form="size=7")
    odds = [(place, -100.0), (seed, -50.0), (other, -60.0), (kept, -51.0)]
    told = _told([Account(fault, likelihood) for fault, likelihood in odds], "4 tokens")
    assert [entry["fault"] for entry in told] == ["seed_ignored", "one_more_than_top_k", "position_ignored"]
    assert all(entry["evidence"].endswith("So it is in 4 tokens") for entry in told[:2])
    assert told[2]["evidence"].endswith("seed_ignored is likelier by 10^22")  # e^50
    told = _told([Account(fault, 0.0) for fault in (other, place, kept, get("temperature_ignored"))], "")
    assert len(told) == 3 and "Here size=7." in told[0]["evidence"]


@pytest.mark.parametrize("stage", ["rms_norm", "rope_cache", "paged_attention", "sampler"])
def test_what_is_registered_has_no_cause(stage: str) -> None:
    case = {"rms_norm": RmsNormCase(residual=True), "rope_cache": ROPE, "paged_attention": PAGED, "sampler": DRAWS}
    subject = load(stage, "torch")
    assert explain(Trial(subject, "cpu"), case[stage], GENEROUS) == []


def test_another_form_is_the_same_fault_with_another_number() -> None:
    forms = list(get("window_of_128").other_forms())
    assert {form.name for form in forms} == {"window_of_128"}
    assert "size=256" in {form.form for form in forms} and "size=128" not in {form.form for form in forms}
    assert forms[0].label.startswith("window_of_128 (size=")
