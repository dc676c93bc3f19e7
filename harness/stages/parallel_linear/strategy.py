"""Random cases of the stage `parallel_linear`; only the controller draws, each rank makes the tensors."""

from collections.abc import Sequence

from hypothesis import strategies as st

from moe_harness.harness.core.ranked_cases import DTYPES
from moe_harness.harness.stages.parallel_linear.cases import KINDS, LinearCase


@st.composite
def cases(draw: st.DrawFn, worlds: Sequence[int] = (1, 2, 4), kind: str | None = None) -> LinearCase:
    """Cases of a layer of this kind, or of any, whose sizes the ranks share evenly."""
    ranks, experts = draw(st.sampled_from(sorted(worlds))), draw(st.integers(1, 4))
    rows = draw(st.lists(st.integers(0, 4), min_size=experts, max_size=experts))
    kind = kind or draw(st.sampled_from(KINDS))
    return LinearCase(
        R=ranks,
        E=experts,
        K=ranks * draw(st.integers(1, 6)),
        N=ranks * draw(st.integers(1, 6)),
        S="+".join(map(str, rows)),
        kind=kind,
        parts=draw(st.sampled_from(("1+1", "1+2", "2+1+1"))) if kind == "merged_column" else "1+1",
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 99)),
    )
