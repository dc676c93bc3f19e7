"""Released models under `--config`: in the format in which they are shipped, and within a judging process's memory."""

from typing import Any

import pytest
from torch import Tensor

from moe_harness.fixtures.configs import shape
from moe_harness.harness.core.plan import Request
from moe_harness.harness.stages.quantized_experts import stage
from moe_harness.harness.stages.quantized_experts.cases import QuantizedCase, plan
from moe_harness.reference.quantized_experts import dequantised

SHIPPED = {"qwen3-30b-a3b-fp8": "fp8_block", "deepseek-v3": "fp8_block", "gpt-oss-20b": "mxfp4"}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_model_is_judged_in_the_format_in_which_it_is_shipped(name: str) -> None:
    model = shape(name)
    planned = plan(Request(configs=(model,)))
    cases = [case for check in ("exact", "numeric") for case in planned[check] if model.num_experts == case.E]
    assert {case.format for case in cases if model.hidden_size == case.H} == {SHIPPED[name]}


def test_codes_become_numbers_one_expert_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All experts of DeepSeek-V3 at once took a judging process beyond its 4 GiB, which was told as a failure."""
    shapes = []

    def watched(codes: Tensor, *rest: Any) -> Tensor:
        shapes.append(tuple(codes.shape))
        return dequantised(codes, *rest)

    monkeypatch.setattr(stage, "dequantised", watched)
    stage.STAGE.exact_value(stage.STAGE.build(QuantizedCase(data="exact"), "cpu"))
    assert shapes
    assert all(len(size) == 2 for size in shapes)
