"""What an implementation does with memory beyond its result: inputs, earlier results, state, leaks."""

import contextlib
import ctypes
import gc
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.checks.plain import judged_call
from moe_harness.harness.core.call import Call
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.findings import Record
from moe_harness.harness.core.invocation import Rejected, Trial
from moe_harness.harness.core.memory import poisoned_allocations

LEAK_CALLS = 40
WARM_UP_CALLS = 15
LEAK_SECONDS = 6.0
LEAST_TELLING = 1 << 20  # bytes; the resident set moves by a few pages on its own


def results_of(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two results agree bit for bit; a NaN equals itself."""
    pairs = zip(results_of(a), results_of(b), strict=True)
    return all(torch.equal(_bits(x), _bits(y)) for x, y in pairs)


def _bits(tensor: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(kinds[tensor.element_size()])


def copies(result: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().clone() for tensor in results_of(result))


def memory(trial: Trial, case: Case) -> Record:
    """A sequence of calls over poisoned memory: this shape, other data, another shape, this one, changed in place."""
    record = Record()
    with poisoned_allocations(trial.device):
        first_call = trial.build(case)
        first = trial.invoke(first_call)
        kept = copies(first)
        record.merge(trial.judge(first_call, first), "first call: ")
        record.merge(judged_call(trial, trial.build(case.but(seed=case.seed + 77))), "second call, other data: ")
        _kept_or_fail(record, first, kept, "a second call of the same shape")
        _another_shape(trial, case, record)
        _kept_or_fail(record, first, kept, "a call of another shape")
        record.merge(judged_call(trial, trial.build(case)), "the first call repeated after others: ")
        for operand, what in first_call.arena.violations():
            record.fail(f"a later call: the first call's input {operand} {what}", headroom=float("inf"))
        record.merge(_changed_in_place(trial, first_call), "inputs changed in place, same addresses: ")
    return record


def _kept_or_fail(record: Record, result: Any, kept: tuple[Tensor, ...], what: str) -> None:
    if not same_bits(result, kept):
        message = f"the first result was changed by {what}, but a result belongs to the caller"
        record.fail(message, headroom=float("inf"), looks_like=["the output lives in a buffer that is reused"])


def _another_shape(trial: Trial, case: Case, record: Record) -> None:
    with contextlib.suppress(Rejected):  # refusing the other shape is its right; the rest of the sequence still counts
        record.merge(judged_call(trial, trial.build(case.resized())), "a call of another shape: ")


def _changed_in_place(trial: Trial, call: Call) -> Record:
    """New values at the old addresses: whatever an implementation remembers by address is stale now."""
    refill(call, trial.build(call.case.but(seed=call.case.seed + 99)))
    return judged_call(trial, call)


def refill(call: Call, values: Call) -> None:
    """Copy the operands of `values` into those of `call`."""
    for name, tensor in tensors(call).items():
        tensor.copy_(tensors(values)[name])
    call.truth = None
    call.arena.refresh()


def tensors(call: Call) -> dict[str, Tensor]:
    """Every operand of a call by name, those inside a dict of weights too."""
    found: dict[str, Tensor] = {}
    for name, value in {**call.args, **call.keywords}.items():
        members = value if isinstance(value, dict) else {name: value}
        found |= {k: v for k, v in members.items() if isinstance(v, Tensor)}
    return found


def leak(trial: Trial, case: Case) -> Record:
    """The same call over and over: memory must not grow by anything like a result per call."""
    record = Record()
    call = trial.build(case)
    size = sum(r.numel() * r.element_size() for r in results_of(trial.invoke(call)))
    _repeat(trial, call, WARM_UP_CALLS)
    before = _memory_in_use(trial.device)
    calls = _repeat(trial, call, LEAK_CALLS)
    grown = _memory_in_use(trial.device) - before
    if calls * size < LEAST_TELLING:
        record.skipped = f"{calls} calls in {LEAK_SECONDS:.0f} s are too few to tell a leak from noise"
        return record
    record.worst = max(0.0, grown / (0.5 * calls * size))
    if record.worst > 1:
        message = f"memory grew by {grown / 2**20:.1f} MiB over {calls} equal calls, but should stay as it is"
        looks_like = [f"{grown / calls / size:.1f} results are kept for each call"]
        record.fail(message, headroom=record.worst, looks_like=looks_like)
    return record


def _repeat(trial: Trial, call: Call, most: int) -> int:
    """Call up to `most` times within LEAK_SECONDS; returns how often."""
    end = time.monotonic() + LEAK_SECONDS
    for done in range(most):
        trial.invoke(call)
        if time.monotonic() > end:
            return done + 1
    return most


def _memory_in_use(device: str) -> int:
    """Bytes held by live tensors on CUDA; elsewhere the resident set, with freed memory given back first."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return pages * 4096
