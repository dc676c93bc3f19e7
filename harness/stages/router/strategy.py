"""Random cases of the stage `router`, as specs, so that a failure shrinks to its smallest case."""

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.strategies import EXPERTS, TOKENS, layouts
from moe_harness.harness.stages.router import cases as space


@st.composite
def cases(draw: Callable, dtypes: st.SearchStrategy[str]) -> Case:
    """Cases of the stage in any of `dtypes`; each is an input that the contract promises."""
    count = draw(EXPERTS)
    row: dict[str, Any] = {
        "experts": (count, draw(st.integers(1, min(10, count)))),
        "scoring": draw(st.sampled_from(("softmax", "sigmoid"))),
        "bias": draw(st.sampled_from(space.BIASES)), "groups": draw(st.sampled_from(space.GROUPS)),
    }  # fmt: skip
    if not space.allowed(row):
        row["groups"] = "none"
    count, top_k = row.pop("experts")
    return space.RouterCase(
        T=draw(TOKENS), E=count, k=top_k, renorm=draw(st.booleans()), scale=draw(st.sampled_from((1.0, 2.5, 0.125))),
        dtype=draw(dtypes), data=draw(st.sampled_from(("normal", "negative", "peaked", "ties"))),
        layout=draw(layouts(("router_logits", "correction_bias"))), seed=draw(st.integers(0, 999)), **row,
    )  # fmt: skip
