"""Random cases of the stage `reduction`; only the controller draws, each rank makes the tensors."""

from collections.abc import Sequence

from hypothesis import strategies as st

from moe_harness.harness.core.ranked_cases import DTYPES, LAYOUTS
from moe_harness.harness.stages.reduction.cases import DATA, SUMS, ReductionCase


@st.composite
def cases(draw: st.DrawFn, worlds: Sequence[int] = (1, 2, 4)) -> ReductionCase:
    """Every sum of states on few rows."""
    ranks, (routed, shared) = draw(st.sampled_from(sorted(worlds))), draw(st.sampled_from(SUMS))
    groups = draw(st.sampled_from([count for count in (1, 2) if ranks % count == 0]))
    rows = draw(st.lists(st.integers(0, 4), min_size=ranks // groups, max_size=ranks // groups))
    sequence = draw(st.booleans())
    operands = ["routed"] if shared == "none" else ["routed", "shared"]
    layout = draw(st.sampled_from(["", *(f"{operand}:{kind}" for operand in operands for kind in LAYOUTS)]))
    return ReductionCase(
        R=ranks,
        T="+".join(map(str, rows)),
        H=draw(st.sampled_from([8, 16])),
        routed=routed,
        shared=shared,
        layout=layout,
        data=draw(st.sampled_from(DATA)),
        sequence=sequence,
        groups=groups,
        optional=bool(layout) or (sequence and routed == "complete" and shared in ("partial", "replicated")),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 99)),
    )
