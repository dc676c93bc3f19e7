"""Random cases of the stage `grouped_linear`, as specs, so that a failure shrinks to its smallest case."""

from collections.abc import Callable

from hypothesis import strategies as st

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.strategies import EXPERTS, SIZE, TOKENS, layouts
from moe_harness.harness.stages.grouped_linear import cases as space


@st.composite
def cases(draw: Callable, dtypes: st.SearchStrategy[str]) -> Case:
    """Cases of the stage in any of `dtypes`; each is an input that the contract promises."""
    return space.GroupedLinearCase(
        S=draw(TOKENS), K=draw(SIZE), N=draw(SIZE), E=draw(EXPERTS), sizes=draw(st.sampled_from(space.SIZES)),
        bias=draw(st.booleans()), dtype=draw(dtypes), data=draw(st.sampled_from(("exact", "normal"))),
        layout=draw(layouts(("x", "weight", "bias"))), seed=draw(st.integers(0, 999)),
    )  # fmt: skip
