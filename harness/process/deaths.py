"""Crashes and hangs of one implementation: which kind of input they go with, and what is left out because of them.

A kind of input is what a case's id says of one axis, such as `masked=some`, `T=1` or `layout=x:padded`.  A kind is to
blame where two cases of it died and none lived; of kinds that explain the same deaths the one that explains most is
taken, no plain size where there is a choice, and the others are judged on.  So one bad input costs two crashes and
hides nothing but its like.
"""

from collections import Counter
from dataclasses import dataclass, field

OF_A_KIND = 2  # deaths without a life by which a kind is to blame
OF_A_CHECK = 4  # deaths that no kind explains, after which a check is left out
OF_A_RUN, HANG = 16, 3  # deaths after which nothing more is judged, and how many of them a hang counts for


@dataclass
class Deaths:
    """What died so far, and of each kind of input how many cases lived."""

    died: list[str] = field(default_factory=list)
    cost: int = 0
    lived: Counter = field(default_factory=Counter)

    def note(self, case_id: str, *, died: bool, hung: bool = False) -> None:
        """Enter the outcome of a case."""
        if died:
            self.died.append(case_id)
            self.cost += HANG if hung else 1
        else:
            self.lived.update(kinds(case_id))

    def why_not(self, case_id: str) -> str | None:
        """Why a case is not worth judging now, None where it is; it may be again once a kind is no more to blame."""
        if self.cost >= OF_A_RUN:
            return f"not judged after {len(self.died)} crashes or hangs"
        blamed = self.blamed()
        for kind in kinds(case_id):
            if kind in blamed:
                return f"not judged: all of {blamed[kind]} cases with {kind} crashed or hung"
        check = case_id.split("/")[1]
        unexplained = [each for each in self.died if each.split("/")[1] == check and not kinds(each) & set(blamed)]
        if len(unexplained) >= OF_A_CHECK:
            return f"not judged after {len(unexplained)} crashes or hangs in {check}"
        return None

    def blamed(self) -> dict[str, int]:
        """Kinds to blame, each with the deaths it has: the one with most first, then of the deaths left, and so on."""
        left, found = [kinds(case_id) for case_id in self.died], dict[str, int]()
        while True:
            counts = Counter(kind for each in left for kind in sorted(each) if not self.lived[kind])
            often = [kind for kind, deaths in counts.most_common() if deaths >= OF_A_KIND]
            if not often:
                return found
            kind = min(often, key=_is_size)  # the first that is none, or the first
            found[kind] = counts[kind]
            left = [each for each in left if kind not in each]


def kinds(case_id: str) -> set[str]:
    """What an id says of each axis."""
    told = case_id.split("/", 2)[-1].split(",")
    return {item for item in told if "=" in item and not item.startswith("seed=")}


def _is_size(kind: str) -> bool:
    return kind.partition("=")[2].replace(".", "", 1).isdigit()
