"""Hypothesis strategies over cases: specs, never tensors, so that a failure shrinks to its smallest case."""

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from moe_harness.harness.core import boundaries
from moe_harness.harness.core.case import Case
from moe_harness.harness.stages.experts import cases as experts
from moe_harness.harness.stages.grouped_linear import cases as grouped_linear
from moe_harness.harness.stages.moe_block import cases as moe_block
from moe_harness.harness.stages.router import cases as router
from moe_harness.harness.stages.shared_expert_gate import cases as shared_expert_gate

SIZE = st.integers(1, 12) | st.sampled_from((16, 17, 31, 33, 48, 64, 65, 96, 100))
TOKENS = st.integers(0, 12) | st.sampled_from(boundaries.TOKENS)
EXPERTS = st.integers(1, 12) | st.sampled_from((16, 60, 64, 72, 128))


def cases(stage: str, dtypes: tuple[str, ...]) -> st.SearchStrategy[Case]:
    """Cases of `stage` in any of `dtypes`; every one is an input the contract promises."""
    return _BY_STAGE[stage](st.sampled_from(dtypes))


@st.composite
def _experts(draw: Callable, dtypes: st.SearchStrategy[str]) -> Case:
    count = draw(EXPERTS)
    return experts.ExpertsCase(
        T=draw(TOKENS), H=draw(SIZE), I=draw(SIZE), E=count, k=draw(st.integers(1, min(10, count))), dtype=draw(dtypes),
        data=draw(st.sampled_from(("exact", "normal"))), routing=draw(st.sampled_from(experts.ROUTINGS)),
        masked=draw(st.sampled_from((*experts.MASKS, "all"))), map=draw(st.sampled_from(experts.MAPS)),
        weights=draw(st.sampled_from(("fp32", "model"))), activation=draw(st.sampled_from(("silu", "gelu_tanh"))),
        layout=draw(_layouts(experts.OPERANDS)), seed=draw(st.integers(0, 999)),
    )  # fmt: skip


@st.composite
def _router(draw: Callable, dtypes: st.SearchStrategy[str]) -> Case:
    count = draw(EXPERTS)
    row: dict[str, Any] = {
        "experts": (count, draw(st.integers(1, min(10, count)))),
        "scoring": draw(st.sampled_from(("softmax", "sigmoid"))),
        "bias": draw(st.sampled_from(router.BIASES)), "groups": draw(st.sampled_from(router.GROUPS)),
    }  # fmt: skip
    if not router.allowed(row):
        row["groups"] = "none"
    count, top_k = row.pop("experts")
    return router.RouterCase(
        T=draw(TOKENS), E=count, k=top_k, renorm=draw(st.booleans()), scale=draw(st.sampled_from((1.0, 2.5, 0.125))),
        dtype=draw(dtypes), data=draw(st.sampled_from(("normal", "negative", "peaked", "ties"))),
        layout=draw(_layouts(("router_logits", "correction_bias"))), seed=draw(st.integers(0, 999)), **row,
    )  # fmt: skip


@st.composite
def _grouped_linear(draw: Callable, dtypes: st.SearchStrategy[str]) -> Case:
    return grouped_linear.GroupedLinearCase(
        S=draw(TOKENS), K=draw(SIZE), N=draw(SIZE), E=draw(EXPERTS), sizes=draw(st.sampled_from(grouped_linear.SIZES)),
        bias=draw(st.booleans()), dtype=draw(dtypes), data=draw(st.sampled_from(("exact", "normal"))),
        layout=draw(_layouts(("x", "weight", "bias"))), seed=draw(st.integers(0, 999)),
    )  # fmt: skip


@st.composite
def _shared_expert_gate(draw: Callable, dtypes: st.SearchStrategy[str]) -> Case:
    lead = draw(st.lists(st.integers(0, 5), max_size=3) | st.lists(TOKENS, min_size=1, max_size=1))
    return shared_expert_gate.GateCase(
        lead="x".join(map(str, lead)),
        optional=not lead, H=draw(SIZE), D=draw(SIZE), dtype=draw(dtypes),
        data=draw(st.sampled_from(("exact", "normal"))), layout=draw(_layouts(shared_expert_gate.OPERANDS)),
        seed=draw(st.integers(0, 999)),
    )  # fmt: skip


@st.composite
def _moe_block(draw: Callable, dtypes: st.SearchStrategy[str]) -> Case:
    count = 8 * draw(st.integers(1, 8))  # groups of DeepSeek's families divide it, and hold two experts each
    return moe_block.MoeBlockCase(
        family=draw(st.sampled_from(moe_block.FAMILIES)), T=draw(TOKENS), H=draw(SIZE), I=draw(SIZE), shared=draw(SIZE),
        E=max(16, count), k=draw(st.integers(1, 4)), renorm=draw(st.sampled_from(("yes", "no"))),
        dtype=draw(dtypes), seed=draw(st.integers(0, 999)),
    )  # fmt: skip


def _layouts(operands: tuple[str, ...]) -> st.SearchStrategy[str]:
    named = st.builds("{}:{}".format, st.sampled_from(operands), st.sampled_from(boundaries.LAYOUTS[:5]))
    return st.just("") | named


_BY_STAGE = {
    "experts": _experts,
    "router": _router,
    "grouped_linear": _grouped_linear,
    "shared_expert_gate": _shared_expert_gate,
    "moe_block": _moe_block,
}


class _Falsified(Exception):
    """The one exception of a search, always from one line, so that shrinking compares cases and not causes."""


def search(
    stage: str,
    dtypes: tuple[str, ...],
    judge: Callable[[Case], bool],
    *,
    examples: int,
    start: int,
    out_of_time: Callable[[], bool],
) -> Case | None:
    """Draw cases of `stage` and return the smallest one that `judge` rejects, or None."""
    return falsify(cases(stage, dtypes), judge, examples=examples, start=start, out_of_time=out_of_time)


def falsify(
    drawn: st.SearchStrategy[Case],
    judge: Callable[[Case], bool],
    *,
    examples: int,
    start: int,
    out_of_time: Callable[[], bool],
) -> Case | None:
    """Draw `examples` cases and return the smallest one that `judge` rejects, or None; stop once `out_of_time`."""
    known: dict[str, bool] = {}
    rejected: list[Case] = []

    @seed(start)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(drawn)
    def holds(case: Case) -> None:
        name = case.id()
        if name not in known:
            known[name] = True if out_of_time() else judge(case)
        if not known[name]:
            rejected.append(case)
            raise _Falsified

    try:
        holds()
    except _Falsified:
        return rejected[-1]  # Hypothesis runs the smallest one last
    return None
