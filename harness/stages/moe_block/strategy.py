"""Random cases of the stage `moe_block`, as specs, so that a failure shrinks to its smallest case."""

from collections.abc import Callable

from hypothesis import strategies as st

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.strategies import SIZE, TOKENS
from moe_harness.harness.stages.moe_block import cases as space


@st.composite
def cases(draw: Callable, dtypes: st.SearchStrategy[str]) -> Case:
    """Cases of the stage in any of `dtypes`; each is an input that the contract promises."""
    count = 8 * draw(st.integers(1, 8))  # groups of DeepSeek's families divide it, and hold two experts each
    return space.MoeBlockCase(
        family=draw(st.sampled_from(space.FAMILIES)), T=draw(TOKENS), H=draw(SIZE), I=draw(SIZE), shared=draw(SIZE),
        E=max(16, count), k=draw(st.integers(1, 4)), renorm=draw(st.sampled_from(("yes", "no"))),
        dtype=draw(dtypes), seed=draw(st.integers(0, 999)),
    )  # fmt: skip
