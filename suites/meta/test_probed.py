"""Sums in too few bits are named from probes, with the terms added beforehand; wide sums never are."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.contracts import Declarations, Subject, load
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.diagnosis import patterns, probed
from moe_harness.harness.diagnosis.numerics_probes import sees_sums
from moe_harness.harness.diagnosis.search import explain
from moe_harness.harness.stages.experts.cases import ExpertsCase
from moe_harness.harness.stages.grouped_linear.cases import GroupedLinearCase
from moe_harness.harness.stages.paged_attention.cases import PagedAttentionCase
from moe_harness.harness.stages.shared_expert_gate.cases import GateCase
from moe_harness.suites.meta.judging import functions_of

GENEROUS = 60.0
LONG = {"T": 33, "H": 512, "I": 256, "E": 4, "k": 2}
Product = Callable[[Tensor, Tensor], Tensor]


def running(run: int, kind: torch.dtype) -> Product:
    """One accumulator of that dtype, stored after every `run` terms."""

    def product(x: Tensor, weight: Tensor) -> Tensor:
        total = torch.zeros(len(x), len(weight))
        for part, other in zip(x.split(run, 1), weight.split(run, 1), strict=True):
            total = (total + part.float() @ other.float().T).to(kind).float()
        return total

    return product


def pairwise(kind: torch.dtype) -> Product:
    """Products stored, then added in pairs, pairs of pairs, ..."""

    def product(x: Tensor, weight: Tensor) -> Tensor:
        terms = (x.float()[:, None] * weight.float()).to(kind)
        while terms.shape[-1] > 1:
            terms = torch.nn.functional.pad(terms, (0, terms.shape[-1] % 2))
            terms = (terms[..., ::2].float() + terms[..., 1::2].float()).to(kind)
        return terms[..., 0].float()

    return product


def wide(x: Tensor, weight: Tensor) -> Tensor:
    return x.float() @ weight.float().T


def cut(x: Tensor, weight: Tensor) -> Tensor:
    """Operands of tf32, as a tensor core reads them."""
    return wide(*((t.float().view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (x, weight)))


def experts(first: Product, second: Product, kind: torch.dtype = torch.float32) -> Callable[..., Tensor]:
    """Token after token's slots, their running sum in `kind`."""

    def function(x, gate_up, down, weights, ids, *, activation="silu", expert_map=None):
        if activation != "silu" or expert_map is not None:
            raise NotImplementedError
        out = torch.zeros(len(x), down.shape[1])
        for slot in range(ids.shape[1]):
            term = torch.zeros_like(out)
            for expert in ids[ids[:, slot] >= 0, slot].unique().tolist():
                rows = ids[:, slot] == expert
                gate, up = first(x[rows], gate_up[expert]).chunk(2, -1)
                hidden = torch.nn.functional.silu(gate) * up
                term[rows] = second(hidden, down[expert]) * weights[rows, slot, None]
            out = (out + term).to(kind).float()
        return out.to(x.dtype)

    return function


def linear(product: Product) -> Callable[..., Tensor]:
    def function(x, weight, group_sizes, *, bias=None):
        parts = [product(rows, w) for rows, w in zip(x.split(group_sizes.tolist()), weight, strict=True)]
        parts = [p if bias is None else p + b.float() for p, b in zip(parts, [None] * 99 if bias is None else bias)]  # noqa: B905
        return torch.cat(parts).to(x.dtype)

    return function


def gate(product: Product) -> Callable[..., Tensor]:
    def function(x, weight, output):
        logit = product(x.flatten(0, -2), weight).view(*x.shape[:-1], 1)
        return (logit.sigmoid() * output.float()).to(x.dtype)

    return function


def trial_of(function, case: Case, **declares) -> Trial:
    return Trial(Subject(case.stage, "stranger", function, replace(Declarations.of(function), **declares), None), "cpu")


BF16, FP16 = torch.bfloat16, torch.float16
LINEAR = {"S": 33, "K": 512, "N": 48, "E": 3}
KERNELS = [
    (experts(running(32, BF16), running(32, BF16)), ExpertsCase(dtype="bf16", **LONG), "sums_in_bf16_every_32_terms"),
    (experts(running(64, BF16), running(64, BF16)), ExpertsCase(dtype="bf16", **LONG), "sums_in_bf16_every_64_terms"),
    (experts(running(8, FP16), wide), ExpertsCase(dtype="fp16", **LONG), "first_product_sums_in_fp16_every_8_terms"),
    (experts(wide, running(32, BF16)), ExpertsCase(), "second_product_sums_in_bf16_every_32_terms"),
    (experts(cut, cut), ExpertsCase(), "operands_cut_to_tf32"),
    (experts(wide, wide, BF16), ExpertsCase(k=4), "slots_summed_in_bf16_first_to_last"),
    (linear(running(128, BF16)), GroupedLinearCase(dtype="bf16", **LINEAR), "sums_in_bf16_every_128_terms"),
    (linear(pairwise(FP16)), GroupedLinearCase(dtype="fp16", **LINEAR), "sums_in_fp16"),
    (gate(running(1, FP16)), GateCase(dtype="fp16", lead="33", H=256), "sums_in_fp16_every_term"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "case", "name"), KERNELS, ids=[f"{c.stage}-{n}" for _, c, n in KERNELS])
def test_a_narrow_sum_is_named(function, case: Case, name: str) -> None:
    told = explain(trial_of(function, case), case, GENEROUS)
    assert [entry["fault"] for entry in told][:1] == [name]
    assert told[0]["evidence"].startswith("Probes: ") and " bits (" in told[0]["evidence"]


@pytest.mark.parametrize(("low", "suspected"), [(1.0, True), (0.8, False)])
def test_another_error_in_a_kernel_with_narrow_sums_is_not_blamed_on_them(low: float, suspected: bool) -> None:
    """Columns scaled by 1 to 1.3, of which the probes see the first; where that is off too they see no sums at all."""
    coarse = linear(running(64, BF16))

    def scaled(x: Tensor, *call: Tensor, **options: Tensor) -> Tensor:
        return coarse(x, *call, **options) * torch.linspace(low, 1.3, call[0].shape[1]).to(x.dtype)

    case = GroupedLinearCase(dtype="bf16", **LINEAR)
    assert bool(probed.suspects(trial_of(scaled, case), "bf16")) == suspected
    assert explain(trial_of(scaled, case), case, GENEROUS) == []


def test_a_store_that_is_not_declared_is_named() -> None:
    case = ExpertsCase(dtype="bf16", k=4, **{n: v for n, v in LONG.items() if n != "k"})
    told = explain(trial_of(experts(wide, wide, BF16), case, rounds=()), case, GENEROUS)
    assert [entry["fault"] for entry in told] == ["undeclared_rounding"]
    assert "partial_sum" in told[0]["evidence"]
    assert probed.undeclared_store(trial_of(experts(wide, wide, BF16), case, rounds=("partial_sum",)), case) == []


def test_a_rounding_that_only_this_stage_has_is_told_by_its_name() -> None:
    """Softmax weights stored in 16 bits: no store of the experts' names, which would explain as much, is told."""

    def attention(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, start: Tensor, length: Tensor, *,
                  scale: float) -> Tensor:  # fmt: skip
        pages, group = keys.shape[1], q.shape[1] // keys.shape[2]
        out = torch.zeros_like(q)
        for s, size in enumerate(length.tolist()):
            at = torch.arange(size)
            rows = torch.arange(int(start[s]), int(start[s + 1]))
            k, v = (x[table[s, at // pages].long(), at % pages].repeat_interleave(group, 1) for x in (keys, values))
            score = torch.einsum("nhd,lhd->nhl", q[rows].float(), k.float()) * scale
            seen = at <= (size - len(rows) + torch.arange(len(rows)))[:, None]
            weight = score.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
            out[rows] = torch.einsum("nhl,lhd->nhd", weight.to(q.dtype).float(), v.float()).to(q.dtype)
        return out

    case = PagedAttentionCase(dtype="bf16")
    trial = trial_of(attention, case, rounds=())
    told = patterns.undeclared(trial, trial.build(case), trial.invoke(trial.build(case)))
    assert "if `rounds` held probability, partial_sum, any one of them, as well" in told[0]


def test_operands_that_are_declared_to_be_tf32_are_no_suspects() -> None:
    case = ExpertsCase()
    assert probed.suspects(trial_of(experts(cut, cut), case), "fp32")
    assert not probed.suspects(trial_of(experts(cut, cut), case, rounds=("tf32",)), "fp32")


def test_operands_coarser_than_the_tf32_that_is_declared_stay_suspects() -> None:
    def narrow(x: Tensor, weight: Tensor) -> Tensor:
        return wide(x.bfloat16(), weight.bfloat16())

    found = probed.suspects(trial_of(experts(narrow, narrow), ExpertsCase(), rounds=("tf32",)), "fp32")
    assert {fault.name for fault in found} == {"operands_rounded_to_bf16", "operands_cut_to_bf16"}


RIGHT = [(stage, spec) for stage, spec in functions_of("right") if sees_sums(stage)]


@pytest.mark.parametrize(("stage", "spec"), RIGHT, ids=[spec.rpartition("/")[2] for _, spec in RIGHT])
def test_the_probes_suspect_no_right_implementation(stage: str, spec: str) -> None:
    trial = Trial(load(stage, spec), "cpu")
    assert [fault.name for dtype in trial.subject.declared.dtypes for fault in probed.suspects(trial, dtype)] == []
