"""Do the ranks agree?  Compares the calls that each rank made, or is stuck in, and names the first disagreement.

The i-th call on a group has to be the same operation on every member: same dtype, reduction, root, matching sizes.
Two calls of equal shape in swapped order look the same by all that; they are told by the line they came from.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moe_harness.harness.ranks.calls import POINT_TO_POINT, RecordedCall


@dataclass(frozen=True)
class Disagreement:
    """The first place where ranks differ: who stands apart, at which of its calls, in what."""

    rank: int
    call: RecordedCall | None
    cause: str
    others: dict[int, str] = field(default_factory=dict)

    def __str__(self) -> str:
        where = f"call {self.call}" if self.call else "no further call"
        return f"rank {self.rank}, {where}: {self.cause}"


def compare(traces: Sequence[Sequence[RecordedCall]], *, complete: bool = True) -> Disagreement | None:
    """The first disagreement over all groups, or None.

    Args:
        traces: the calls of each global rank, in order.
        complete: every rank came to its end, so that a rank with fewer calls has left one out; otherwise the traces
            are compared as far as all members of a group have come.
    """
    groups = dict.fromkeys(call.group for trace in traces for call in trace if call.op not in POINT_TO_POINT)
    for group in groups:
        found = _compare_group(group, traces, complete)
        if found is not None:
            return found
    return _compare_messages(traces) if complete else None


def _compare_group(
    group: tuple[int, ...], traces: Sequence[Sequence[RecordedCall]], complete: bool
) -> Disagreement | None:
    of = {rank: [c for c in traces[rank] if c.group == group and c.op not in POINT_TO_POINT] for rank in group}
    lengths = {rank: len(calls) for rank, calls in of.items()}
    for position in range(min(lengths.values())):
        found = disagreement({rank: calls[position] for rank, calls in of.items()})
        if found is not None:
            return found
    if complete and len(set(lengths.values())) > 1:
        return _missing(of, lengths)
    return _swapped(of)


def _missing(of: dict[int, list[RecordedCall]], lengths: dict[int, int]) -> Disagreement:
    usual = Counter(lengths.values()).most_common(1)[0][0]
    odd = next((rank for rank, n in lengths.items() if n != usual and n < max(lengths.values())), None)
    odd = odd if odd is not None else min(lengths, key=lengths.__getitem__)
    longest = max(of, key=lambda rank: len(of[rank]))
    left_out = of[longest][lengths[odd]]
    return Disagreement(odd, None, f"made {lengths[odd]} calls, but rank {longest} made {lengths[longest]}; "
                        f"it left out {left_out}", {longest: str(left_out)})  # fmt: skip


def disagreement(calls: dict[int, RecordedCall]) -> Disagreement | None:
    """Compare the calls that the members of one group made at the same position."""
    for name, words in (("op", "operation"), ("dtype", "dtype"), ("reduce", "reduction"), ("root", "root")):
        values = {rank: getattr(call, name) for rank, call in calls.items()}
        if len(set(values.values())) > 1:
            return _odd_one_out(calls, values, words)
    return _sizes(calls)


def _odd_one_out(calls: dict[int, RecordedCall], values: Mapping[int, object], words: str) -> Disagreement:
    usual = Counter(values.values()).most_common(1)[0][0]
    odd = [rank for rank, value in values.items() if value != usual]
    # With two ranks neither is the usual one; the higher is told apart from the lower.
    rank, other = odd[0], next(rank for rank, value in values.items() if value == usual)
    cause = f"{words} is {values[rank]}, but is {values[other]} on rank {other} ({calls[other]})"
    return Disagreement(rank, calls[rank], cause, {r: str(c) for r, c in calls.items() if r != rank})


def _sizes(calls: dict[int, RecordedCall]) -> Disagreement | None:
    members = list(calls)
    if any(call.sends for call in calls.values()):
        for i, source in enumerate(members):
            for j, target in enumerate(members):
                sends, receives = calls[source].sends, calls[target].receives
                if sends and receives and sends[j] != receives[i]:
                    cause = (f"expects {receives[i]} elements from rank {source}, which sends {sends[j]}")  # fmt: skip
                    return Disagreement(target, calls[target], cause, {source: str(calls[source])})
        return None
    elements = {rank: _elements(call) for rank, call in calls.items()}
    return _odd_one_out(calls, elements, "number of elements") if len(set(elements.values())) > 1 else None


def _elements(call: RecordedCall) -> int:
    total = 0
    for shape in call.inputs or call.outputs:
        size = 1
        for length in shape:
            size *= length
        total += size
    return total


def _swapped(of: dict[int, list[RecordedCall]]) -> Disagreement | None:
    """A rank that made the same calls from the same lines as another, in another order; barriers carry nothing."""
    of = {rank: [call for call in calls if call.op != "barrier"] for rank, calls in of.items()}
    first, *others = of
    length = min(len(calls) for calls in of.values())
    sites = {rank: [call.site for call in calls[:length]] for rank, calls in of.items()}
    for rank in others:
        if sites[rank] != sites[first] and Counter(sites[rank]) == Counter(sites[first]):
            at = next(i for i in range(length) if sites[rank][i] != sites[first][i])
            cause = f"calls in another order than rank {first}, which is at {of[first][at]}"
            return Disagreement(rank, of[rank][at], cause, {first: str(of[first][at])})
    return None


def _compare_messages(traces: Sequence[Sequence[RecordedCall]]) -> Disagreement | None:
    """Sends and receives between each pair of ranks have to match in number and size."""
    for source, trace in enumerate(traces):
        for target in {c.root for c in trace if c.op == "send" and c.root is not None}:
            if any(c.op == "recv_any" for c in traces[target]):  # which sends these took is not known
                continue
            sends = [c for c in trace if c.op == "send" and c.root == target]
            receives = [c for c in traces[target] if c.op == "recv" and c.root == source]
            for sent, received in zip(sends, receives, strict=False):
                if (sent.dtype, _elements(sent)) != (received.dtype, _elements(received)):
                    return Disagreement(target, received, f"does not fit what rank {source} sends: {sent}")
            if len(sends) != len(receives):
                cause = f"sends {len(sends)} messages to rank {target}, which receives {len(receives)}"
                return Disagreement(source, sends[-1], cause)
    return None
