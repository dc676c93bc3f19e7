"""Calling an implementation: what it may do (return, refuse) and what it may not (crash, lie about its result)."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import Bound
from moe_harness.harness.core.call import Call
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.compare import against_bound, exactly
from moe_harness.harness.core.contracts import REJECTIONS, Subject
from moe_harness.harness.core.environment import what_is_missing
from moe_harness.harness.core.errors import CannotJudge
from moe_harness.harness.core.findings import Record
from moe_harness.harness.core.rows import count, of_result, part
from moe_harness.harness.core.stage import stage_module

PART = 1 << 16  # rows that are judged at once: of 2^31 elements the fp64 reference alone would fill a GPU's memory


class Rejected(Exception):
    """The implementation refuses this input, as the contract allows."""


class Broken(Exception):
    """The implementation failed in a way that leaves no result to judge."""


@contextmanager
def kept_defaults() -> Iterator[None]:
    """Put back what the code inside sets for the whole process: the judge makes its own tensors with these."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.are_deterministic_algorithms_enabled() != deterministic:
            torch.use_deterministic_algorithms(deterministic)


class Trial:
    """One implementation on one device."""

    def __init__(self, subject: Subject, device: str):
        self.subject, self.device = subject, device
        self.stage = stage_module(subject.stage)
        self._ready: dict[Case, Call] = {}

    def build(self, case: Case) -> Call:
        """A call of its own for every time it is asked for."""
        return self._ready.pop(case, None) or self.stage.build(case, self.device)

    def prepare(self, case: Case) -> Call:
        """The call that `build` hands out next for the case, with what a right result is."""
        call = self.stage.build(case, self.device)
        if count(call) <= PART:
            call.truth = right_result(call, self.subject.declared.rounds)
        self._ready = {case: call}
        return call

    def invoke(self, call: Call) -> Any:
        """The result, checked for what the contract says of its form.

        Raises:
            Rejected: NotImplementedError, ValueError or TypeError (any exception at all on an optional case).
            Broken: another exception, an input that was written to, or a result of another form.
        """
        before = {name: dict(value) for name, value in call.args.items() if isinstance(value, dict)}
        result = self.launch(call)
        _check_entries(before, call.args)
        modified = call.arena.violations()
        if modified:
            operand, what = modified[0]
            raise Broken(f"the input {operand} {what}, but no input may be written, nor anything around it")
        return self._checked(call, result)

    def launch(self, call: Call, *, wait: bool = True) -> Any:
        """Call it; `wait` for the device, or leave that to the caller.  Raises as `invoke`."""
        lacking = self.subject.missing_keywords(call.keywords)
        if lacking:
            raise Rejected(f"has no parameter {', '.join(lacking)}")
        try:
            with torch.no_grad(), kept_defaults():
                result = self.subject.call(call.args, call.keywords)
            if wait:
                self.synchronize()
        except REJECTIONS as error:
            if wait:
                self._check_device(error)
            raise Rejected(_refusal(error)) from error
        except BaseException as error:  # SystemExit and KeyboardInterrupt too: Ctrl-C does not reach this process
            if (missing := what_is_missing(error)) is not None:
                raise CannotJudge(missing) from error
            if call.case.optional:
                raise Rejected(f"{type(error).__name__}: {first_line(error)}") from error
            raise Broken(
                f"raised {type(error).__name__}: {first_line(error)}\n  at {_user_frame(error)}\n  the contract "
                "allows NotImplementedError, ValueError and TypeError, for inputs it refuses"
            ) from error
        return result

    def _check_device(self, refusal: BaseException) -> None:
        """A refusal that leaves the device in error is none: grouped_mm raises after it has launched."""
        try:
            self.synchronize()
        except Exception as error:
            raise Broken(
                f"refused ({first_line(refusal)}), but left the device in error: {first_line(error)}"
            ) from error

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def judge(self, call: Call, result: Any) -> Record:
        """The result against what a right one may be, many rows in parts."""
        total = count(call)
        if total <= PART:
            return self._judge(call, result)
        record = Record()
        for rows in torch.arange(total, device=self.device).split(PART):
            note = f"among rows {int(rows[0])} to {int(rows[-1])}: "
            record.merge(self._judge(part(call, rows), of_result(result, rows)), note)
            if record.findings:
                break
        return record

    def _judge(self, call: Call, result: Any) -> Record:
        truth = right_result(call, self.subject.declared.rounds) if call.truth is None else call.truth
        if truth is None:
            return self.stage.compare(call, result, self.subject.declared.rounds)
        if isinstance(truth, Tensor):
            return exactly(self.stage, call, truth, result)
        return against_bound(self.stage, call, truth, result)

    def _checked(self, call: Call, result: Any) -> Any:
        wanted = self.stage.outputs(call)
        results = result if isinstance(result, tuple | list) else (result,)
        if len(results) != len(wanted) or (len(wanted) == 1 and result is not results[0]):
            raise Broken(f"returned {_kind(result)}, but should return {_wanted(wanted)}")
        for (name, shape, dtype), value in zip(wanted, results, strict=True):
            self._check_form(call, name, shape, dtype, value)
        return tuple(results) if len(wanted) > 1 else result

    def _check_form(self, call: Call, name: str, shape: tuple, dtype: Any, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise Broken(f"{name} is {_kind(value)}, but should be a tensor of shape {list(shape)}")
        if tuple(value.shape) != tuple(shape):
            raise Broken(f"{name} has the shape {list(value.shape)}, but should have {list(shape)}")
        allowed = dtype if isinstance(dtype, tuple) else (dtype,)
        if value.dtype not in allowed:
            names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
            raise Broken(f"{name} has the dtype {str(value.dtype).removeprefix('torch.')}, but should have {names}")
        if value.device.type != self.device:
            raise Broken(f"{name} is on {value.device.type}, but should be on {self.device}, as the inputs are")
        if value.layout is not torch.strided:
            raise Broken(f"{name} has the layout {value.layout}, but should be a dense tensor")
        owner = call.arena.aliased_by(value)
        if owner is not None:
            raise Broken(f"{name} shares its memory with the input {owner}, but should be a new tensor")


def right_result(call: Call, declared: tuple[str, ...] | None) -> Bound | Tensor | None:
    """Bound, or the only right value of exact data; None where the stage has a judgement of its own."""
    stage = stage_module(call.case.stage)
    if hasattr(stage, "compare"):  # the router's choice is a set
        return None
    return stage.exact_value(call) if call.case.data == "exact" else stage.expect(call, declared)


def _check_entries(before: dict[str, dict], after: dict[str, Any]) -> None:
    """Raises Broken where an entry of a dict among the inputs was set, replaced or taken out."""
    for name, entries in before.items():
        now = after[name]
        for key in {**entries, **now}:
            if key not in now or key not in entries or entries[key] is not now[key]:
                raise Broken(f"the input {name} was modified in its entry {key!r}, but no input may be written")


def first_line(error: BaseException) -> str:
    try:
        return (str(error).strip().splitlines() or ["(no message)"])[0][:300]
    except Exception as unprintable:
        return f"(no message: its own text raises {type(unprintable).__name__})"


def _refusal(error: BaseException) -> str:
    """What was raised, and by which line where that is none of the author's own `raise`: it may be a mistake."""
    told = f"{type(error).__name__}: {first_line(error)}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, NotImplementedError) or (last.line or "").startswith("raise ") or not _own_frames(error):
        return told
    return f"{told} (by no `raise` of its own, but at {_user_frame(error)})"


def _own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    frames = traceback.extract_tb(error.__traceback__)
    return [f for f in frames if "/harness/" not in f.filename and "/torch/" not in f.filename]


def _user_frame(error: BaseException) -> str:
    frame = (_own_frames(error) or traceback.extract_tb(error.__traceback__))[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name}"


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"one tensor of shape {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}: ({', '.join(type(v).__name__ for v in value)})"
    return f"{type(value).__name__}"


def _wanted(wanted: list[tuple]) -> str:
    if len(wanted) == 1:
        return f"one tensor of shape {list(wanted[0][1])}"
    return "a tuple (" + ", ".join(name for name, _, _ in wanted) + ")"
