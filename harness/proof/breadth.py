"""How broadly a fault is caught: the cases of different shapes that kill it, sought where they are likely.

A fault that one case catches is one edit of the plan away from surviving, and a stranger's bug of its kind may well lie
beside that one shape.  So every fault of the catalogue is killed by `WANTED` cases of different shapes, or its entry
says why not (`few`).  What the matrix has judged until the first kill of each check is counted first; where that is
fewer, the cases most like the killing ones follow.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import fields

from moe_harness.harness.core.case import Case, parse_id

WANTED = 3  # cases of different shapes
SOUGHT = 150  # more cases of a fault that are judged for them: about 3 s

BACKGROUND = 0.2  # weight of a field that is at its default in the killing case: it hardly is the condition


def shapes(ids: Iterable[str]) -> int:
    """How many different shapes there are among these cases."""
    return len({parse_id(case_id)[2].shape() for case_id in ids})


def seek(killing: list[str], unjudged: list[str], kills: Callable[[str], bool]) -> int:
    """Add to `killing` until they have `WANTED` shapes; returns how many cases that took.

    Args:
        killing: ids of cases that kill, at least one.
        unjudged: ids of planned cases that nobody has judged, in the order of the plan.
        kills: judges a case.
    """
    judged = 0
    left = {case_id: parse_id(case_id)[2] for case_id in unjudged}
    while left and judged < SOUGHT:
        known = [parse_id(case_id)[2] for case_id in killing]
        if len({case.shape() for case in known}) >= WANTED:
            break
        left = {i: case for i, case in left.items() if case.shape() not in {one.shape() for one in known}}
        found = _first_kill(_by_likeness(left, known)[: SOUGHT - judged], kills)
        judged += found[0]
        for case_id in found[1]:
            del left[case_id]
        if found[2] is None:
            break
        killing.append(found[2])
    return judged


def _first_kill(ids: list[str], kills: Callable[[str], bool]) -> tuple[int, list[str], str | None]:
    """(cases judged, those, the one that kills)."""
    for count, case_id in enumerate(ids, 1):
        if kills(case_id):
            return count, ids[:count], case_id
    return len(ids), ids, None


def _by_likeness(cases: dict[str, Case], known: list[Case]) -> list[str]:
    return sorted(cases, key=lambda case_id: min(distance(one, cases[case_id]) for one in known))


def distance(killing: Case, other: Case) -> float:
    """How little speaks for it that a condition of `killing` holds for `other`."""
    total = 0.0
    for each in fields(killing):
        if each.name in ("seed", "optional"):
            continue
        here, there = getattr(killing, each.name), getattr(other, each.name)
        usual = here == each.default
        total += (BACKGROUND if usual else 1.0) * _apart(here, there)
    return total


def _apart(here: object, there: object) -> float:
    """0 where equal, 1 where nothing is common; numbers are near within a factor of four."""
    if here == there:
        return 0.0
    if isinstance(here, int) and isinstance(there, int) and min(here, there) >= 0:
        return min(1.0, 0.2 + abs(math.log2((1 + here) / (1 + there))) / 2)
    return 1.0
