"""Hypothesis strategies over case specs; only the controller draws, tensors are made from the spec on each rank."""

from collections.abc import Sequence

from hypothesis import strategies as st

from moe_harness.harness.ranks.cases import (
    DTYPES,
    KINDS,
    OWNERS,
    ROUTINGS,
    SUMS,
    DispatcherCase,
    LinearCase,
    ReductionCase,
)


@st.composite
def dispatcher_cases(
    draw: st.DrawFn, worlds: Sequence[int] = (1, 2, 4), dtypes: Sequence[str] = DTYPES, copies: bool = False
) -> DispatcherCase:
    """Cases that shrink to few ranks, experts, slots and tokens, and to the plainest routing; with redundant experts
    where `copies` says so."""
    ranks = draw(st.sampled_from(sorted(worlds)))
    experts = draw(st.integers(1, 9))
    groups = draw(st.sampled_from([count for count in (1, 2) if ranks % count == 0]))
    tokens = draw(st.lists(st.integers(0, 5), min_size=ranks // groups, max_size=ranks // groups))
    return DispatcherCase(
        R=ranks,
        E=experts,
        k=draw(st.integers(1, min(experts, 5))),
        T="+".join(map(str, tokens)),
        H=draw(st.sampled_from([8, 16])),
        owner=draw(st.sampled_from(OWNERS)),
        ids=draw(st.sampled_from(ROUTINGS)),
        copies=draw(st.integers(0, 5)) if copies else 0,
        groups=groups,
        dtype=draw(st.sampled_from(list(dtypes))),
        seed=draw(st.integers(0, 99)),
    )


@st.composite
def linear_cases(draw: st.DrawFn, worlds: Sequence[int] = (1, 2, 4), kinds: Sequence[str] = KINDS) -> LinearCase:
    """Cases whose sizes the ranks share evenly."""
    ranks, experts = draw(st.sampled_from(sorted(worlds))), draw(st.integers(1, 4))
    rows = draw(st.lists(st.integers(0, 4), min_size=experts, max_size=experts))
    return LinearCase(
        R=ranks,
        E=experts,
        K=ranks * draw(st.integers(1, 6)),
        N=ranks * draw(st.integers(1, 6)),
        S="+".join(map(str, rows)),
        kind=draw(st.sampled_from(list(kinds))),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 99)),
    )


@st.composite
def reduction_cases(draw: st.DrawFn, worlds: Sequence[int] = (1, 2, 4)) -> ReductionCase:
    """Every sum of states on few rows."""
    ranks, (routed, shared) = draw(st.sampled_from(sorted(worlds))), draw(st.sampled_from(SUMS))
    groups = draw(st.sampled_from([count for count in (1, 2) if ranks % count == 0]))
    rows = draw(st.lists(st.integers(0, 4), min_size=ranks // groups, max_size=ranks // groups))
    sequence = draw(st.booleans())
    return ReductionCase(
        R=ranks,
        T="+".join(map(str, rows)),
        H=draw(st.sampled_from([8, 16])),
        routed=routed,
        shared=shared,
        sequence=sequence,
        groups=groups,
        optional=sequence and routed == "complete" and shared in ("partial", "replicated"),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 99)),
    )
