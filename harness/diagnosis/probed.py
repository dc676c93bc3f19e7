r"""Suspects that no catalogue can list: sums in too few bits, built as the probes of one implementation describe them.

`harness.diagnosis.numerics_probes` finds how many bits each sum keeps, and how many terms are added before they
meet it.  What is less than the contract demands becomes a fault made for this implementation, which is tried like
those of the catalogue.
Where the probes leave the order open, there is a suspect for each usual one:

    running    s <- round(s + sum of the next n terms)      one accumulator, stored after every n terms
    partial    sum over runs of n terms of round(their sum)      each partial sum stored, added in fp32
"""

from collections.abc import Callable, Iterator
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.catalogue import Fault, all_faults
from moe_harness.harness.core.compare import against_bound
from moe_harness.harness.core.emulation import matmul
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.diagnosis import numerics_probes
from moe_harness.harness.diagnosis.patterns import undeclared_roundings
from moe_harness.harness.stages.experts.faults import _steps as experts
from moe_harness.harness.stages.grouped_linear.faults import _steps as grouped_linear
from moe_harness.harness.stages.shared_expert_gate.faults import _steps as gates

FULL = 24  # bits of fp32, the least that the contract allows
RUNS = (1, 4, 8, 16, 32, 64, 128, 256)  # terms added beforehand, where the probes cannot tell
SAME_SIZE = 2.0  # of an error, expected over found: running sums of runs twice as long err 1.4 times less
TF32 = 11  # bits of its significand
STORED = {8: torch.bfloat16, 11: torch.float16}
# Significands that formats have: another depth is read off a kernel that misreads its operands.
SUMS = (*STORED, 13, 14)  # also what tensor cores keep of sums of fp8 products
OPERANDS = (*STORED, 3, 4)  # also e5m2 and e4m3
Product = Callable[[Tensor, Tensor], Tensor]
Step = tuple[str, str, str, Callable[..., Tensor]]  # name, what the probes establish, in which order, a stage with that


def suspects(trial: Trial, dtype: str) -> list[Fault]:
    """The faults that the probes of an implementation suggest; [] where all its sums are as wide as they should be."""
    stage = trial.subject.stage
    found = numerics_probes.accumulators(trial, dtype)
    coarse = {name: sums for name, sums in found.items() if sums["bits"] in SUMS}
    steps = [*_of_products(stage, coarse, len(found)), *_of_operands(trial, dtype), *_of_slots(trial, dtype)]
    return [
        Fault(name, stage, "precision", probed, f"{probed}; {order}.", function)
        for name, probed, order, function in steps
    ]


def of_same_size(tried: list[Fault], seen: dict[str, list[tuple[float, float]]]) -> list[dict[str, str]]:
    """The suspect whose errors are nearest in size to those found, (its rms, that of the result) on several data."""
    sizes = {name: max(max(a / b, b / a) for a, b in pairs) for name, pairs in seen.items() if len(pairs) > 1}
    alike = [fault for fault in tried if sizes.get(fault.name, inf) < SAME_SIZE]
    if not alike:
        return []
    best = min(alike, key=lambda fault: sizes[fault.name])
    told = ", ".join(f"{expected:.2g} where {got:.2g} are found" for expected, got in seen[best.name][:2])
    name = best.name.partition("_every")[0].partition("partial_")
    evidence = f"{best.condition}. Such sums err by {told} (rms, in sigma); they are in an order not known here"
    return [{"fault": f"{name[0]}{name[2]}", "evidence": evidence}]


def summed_in_16_bits(trial: Trial, case: Case) -> list[dict[str, str]]:
    """The fault of data on which one sum in 16 bits alone can show, where the result is right but for that."""
    seen = {"partial_sums": _slots_alone, "deep_sums": _depth_alone}.get(case.data)
    evidence = seen(trial, case.once()) if seen else None
    if evidence is None:
        return []
    known = all_faults(trial.subject.stage)
    fault = next(each for each in known if ((each.part or each).shows or {}).get("data") == case.data)
    return [{"fault": fault.name, "evidence": f"{fault.consequence} {evidence}"}]


def _slots_alone(trial: Trial, case: Case) -> str | None:
    call = trial.build(case)
    if undeclared_roundings(trial, call, trial.invoke(call)) != ["partial_sum"]:
        return None
    return "On these data no other rounding shows; the result is right if `rounds` holds partial_sum"


def _depth_alone(trial: Trial, case: Case) -> str | None:
    call = trial.build(case.but(data="normal"))
    if trial.stage.judge(call, trial.invoke(call), trial.subject.declared.rounds).findings:
        return None
    return "Ordinary data of these sizes, whose sums are no larger on their way than at their end, are right"


def undeclared_store(trial: Trial, case: Case) -> list[dict[str, str]]:
    """Roundings that an implementation does not declare, that its probes show, and with which its result is right."""
    call = trial.build(case.once())
    out, declared = trial.invoke(call), trial.subject.declared.rounds or ()
    if not undeclared_roundings(trial, call, out):
        return []
    stored = [name for name, yes in numerics_probes.stores(trial, case.dtype).items() if yes and name not in declared]
    worst = [against_bound(trial.stage, call, trial.stage.expect(call, rounds), out)
             for rounds in (declared, (*declared, *stored))]  # fmt: skip
    if worst[1].findings:
        return []
    names = ", ".join(stored)
    return [{
        "fault": "undeclared_rounding",
        "evidence": f"Probes: {names} rounded to {case.dtype}, and `rounds` does not say so. The result uses "
        f"{worst[0].worst:.3g} of the bound as declared, {worst[1].worst:.2g} with that declared",
    }]  # fmt: skip


def _of_products(stage: str, coarse: dict[str, Any], products: int) -> Iterator[Step]:
    if not coarse:
        return
    bits = min(sums["bits"] for sums in coarse.values())
    known = all(sums["block"] for sums in coarse.values())
    which = "" if len(coarse) == products else f"{next(iter(coarse)).removeprefix('the ').replace(' ', '_')}_"
    terms = min(sums["block"] or 0 for sums in coarse.values())
    for kind, run in [("running", terms)] if known else [(kind, n) for n in RUNS for kind in ("running", "partial")]:
        multiply = {
            name: _rounding(sums["bits"], kind, sums["block"] if known else run) for name, sums in coarse.items()
        }
        every = f"every_{run}_terms" if run > 1 else "every_term"
        name = f"{which}{'partial_' if kind == 'partial' else ''}sums_in_{_format(bits)}_{every}"
        which_sum = "each partial" if kind == "partial" else "the running"
        order = f"{which_sum} sum is stored after {every.replace('_', ' ')}"
        yield name, _lost(" and ".join(coarse), bits), order, _with(stage, multiply)


def _lost(what: str, bits: int) -> str:
    verb = "keep" if " and " in what else "keeps"
    return f"Probes: {what} {verb} {bits} bits ({_format(bits)}), a 1 beside 2^{bits} is lost, fp32 keeps {FULL}"


def _of_operands(trial: Trial, dtype: str) -> Iterator[Step]:
    """fp32 operands rounded or cut before they are multiplied."""
    bits = numerics_probes.operand_bits(trial) if dtype == "fp32" else None
    declared = bits == TF32 and "tf32" in (trial.subject.declared.rounds or ())
    if bits is None or bits not in OPERANDS or declared:
        return
    style = "tf32" if bits == TF32 else _format(bits)
    declare = "; `rounds` may declare tf32" if bits == TF32 else ""
    facts = f"Probes: operands of fp32 products keep {bits} bits ({style}) of {FULL}{declare}"
    for manner, narrow in (("rounded", _rounded), ("cut", _cut)):
        stage = _with(trial.subject.stage, dict.fromkeys(_PRODUCTS, _narrowed(narrow, bits)))
        yield f"operands_{manner}_to_{style}", facts, f"they are {manner}", stage


def _of_slots(trial: Trial, dtype: str) -> Iterator[Step]:
    """A sum over the slots in fewer bits than the inputs' dtype has."""
    bits = numerics_probes.slot_sum_bits(trial, dtype)
    if bits is None or bits >= numerics_probes.BITS[dtype]:
        return
    for order, step in (("first_to_last", 1), ("last_to_first", -1)):

        def combine(slots: Tensor, topk_weights: Tensor, ids: Tensor, step: int = step) -> Tensor:
            weighted = experts.live(topk_weights, ids, slots.dtype)[..., None] * slots
            total = torch.zeros_like(weighted[:, 0])
            for slot in weighted.unbind(1)[::step]:
                total = _stored(total + slot, bits)
            return total

        stage, facts = _with("experts", {}, combine=combine), _lost(f"the sum over the slots, {dtype} inputs,", bits)
        yield f"slots_summed_in_{_format(bits)}_{order}", facts, f"they are added {order.replace('_', ' ')}", stage


# ------------------------------------------------------------------------------------------------------------ products

_PRODUCTS = ("the first product", "the second product", "the product")


def _with(stage: str, multiply: dict[str, Product], **steps: Any) -> Callable[..., Tensor]:
    """The stage with some of its products replaced."""
    if stage == "experts":
        places = {"the first product": "first", "the second product": "second"}
        steps |= {step: multiply[name] for name, step in places.items() if name in multiply}
        return partial(experts.run, **steps)
    product = multiply["the product"]
    if stage == "grouped_linear":
        return partial(grouped_linear.run, multiply=product)

    def dot(hidden_states: Tensor, gate_weight: Tensor) -> Tensor:
        return product(hidden_states.flatten(0, -2), gate_weight).view(*hidden_states.shape[:-1], 1)

    return partial(gates.run, dot=dot)


def _rounding(bits: int, kind: str, run: int) -> Product:
    def multiply(rows: Tensor, weight: Tensor) -> Tensor:
        total = matmul(rows[:, :0], weight[:, :0])
        for start in range(0, rows.shape[1], run):
            part = matmul(rows[:, start : start + run], weight[:, start : start + run])
            total = _stored(total + part, bits) if kind == "running" else total + _stored(part, bits)
        return total

    return multiply


def _narrowed(narrow: Callable[[Tensor, int], Tensor], bits: int) -> Product:
    def multiply(rows: Tensor, weight: Tensor) -> Tensor:
        if rows.dtype not in (torch.float32, torch.float64):
            return matmul(rows, weight)
        return matmul(narrow(rows.float(), bits), narrow(weight.float(), bits))

    return multiply


def _stored(values: Tensor, bits: int) -> Tensor:
    """In the format that has so many bits, its range included; only rounded where none has."""
    return values.to(STORED[bits]).to(values.dtype) if bits in STORED else _rounded(values, bits)


def _rounded(values: Tensor, bits: int) -> Tensor:
    significand, exponent = torch.frexp(values)
    return torch.ldexp((significand * 2.0**bits).round(), exponent - bits)


def _cut(values: Tensor, bits: int) -> Tensor:
    """The further bits of fp32 dropped, as tensor cores drop them."""
    return (values.view(torch.int32) & -(1 << 24 - bits)).view(torch.float32)


def _format(bits: int) -> str:
    return {8: "bf16", 11: "fp16"}.get(bits, f"{bits}_bits")
