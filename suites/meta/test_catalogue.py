"""The catalogue of faults is well-formed, and each fault does what its entry says.

Every entry carries a small case on which it shows (`shows`) and changes of that case under which it does not
(`hidden`); both are run here, against the references in fp64.
"""

import ast
import contextlib
import faulthandler
import importlib
import inspect
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_harness.harness.core import catalogue as entries
from moe_harness.harness.core.bounds import accumulation, max_limit
from moe_harness.harness.core.call import Call as Judged
from moe_harness.harness.core.case import case_types
from moe_harness.harness.core.catalogue import Fault, all_faults, get
from moe_harness.harness.core.compare import against_bound
from moe_harness.harness.core.contracts import REJECTIONS, SIGNATURES
from moe_harness.harness.core.memory import poisoned_allocations
from moe_harness.harness.core.stage import find_stage
from moe_harness.reference.experts import experts
from moe_harness.reference.grouped_linear import grouped_linear
from moe_harness.reference.moe_block import moe_block
from moe_harness.reference.router import router
from moe_harness.reference.shared_expert_gate import shared_expert_gate
from moe_harness.suites.meta.catalogue_calls import BEFORE, BUILDERS, Call, experts_call

# Those of one device; what is one of them inside a block has a suite of its own.
FAULTS = tuple(fault for fault in all_faults() if fault.stage in SIGNATURES and fault.part is None)
REFERENCES = {f.__name__: f for f in (experts, router, grouped_linear, shared_expert_gate, moe_block)}
# Those of the other stages name fields of a case: suites/meta/test_examples.py, suites/quantized_experts.
EXAMPLES = [
    fault for fault in FAULTS
    if fault.stage in REFERENCES and fault.shows is not None and fault.sign != "process" and "cpu" in fault.devices
]  # fmt: skip


# Judging one example ------------------------------------------------------------------------------------------------


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a structure of tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: map_tensors(part, change) for name, part in value.items()}
    if isinstance(value, tuple):
        parts = [map_tensors(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def in_fp64(call: Call) -> Call:
    return map_tensors(call, lambda t: t.double() if t.is_floating_point() else t.clone())


def storages(call: Call) -> list[bytes]:
    """All bytes behind the arguments, what lies between and around the rows included."""
    return [bytes(t.untyped_storage().tolist()) for t in tensors(call)]


NOTHING: tuple[str, ...] = ()  # rounds nothing but its result; None allows every rounding of the contract


def differs(stage: str, out: Any, call: Call, permitted: tuple[str, ...] | None) -> bool:
    """Would the judge reject `out` of an implementation that may round what is permitted?"""
    module, names = find_stage(stage), SIGNATURES[stage].parameters
    judged = Judged(case_types()[stage](), dict(zip(names, call.args, strict=False)), dict(call.options))
    if stage == "router":
        return bool(module.judge(judged, out, permitted).findings)
    bound = module.expect(judged, permitted)
    if not torch.equal(out.isnan(), bound.value.isnan()) or not torch.equal(out.isinf(), bound.value.isinf()):
        return True
    return bool(against_bound(module, judged, bound, out).findings)


def forget() -> None:
    """Stateful faults start afresh."""
    for module in entries.modules():
        for name in ("_kept", "_sums"):
            getattr(importlib.import_module(module), name, {}).clear()


def visible(fault: Fault, parameters: Mapping[str, Any], permitted: tuple[str, ...] | None) -> bool:
    """Does the fault show its sign on this case?"""
    parameters = dict(parameters)
    poison = parameters.pop("poison", False) or parameters.get("variant") == "poisoned"
    before = parameters.pop("before", None)
    parameters.pop("calls", None)
    build = BUILDERS[fault.stage]
    forget()
    with poisoned_allocations("cpu") if poison else contextlib.nullcontext():
        if before is not None:
            earlier = build(**{**parameters, **BEFORE[before]})
            fault.function(*earlier.args, **earlier.options)
        call = build(**parameters)
        if fault.sign == "value":
            return differs(fault.stage, fault.function(*call.args, **call.options), call, permitted)
        return SEEN[fault.sign](fault, call)


def seen_raising(fault: Fault, call: Call) -> bool:
    try:
        fault.function(*call.args, **call.options)
    except REJECTIONS:
        return False
    except Exception:
        return True
    return False


def seen_dtype(fault: Fault, call: Call) -> bool:
    out = fault.function(*call.args, **call.options)
    if fault.stage == "router":
        return not out[0].is_floating_point() or out[1].dtype not in (torch.int32, torch.int64)
    return out.dtype != call.args[0].dtype


def seen_shape(fault: Fault, call: Call) -> bool:
    want = REFERENCES[fault.stage](*in_fp64(call).args, **in_fp64(call).options)
    out = fault.function(*call.args, **call.options)
    shapes = [[t.shape for t in tensors(value)] for value in (out, want)]
    return type(out) is not type(want) or shapes[0] != shapes[1]


def seen_inputs(fault: Fault, call: Call) -> bool:
    before = map_tensors(call, Tensor.clone)
    fault.function(*call.args, **call.options)
    pairs = list(zip(tensors(before), tensors(call), strict=False))
    same = len(list(tensors(before))) == len(list(tensors(call)))
    return not same or any(not torch.equal(was.nan_to_num(), now.nan_to_num()) for was, now in pairs)


def seen_guards(fault: Fault, call: Call) -> bool:
    """Memory around the arguments changed while the arguments did not."""
    before, values = storages(call), map_tensors(call, Tensor.clone)
    fault.function(*call.args, **call.options)
    same = all(torch.equal(was, now) for was, now in zip(tensors(values), tensors(call), strict=True))
    return same and storages(call) != before


def seen_earlier(fault: Fault, call: Call) -> bool:
    out = fault.function(*call.args, **call.options)
    owned = {t.untyped_storage().data_ptr() for t in tensors(call)}
    kept, other = out.clone(), Call((call.args[0] * 2 + 1, *call.args[1:]), call.options)
    fault.function(*other.args, **other.options)
    return out.untyped_storage().data_ptr() in owned or not torch.equal(out, kept)


def seen_repeat(fault: Fault, call: Call) -> bool:
    first, *others = (tuple(tensors(fault.function(*call.args, **call.options))) for _ in range(4))
    return any(not torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def seen_batch(fault: Fault, call: Call) -> bool:
    whole = fault.function(*call.args, **call.options)
    hidden, gate_up, down, weights, ids = call.args
    alone = [
        fault.function(hidden[t : t + 1], gate_up, down, weights[t : t + 1], ids[t : t + 1], **call.options)
        for t in range(len(hidden))
    ]
    # fp32 products of other heights may differ in the last bit on a CPU; a fault has to differ in many rows.
    return (torch.cat(alone) != whole).any(1).float().mean().item() > 0.9


SEEN: dict[str, Callable[[Fault, Call], bool]] = {
    "raises": seen_raising, "dtype": seen_dtype, "shape": seen_shape, "inputs": seen_inputs,
    "guards": seen_guards, "earlier": seen_earlier, "repeat": seen_repeat, "batch": seen_batch,
}  # fmt: skip


def hidden_examples() -> Iterator[Any]:
    """One parameter per `hidden` entry that is data; "a=1, b=2" changes two parameters at once."""
    for fault in EXAMPLES:
        for change in fault.hidden:
            try:
                keywords = ast.parse(f"dict({change})", mode="eval").body.keywords  # type: ignore[attr-defined]
            except SyntaxError:  # words, for people only
                continue
            changes = {keyword.arg: ast.literal_eval(keyword.value) for keyword in keywords}
            yield pytest.param(fault, {**fault.shows, **changes}, id=f"{fault.name}[{change}]")


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
    assert visible(fault, fault.shows, NOTHING)


@pytest.mark.parametrize(("fault", "parameters"), list(hidden_examples()))
def test_fault_is_hidden_where_it_says_so(fault: Fault, parameters: dict[str, Any]) -> None:
    assert not visible(fault, parameters, None)


RETURNED = 77


def call_and_leave(fault: Fault, call: Call) -> None:
    """In the child: leave with a status that no fault uses, so that a return is told from every other end."""
    faulthandler.disable()  # the crash is wanted, its trace is not
    fault.function(*call.args, **call.options)
    os._exit(RETURNED)


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.sign == "process"], ids=lambda fault: fault.name)
def test_process_fault_does_not_return(fault: Fault) -> None:
    if fault.name in ("leaks_memory", "results_kept_for_ever"):
        pytest.skip("returns; its memory is seen over many calls only")
    call = experts_call(**fault.shows)
    child = multiprocessing.get_context("fork").Process(target=call_and_leave, args=(fault, call))
    child.start()
    child.join(timeout=1)
    hung = child.exitcode is None
    child.kill()
    child.join()
    assert hung == fault.name.startswith("never_returns")
    assert child.exitcode != RETURNED


BUILDING_BLOCKS = [(stage, f"moe_harness.harness.stages.{stage}.faults._steps", "run") for stage in REFERENCES]
BUILDING_BLOCKS += [("experts", "moe_harness.harness.stages.experts.faults.alignment", "run_aligned")]
BUILDING_BLOCKS += [("experts", "moe_harness.harness.stages.experts.faults.cuda", "run_captured")]


@pytest.mark.parametrize(("stage", "module", "name"), BUILDING_BLOCKS)
def test_building_block_is_right(stage: str, module: str, name: str) -> None:
    run = getattr(importlib.import_module(module), name)
    idle = {"grouped_linear": {"S": 0}, "shared_expert_gate": {"lead": "0"}}.get(stage, {"T": 0})
    for parameters in (idle, *({"seed": seed} for seed in range(5))):
        call = BUILDERS[stage](**parameters)
        want = REFERENCES[stage](*in_fp64(call).args, **in_fp64(call).options)
        for got, wanted in zip(tensors(run(*call.args, **call.options)), tensors(want), strict=True):
            scale = 1 + wanted.double().abs().max() if wanted.numel() else 1.0
            limit = max_limit() * accumulation(64) ** 0.5 * scale
            assert got.shape == wanted.shape and bool(((got.double() - wanted.double()).abs() <= limit).all())


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
    parameters = {k: v for k, v in (fault.shows or {}).items() if k not in ("poison", "before", "calls")}
    found = []
    for held in (0, 100):
        forget()
        with monkeypatch.context() as patch:
            for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
                patch.setattr(owner, name, filled_with(held)(getattr(owner, name)))
            call = BUILDERS[fault.stage](**parameters)
            found.append(list(tensors(fault.function(*call.args, **call.options))))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*found, strict=True))


def test_the_order_of_the_catalogue_does_not_depend_on_who_imported_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found = all_faults()
    late = sorted(found, key=lambda fault: fault.function.__module__, reverse=True)
    monkeypatch.setattr(entries, "_FAULTS", {fault.name: fault for fault in late})
    assert list(late) != list(found) and all_faults() == found
