"""How broadly a fault is caught: the cases of different shapes that kill it, sought where they are likely.

A fault that one case catches is one edit of the plan away from surviving, and a stranger's bug of its kind may well lie
beside that one shape.  So every fault of the catalogue is killed by `WANTED` cases of different shapes, or its entry
says why not (`few`).  What the matrix has judged until the first kill of each check is counted first; where that is
fewer, the cases most like the killing ones follow.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from itertools import chain, zip_longest

from moe_harness.harness.core.case import parse_id
from moe_harness.harness.core.plan import Planned

WANTED = 3  # cases of different shapes
SOUGHT = 150  # more cases of a fault that are judged for them: about 3 s

BACKGROUND = 0.2  # weight of a field that is at its default in the killing case: it hardly is the condition


def shapes(ids: Iterable[str]) -> int:
    """How many different shapes there are among these cases."""
    return len({planned(case_id).case.shape() for case_id in ids})


def planned(case_id: str) -> Planned:
    """The check and the case of an id."""
    return Planned(*parse_id(case_id)[1:])


def seek(killing: list[str], unjudged: list[str], kills: Callable[[str], bool]) -> int:
    """Add to `killing` until they have `WANTED` shapes; returns how many cases that took.

    Args:
        killing: ids of cases that kill, at least one.
        unjudged: ids of planned cases that nobody has judged, in the order of the plan.
        kills: judges a case.
    """
    judged = 0
    known = [planned(case_id) for case_id in killing]
    left = {case_id: planned(case_id) for case_id in unjudged}
    while judged < SOUGHT and len(seen := {one.case.shape() for one in known}) < WANTED:
        left = {case_id: one for case_id, one in left.items() if one.case.shape() not in seen}
        order = _order(known, left)
        tried = order[: SOUGHT - judged]
        found = next((count for count, case_id in enumerate(tried, 1) if kills(case_id)), None)
        judged += found or len(tried)
        if found is None:
            break
        killing.append(tried[found - 1])
        known.append(left[killing[-1]])
        left = {case_id: left[case_id] for case_id in order[found:]}
    return judged


def _order(known: list[Planned], left: dict[str, Planned]) -> list[str]:
    """Ids of `left`: those most like the killing cases, and in turn those that share one of their unusual values."""
    nearest = sorted(left, key=lambda case_id: min(distance(one, left[case_id]) for one in known))
    first, skipped = known[0].case, ("seed", "optional")
    unusual = [f.name for f in fields(first) if f.name not in skipped and getattr(first, f.name) != f.default]
    values = {name: {getattr(one.case, name) for one in known} for name in unusual}
    sharing = [[case_id for case_id in nearest if getattr(left[case_id].case, name, None) in values[name]]
               for name in unusual if len(values[name]) == 1]  # fmt: skip
    turns = chain.from_iterable(zip_longest(nearest, *sharing))
    return [case_id for case_id in dict.fromkeys(turns) if case_id is not None]


def distance(killing: Planned, other: Planned) -> float:
    """How little speaks for it that what shows in one case shows in the other."""
    total = 0.0 if killing.check == other.check else 1.0
    for each in fields(killing.case):
        if each.name in ("seed", "optional"):
            continue
        here, there = getattr(killing.case, each.name), getattr(other.case, each.name)
        total += (BACKGROUND if here == each.default else 1.0) * _apart(here, there)
    return total


def _apart(here: object, there: object) -> float:
    """0 where equal, 1 where nothing is common; numbers are near within a factor of four."""
    if here == there:
        return 0.0
    if isinstance(here, int) and isinstance(there, int) and min(here, there) >= 0:
        return min(1.0, 0.2 + abs(math.log2((1 + here) / (1 + there))) / 2)
    return 1.0
