"""What the harness asks of a stage.

A stage is a folder of harness/stages.  Two of its modules import no torch: `contract.py` (the signature of an
implementation) and `cases.py` (its cases, and the plan of a run).  `stage.py` holds `STAGE`, an object of a class
derived from `Stage` below: data, and what a right result is.  All else is optional and found by its name: `laws.py`,
`wrong.py`, `strategy.py`, `faults/`, `datasets.py`, `disguise.py`, `probes.py`, `causes.py`, `bench.py`.

Nothing here assumes that a result is one tensor, that it is floating point, or that it is new memory: an `Output` may
be an operand that is written in place, an integer, one of many.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_harness.harness.core import compare
from moe_harness.harness.core.bounds import Bound, matrix, max_limit, truth_of
from moe_harness.harness.core.call import Call
from moe_harness.harness.core.contracts import Declarations, Subject, check_stage
from moe_harness.harness.core.error_patterns import Places
from moe_harness.harness.core.findings import Record
from moe_harness.harness.core.registry import needed_part, stage_part

Wrong = dict[str, Any]  # name -> a result


class Excuse(NamedTuple):
    """Cases whose data cannot tell a wrong output (ALL: any of them) from a right one, whatever is drawn, and why."""

    wrong: str
    holds: Callable[[Any], bool]
    why: str


ALL = "all"


def common(value: Tensor) -> Wrong:
    """Mistakes that need only the right value [rows, columns]."""
    if not value.numel():
        return {}
    filled = value.any(-1).nonzero()[:, 0].tolist() or [0]  # a row of zeros cannot be lost
    row = filled[len(filled) // 2]
    zeroed, off = value.clone(), value.clone()
    zeroed[row] = 0.0
    off[row, value.shape[-1] // 2] += value.abs().max()
    return {
        "all_zeros": value.new_zeros(value.shape),
        "doubled": 2 * value,
        "one_row_zeroed": zeroed,
        "one_element_off": off,
    }


def without_last(hidden: Tensor, columns: int) -> Tensor:
    """The last columns zero."""
    kept = hidden.clone()
    kept[..., -columns:] = 0.0
    return kept


@contextmanager
def whole_sums() -> Iterator[None]:
    """Let torch's own products on a GPU add the parts of a split depth in fp32, not in 16 bits as they may by default.

    What is judged is a kernel's sum; how torch is set is whoever runs it to decide.
    """
    settings = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    before = [getattr(settings, name) for name in names]
    try:
        for name in names:
            setattr(settings, name, False)
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(settings, name, value)


Declared = tuple[str, ...] | None  # roundings that an implementation declares; None: the contract's default set
Truth = Bound | Tensor  # of one output: within a bound, or exactly this (floating point or integer)
Truths = Truth | tuple[Truth, ...]


@dataclass(frozen=True)
class Output:
    """One thing that a call yields: returned, or written into the operand `inside`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | tuple[torch.dtype, ...]  # that it has, or those that it may have
    inside: str | None = None

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return self.dtype if isinstance(self.dtype, tuple) else (self.dtype,)


class Stage(ABC):
    """One stage.  A result is the tensor that the call yields, or the tuple of them where there are several outputs."""

    batched: tuple[str, ...] = ()  # operands with a row for each row of the result; none: a call cannot be cut

    @property
    def name(self) -> str:
        """The name of the folder."""
        return type(self).__module__.split(".")[-2]

    def part(self, name: str) -> Any:
        """A module of the stage's folder, None where it has none of that name."""
        return stage_part(self.name, name)

    # --------------------------------------------------------------------------------------- what a right result is

    @abstractmethod
    def build(self, case: Any, device: str) -> Call:
        """The operands of a case, drawn from its seed on the CPU and placed in fences (`core.call.Builder`)."""

    def run(self, subject: Subject, call: Call) -> Any:
        """What the implementation yields for a call."""
        with whole_sums() if call.case.data == "deep_sums" else nullcontext():
            return subject.call(call.args, call.keywords)

    @abstractmethod
    def outputs(self, call: Call) -> list[Output]:
        """What the call yields; what is returned comes first, in its order, then what is written in place."""

    def undeclared(self, call: Call, declared: Declarations) -> str | None:
        """Why an implementation does not take this call by its own word; None where it does."""
        return None

    def expect(self, call: Call, declared: Declared) -> Any:
        """What a right result may be within the permitted roundings: a Bound, or a tuple, a Truth for each output."""
        raise NotImplementedError(f"the stage {self.name} has no bound")

    def exact_value(self, call: Call) -> Any:
        """The only right result where the data is "exact", in fp64 or integers: a tensor, or a tuple of them."""
        raise NotImplementedError(f"the stage {self.name} has no exact data")

    def one_result(self, case: Any, declared: Declarations) -> bool:
        """Whether "exact" data have one right result for an implementation that declares this."""
        return True

    def truth(self, call: Call, declared: Declared) -> Truths | None:
        """What a result is compared with; None where `judge` does not compare (a choice that is judged as a set)."""
        return self.exact_value(call) if call.case.data == "exact" else self.expect(call, declared)

    def judge(self, call: Call, result: Any, declared: Declared) -> Record:
        """Findings on a result whose form is right."""
        truth = self.truth(call, declared) if call.truth is None else call.truth
        if truth is None:
            raise NotImplementedError(f"the stage {self.name} has no truth, so it should have a `judge` of its own")
        if not isinstance(truth, tuple):
            return compare.judged(self, call, truth, result)
        record = Record()
        for number, (output, of, value) in enumerate(zip(self.outputs(call), truth, result, strict=True)):
            places = self if number == 0 else self.places(output)
            record.merge(compare.judged(places, call, of, value), f"{output.name}: ")
        return record

    # ------------------------------------------------------------------------------------------------- words of a place

    def place_of(self, call: Call, row: int, column: int) -> dict[str, Any]:
        """Where an element of the first output is, in words that a kernel's author uses."""
        return {"row": row, "column": column}

    def row_groups(self, call: Call) -> dict[str, Tensor]:
        """Rows of the first output that belong together, bool [rows] by name."""
        return {}

    def places(self, output: Output) -> Places:
        """The same of a further output."""
        return compare.PlainRows()

    # --------------------------------------------------------------------------------------------------- rows of a call

    def count(self, call: Call) -> int:
        """Number of rows of the result; 1 where a call cannot be cut."""
        return len(matrix(call.args[self.batched[0]])) if self.batched else 1

    def cut(self, call: Call, rows: Tensor) -> Call:
        """The call on these rows (int64 row numbers) only, with what is right for it where that is known."""
        args = {name: matrix(value)[rows] if name in self.batched else value for name, value in call.args.items()}
        return Call(call.case, args, call.keywords, truth=truth_of(call.truth, rows), declared=call.declared)

    def spread(self, call: Call, rows: Tensor, most: int) -> Call:
        """The call on at most `most` of these rows, evenly spread."""
        if not self.batched:
            return call
        if len(rows) > most:
            rows = rows[torch.linspace(0, len(rows) - 1, most).round().long().to(rows.device)]
        return self.cut(call, rows)

    # ------------------------------------------------------------------------------------------------ power of the data

    def wrong_outputs(self, call: Call) -> Wrong:
        """Name -> what a plausible mistake would give: from `wrong.py`, or made of the right result alone."""
        module, truth = self.part("wrong"), call.truth
        if module is not None:
            return module.wrong_outputs(call)
        if not isinstance(truth, tuple):
            value = None if truth is None else _value(truth)
            return {} if value is None else {n: w.view(value.shape) for n, w in common(matrix(value)).items()}
        found: Wrong = {}
        right = [_value(of) for of in truth]
        for number, output in enumerate(self.outputs(call)):
            for name, wrong in common(matrix(right[number])).items():
                changed = [*right[:number], wrong.view(right[number].shape), *right[number + 1 :]]
                found[f"{output.name}_{name}"] = tuple(changed)
        return found

    def excuses(self) -> tuple[Excuse, ...]:
        """Wrong outputs that no data of some kind can tell from a right one."""
        return getattr(self.part("wrong"), "EXCUSES", ())

    def telling_rows(self, call: Call) -> Tensor:
        """Numbers of the rows that a mistake shows in: not those in which zeros are right, or NaN is."""
        truth = call.truth[0] if isinstance(call.truth, tuple) else call.truth
        rows = matrix(next(iter(call.args.values())) if truth is None else _value(truth))
        return rows.isfinite().all(-1).nonzero()[:, 0]

    def passing(self, call: Call, wrong: Wrong, declared: Declared) -> list[str]:
        """Those of `wrong` that no element alone gives away: all compared at once where there is one output."""
        if not wrong:
            return []
        if call.truth is None or isinstance(call.truth, tuple):
            return [name for name, result in wrong.items() if not self.rejects(call, result, declared)]
        stacked = torch.stack([self.as_result(call, one) for one in wrong.values()])
        if isinstance(call.truth, Tensor):
            rejected = stacked.double() != call.truth
        else:
            rejected = ~(call.truth.z(stacked).abs() <= max_limit())
        return [name for name, bad in zip(wrong, rejected.flatten(1).any(1).tolist(), strict=True) if not bad]

    def rejects(self, call: Call, wrong: Any, declared: Declared) -> bool:
        """Whether the judge finds fault with a wrong output, with the statistics that it makes of many elements."""
        return bool(self.judge(call, self.as_result(call, wrong), declared).findings)

    def as_result(self, call: Call, wrong: Any) -> Any:
        """A wrong output, made in fp64, in the dtypes of a result."""
        outputs = self.outputs(call)
        if not isinstance(wrong, tuple):
            return wrong.to(outputs[0].dtypes[0])
        return tuple(value.to(output.dtypes[0]) for value, output in zip(wrong, outputs, strict=True))


def find_stage(name: str) -> Stage:
    """The stage of that name; UsageError tells the nearest ones where there is none."""
    return needed_part(check_stage(name), "stage").STAGE


def _value(truth: Truth) -> Tensor:
    return truth.value if isinstance(truth, Bound) else truth
