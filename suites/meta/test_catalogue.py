"""The catalogue of faults is well-formed, and each fault does what its entry says.

Every entry carries a small case on which it shows (`shows`) and changes of that case under which it does not
(`hidden`); both are judged here.
"""

import contextlib
import faulthandler
import importlib
import inspect
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_harness.harness.checks.memory import results_of, tensors
from moe_harness.harness.core import catalogue as entries
from moe_harness.harness.core.call import Call
from moe_harness.harness.core.case import Case, case_types
from moe_harness.harness.core.catalogue import Fault, all_faults, get
from moe_harness.harness.core.contracts import REJECTIONS, SIGNATURES
from moe_harness.harness.core.memory import poisoned_allocations
from moe_harness.harness.core.stage import find_stage

# Those of one device; what is one of them inside a block has a suite of its own.
FAULTS = tuple(fault for fault in all_faults() if fault.stage in SIGNATURES and fault.part is None)
# The examples of the other stages: suites/meta/test_examples.py, suites/quantized_experts.
STAGES = ("experts", "router", "grouped_linear", "shared_expert_gate", "moe_block")
EXAMPLES = [
    fault for fault in FAULTS
    if fault.stage in STAGES and fault.shows is not None and fault.sign != "process" and "cpu" in fault.devices
]  # fmt: skip
REMEMBERING = [fault for fault in EXAMPLES if fault.before is not None]


# Judging one example ------------------------------------------------------------------------------------------------


def build(case: Case) -> Call:
    return find_stage(case.stage).build(case, "cpu")


def run(function: Callable[..., Any], call: Call) -> Any:
    return function(*call.args.values(), **call.keywords)


NOTHING: tuple[str, ...] = ()  # rounds nothing but its result; None allows every rounding of the contract


def differs(out: Any, call: Call, permitted: tuple[str, ...] | None) -> bool:
    """Would the judge reject `out` of an implementation that may round what is permitted?"""
    return bool(find_stage(call.case.stage).judge(call, out, permitted).findings)


def forget() -> None:
    """Stateful faults start afresh."""
    for module in entries.modules():
        for name in ("_kept", "_sums"):
            getattr(importlib.import_module(module), name, {}).clear()


def visible(fault: Fault, case: Case, permitted: tuple[str, ...] | None, *, alone: bool = False) -> bool:
    """Does the fault show its sign on this case, behind the call that it needs before unless it is to be `alone`?"""
    forget()
    with poisoned_allocations("cpu") if case.variant == "poisoned" else contextlib.nullcontext():
        if fault.before is not None and not alone:
            run(fault.function, build(case.but(**fault.before)))
        call = build(case)
        if fault.sign == "value":
            return differs(run(fault.function, call), call, permitted)
        return SEEN[fault.sign](fault, call)


def seen_raising(fault: Fault, call: Call) -> bool:
    try:
        run(fault.function, call)
    except REJECTIONS:
        return False
    except Exception:
        return True
    return False


def seen_dtype(fault: Fault, call: Call) -> bool:
    out = run(fault.function, call)
    if fault.stage == "router":
        return not out[0].is_floating_point() or out[1].dtype not in (torch.int32, torch.int64)
    return out.dtype != next(iter(call.args.values())).dtype


def seen_shape(fault: Fault, call: Call) -> bool:
    wanted, out = find_stage(fault.stage).outputs(call), run(fault.function, call)
    return isinstance(out, tuple) != (len(wanted) > 1) or [o.shape for o in wanted] != [
        tuple(t.shape) for t in results_of(out)
    ]


def kept_values(fault: Fault, call: Call) -> bool:
    """Whether a call leaves every operand as it was."""
    before = {name: operand.clone() for name, operand in tensors(call).items()}
    run(fault.function, call)
    after = tensors(call)
    return before.keys() == after.keys() and all(
        torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before
    )


def seen_inputs(fault: Fault, call: Call) -> bool:
    return not kept_values(fault, call)


def seen_guards(fault: Fault, call: Call) -> bool:
    """Memory around the arguments changed while the arguments did not."""
    return kept_values(fault, call) and bool(call.arena.violations())


def seen_earlier(fault: Fault, call: Call) -> bool:
    out = run(fault.function, call)
    kept = out.clone()
    run(fault.function, build(call.case.but(seed=call.case.seed + 1)))
    return call.arena.aliased_by(out) is not None or not torch.equal(out, kept)


def seen_repeat(fault: Fault, call: Call) -> bool:
    first, *others = (results_of(run(fault.function, call)) for _ in range(4))
    return any(not torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def seen_batch(fault: Fault, call: Call) -> bool:
    whole = run(fault.function, call)
    hidden, gate_up, down, weights, ids = call.args.values()
    alone = [
        fault.function(hidden[t : t + 1], gate_up, down, weights[t : t + 1], ids[t : t + 1], **call.keywords)
        for t in range(len(hidden))
    ]
    # fp32 products of other heights may differ in the last bit on a CPU; a fault has to differ in many rows.
    return (torch.cat(alone) != whole).any(1).float().mean().item() > 0.9


SEEN: dict[str, Callable[[Fault, Call], bool]] = {
    "raises": seen_raising, "dtype": seen_dtype, "shape": seen_shape, "inputs": seen_inputs,
    "guards": seen_guards, "earlier": seen_earlier, "repeat": seen_repeat, "batch": seen_batch,
}  # fmt: skip


def hidden_examples() -> Iterator[Any]:
    for fault in EXAMPLES:
        for entry, case in fault.hiding():
            yield pytest.param(fault, case, id=f"{fault.name}[{entry}]")


# Tests --------------------------------------------------------------------------------------------------------------


def test_enough_faults_of_every_stage() -> None:
    assert len(FAULTS) >= 120
    assert {fault.stage for fault in FAULTS} == set(SIGNATURES) - {"model"}  # whose faults are planted in suites/model


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_entry_is_well_formed(fault: Fault) -> None:
    assert fault.condition
    assert fault.consequence.endswith(".")
    assert fault.source is None or fault.source.startswith("https://")
    assert set(fault.devices) <= {"cpu", "cuda"}
    assert fault.function.devices == fault.devices
    assert inspect.signature(fault.function) == SIGNATURES[fault.stage]
    module, _, name = fault.spec.partition(":")
    assert getattr(importlib.import_module(module), name) is fault.function
    assert get(fault.name) is fault
    assert fault.shows is not None or "cpu" not in fault.devices


@pytest.mark.parametrize("fault", EXAMPLES, ids=lambda fault: fault.name)
def test_fault_shows_in_its_example(fault: Fault) -> None:
    assert visible(fault, fault.example(), NOTHING)


@pytest.mark.parametrize(("fault", "case"), list(hidden_examples()))
def test_fault_is_hidden_where_it_says_so(fault: Fault, case: Case) -> None:
    assert not visible(fault, case, None)


@pytest.mark.parametrize("fault", REMEMBERING, ids=lambda fault: fault.name)
def test_fault_that_needs_a_call_before_is_hidden_without(fault: Fault) -> None:
    assert not visible(fault, fault.example(), None, alone=True)


RETURNED = 77


def call_and_leave(fault: Fault, call: Call) -> None:
    """In the child: leave with a status that no fault uses, so that a return is told from every other end."""
    faulthandler.disable()  # the crash is wanted, its trace is not
    run(fault.function, call)
    os._exit(RETURNED)


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.sign == "process"], ids=lambda fault: fault.name)
def test_process_fault_does_not_return(fault: Fault) -> None:
    if fault.name in ("leaks_memory", "results_kept_for_ever"):
        pytest.skip("returns; its memory is seen over many calls only")
    call = build(fault.example())
    child = multiprocessing.get_context("fork").Process(target=call_and_leave, args=(fault, call))
    child.start()
    child.join(timeout=1)
    hung = child.exitcode is None
    child.kill()
    child.join()
    assert hung == fault.name.startswith("never_returns")
    assert child.exitcode != RETURNED


BUILDING_BLOCKS = [(stage, f"moe_harness.harness.stages.{stage}.faults._steps", "run") for stage in STAGES]
BUILDING_BLOCKS += [("experts", "moe_harness.harness.stages.experts.faults.alignment", "run_aligned")]
BUILDING_BLOCKS += [("experts", "moe_harness.harness.stages.experts.faults.cuda", "run_captured")]


@pytest.mark.parametrize(("stage", "module", "name"), BUILDING_BLOCKS)
def test_building_block_is_right(stage: str, module: str, name: str) -> None:
    idle = {"grouped_linear": {"S": 0}, "shared_expert_gate": {"lead": "0"}}.get(stage, {"T": 0})
    for fields in (idle, *({"seed": seed} for seed in range(5))):
        call = build(case_types()[stage](**fields))
        assert not differs(run(getattr(importlib.import_module(module), name), call), call, NOTHING)


def test_unknown_name_tells_the_nearest() -> None:
    with pytest.raises(KeyError, match="gate_up_swapped"):
        get("gate_up_swaped")


def filled_with(value: int) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Wraps torch.empty and its kin so that what they return holds `value`."""

    def wrap(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **options: Any) -> Tensor:
            out = make(*args, **options)
            return out if out.is_meta else out.fill_(value)

        return call

    return wrap


@pytest.mark.parametrize("fault", [f for f in EXAMPLES if f.sign == "value"], ids=lambda fault: fault.name)
def test_what_a_fault_does_does_not_hang_on_what_memory_holds(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it is killed today and survives tomorrow, as one did in two of six runs."""
    found = []
    for held in (0, 100):
        forget()
        with monkeypatch.context() as patch:
            for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
                patch.setattr(owner, name, filled_with(held)(getattr(owner, name)))
            found.append(results_of(run(fault.function, build(fault.example()))))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*found, strict=True))


def test_the_order_of_the_catalogue_does_not_depend_on_who_imported_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found = all_faults()
    late = sorted(found, key=lambda fault: fault.function.__module__, reverse=True)
    monkeypatch.setattr(entries, "_FAULTS", {fault.name: fault for fault in late})
    assert list(late) != list(found) and all_faults() == found
