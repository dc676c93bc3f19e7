"""The checks of a stage as tests: one function for each check that its plan names, made here for every stage."""

from collections.abc import Callable

import pytest

from moe_harness.harness.core.plan import ON_CUDA_ONLY, Request, plan

QUESTIONS = {
    "contract": "Shapes, dtype, device, aliasing, exceptions; the forms every caller uses.",
    "exact": "Bitwise, on data for which every rounding is exact.",
    "numeric": "Within the elementwise bound, by its largest value and by rms.",
    "routing": "The chosen sets, with ties and rounding allowed for, and the weights given the choice.",
    "sentinels": "Ids of -1, with and without expert_map, NaN weights on them, duplicates.",
    "layouts": "Each operand's strides varied alone, with NaN behind every row.",
    "memory": "Inputs, earlier results, poisoned allocations, state left by other calls.",
    "special": "NaN, infinity, tiny, huge and cancelling values.",
    "laws": "Relations that hold without a reference.",
    "determinism": "Same call, same bits, where declared.",
    "batch_invariance": "Same row, same bits, where declared.",
    "leak": "Memory does not grow from call to call.",
    "graph_replay": "CUDA graph replay with changed inputs and poisoned outputs.",
    "side_stream": "Late inputs on a stream of its own.",
    "large_offsets": "More than 2^31 elements in one operand.",
}


def checks_of(stage: str) -> dict[str, Callable[..., None]]:
    """`test_<check>` for every check of the stage, and the search for a case that fails, for a test module to hold."""
    planned = dict.fromkeys(item.check for item in plan(stage, Request()))
    return {f"test_{check}": _test(check) for check in planned} | {"test_property": test_property}


def _test(check: str) -> Callable[..., None]:
    def test(verdict: Callable[[], None]) -> None:
        verdict()

    test.__name__ = test.__qualname__ = f"test_{check}"
    test.__doc__ = QUESTIONS.get(check)
    return pytest.mark.gpu(test) if check in ON_CUDA_ONLY else test


def test_property(falsify: Callable[[], None]) -> None:
    """Hypothesis over specs finds no case that fails."""
    falsify()
