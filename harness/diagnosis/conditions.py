"""Conditions: conjunctions of terms over the axes of cases, and how one is said in the fewest words.

A term is a value of an axis, a limit, a set or a property of it (`bias=negative`, `T >= 33`, `E no power of two`), or a
relation of two axes (`k = E`).  What a conjunction says of the cases of a plan can often be said in less: an interval
that holds one value of the plan is that value, and a term that the others imply is none.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from itertools import combinations
from typing import Any

from moe_harness.harness.core.case import Case

NOT_AXES = ("seed", "optional", "variant")
# What a term costs a reader; the cheapest conjunction is the condition.
EQUAL, LIMIT, UNEQUAL, PROPERTY, INTERVAL, SET = 1.0, 1.1, 1.2, 1.4, 1.5, 1.6
MOST_IN_A_SET = 3
MULTIPLES = (2, 4, 8, 16, 32, 64, 128)

Axes = dict[str, Any]
Holds = Callable[[Axes], bool]


@dataclass(frozen=True)
class AxisValue:
    """One part of a condition; `axis` where it is about one alone, with the limit that it sets."""

    text: str
    holds: Holds
    cost: float
    axis: str = ""
    at_least: Any = None
    at_most: Any = None


@dataclass(frozen=True)
class Condition:
    """A conjunction; without terms it holds always."""

    terms: tuple[AxisValue, ...]

    def holds(self, case: Case) -> bool:
        axes = axes_of(case)
        return all(term.holds(axes) for term in self.terms)

    @property
    def cost(self) -> float:
        return sum(term.cost for term in self.terms)

    def __str__(self) -> str:
        return " and ".join(term.text for term in self.terms) or "always"


def axes_of(case: Case) -> dict[str, Any]:
    """What conditions are made of: the fields of the case, its rows, and operand and kind of a layout."""
    axes = {f.name: getattr(case, f.name) for f in fields(case) if f.name not in NOT_AXES}
    operand, _, kind = axes.pop("layout").partition(":")
    return {**axes, "layout of": operand or "none", "layout": kind or "contiguous", "rows": case.rows()}


def bits(terms: Iterable[AxisValue], cases: Sequence[Axes]) -> int:
    """Which cases meet all of the terms, a bit each."""
    terms = tuple(terms)
    return sum(1 << place for place, axes in enumerate(cases) if all(term.holds(axes) for term in terms))


# --------------------------------------------------------------------------------------------------------- fewest words


def shortest(condition: Condition, failing: Sequence[Axes], passing: Sequence[Axes]) -> Condition:
    """What holds for the same of these cases, told in the fewest words.

    A search for what tells failing cases from passing ones looks at limits first, which hold for many: of `H >= 48 and
    H <= 48` each holds for more than `H=48` does.
    """
    cases = [*failing, *passing]
    everything, wanted = (1 << len(cases)) - 1, bits(condition.terms, cases)
    known: dict[int, AxisValue] = {}
    for term in sorted(terms_of(failing, passing), key=lambda term: term.cost):
        known.setdefault(bits([term], cases), term)
    while len(condition.terms) > 1:
        masks = {term: bits([term], cases) for term in condition.terms}
        told = [Condition(terms) for terms in _in_fewer(condition.terms, masks, known, everything, wanted)]
        if not told:
            break
        condition = min(told, key=lambda each: each.cost)
    return condition


def _in_fewer(
    terms: tuple[AxisValue, ...], masks: dict[AxisValue, int], known: dict[int, AxisValue], everything: int, wanted: int
) -> Iterator[tuple[AxisValue, ...]]:
    """The conjunction without one of its terms, or with one in the place of two, where it still holds for `wanted`."""
    for term in terms:
        rest = tuple(other for other in terms if other is not term)
        if reduce(operator.and_, (masks[other] for other in rest)) == wanted:
            yield rest
    for pair in combinations(terms, 2):
        rest = tuple(other for other in terms if other not in pair)
        left = reduce(operator.and_, (masks[other] for other in rest), everything)
        together = sum(term.cost for term in pair)
        yield from ((*rest, t) for mask, t in known.items() if mask & left == wanted and t.cost < together)
        if (interval := _interval(*pair)) is not None:
            yield *rest, interval


def _interval(one: AxisValue, other: AxisValue) -> AxisValue | None:
    """Two limits of one axis as one term."""
    low, high = (one, other) if other.at_least is None else (other, one)
    if one.axis != other.axis or low.at_least is None or high.at_most is None:
        return None
    text = f"{low.at_least} <= {low.axis} <= {high.at_most}"
    return AxisValue(text, lambda axes: low.holds(axes) and high.holds(axes), INTERVAL, low.axis)


# ---------------------------------------------------------------------------------------------------------------- terms


def terms_of(failing: Sequence[Axes], passing: Sequence[Axes]) -> Iterator[AxisValue]:
    """Every term that some failing case meets."""
    seen = [*failing, *passing]
    for name in failing[0]:
        values = {axes[name] for axes in failing}
        everywhere = {axes[name] for axes in seen}
        if len(everywhere) > 1:
            yield from _of_axis(name, values, everywhere)
    numeric = [name for name in failing[0] if name != "rows" and _is_number(failing[0][name])]
    for one, other in combinations(numeric, 2):
        yield from _relations(one, other)


def _of_axis(name: str, values: set[Any], everywhere: set[Any]) -> Iterator[AxisValue]:
    for value in values:
        yield AxisValue(f"{name}={_text(value)}", _compared(name, operator.eq, value), EQUAL, name)
    numbers = all(map(_is_number, everywhere))
    others = everywhere - values
    if not numbers or any(isinstance(value, float) for value in everywhere):  # a factor of 1 is a kind, not a limit
        for value in others:
            yield AxisValue(f"{name} not {_text(value)}", _compared(name, operator.ne, value), UNEQUAL, name)
        if 1 < len(others) <= MOST_IN_A_SET:
            yield _set(f"{name} not in", others, lambda axes: axes[name] not in others)
    if others and 1 < len(values) <= MOST_IN_A_SET:
        yield _set(f"{name} in", values, lambda axes: axes[name] in values)
    if numbers:
        yield from _of_numbers(name, values)


def _set(words: str, values: set[Any], holds: Holds) -> AxisValue:
    return AxisValue(f"{words} ({', '.join(sorted(map(_text, values)))})", holds, SET + 0.2 * len(values))


def _of_numbers(name: str, values: set[Any]) -> Iterator[AxisValue]:
    for value in values:
        yield _limit(name, LIMIT, at_least=value)
        yield _limit(name, LIMIT, at_most=value)
    if not all(isinstance(value, int) for value in values):
        return
    if min(values) > 2:  # what passes at 1 alone and fails from 5 on is likelier right for one than for four
        yield _limit(name, LIMIT - 0.01, at_least=2)
    yield AxisValue(f"{name} no power of two", lambda axes: bool(axes[name] & (axes[name] - 1)), PROPERTY)
    yield AxisValue(f"{name} a power of two", lambda axes: not axes[name] & (axes[name] - 1), PROPERTY)
    for number in MULTIPLES:
        yield AxisValue(f"{name} a multiple of {number}", _divided(name, number, True), PROPERTY)
        yield AxisValue(f"{name} no multiple of {number}", _divided(name, number, False), PROPERTY)


def _limit(name: str, cost: float, *, at_least: Any = None, at_most: Any = None) -> AxisValue:
    sign, value, compare = ("<=", at_most, operator.le) if at_least is None else (">=", at_least, operator.ge)
    return AxisValue(f"{name} {sign} {value}", _compared(name, compare, value), cost, name, at_least, at_most)


def _compared(name: str, compare: Callable[[Any, Any], bool], value: Any) -> Holds:
    return lambda axes: compare(axes[name], value)


def _divided(name: str, number: int, wanted: bool) -> Holds:
    return lambda axes: (axes[name] % number == 0) is wanted


def _relations(one: str, other: str) -> Iterator[AxisValue]:
    yield AxisValue(f"{one} = {other}", lambda axes: axes[one] == axes[other], PROPERTY)
    yield AxisValue(f"{one} < {other}", lambda axes: axes[one] < axes[other], PROPERTY)
    yield AxisValue(f"{one} > {other}", lambda axes: axes[one] > axes[other], PROPERTY)
    yield AxisValue(f"{one} = 2 {other}", lambda axes: axes[one] == 2 * axes[other], PROPERTY)
    yield AxisValue(f"{other} = 2 {one}", lambda axes: axes[other] == 2 * axes[one], PROPERTY)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value) or "none"
