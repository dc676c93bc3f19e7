"""Two runs: what got worse.

A verdict or a judgement that was lost is a regression.  A time is one where all of this holds: Mann-Whitney's test says
so at ALPHA (or FAMILY over the number of times, where that is less), the ratio of the medians is above SLOWER and above
the spread of either run, and a new round is above an old one in MOSTLY of all pairs; a rank test alone would call any
difference significant once there are rounds enough.  Times are compared as multiples of the floor that their own run
measured, and only on the same device.  Answers are paired by document again, as in the gate.  A z that moved beyond its
sampling error is a warning: the limits of the verdicts stay what they are.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy import stats

from moe_harness.harness.core.errors import CannotJudge
from moe_harness.harness.gate.statistics import Paired, verdict
from moe_harness.harness.record.line import Line

ALPHA, FAMILY, SLOWER, MOSTLY = 0.001, 0.05, 1.03, 0.9
DRIFT, ERRORS = 0.10, 5.0  # a root mean square moves by chance by 1 / sqrt(2 n) of itself
RANK = {"pass": 3, "inconclusive": 2, "fail": 1, "unsupported": 0, "error": 0}
LEVELS = ("regression", "warning", "refused", "improvement", "note")


@dataclass(frozen=True)
class Change:
    """One thing that differs between two runs."""

    level: str  # one of LEVELS
    name: str
    case: str
    before: str
    after: str
    why: str = ""


@dataclass(frozen=True)
class Comparison:
    """What differs, and how much was compared."""

    changes: tuple[Change, ...]
    compared: int

    @property
    def regressed(self) -> bool:
        return any(change.level == "regression" for change in self.changes)

    @property
    def refused(self) -> bool:
        """Whether nothing could be compared."""
        refused = sum(change.level == "refused" for change in self.changes)
        return refused == self.compared == len(self.changes)

    def as_dict(self) -> dict[str, Any]:
        ordered = sorted(self.changes, key=lambda change: LEVELS.index(change.level))
        return {
            "schema": 1, "kind": "comparison", "verdict": "fail" if self.regressed else "pass",
            "compared": self.compared, "changes": [asdict(change) for change in ordered],
        }  # fmt: skip


def compare(old: Mapping[tuple[str, str], Line], new: Mapping[tuple[str, str], Line]) -> Comparison:
    """The newest line of each name in two files.

    Raises:
        CannotJudge: the two have no name in common.
    """
    both = [key for key in old if key in new]
    if not both:
        names = "; ".join(f"{kind} {name}" for kind, name in [*list(old)[:3], *list(new)[:3]])
        raise CannotJudge(f"the two runs have nothing in common, so nothing was compared: {names}")
    times = sum(len(set(old[key].get("times", {})) & set(new[key].get("times", {}))) for key in both)
    changes = [change for key in both for change in _changes(old[key], new[key], times)]
    changes += [Change("regression", name, "", kind, "absent", "it was judged before")
                for kind, name in old if (kind, name) not in new]  # fmt: skip
    changes += [Change("note", name, "", "absent", kind, "new") for kind, name in new if (kind, name) not in old]
    return Comparison(tuple(changes), len(both))


def _changes(old: Line, new: Line, times: int) -> Iterator[Change]:
    was, now = old.get("model"), new.get("model")
    if was and now and was != now:  # it answers otherwise, whatever computes it
        yield Change("refused", old["name"], "checkpoint", was, now, "another checkpoint")
        return
    yield from _verdicts(old, new)
    yield from _statistics(old, new)
    yield from _times(old, new, times)
    yield from _documents(old, new)


def _verdicts(old: Line, new: Line) -> Iterator[Change]:
    name, before, after = old["name"], old.get("verdicts", {}), new.get("verdicts", {})
    for case, was in before.items():
        now = after.get(case)
        if now is None:
            yield Change("regression", name, case, was["verdict"], "absent", "it was judged before")
        elif was["verdict"] != now["verdict"]:
            moved = RANK[now["verdict"]] - RANK[was["verdict"]]
            level = "note" if not moved else "improvement" if moved > 0 else "regression"
            yield Change(level, name, case, was["verdict"], now["verdict"])
        elif now.get("judged", 0) < was.get("judged", 0) and case != "all":
            yield Change("regression", name, case, f"{was['judged']} cases judged", f"{now['judged']}", "fewer judged")
    for case in after.keys() - before.keys():
        yield Change("note", name, case, "absent", after[case]["verdict"], "new")


def _statistics(old: Line, new: Line) -> Iterator[Change]:
    for case, was in old.get("statistics", {}).items():
        now = new.get("statistics", {}).get(case)
        if now is None or not was["rms"]:
            continue
        moved = now["rms"] / was["rms"] - 1
        error = math.sqrt(1 / (2 * was["elements"]) + 1 / (2 * now["elements"]))
        if abs(moved) > DRIFT and abs(moved) > ERRORS * error:
            yield Change("warning", old["name"], f"rms of {case}", f"{was['rms']:.3f}", f"{now['rms']:.3f}",
                         f"moved by {moved:+.0%}, {abs(moved) / error:.0f} sampling errors")  # fmt: skip


def _times(old: Line, new: Line, times: int) -> Iterator[Change]:
    before, after = old.get("times", {}), new.get("times", {})
    both = [case for case in before if case in after]
    devices = [line["environment"].get("device") for line in (old, new)]
    if both and devices[0] != devices[1]:
        yield Change("refused", old["name"], "times", str(devices[0]), str(devices[1]), "another device")
        return
    for case in both:
        was, now = (_over_floor(line) for line in (before[case], after[case]))
        level = judged_times(was, now, times)
        if level is not None:
            medians = [statistics.median(rounds) for rounds in (was, now)]
            yield Change(level, old["name"], case, f"{medians[0]:.3f}", f"{medians[1]:.3f}",
                         f"times of the floor; {medians[1] / medians[0] - 1:+.1%}")  # fmt: skip


def _over_floor(time: dict[str, Any]) -> list[float]:
    return [value / (time["floor"] or 1.0) for value in time["rounds"]]


def judged_times(old: Sequence[float], new: Sequence[float], times: int = 1) -> str | None:
    """regression, improvement, or None where neither is shown; `times` is how many are looked at together."""
    for level, slow, fast in (("regression", new, old), ("improvement", old, new)):
        ratio = statistics.median(slow) / statistics.median(fast)
        if ratio <= max(SLOWER, 1 + spread(old), 1 + spread(new)):
            continue
        test = stats.mannwhitneyu(slow, fast, alternative="greater")
        if test.pvalue < min(ALPHA, FAMILY / times) and test.statistic / (len(slow) * len(fast)) > MOSTLY:
            return level
    return None


def spread(rounds: Sequence[float]) -> float:
    """The distance of the quartiles over the median."""
    if len(rounds) < 4:
        return 0.0
    low, middle, high = statistics.quantiles(rounds, n=4)
    return (high - low) / middle


def _documents(old: Line, new: Line) -> Iterator[Change]:
    before, after = ({row["doc_hash"]: row for row in line.get("documents", ())} for line in (old, new))
    both = [doc for doc in before if doc in after]
    if not before and not after:
        return
    asked = f"{len(before)} questions", f"{len(after)} questions"
    if not both:
        yield Change("refused", old["name"], "answers", *asked, "none of them in common: another --seed or --data?")
        return
    if len(after) < len(before):
        yield Change("regression", old["name"], "answers", *asked, "fewer asked")
    if any(before[doc]["prompt_hash"] != after[doc]["prompt_hash"] for doc in both):
        yield Change("refused", old["name"], "answers", "", "", "the questions were put in other words")
        return
    rights = [(before[doc]["right"], after[doc]["right"]) for doc in both]
    counted = Paired(len(both), sum(b and not a for b, a in rights), sum(a and not b for b, a in rights))
    decided = verdict(counted, float(new.get("margin") or 0.02))
    level = {"fail": "regression", "pass": "note"}.get(decided, "warning" if counted.worse else "note")
    if counted.worse or counted.better or level == "regression":
        before_after = [sum(r[side] for r in rights) / len(rights) for side in (0, 1)]
        yield Change(level, old["name"], f"{len(both)} answers", f"{before_after[0]:.2%}", f"{before_after[1]:.2%}",
                     f"only one right: {counted.worse}, {counted.better}; p {counted.p:.2g}")  # fmt: skip
