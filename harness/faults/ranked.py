"""Faults of the stages that run on many ranks: classes, entered like the functions of `harness.faults.catalogue`.

    @ranked("dispatcher", "EP", condition="always", consequence="...", shows="R=2,E=3,k=1,T=0+2")
    class owner_by_division(Copies):
        def owners(self, ids): ...

`shows` holds the fields of one case that reveals the fault, `seen_by` the name of the check that finds it there, and
each `hidden` case gives the right answer all the same.
"""

import importlib
from collections.abc import Callable
from typing import TypeVar

from harness.faults.catalogue import Fault

MODULES = ("dispatcher", "parallel_linear")
SEEN_BY = ("dense", "contract", "inputs", "volume", "refusal", "ranks", "shard")
GITHUB = "https://github.com/"

_FAULTS: dict[str, Fault] = {}
Kind = TypeVar("Kind", bound=type)


def ranked(
    stage: str,
    family: str,
    *,
    condition: str,
    consequence: str,
    shows: str,
    check: str = "",
    seen_by: str = "",
    source: str | None = None,
    hidden: tuple[str, ...] = (),
) -> Callable[[Kind], Kind]:
    """Enter a class in the catalogue.

    Args:
        shows: fields of a case, "R=2,E=3,k=1,T=0+2".
        check: the check of that case where it is not the stage's first.
        seen_by: the check that finds the fault there, the stage's first by default.

    Raises:
        ValueError: unknown `seen_by`, or a name that is taken.
    """
    first = {"dispatcher": "dense", "parallel_linear": "shard"}[stage]
    seen_by = seen_by or first
    if seen_by not in SEEN_BY:
        raise ValueError(f"seen_by is {seen_by!r}, but should be one of {', '.join(SEEN_BY)}")

    def enter(kind: Kind) -> Kind:
        known = _FAULTS.get(kind.__name__)
        if known is not None and known.function.__module__ != kind.__module__:
            raise ValueError(f"a fault named {kind.__name__!r} exists already, in {known.function.__module__}")
        example = {"case": f"{stage}/{check or first}/{shows}", "seen_by": seen_by}
        cases = tuple(f"{stage}/{first}/{case}" for case in hidden)
        url = None if source is None else GITHUB + source
        sign = {"ranks": "process", "inputs": "inputs"}.get(seen_by, "value")
        _FAULTS[kind.__name__] = Fault(
            kind.__name__, stage, family, condition, consequence, kind, url, cases, example, sign
        )
        return kind

    return enter


def all_ranked(stage: str | None = None) -> tuple[Fault, ...]:
    """Every fault of the stages that run on many ranks, or those of one of them."""
    for module in MODULES:
        importlib.import_module(f"harness.faults.{module}")
    return tuple(fault for fault in _FAULTS.values() if stage in (None, fault.stage))
