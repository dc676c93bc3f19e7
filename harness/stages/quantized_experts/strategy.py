"""Random cases of the stage `quantized_experts`, as specs, so that a failure shrinks to its smallest case."""

from collections.abc import Callable

from hypothesis import strategies as st

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.strategies import TOKENS
from moe_harness.harness.stages.quantized_experts import cases as space

SIZE = st.sampled_from((1, 2, 3))


@st.composite
def cases(draw: Callable, dtypes: st.SearchStrategy[str]) -> Case:
    """Cases of the stage in any of `dtypes`; each is an input that the contract promises."""
    count, format = draw(st.integers(1, 12) | st.sampled_from((32, 60, 128))), draw(st.sampled_from(space.FORMATS))
    step = space.STEP.get(format, 8)
    data = draw(st.sampled_from(("exact", "normal")))
    activation = draw(st.sampled_from(space.ACTIVATIONS[:2] if data == "exact" else space.ACTIVATIONS))
    least = max(1, 64 // step)  # an exact gate wants that many columns
    return space.QuantizedCase(
        T=draw(TOKENS), H=step * (draw(SIZE) + least - 1), I=step * draw(SIZE), E=count,
        k=draw(st.integers(1, min(8, count))), format=format, activation=activation, bias=draw(st.booleans()),
        dtype=draw(dtypes), data=data, routing=draw(st.sampled_from(space.ROUTINGS)),
        masked=draw(st.sampled_from((*space.MASKS, "all"))), map=draw(st.sampled_from(space.MAPS)),
        weights=draw(st.sampled_from(("fp32", "model"))), seed=draw(st.integers(0, 999)),
    )  # fmt: skip
