"""Random cases of the stage `shared_expert_gate`, as specs, so that a failure shrinks to its smallest case."""

from collections.abc import Callable

from hypothesis import strategies as st

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.strategies import SIZE, TOKENS, layouts
from moe_harness.harness.stages.shared_expert_gate import cases as space


@st.composite
def cases(draw: Callable, dtypes: st.SearchStrategy[str]) -> Case:
    """Cases of the stage in any of `dtypes`; each is an input that the contract promises."""
    lead = draw(st.lists(st.integers(0, 5), max_size=3) | st.lists(TOKENS, min_size=1, max_size=1))
    return space.GateCase(
        lead="x".join(map(str, lead)),
        optional=not lead, H=draw(SIZE), D=draw(SIZE), dtype=draw(dtypes),
        data=draw(st.sampled_from(("exact", "normal"))), layout=draw(layouts(space.OPERANDS)),
        seed=draw(st.integers(0, 999)),
    )  # fmt: skip
