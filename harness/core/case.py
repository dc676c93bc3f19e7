"""A case: a frozen spec from which every tensor of a call is rebuilt, with an id a person can read and replay.

`experts/exact/T=33,E=128,k=8,dtype=bf16,seed=4` is the check `exact` on that case of the stage `experts`; fields at
their default are left out of the id.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, ClassVar, Self, TypeVar

from moe_harness.harness.core.errors import UsageError, unknown
from moe_harness.harness.core.registry import needed_part, stages_with

SIZES = re.compile(r"\d*([+x]\d+)*")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Fields every stage has; each stage adds its shapes and axes."""

    stage: ClassVar[str]
    dtype: str = "fp32"  # of the activations and the weights
    data: str = "normal"  # how values are drawn: normal, exact, or a special kind of the stage
    layout: str = ""  # "operand:kind" where one operand is laid out unlike contiguous
    variant: str = ""  # what a check does with this case: a law's name, a special value's
    optional: bool = False  # outside what the contract promises: refusing it in any way is no failure
    seed: int = 0

    def id(self) -> str:
        return ",".join(f"{f.name}={_text(getattr(self, f.name))}" for f in fields(self) if self._told(f.name))

    def _told(self, name: str) -> bool:
        return getattr(self, name) != type(self).__dataclass_fields__[name].default

    def but(self, **changes: Any) -> Self:
        return replace(self, **changes)

    def once(self) -> Self:
        """The call itself, made once: nothing of what `variant` asks beside it, and judged by no other rule."""
        return self.but(variant="", optional=False)

    def resized(self) -> Self:
        """A call of another shape, to be made in between."""
        raise NotImplementedError

    def rows(self) -> int:
        """Rows of work in the call."""
        raise NotImplementedError

    def shows(self) -> bool:
        """Whether a result can be wrong in a value at all."""
        return self.rows() > 0

    def shape(self) -> tuple[object, ...]:
        """The sizes alone: what a stage adds to a case and is a number, or numbers ("3+0+2", "2x3")."""
        common = {field.name for field in fields(Case)}
        values = [getattr(self, field.name) for field in fields(self) if field.name not in common]
        return tuple(v for v in values if SIZES.fullmatch(str(v)) and not isinstance(v, bool))

    def together(self) -> int:
        """How many ranks work together in the call."""
        return getattr(self, "R", 1) // getattr(self, "groups", 1)

    def steps(self) -> int:
        """About how many small tiles a kernel goes through, which is what it costs to interpret one."""
        return self.rows()

    def core(self) -> bool:
        """Whether this is an ordinary input that every implementation of the stage is for."""
        return not self.layout and not self.optional

    def part(self) -> str:
        """Which part of the core it belongs to: an implementation passes that is judged in all of one part."""
        return self.dtype


Kind = TypeVar("Kind", bound=Case)


def crossed(kind: type[Kind], **fields: Any) -> Iterator[Kind]:
    """A case for every combination of the fields that are tuples, of which the last one changes first."""
    choices = [values if isinstance(values, tuple) else (values,) for values in fields.values()]
    for chosen in product(*choices):
        yield kind(**dict(zip(fields, chosen, strict=True)))


def layouts(operands: Sequence[str], kinds: Sequence[str]) -> tuple[str, ...]:
    """Every operand laid out in every way, as cases spell it."""
    return tuple(f"{operand}:{kind}" for operand in operands for kind in kinds)


def in_shapes(cases: Iterable[Case], *shapes: Mapping[str, Any]) -> Iterator[Case]:
    """The cases, and then each again in every one of these shapes: what one shape alone shows, an edit may lose."""
    first = list(cases)
    yield from first
    for shape in shapes:
        yield from (case.but(**shape) for case in first)


def tile_steps(rows: int, experts: int, depth: int, columns: int) -> int:
    """Tiles of 16 x 32 x 32 in a grouped product whose rows are spread over experts."""
    return min(rows, experts + rows // 16) * -(-depth // 32) * -(-columns // 32)


def _text(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def case_types() -> dict[str, type[Case]]:
    """The type of the cases of each stage."""
    return {stage: needed_part(stage, "cases").CaseType for stage in stages_with("cases")}


def parse(stage: str, text: str) -> Case:
    """The case of `stage` that `text` (k=v,k=v) spells; UsageError names the field that does not fit."""
    if stage not in (known := stages_with("cases")):
        raise unknown("stage", stage, list(known))
    kind: type[Case] = needed_part(stage, "cases").CaseType
    return kind(**_spelled(kind, text))


def changed(case: Case, text: str) -> Case:
    """The case with the fields that `text` (k=v,k=v) spells; UsageError as for `parse`."""
    return case.but(**_spelled(type(case), text))


def _spelled(kind: type[Case], text: str) -> dict[str, Any]:
    types = {f.name: f.type for f in fields(kind)}
    values: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        if name not in types or not equals:
            raise UsageError(f"in the case {text!r}: {unknown('field', name, list(types))}")
        values[name] = _value(name, value, types[name])
    return values


def _value(name: str, text: str, annotation: object) -> object:
    kind = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    converters: dict[str, Callable[[str], object]] = {
        "int": int, "float": float, "str": str, "bool": lambda t: bool(int(t)),
    }  # fmt: skip
    convert = converters[kind]
    try:
        return convert(text)
    except ValueError:
        raise UsageError(f"the case field {name} is {text!r}, but should be {kind}") from None


def parse_id(text: str) -> tuple[str, str, Case]:
    """(stage, check, case) of an id as a run prints it: stage/check/k=v,k=v."""
    parts = text.strip().split("/", 2)
    if len(parts) != 3:
        raise UsageError(f"the case id is {text!r}, but should look like experts/exact/T=33,E=8,k=2,seed=1")
    return parts[0], parts[1], parse(parts[0], parts[2])
