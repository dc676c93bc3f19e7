"""Data whose activations are codes at their scale leave an implementation that quantises them no room for codes.

Elsewhere the variance of the codes hides what is far smaller than their spacing, such as a scale of 16 bits.
"""

import pytest
import torch
from torch import Tensor

from moe_harness.harness.core.contracts import load
from moe_harness.harness.core.invocation import Trial
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
