"""Special values of the stage `quantized_experts`."""

import torch
from torch import Tensor

from moe_harness.harness.stages.quantized_experts.cases import QuantizedCase
from moe_harness.reference.quantized_experts import MX_BIAS

Matrix = tuple[Tensor, Tensor | None]  # codes and scales of all experts
USED = 1  # the expert whose weights are changed
UNUSED = 2


def make(case: QuantizedCase, x: Tensor, first: Matrix, second: Matrix, ids: Tensor, weights: Tensor) -> None:
    """Change the drawn data in place to the special kind that the case names."""
    if case.data in ("token_nan", "token_inf"):
        x[case.T // 2, case.H // 3] = float(case.data.removeprefix("token_"))
    elif case.data == "tiny":
        x *= 2.0**-12
    elif case.data == "huge":
        x *= 12.0
    elif case.data == "zero_rows":  # the largest of such a row is 0: a scale that may not be divided by
        x[::3] = 0.0
    elif case.data == "outlier":  # the others of its row, or of its group, are left few codes
        x[::2, case.H // 2] = 40.0
    elif case.data == "signed_weights":
        weights[:, ::2] *= -1.0
    elif case.data == "outside_fp16":  # results of 10^5, which the dtype holds
        scale = second[1]
        assert scale is not None
        scale += 17 if scale.dtype == torch.uint8 else scale * (2.0**17 - 1)
    elif case.data == "unused_expert_nan":
        ids[ids == UNUSED] = 0
        _poison(first, UNUSED)
        _poison(second, UNUSED)
    else:
        _make_codes(case, first, second)


def _poison(matrix: Matrix, expert: int) -> None:
    """The worst that codes and scales of an expert can be."""
    codes, scale = matrix
    if scale is not None:
        scale[expert] = 254 if scale.dtype == torch.uint8 else float("nan")
    if codes.dtype == torch.float8_e4m3fn:
        codes.view(torch.uint8)[expert] = 0x7F


def _make_codes(case: QuantizedCase, first: Matrix, second: Matrix) -> None:
    (up, up_scale), (down, down_scale) = first, second
    if case.data == "scale_zero":  # a part of the weights is 0, whatever the codes
        assert up_scale is not None and down_scale is not None
        up_scale[USED].view(-1)[0] = 0.0
        down_scale[::2].view(len(down_scale[::2]), -1)[:, -1] = 0.0
    elif case.data == "scale_nan":
        assert up_scale is not None
        up_scale[USED].view(-1)[0] = float("nan")
    elif case.data == "nan_code":
        up.view(torch.uint8)[USED, case.I // 2, case.H // 2] = 0x7F
    elif case.data == "subnormal_codes":  # multiples of 2^-9 under 2^-6, with scales that make them count
        assert up_scale is not None
        codes = up.view(torch.uint8)
        codes[:, ::2] = codes[:, ::2] & 0x87
        up_scale *= 2.0**11
        up[:, 1::2] = (up[:, 1::2].float() * 2.0**-11).to(up.dtype)
    elif case.data == "largest_code":
        _largest(case.format, up)
        _largest(case.format, down)
    elif case.data == "exponents":  # of e8m0, far from those around: tiny ones, and 0
        assert up_scale is not None and down_scale is not None
        up_scale[:, ::4] = up_scale[:, ::4] - 40
        down_scale[:, 1::5, 0] = 0
        down_scale[:, 2::5, -1] = MX_BIAS + 2
    elif case.data == "uneven_scales" and up_scale is not None and down_scale is not None:
        for scale in (up_scale, down_scale):
            flat = scale.view(len(scale), -1)
            if scale.dtype == torch.uint8:
                flat[:, ::3] = flat[:, ::3] + 3
            else:
                flat[:, ::3] *= 8.0


def _largest(format: str, codes: Tensor) -> None:
    """The ends of the range of codes in every seventh row, each on the side where the code was."""
    if format in ("fp8_block", "fp8_channel"):
        rows = codes.view(torch.uint8)[:, ::7]
        rows[:] = rows & 0x80 | 0x7E
    elif format == "int8_channel":
        rows = codes[:, ::7]
        rows[:] = torch.where(rows < 0, -128, 127)
    elif format == "int4_group":  # 0 stands for -8, 15 for 7
        rows = codes[:, ::7]
        rows[:] = torch.where(rows & 0x08 > 0, 0x0F, 0) | torch.where(rows & 0x80 > 0, 0xF0, 0)
    else:
        codes[:, ::7] |= 0x77
