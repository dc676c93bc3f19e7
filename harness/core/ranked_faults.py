"""Faults of the stages that run on many ranks: classes or functions, entered in the one catalogue.

    @ranked("dispatcher", "EP", condition="always", consequence="...", shows="R=2,E=3,k=1,T=0+2")
    class owner_by_division(Copies):
        def owners(self, ids): ...

`shows` holds the fields of one case that reveals the fault, `seen_by` the name of the check that finds it there, and
each `hidden` case gives the right answer all the same.
"""

from collections.abc import Callable
from typing import TypeVar

from moe_harness.harness.core.catalogue import Fault, enter
from moe_harness.harness.core.names import RANK_CHECKS

FIRST_CHECK = {"dispatcher": "dense", "parallel_linear": "shard", "layouts": "reduction"}
SIGNS = {"ranks": "process", "inputs": "inputs"}
GITHUB = "https://github.com/"

Kind = TypeVar("Kind", bound=Callable)


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
    """Enter a class (of layouts: a function) in the catalogue.

    Args:
        shows: fields of a case, "R=2,E=3,k=1,T=0+2".
        check: the check of that case where it is not the stage's first.
        seen_by: the check that finds the fault there, the stage's first by default.

    Raises:
        ValueError: unknown `seen_by`, or a name that is taken.
    """
    first = FIRST_CHECK[stage]
    seen_by = seen_by or first
    if seen_by not in RANK_CHECKS:
        raise ValueError(f"seen_by is {seen_by!r}, but should be one of {', '.join(RANK_CHECKS)}")

    def decorate(kind: Kind) -> Kind:
        example = {"case": f"{stage}/{check or first}/{shows}", "seen_by": seen_by}
        cases = tuple(f"{stage}/{first}/{case}" for case in hidden)
        url = None if source is None else GITHUB + source
        sign = SIGNS.get(seen_by, "value")
        enter(Fault(kind.__name__, stage, family, condition, consequence, kind, url, cases, example, sign))
        return kind

    return decorate
