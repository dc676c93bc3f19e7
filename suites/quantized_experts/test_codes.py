"""Data whose activations are codes at their scale leave an implementation that quantises them no room for codes.

Elsewhere the variance of the codes hides what is far smaller than their spacing, such as a scale of 16 bits.
"""

import pytest
import torch
from torch import Tensor

from moe_harness.harness.core.contracts import load
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.process.worker import judge_id
from moe_harness.harness.stages.quantized_experts.cases import QuantizedCase
from moe_harness.reference.quantized_experts import quantized_experts

CODES = QuantizedCase(T=9, I=256, data="codes")
NORMAL = QuantizedCase(T=9, I=256)


def quantised(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float() * scale


def scales_of_32_bits(hidden_states: Tensor, *call: Tensor, format: str, **options: object) -> Tensor:
    scale = hidden_states.float().abs().amax(-1, keepdim=True) / 448.0
    return quantized_experts(quantised(hidden_states, scale), *call, format=format, **options)


def scales_of_16_bits(hidden_states: Tensor, *call: Tensor, format: str, **options: object) -> Tensor:
    scale = (hidden_states.float().abs().amax(-1, keepdim=True) / 448.0).bfloat16().float()
    return quantized_experts(quantised(hidden_states, scale), *call, format=format, **options)


scales_of_32_bits.quantizes = scales_of_16_bits.quantizes = "fp8_token"


@pytest.mark.parametrize(
    ("name", "case", "right"),
    [("scales_of_32_bits", NORMAL, True), ("scales_of_32_bits", CODES, True), ("scales_of_16_bits", NORMAL, True),
     ("scales_of_16_bits", CODES, False)],
)  # fmt: skip
def test_scales_of_16_bits_show_on_codes_alone(name: str, case: QuantizedCase, right: bool) -> None:
    trial = Trial(load("quantized_experts", f"{__file__}:{name}"), "cpu")
    call = trial.build(case)
    assert (not trial.judge(call, trial.invoke(call)).findings) == right


def test_a_law_allows_what_codes_of_activations_may_change() -> None:
    """Other numbers of rows, another order of sums, and a hidden value falls to the neighbouring code.

    The terms of a law are calls of the same implementation: without its declaration their bound knew of no codes, and
    this case failed at 153 sigma on a right kernel.
    """
    case = "laws/dtype=fp16,variant=duplicates_add,seed=100019,T=18,E=9,k=3,format=fp8_channel,bias=1"
    spec = "moe_harness.suites.meta.right.quantized_experts:fp8_groups_with_powers_of_two"
    answer = judge_id(Trial(load("quantized_experts", spec), "cpu"), f"quantized_experts/{case}")
    assert answer.status == "passed", answer.findings
