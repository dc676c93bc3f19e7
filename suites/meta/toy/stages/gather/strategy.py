"""Random cases of the stage `gather`."""

from collections.abc import Sequence

from hypothesis import strategies as st
from moe_harness.harness.stages.gather.cases import GatherCase  # type: ignore[import-not-found]


@st.composite
def cases(draw: st.DrawFn, worlds: Sequence[int]) -> GatherCase:
    """Few rows of each rank."""
    ranks = draw(st.sampled_from(sorted(worlds)))
    rows = draw(st.lists(st.integers(0, 3), min_size=ranks, max_size=ranks))
    return GatherCase(R=ranks, T="+".join(map(str, rows)), seed=draw(st.integers(0, 99)))
