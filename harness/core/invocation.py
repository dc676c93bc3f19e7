"""Calling an implementation: what it may do (return, refuse) and what it may not (crash, lie about its result)."""

import traceback
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core import blame
from moe_harness.harness.core.blame import kept_defaults
from moe_harness.harness.core.bounds import of_result
from moe_harness.harness.core.call import Call
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.contracts import REJECTIONS, Subject
from moe_harness.harness.core.environment import what_is_missing
from moe_harness.harness.core.errors import CannotJudge, Lacks
from moe_harness.harness.core.findings import Record
from moe_harness.harness.core.stage import Output, find_stage

PART = 1 << 16  # rows that are judged at once: of 2^31 elements the fp64 reference alone would fill a GPU's memory


class Rejected(Exception):
    """The implementation refuses this input, as the contract allows."""


class Broken(Exception):
    """The implementation failed in a way that leaves no result to judge."""


class JudgeFailed(Exception):
    """The judge failed underneath a call, by an exception with which an implementation refuses; its cause tells it."""


class Trial:
    """One implementation on one device."""

    def __init__(self, subject: Subject, device: str):
        self.subject, self.device = subject, device
        self.stage = find_stage(subject.stage)
        self._ready: dict[Case, Call] = {}

    def build(self, case: Case) -> Call:
        """A call of its own for every time it is asked for."""
        return self._ready.pop(case, None) or self._built(case)

    def _built(self, case: Case) -> Call:
        call = self.stage.build(case, self.device)
        call.declared = self.subject.declared
        return call

    def again(self, call: Call) -> Call:
        """The call to make once more: itself, or a new one where it writes into its operands."""
        written = any(output.inside for output in self.stage.outputs(call))
        return self._built(call.case) if written else call

    def prepare(self, case: Case) -> Call:
        """The call that `build` hands out next for the case, with what a right result is."""
        call = self._built(case)
        self.expect(call)
        self.hand_out(call)
        return call

    def expect(self, call: Call) -> None:
        """Note what is right, where the result is judged at once."""
        if call.truth is None and self.stage.count(call) <= PART:
            call.truth = self.stage.truth(call, self.subject.declared.rounds)

    def hand_out(self, call: Call) -> None:
        """What `build` hands out next for the case of a call is this one."""
        self._ready = {call.case: call}

    def invoke(self, call: Call) -> Any:
        """The result, checked for what the contract says of its form.

        Raises:
            Rejected: NotImplementedError, ValueError or TypeError (any exception at all on an optional case).
            Broken: another exception, an input that was written to, or a result of another form.
        """
        self.expect_written(call)
        before = {name: dict(value) for name, value in call.args.items() if isinstance(value, dict)}
        result = self.launch(call)
        _check_entries(before, call.args)
        return self.collected(call, result)

    def expect_written(self, call: Call) -> None:
        """Note what is right where operands are written in place: afterwards they no longer say what was asked."""
        if call.truth is None and any(output.inside for output in self.stage.outputs(call)):
            call.truth = self.stage.truth(call, self.subject.declared.rounds)

    def collected(self, call: Call, result: Any) -> Any:
        """What a call yields: what it returned, of the right form, and copies of the operands that it writes in place.

        Raises:
            Broken: the form is another one, or something else was written to.
        """
        outputs = self.stage.outputs(call)
        modified = call.arena.violations([output.inside for output in outputs if output.inside])
        if modified:
            operand, what = modified[0]
            raise Broken(f"the input {operand} {what}, but no input may be written, nor anything around it")
        return self.result_of(call, result)

    def launch(self, call: Call, *, wait: bool = True) -> Any:
        """Call it; `wait` for the device, or leave that to the caller.  Raises as `invoke`."""
        lacking = self.subject.missing_keywords(call.keywords)
        if lacking:
            raise Rejected(f"has no parameter {', '.join(lacking)}")
        refused = self.stage.undeclared(call, self.subject.declared)
        if refused is not None:
            raise Rejected(refused)
        try:
            with torch.no_grad(), kept_defaults():
                result = self.stage.run(self.subject, call)
            if wait:
                self.synchronize()
        except REJECTIONS as error:
            if blame.is_judges(error):
                raise JudgeFailed(f"{type(error).__name__}: {first_line(error)}") from error
            if wait:
                self._check_device(error)
            if blame.accident(error) and not call.case.optional:
                told = f"raised {type(error).__name__}: {first_line(error)}\n"
                raise Broken(f"{told}  by no `raise` of its own, and so no refusal, at {_user_frame(error)}") from error
            raise Rejected(_refusal(error)) from error
        except BaseException as error:  # SystemExit and KeyboardInterrupt too: Ctrl-C does not reach this process
            if (missing := what_is_missing(error)) is not None:
                raise Lacks(missing) from error
            if (trouble := blame.machine_trouble(error)) is not None:
                raise CannotJudge(blame.out_of(trouble)) from error
            if blame.is_judges(error):
                raise
            if blame.left_behind(error):
                raise Broken(
                    f"left a CUDA error behind, which whatever is launched next is told: {first_line(error)}\n"
                    "  launch nothing where there is nothing to do, and ask cudaGetLastError after a launch"
                ) from error
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
            blame.pass_on(_settle)  # what is told there happened in the code that was called

    def judge(self, call: Call, result: Any) -> Record:
        """The result against what a right one may be, many rows in parts."""
        declared, total = self.subject.declared.rounds, self.stage.count(call)
        if total <= PART:
            return self.stage.judge(call, result, declared)
        record = Record()
        for rows in torch.arange(total, device=self.device).split(PART):
            note = f"among rows {int(rows[0])} to {int(rows[-1])}: "
            record.merge(self.stage.judge(self.stage.cut(call, rows), of_result(result, rows), declared), note)
            if record.findings:
                break
        return record

    def result_of(self, call: Call, result: Any) -> Any:
        """As `collected`, without a look at the memory around the operands, which would wait for the device."""
        outputs = self.stage.outputs(call)
        wanted = [output for output in outputs if output.inside is None]
        found = result if isinstance(result, tuple | list) else () if result is None and not wanted else (result,)
        if len(found) != len(wanted) or (len(wanted) == 1 and result is not found[0]):
            raise Broken(f"returned {_kind(result)}, but should return {_wanted(wanted)}")
        for output, value in zip(wanted, found, strict=True):
            self._check_form(call, output, value)
        written = [call.operand(output.inside).clone() for output in outputs if output.inside is not None]
        return (*found, *written) if len(outputs) > 1 else (*found, *written)[0]

    def _check_form(self, call: Call, output: Output, value: Any) -> None:
        name, shape = output.name, output.shape
        if not isinstance(value, Tensor):
            raise Broken(f"{name} is {_kind(value)}, but should be a tensor of shape {list(shape)}")
        if tuple(value.shape) != tuple(shape):
            raise Broken(f"{name} has the shape {list(value.shape)}, but should have {list(shape)}")
        if value.dtype not in output.dtypes:
            names = " or ".join(str(d).removeprefix("torch.") for d in output.dtypes)
            raise Broken(f"{name} has the dtype {str(value.dtype).removeprefix('torch.')}, but should have {names}")
        if value.device.type != self.device:
            raise Broken(f"{name} is on {value.device.type}, but should be on {self.device}, as the inputs are")
        if value.layout is not torch.strided:
            raise Broken(f"{name} has the layout {value.layout}, but should be a dense tensor")
        owner = call.arena.aliased_by(value)
        if owner is not None:
            raise Broken(f"{name} shares its memory with the input {owner}, but should be a new tensor")


def _settle() -> None:
    """Wait for the device, and launch once more: an error of a launch that nobody asked for waits for the next one.

    A grid of no blocks is such a launch: the judge's own kernel behind it would be told "invalid argument".
    """
    torch.cuda.synchronize()
    torch.zeros(1, device="cuda")


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


def _wanted(wanted: list[Output]) -> str:
    if not wanted:
        return "None: what it computes is written into its arguments"
    if len(wanted) == 1:
        return f"one tensor of shape {list(wanted[0].shape)}"
    return "a tuple (" + ", ".join(output.name for output in wanted) + ")"
