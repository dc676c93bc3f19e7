"""Data sets on which suspects are told apart: near relatives of the failing case, probes, and sequences of calls.

The probes of a stage cover every condition under which a fault of the catalogue shows: what one of them leaves tied
another separates.  They are small, so that all of them cost about a second.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from moe_harness.harness.core.case import Case, changed
from moe_harness.harness.core.registry import stage_part

NORMAL: dict[str, Any] = {"data": "normal", "layout": "", "variant": "", "optional": False}


@dataclass(frozen=True)
class Dataset:
    """Calls made one after the other; a single one except where state is asked for."""

    cases: tuple[Case, ...]

    @property
    def name(self) -> str:
        first = f"{self.cases[0].stage} {self.cases[0].id() or 'of the default shape'}"
        return first if len(self.cases) == 1 else f"{len(self.cases)} calls in a row, the first {first}"


def relatives(case: Case) -> Iterator[Dataset]:
    """The same condition on other data: other seeds, and normal values in the place of special ones."""
    yield Dataset((case.once().but(seed=case.seed + 501),))
    yield Dataset((case.but(**NORMAL | {"layout": case.layout}, seed=case.seed + 502),))
    yield Dataset((case.once().but(seed=case.seed + 503),))


def probes(case: Case) -> Iterator[Dataset]:
    """Small cases of every kind the stage has, in the dtype of `case` where nothing else is asked for."""
    kind = type(case)
    module = stage_part(case.stage, "datasets")
    for number, spelled in enumerate(() if module is None else module.probes()):
        yield Dataset((changed(kind(dtype=case.dtype, seed=case.seed + 600 + number), spelled),))


def sequences(case: Case, count: int = 3) -> Iterator[Dataset]:
    """Calls of one shape that was never seen, with a larger one in between; the shape follows the seed."""
    known = {f.name for f in fields(case)}
    for number in range(count):
        turn = case.seed * count + number
        rows, wide, inner = 9 + turn % 31, 24 + 8 * (turn // 13 % 29), 16 + 8 * (turn % 13)
        shape: dict[str, Any] = dict.fromkeys(("T", "S"), rows) | dict.fromkeys(("H", "K"), wide)
        shape |= dict.fromkeys(("I", "N", "D"), inner) | {"lead": str(rows)}
        if case.stage == "router":
            shape["T"] = 9 + turn % 301
        own = {name: size for name, size in shape.items() if name in known}
        base = type(case)(dtype=case.dtype, seed=case.seed + 701 + 10 * number, **own)
        more: dict[str, Any] = {name: 2 * shape[name] + 1 for name in ("T", "S") if name in known}
        masked: dict[str, Any] = {"masked": "some"} if "masked" in known else {}
        unlike: tuple[dict[str, Any], ...] = ({}, {}, masked, more)
        calls = (base.but(seed=base.seed + at, **changes) for at, changes in enumerate(unlike))
        yield Dataset((*calls, base))
