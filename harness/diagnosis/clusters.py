"""Failures put together: each cluster with its condition, the smallest set of axis values that tells it from passing.

A condition is a conjunction of up to three terms over the axes of the cases (`conditions`).  It holds for every failing
case of its cluster and for no passing one, or for a few: what a check could not see passes although the fault is there,
so up to `BLIND` of the cases may, and their number is told.

Only cases of checks that saw the fault are counted, and no call that every fault gets right, as without rows.  Nothing
here needs torch: a case is compared as data, each set of cases is one integer whose bits are the cases.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import ceil, comb, log
from typing import Any

from moe_harness.harness.core.case import Case
from moe_harness.harness.diagnosis.conditions import AxisValue, Condition, axes_of, bits, shortest, terms_of

NORMAL = "normal"  # data
MOST_TERMS = 3
MOST_CLUSTERS = 5  # of one kind of failure; what is left is told as one, without a condition
MOST_WITH_THREE = 60  # terms of which triples are tried: 34,000 take 20 ms
BLIND = 0.05
CHANCE = 0.05
LOOSE = 0.4  # ... where one term would otherwise be many clusters, or none; the passing cases are counted beside it


@dataclass(frozen=True)
class Outcome:
    """A case that was judged; `kind` is how it failed, None where it passed."""

    check: str
    case: Case
    id: str
    kind: str | None = None


@dataclass(frozen=True)
class Cluster:
    """Failing cases with one condition, None where none was found; `passing` are those it holds for as well."""

    kinds: tuple[str, ...]
    condition: Condition | None
    failing: tuple[Outcome, ...]
    passing: int  # passing cases for which the condition holds too
    others: int  # passing cases for which it does not

    @property
    def smallest(self) -> Outcome:
        """The failing case with the fewest rows, of the earliest check."""
        return min(self.failing, key=lambda outcome: (outcome.case.rows(), len(outcome.id)))


def cluster(outcomes: Sequence[Outcome]) -> list[Cluster]:
    """The failures among `outcomes`, by kind and condition, the largest cluster first."""
    by_kind: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.kind is not None:
            by_kind[outcome.kind].append(outcome)
    together = _whole([outcome for group in by_kind.values() for outcome in group], outcomes) if by_kind else None
    found = [each for kind, group in by_kind.items() for each in _of_kind(kind, group, outcomes)]
    if together is not None and all(each.condition is None or together.cost <= each.condition.cost for each in found):
        failing = [outcome for group in by_kind.values() for outcome in group]
        found = [_made(tuple(by_kind), together, failing, outcomes)]
    return sorted(_merged(found, outcomes), key=lambda each: -len(each.failing))


def _of_kind(kind: str, failing: list[Outcome], outcomes: Sequence[Outcome]) -> Iterator[Cluster]:
    whole = _whole(failing, outcomes)
    if whole is not None or len(failing) == 1:
        yield _made((kind,), whole, failing, outcomes)
        return
    parts = list(_parts(kind, failing, outcomes))
    if len(parts) > 2 or parts[-1].condition is None:
        loose = _whole(failing, outcomes, loose=True)
        parts = parts if loose is None else [_made((kind,), loose, failing, outcomes)]
    yield from parts


def _parts(kind: str, failing: list[Outcome], outcomes: Sequence[Outcome]) -> Iterator[Cluster]:
    """The failing cases split by conditions of their own, the largest first; what none holds for comes last."""
    left = failing
    for _ in range(MOST_CLUSTERS):
        part = _part(left, outcomes)
        if part is None:
            break
        inside = [outcome for outcome in left if part.holds(outcome.case)]
        yield _made((kind,), part, inside, outcomes)
        left = [outcome for outcome in left if not part.holds(outcome.case)]
        if not left:
            return
    yield _made((kind,), None, left, outcomes)


def _merged(clusters: list[Cluster], outcomes: Sequence[Outcome]) -> Iterator[Cluster]:
    """Clusters of one condition are one, whatever kinds of failure it has."""
    same: dict[str, list[Cluster]] = defaultdict(list)
    for each in clusters:
        same[str(each.condition) if each.condition else f"none of {each.kinds}"].append(each)
    for group in same.values():
        kinds = tuple(dict.fromkeys(kind for each in group for kind in each.kinds))
        failing = [outcome for each in group for outcome in each.failing]
        yield _made(kinds, group[0].condition, failing, outcomes)


def _made(
    kinds: tuple[str, ...], condition: Condition | None, failing: list[Outcome], all_: Sequence[Outcome]
) -> Cluster:
    if condition is not None and len(condition.terms) > 1:
        met = [axes_of(outcome.case) for outcome in failing]
        ids = {outcome.id for outcome in failing}
        condition = shortest(condition, met, [axes_of(outcome.case) for outcome in all_ if outcome.id not in ids])
    passing = _passing(failing, all_)
    inside = sum(condition.holds(outcome.case) for outcome in passing) if condition else 0
    return Cluster(kinds, condition, tuple(failing), inside, len(passing) - inside)


def _passing(failing: Iterable[Outcome], outcomes: Sequence[Outcome], *, seeing_little: bool = False) -> list[Outcome]:
    """Passing cases of the checks that saw the fault, or those among them that see little, where others failed too.

    Without rows nothing can be wrong.  On special data many mistakes change nothing: with few columns gate and up
    swapped pass one in ten exact cases, and peaked logits need no renormalisation.  Where normal data fail, such cases
    only decide between conditions that explain the rest alike.
    """
    failing = list(failing)
    checks = {outcome.check for outcome in failing}
    empty = any(not outcome.case.shows() for outcome in failing)
    normal = any(outcome.case.data == NORMAL for outcome in failing)
    exact = all(outcome.case.data == "exact" for outcome in failing)
    told = [outcome for outcome in outcomes if outcome.kind is None and outcome.check in checks]
    shown = [outcome for outcome in told if empty or outcome.case.shows()]
    special = {o.case.data for o in shown} - {NORMAL} if normal else set() if exact else {"exact"}
    return [o for o in shown if (o.case.data in special) is seeing_little]


# -------------------------------------------------------------------------------------------------------------- search


def _whole(failing: list[Outcome], outcomes: Sequence[Outcome], *, loose: bool = False) -> Condition | None:
    """The cheapest condition that all failing cases meet and (nearly) no passing one; `loose` lets more of these in."""
    passing = _passing(failing, outcomes)
    failed, passed = ([axes_of(outcome.case) for outcome in group] for group in (failing, passing))
    terms = [term for term in terms_of(failed, passed) if all(map(term.holds, failed))]
    little = [axes_of(outcome.case) for outcome in _passing(failing, outcomes, seeing_little=True)]
    masks = [(term, mask, bits([term], little)) for term, mask in _cheapest(terms, passing, little)]
    everything, all_little = (1 << len(passing)) - 1, (1 << len(little)) - 1
    best: tuple[tuple[int, int, float], tuple[AxisValue, ...]] = ((len(passing), len(little), 0.0), ())
    allowed = int((LOOSE if loose else BLIND) * len(failing))
    for size in range(1, 2 if loose else MOST_TERMS + 1):
        if best[0][0] <= allowed and (best[0][0] == 0 or size > 1):
            break
        if size == MOST_TERMS:
            masks = sorted(masks, key=lambda entry: (entry[1].bit_count(), entry[0].cost))[:MOST_WITH_THREE]
        for chosen in combinations(masks, size):
            left, unsure = everything, all_little
            for _, mask, hint in chosen:
                left &= mask
                unsure &= hint
            key = (left.bit_count(), unsure.bit_count(), sum(term.cost for term, _, _ in chosen))
            if key < best[0]:
                best = key, tuple(term for term, _, _ in chosen)
    if best[0][0] > allowed or not _has_evidence(best[1], terms, len(masks), len(failing), passed):
        return None
    return Condition(best[1]) if loose else _sharpened(best[1], terms, failing, little)


def _has_evidence(
    found: Sequence[AxisValue], terms: Iterable[AxisValue], tried: int, failing: int, passing: list[dict[str, Any]]
) -> bool:
    """Whether so few cases as there are after --fail-fast tell of a condition: at random they meet one of `tried`.

    Where that is likely, one term holds if no other axis tells as much: of a hundred cases the only one with K=2049.
    """
    if not found or comb(tried, len(found)) <= CHANCE * comb(failing + len(passing), failing):
        return bool(found) or failing > 1
    alike = [t for t in terms if t.cost <= found[0].cost and bits([t], passing) == bits([found[0]], passing)]
    return len(found) == 1 and len({re.split("[ =]", term.text)[0] for term in alike} - {"rows"}) == 1


def _sharpened(
    found: tuple[AxisValue, ...], terms: Sequence[AxisValue], failing: Sequence[Outcome], little: list[dict[str, Any]]
) -> Condition:
    """With one term more, where cases that see little pass without it far more often than chance explains."""
    failed = sum(outcome.case.data != NORMAL for outcome in failing)
    met = [axes for axes in little if all(term.holds(axes) for term in found)]
    by_chance = []
    for term in terms:
        without = sum(not term.holds(axes) for axes in met)
        passing = len(met) - without
        rate = (passing + 1) / (passing + failed + 2)  # at which cases pass that meet the term
        by_chance.append((len(terms) * rate**without, term.cost, term))
    best = min(by_chance, key=lambda entry: entry[:2], default=None)
    return Condition(found if best is None or best[0] > CHANCE else (*found, best[2]))


def _part(failing: list[Outcome], outcomes: Sequence[Outcome]) -> Condition | None:
    """The condition that holds for most failing cases and (nearly) no passing one; one case alone is no condition."""
    passing = _passing(failing, outcomes)
    axes = [axes_of(outcome.case) for outcome in failing]
    everything, all_failing = (1 << len(passing)) - 1, (1 << len(failing)) - 1
    told = terms_of(axes, [axes_of(outcome.case) for outcome in passing])
    terms = [(term, bits([term], axes), mask) for term, mask in _cheapest(told, passing, axes)]
    widest = sorted(terms, key=lambda entry: -entry[1].bit_count())[: 2 * MOST_WITH_THREE]
    little = [axes_of(outcome.case) for outcome in _passing(failing, outcomes, seeing_little=True)]
    normal = sum(1 << place for place, outcome in enumerate(failing) if outcome.case.data == NORMAL) or all_failing
    best: tuple[tuple[float, float], tuple[AxisValue, ...]] | None = None
    for size, tried in ((1, terms), (2, widest)):
        fewest = _fewest(len(failing), len(passing), comb(len(tried), size))
        for chosen in combinations(tried, size):
            covered, left = all_failing, everything
            for _, hit, mask in chosen:
                covered &= hit
                left &= mask
            number, beside = covered.bit_count(), left.bit_count()
            if beside > BLIND * number or number < fewest:
                continue
            if not covered & normal or any(term.text.startswith("data") for term, _, _ in chosen):
                # Nothing of normal data fails there: then those of other data are evidence.
                beside += sum(all(term.holds(axes) for term, _, _ in chosen) for axes in little)
            if beside > BLIND * number:
                continue
            key = (number - 0.5 * size - 2 * beside, -sum(term.cost for term, _, _ in chosen))
            if best is None or key > best[0]:
                best = key, tuple(term for term, _, _ in chosen)
    return Condition(best[1]) if best is not None else None


def _fewest(failing: int, passing: int, tried: int) -> int:
    """Failing cases that a condition has to hold for: failures at random give one of `tried` in CHANCE of runs."""
    if failing < 2 or not passing:
        return min(2, failing)
    return max(2, ceil(log(CHANCE / tried) / log(failing / (failing + passing))))


def _cheapest(
    terms: Iterable[AxisValue], passing: Sequence[Outcome], failed: Sequence[dict[str, Any]] = ()
) -> list[tuple[AxisValue, int]]:
    """Of terms that the same passing and failed cases meet, the cheapest; none that all passing ones meet."""
    axes = [axes_of(outcome.case) for outcome in passing]
    everything = (1 << len(passing)) - 1
    kept: dict[tuple[int, int], tuple[AxisValue, int]] = {}
    for term in sorted(terms, key=lambda term: term.cost):
        mask = bits([term], axes)
        if mask != everything or not passing:
            kept.setdefault((mask, bits([term], failed)), (term, mask))
    return list(kept.values())


# --------------------------------------------------------------------------------------------------------------- words

NUMBER = re.compile(r"[-+]?\d[\d.]*(?:e[-+]?\d+)?|\bnan\b|\binf\b", re.IGNORECASE)
LIST = re.compile(r"\[#(?:, #)*\]")
PLACE = re.compile(r"^(?:the law \w+ does not hold: |among rows [\d to]+: |a call of another shape: |first call: )+")
VALUE = "wrong values"


def kind_of(message: str) -> str:
    """How a case failed, in the words of its message without its numbers; all wrong elements are one kind."""
    text = LIST.sub("[#]", NUMBER.sub("#", _head(message)))
    if text.startswith(("element ", "topk_weights[#]", "the rms of ")) or " sigma" in text:
        return VALUE
    return text.split("; ")[0].split(" (")[0][:100]


def _head(message: str) -> str:
    return PLACE.sub("", message.splitlines()[0])


def words_of(kind: str, messages: Iterable[str]) -> str:
    """A kind for people: with its numbers where all of `messages` that are of it have the same, otherwise without."""
    heads = {_head(message).split("; ")[0].split(" (")[0] for message in messages if kind_of(message) == kind}
    return heads.pop() if len(heads) == 1 and kind != VALUE else kind.replace("#", "…")


def most_common(names: Iterable[str]) -> str | None:
    """The name that occurs most, the earlier of equal ones; None where there is none."""
    counts = Counter(names)
    return counts.most_common(1)[0][0] if counts else None
