"""Faults of the stages that run on many ranks: classes or functions, entered in the one catalogue.

    @ranked("EP", shows="R=2,E=3,k=1,T=0+2")
    class owner_by_division(Copies):
        '''What a user would see.'''

        def owners(self, ids): ...

`shows` holds the fields of one case that reveals the fault, `seen_by` the name of the check that finds it there, and
each `hidden` case gives the right answer all the same.
"""

from collections.abc import Callable
from typing import TypeVar

from moe_harness.harness.core.catalogue import Fault, consequence_of, enter, stage_of, url
from moe_harness.harness.core.ranked_stage import find_ranked, rank_checks

SIGNS = {"ranks": "process", "inputs": "inputs"}

Kind = TypeVar("Kind", bound=Callable)


def ranked(
    family: str,
    *,
    shows: str,
    condition: str = "always",
    check: str = "",
    seen_by: str = "",
    source: str | None = None,
    hidden: tuple[str, ...] = (),
) -> Callable[[Kind], Kind]:
    """Enter a class (of reduction: a function) in the catalogue.

    Args:
        shows: fields of a case, "R=2,E=3,k=1,T=0+2".
        check: the check of that case where it is not the stage's first.
        seen_by: the check that finds the fault there, the stage's first by default.

    Raises:
        ValueError: unknown `seen_by`, or a name that is taken.
    """
    if seen_by and seen_by not in rank_checks():
        raise ValueError(f"seen_by is {seen_by!r}, but should be one of {', '.join(rank_checks())}")

    def decorate(kind: Kind) -> Kind:
        stage = stage_of(kind)
        first = find_ranked(stage).checks[0]
        example = {"case": f"{stage}/{check or first}/{shows}", "seen_by": seen_by or first}
        cases = tuple(f"{stage}/{first}/{case}" for case in hidden)
        sign = SIGNS.get(seen_by, "value")
        told = consequence_of(kind)
        enter(Fault(kind.__name__, stage, family, condition, told, kind, url(source), cases, example, sign))
        return kind

    return decorate
