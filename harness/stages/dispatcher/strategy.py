"""Random cases of the stage `dispatcher`; only the controller draws, each rank makes the tensors."""

from collections.abc import Sequence

from hypothesis import strategies as st

from moe_harness.harness.core.ranked_cases import DTYPES, LAYOUTS
from moe_harness.harness.stages.dispatcher.cases import OPERANDS, OWNERS, ROUTINGS, DispatcherCase


@st.composite
def cases(
    draw: st.DrawFn, worlds: Sequence[int] = (1, 2, 4), dtypes: Sequence[str] = DTYPES, copies: bool = False
) -> DispatcherCase:
    """Cases that shrink to few ranks, experts, slots and tokens, and to the plainest routing; with redundant experts
    where `copies` says so."""
    ranks = draw(st.sampled_from(sorted(worlds)))
    experts = draw(st.integers(1, 9))
    groups = draw(st.sampled_from([count for count in (1, 2) if ranks % count == 0]))
    tokens = draw(st.lists(st.integers(0, 5), min_size=ranks // groups, max_size=ranks // groups))
    layout = draw(st.sampled_from(["", *(f"{operand}:{kind}" for operand in OPERANDS for kind in LAYOUTS)]))
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
        layout=layout,
        optional=bool(layout),
        dtype=draw(st.sampled_from(list(dtypes))),
        seed=draw(st.integers(0, 99)),
    )
