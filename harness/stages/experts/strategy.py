"""Random cases of the stage `experts`, as specs, so that a failure shrinks to its smallest case."""

from collections.abc import Callable

from hypothesis import strategies as st

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.strategies import EXPERTS, SIZE, TOKENS, layouts
from moe_harness.harness.stages.experts import cases as space


@st.composite
def cases(draw: Callable, dtypes: st.SearchStrategy[str]) -> Case:
    """Cases of the stage in any of `dtypes`; each is an input that the contract promises."""
    count = draw(EXPERTS)
    return space.ExpertsCase(
        T=draw(TOKENS), H=draw(SIZE), I=draw(SIZE), E=count, k=draw(st.integers(1, min(10, count))), dtype=draw(dtypes),
        data=draw(st.sampled_from(("exact", "normal"))), routing=draw(st.sampled_from(space.ROUTINGS)),
        masked=draw(st.sampled_from((*space.MASKS, "all"))), map=draw(st.sampled_from(space.MAPS)),
        weights=draw(st.sampled_from(("fp32", "model"))), activation=draw(st.sampled_from(("silu", "gelu_tanh"))),
        layout=draw(layouts(space.OPERANDS)), seed=draw(st.integers(0, 999)),
    )  # fmt: skip
