"""Running a fault of the catalogue as a suspect: on fresh state, guarded, and on inputs changed by a few roundings."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import log
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.catalogue import Fault, all_faults
from moe_harness.harness.core.contracts import Declarations
from moe_harness.harness.core.memory import poisoned_allocations

WOBBLES = 6  # repetitions; a value within a rounding of an edge is missed by all of them once in a hundred times
WOBBLE = 4.0  # unit roundoffs
DEADLY = ("process", "cuda")


def suspects(stage: str, device: str, declared: Declarations | None = None) -> list[Fault]:
    """The faults of a stage that change values and can be run here.

    With `declared`, one that is a fault for what it declares of its stage alone (int8 codes, say) is left out where the
    implementation declares something else.
    """
    found = [f for f in all_faults(stage) if f.sign == "value" and f.family not in DEADLY and device in f.devices]
    if declared is None:
        return found
    extras = [Declarations.of(fault.function, stage).extra for fault in found]
    return [f for f, own in zip(found, extras, strict=True) if own.items() <= declared.extra.items()]


def in_every_form(faults: list[Fault]) -> list[Fault]:
    """The faults, and behind them what else each may look like."""
    return [*faults, *(form for fault in faults for form in fault.other_forms())]


def likely_first(faults: list[Fault], case: Case) -> list[Fault]:
    """Faults that need a batch about as large as this one come first: with large ones the time may be over early."""

    def distance(fault: Fault) -> float:
        shows = fault.shows or {}
        return abs(log(_rows(vars(case)) / _rows(dict(shows))))

    return sorted(faults, key=distance)


def _rows(sizes: dict[str, Any]) -> int:
    return max(1, int(sizes.get("T", sizes.get("S", 7)))) * max(1, int(sizes.get("k", 1)))


def results(stage: Any, fault: Fault, calls: Sequence[Call]) -> list[Any] | None:
    """What the fault returns on the calls, one after the other; None where it raises or returns another form."""
    with _fresh_state(fault):
        found = []
        for call in calls:
            result = _result(stage, fault, call)
            if result is None:
                return None
            found.append(result)
        return found


def _result(stage: Any, fault: Fault, call: Call) -> Any:
    wanted = stage.outputs(call)
    inside = [output.inside for output in wanted if output.inside]
    with restored(stage, call):
        try:
            with torch.no_grad(), poisoned_allocations("cpu"):
                result = fault.function(*call.args.values(), **call.keywords)
        except Exception:
            return None
        parts = result if isinstance(result, tuple) else (result,)
        parts = (*parts, *(call.operand(name).clone() for name in inside))
        fits = len(parts) == len(wanted) and all(
            isinstance(part, Tensor) and tuple(part.shape) == output.shape
            for part, output in zip(parts, wanted, strict=True)
        )
        if not fits or call.arena.violations(inside):
            return None
    return parts if len(parts) > 1 else parts[0]


@contextmanager
def restored(stage: Any, call: Call) -> Iterator[None]:
    """Operands that a call writes in place hold afterwards what they held before: the next suspect gets the same."""
    names = [output.inside for output in stage.outputs(call) if output.inside]
    kept = {name: call.operand(name).clone() for name in names}
    try:
        yield
    finally:
        for name, values in kept.items():
            call.operand(name).copy_(values)
        if kept:
            call.arena.refresh()


@contextmanager
def _fresh_state(fault: Fault) -> Iterator[None]:
    """Nothing remembered from before, and nothing left behind: private dicts of the fault's module, counters at 0."""
    kept = _memories(fault) if fault.stateful else []
    before = [dict(memory) for memory in kept]
    forget(fault)
    try:
        yield
    finally:
        for memory, contents in zip(kept, before, strict=True):
            memory.clear()
            memory.update(contents)


def forget(fault: Fault) -> None:
    """Clear what a stateful fault keeps between calls."""
    for memory in _memories(fault) if fault.stateful else []:
        counters = {key: 0 for key, count in memory.items() if isinstance(key, str) and type(count) is int}
        memory.clear()
        memory.update(counters)


def _memories(fault: Fault) -> list[dict[Any, Any]]:
    names = vars(sys.modules[fault.home]).items()
    return [v for n, v in names if n.startswith("_") and not n.startswith("__") and isinstance(v, dict)]


def wobbled(stage: Any, fault: Fault, call: Call) -> tuple[Any, ...]:
    """Results of the fault on activations changed by a few unit roundoffs: where it jumps, and how far."""
    name, values = next((n, v) for n, v in call.args.items() if isinstance(v, Tensor) and v.is_floating_point())
    random = torch.Generator().manual_seed(call.case.seed)
    unit = WOBBLE * torch.finfo(values.dtype).eps / 2
    kept, found = values.clone(), []
    for _ in range(WOBBLES):
        noise = torch.rand(values.shape, generator=random, dtype=torch.float64).to(values.device) * 2 - 1
        values.copy_(kept.double() * (1 + unit * noise))
        call.arena.refresh()
        found.append(_result(stage, fault, call))
    values.copy_(kept)
    call.arena.refresh()
    return tuple(result for result in found if result is not None)
