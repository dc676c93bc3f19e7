"""Laws of the stage `quantized_experts`; each function is one law and returns its terms.

Those of the stage `experts` that change tokens, slots and routing weights hold as they are.
"""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.laws import Term, changed, shuffled
from moe_harness.harness.stages.experts.laws import (
    batch_split,
    duplicates_add,
    masked_is_zero_weight,
    padding_nan,
    power_of_two,
    row_alone,
    slot_permutation,
    tiny_weights,
    token_permutation,
    weight_linearity,
)
from moe_harness.harness.stages.quantized_experts.encoding import packed
from moe_harness.reference.quantized_experts import BLOCK, MX_BLOCK, unpacked

__all__ = [
    "batch_split", "blocks_permuted", "codes_against_scale", "columns_permuted", "down_negated", "duplicates_add",
    "expert_relabelling", "masked_is_zero_weight", "padding_nan", "power_of_two", "row_alone", "scale_into_input",
    "slot_permutation", "tiny_weights", "token_permutation", "unused_expert_removed", "weight_linearity",
]  # fmt: skip
OF_EXPERTS = ("gate_up_proj", "gate_up_scale", "down_proj", "down_scale", "gate_up_bias", "down_bias")


def _with_experts(call: Call, order: Any, **more: Tensor) -> Call:
    """The call with other experts, or the same in another order."""
    given = {name: call.operand(name) for name in OF_EXPERTS}
    return changed(call, **{name: value[order] for name, value in given.items() if value is not None}, **more)


def expert_relabelling(call: Call) -> list[Term]:
    """Experts may be renumbered, their codes, scales, biases and ids together."""
    order = shuffled(call.case.E, call.case.seed)
    ids = order.argsort().to(call.args["topk_ids"].device)[call.args["topk_ids"].long()]
    return [Term(call), Term(_with_experts(call, order, topk_ids=ids), -1.0)]


def unused_expert_removed(call: Call) -> list[Term]:
    """An expert that nobody chose may be taken away, and the ids above it renumbered."""
    ids, gone = call.args["topk_ids"].long(), call.case.E // 2
    ids = torch.where(ids == gone, (gone + 1) % call.case.E, ids)
    keep = [e for e in range(call.case.E) if e != gone]
    fewer = _with_experts(call, keep, topk_ids=ids - (ids > gone).long())
    return [Term(changed(call, topk_ids=ids)), Term(fewer, -1.0)]


def codes_against_scale(call: Call) -> list[Term]:
    """Codes halved where they stay codes, and scales doubled, stand for the same weights."""
    down, scale = call.args["down_proj"], call.args["down_scale"]
    if scale.dtype == torch.uint8:  # half of 1, 2, 3, 4 and 6 is a value of e2m1
        values = unpacked(down)
        size = torch.tensor([0, 0, 2, 2, 4, 5, 6, 7], device=down.device)[values & 7]
        even = packed(size | values & 8)
        half = packed(torch.tensor([0, 0, 1, 0, 2, 3, 4, 5], device=down.device)[size & 7] | values & 8)
        first, second = changed(call, down_proj=even), changed(call, down_proj=half, down_scale=scale + 1)
        return [Term(first), Term(second, -1.0)]
    coarse = torch.where(down.float().abs() >= 2.0**-3, down.float(), 0.0)  # half of it is no subnormal
    first = changed(call, down_proj=coarse.to(down.dtype))
    second = changed(call, down_proj=(coarse / 2).to(down.dtype), down_scale=scale * 2)
    return [Term(first), Term(second, -1.0)]


def scale_into_input(call: Call) -> list[Term]:
    """Hidden states halved and the scales of the first product doubled give the same."""
    a = call.args
    scale = a["gate_up_scale"]
    moved = scale + 1 if scale.dtype == torch.uint8 else scale * 2
    return [Term(call), Term(changed(call, hidden_states=a["hidden_states"] * 0.5, gate_up_scale=moved), -1.0)]


def _columns(call: Call, order: Tensor) -> Call:
    """The columns of the hidden states and of the first product's codes in another order."""
    a = call.args
    codes = a["gate_up_proj"]
    if codes.dtype == torch.uint8:
        codes = packed(unpacked(codes)[..., order])
    else:
        codes = codes.view(torch.uint8)[..., order].view(codes.dtype)
    return changed(call, hidden_states=a["hidden_states"][:, order], gate_up_proj=codes)


def _width(call: Call) -> int:
    """Columns under one scale; all of them where a scale is a row's."""
    widths: dict[str, int] = {"fp8_block": BLOCK, "int4_group": BLOCK, "mxfp4": MX_BLOCK}
    return widths.get(call.keywords["format"]) or int(call.args["hidden_states"].shape[1])


def columns_permuted(call: Call) -> list[Term]:
    """Columns under one scale may change places."""
    width, seed = _width(call), call.case.seed
    starts = range(0, call.case.H, width)
    order = torch.cat([s + shuffled(min(width, call.case.H - s), seed + s) for s in starts])
    return [Term(call), Term(_columns(call, order), -1.0)]


def blocks_permuted(call: Call) -> list[Term]:
    """Whole blocks of columns may change places, with their scales."""
    width = _width(call)
    blocks = shuffled(call.case.H // width, call.case.seed)
    order = (blocks[:, None] * width + torch.arange(width)).flatten()
    moved = _columns(call, order)
    if width < call.case.H:
        moved = changed(moved, gate_up_scale=call.args["gate_up_scale"][..., blocks])
    return [Term(call), Term(moved, -1.0)]


def down_negated(call: Call) -> list[Term]:
    """Codes of the second product negated negate the result; there is no bias in these cases."""
    down, format = call.args["down_proj"], call.keywords["format"]
    if format == "int4_group":  # 8 stands for 0, and 0 for -8, which has no negative
        values = unpacked(down).clamp(min=1)
        return [Term(changed(call, down_proj=packed(values))), Term(changed(call, down_proj=packed(16 - values)))]
    if format == "int8_channel":
        return [Term(call), Term(changed(call, down_proj=-down))]
    signs = 0x88 if format == "mxfp4" else 0x80
    return [Term(call), Term(changed(call, down_proj=(down.view(torch.uint8) ^ signs).view(down.dtype)))]
