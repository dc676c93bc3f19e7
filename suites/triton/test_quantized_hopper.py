"""What only a Hopper GPU shows of the quantised experts: `_fp8_hopper`, codes of four bits in pairs of 16 bits, and
tiles of one slot with the copy engine.

The interpreter runs neither Gluon nor assembly.  Each case says what of the kernels it is for; sizes are the smallest
that have it, and most of the time is the compiler's.
"""

from typing import Any

import pytest
import torch

from moe_harness.harness.core.contracts import load
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.stages.quantized_experts.cases import QuantizedCase

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.skipif(not HOPPER, reason="Gluon's warpgroups and the assembly need a Hopper GPU"),
    pytest.mark.gpu,
]
BLOCKS: dict[str, Any] = {"format": "fp8_block", "dtype": "bf16", "H": 256, "I": 128, "E": 4, "k": 2}
# More slots than are walked one by one, and whole blocks without biases: what `fits` takes.
CODES: dict[str, dict[str, Any]] = {
    "one step, fewer than there are stages": {"T": 40, "H": 128},
    "steps that are no multiple of the stages: the parity turns inside a tile": {"T": 40, "H": 640, "I": 384},
    "second product: an odd number of blocks, half a tile past the end": {"T": 40, "H": 384, "I": 256},
    "63 rows of an expert": {"T": 63, "E": 2},
    "64 rows, one unit to its last row": {"T": 64, "E": 2},
    "65 rows, the second unit has one": {"T": 65, "E": 2},
    "129 rows, units spread over two tiles": {"T": 129, "E": 2},
    "193 rows, four units of which the last has one row": {"T": 193, "E": 2},
    "all rows with one expert, the others without": {"T": 700, "E": 8, "routing": "one"},
    "all rows with the last expert": {"T": 70, "E": 8, "routing": "last"},
    "an expert twice in a token": {"T": 90, "routing": "duplicates"},
    "most tiles with few experts": {"T": 300, "E": 32, "k": 4, "routing": "skewed"},
    "more tiles than programs, taken by the counter": {"T": 2000, "E": 16, "k": 4, "H": 512, "I": 512},
    "alignment in three launches": {"T": 4200, "k": 1, "H": 128},
    "tokens without a slot": {"T": 80, "masked": "rows"},
    "slots without an expert": {"T": 80, "masked": "some"},
    "experts that live elsewhere": {"T": 80, "map": "alternate"},
    "one expert: no room for two counters, the other kernels": {"T": 40, "E": 1, "k": 1},
    "experts that fill a table of 512": {"T": 60, "E": 257, "k": 4, "H": 128},
    "1,024 experts, the most that one warp holds": {"T": 60, "E": 1024, "k": 4, "H": 128},
    "one more": {"T": 60, "E": 1025, "k": 4, "H": 128},
    "no whole blocks: the other kernels": {"T": 60, "H": 200, "I": 200},
    "biases: the other kernels": {"T": 60, "bias": True},
    "columns of scales behind each other": {"T": 60, "layout": "gate_up_scale:transposed"},
    "fp16": {"T": 60, "dtype": "fp16"},
    "clamped": {"T": 60, "activation": "swiglu_oai"},
    "gelu": {"T": 60, "activation": "gelu_tanh"},
    "runs of zeros, whose scale is 0": {"T": 60, "data": "zero_rows"},
    "scales of activations under the smallest normal": {"T": 60, "data": "tiny"},
    "hidden values beyond fp16": {"T": 60, "data": "huge"},
    "one large value in a run": {"T": 60, "data": "outlier"},
    "NaN in one token": {"T": 60, "data": "token_nan"},
    "infinity in one token": {"T": 60, "data": "token_inf"},
    "NaN in an expert that no token chose": {"T": 60, "data": "unused_expert_nan"},
    "NaN as a code": {"T": 60, "data": "nan_code"},
    "largest codes": {"T": 60, "data": "largest_code"},
    "scales that differ from block to block": {"T": 60, "data": "uneven_scales", "H": 384, "I": 256},
}
HALF_BYTES: dict[str, dict[str, Any]] = {
    f"{format}, {dtype}, {data}": {"format": format, "dtype": dtype, "data": data, "T": tokens}
    for format, dtype, data in (
        ("int4_group", "bf16", "exact"), ("int4_group", "fp16", "exact"), ("int4_group", "bf16", "largest_code"),
        ("mxfp4", "bf16", "exact"), ("mxfp4", "bf16", "exponents"), ("mxfp4", "fp16", "exponents"),
        ("mxfp4", "bf16", "largest_code"),
    )
    for tokens in (70,)
}  # fmt: skip
# As many slots as the rules take one by one.
SLOTS: dict[str, dict[str, Any]] = {
    "one step, fewer than there are stages": {"T": 1, "H": 128},
    "steps that are no multiple of the stages": {"T": 2, "H": 640, "I": 384},
    "one expert in all slots": {"T": 8, "routing": "one"},
    "slots without an expert": {"T": 6, "masked": "some"},
    "no token has an expert": {"T": 3, "masked": "all"},
    "experts that live elsewhere": {"T": 4, "map": "alternate"},
    "no whole blocks, a tile past the end": {"T": 2, "H": 200, "I": 200},
    "biases": {"T": 2, "bias": True},
    "scales in columns": {"T": 2, "layout": "gate_up_scale:transposed"},
    "fp16": {"T": 2, "dtype": "fp16"},
    "clamped": {"T": 2, "activation": "swiglu_oai"},
    "one large value in a run": {"T": 2, "data": "outlier"},
    "scales of activations under the smallest normal": {"T": 2, "data": "tiny"},
    "runs of zeros": {"T": 2, "data": "zero_rows"},
    "NaN in one token": {"T": 4, "data": "token_nan"},
}
FEW_HALF_BYTES = [
    {"format": format, "dtype": dtype, "data": data, "T": 3, "E": 4, "k": 2}
    for format in ("int4_group", "mxfp4") for dtype in ("bf16", "fp16") for data in ("exact", "largest_code")
]  # fmt: skip
GIVEN = [
    *(pytest.param("triton:fp8_group128", {**BLOCKS, **changes}, id=words) for words, changes in CODES.items()),
    *(pytest.param("triton", {**BLOCKS, **changes}, id=words) for words, changes in HALF_BYTES.items()),
    *(
        pytest.param("triton:fp8_group128", {**BLOCKS, **changes}, id=f"few slots, {words}")
        for words, changes in SLOTS.items()
    ),
    *(
        pytest.param("triton", fields, id="few slots, " + ", ".join(map(str, list(fields.values())[:3])))
        for fields in FEW_HALF_BYTES
    ),
]


@pytest.mark.parametrize(("spec", "fields"), GIVEN)
def test_a_hopper_kernel_is_right(spec: str, fields: dict[str, Any]) -> None:
    """Twice: the second call finds the counters as the first one left them."""
    trial = Trial(load("quantized_experts", spec), "cuda")
    call = trial.build(QuantizedCase(**fields))
    once, twice = trial.invoke(call).clone(), trial.invoke(call)
    assert not trial.judge(call, once).findings
    torch.testing.assert_close(twice, once, rtol=0, atol=0, equal_nan=True)


def test_a_second_product_starts_early_only_on_what_does_not_change() -> None:
    """Calls of other rows, ids and sizes without a moment between them: each result is the one it has alone.

    What a kernel reads before it waits would be that of the call before.
    """
    trial = Trial(load("quantized_experts", "triton:fp8_group128"), "cuda")
    calls = [
        trial.build(QuantizedCase(**{**BLOCKS, "T": tokens, "H": 512, "I": 256, "seed": tokens}))
        for tokens in (40, 700, 41, 2000, 40, 129)
    ]
    alone = []
    for call in calls:
        alone.append(trial.invoke(call).clone())
        torch.cuda.synchronize()
    run = trial.subject.function
    for _ in range(20):
        together = [run(*call.args.values(), **call.keywords) for call in calls]
        assert all(torch.equal(one, two) for one, two in zip(alone, together, strict=True))
