"""The quantised experts of Triton: the judge on small cases, interpreted, and what they compile to for a Hopper GPU.

What is compiled is what the rules choose at few, some and many rows per expert; how fast it is only a GPU can tell.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_harness.harness.core.contracts import load
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.stages.quantized_experts.cases import QuantizedCase
from moe_harness.impls.triton import _quantized_tile
from moe_harness.impls.triton._quantized_operands import Matrix, Rows
from moe_harness.impls.triton._quantized_tile import constants_of
from moe_harness.impls.triton.configs import Tiling
from moe_harness.suites.compiled import for_hopper
from moe_harness.suites.triton import DEVICE, runnable

# Under the interpreter: slot by slot without tensor cores, in tiles of one slot, and those of codes made before.
WALKED: dict[str, Any] = {"T": 2, "k": 1}
ONE_SLOT_A_TILE = {"T": 1, "k": 3}
MADE_BEFORE = {"T": 2, "k": 2}
TOGETHER = {"T": 21, "k": 2, "E": 4}  # under the interpreter such batches take the way of large ones
IN_PAIRS = {"T": 33, "k": 2, "E": 4}
CASES: dict[str, list[dict[str, Any]]] = {
    "triton": [
        *({"format": f, "T": 6, "bias": True, "activation": "swiglu_oai", "dtype": "bf16"} for f in ("plain", "mxfp4")),
        {"format": "int4_group", "data": "exact", "dtype": "fp16", **ONE_SLOT_A_TILE},
        {"format": "int4_group", "data": "exact", "dtype": "bf16", "map": "alternate", **WALKED},
        {"format": "mxfp4", "dtype": "bf16", "bias": True, "activation": "swiglu_oai", **WALKED},
        {"format": "mxfp4", "dtype": "bf16", "bias": True, "activation": "swiglu_oai", **ONE_SLOT_A_TILE},
        {"format": "int8_channel", "H": 200, "I": 72, "dtype": "bf16", "masked": "some", **MADE_BEFORE},
        {
            "format": "int8_channel",
            "data": "exact",
            "dtype": "bf16",
            "map": "alternate",
            "masked": "some",
            "bias": True,
            **TOGETHER,
        },
        {"format": "mxfp4", "data": "exponents", "dtype": "fp16", **ONE_SLOT_A_TILE},
        # Codes of four bits in pairs of 16 bits, which only a GPU has.
        {"format": "int4_group", "data": "exact", "dtype": "bf16", **TOGETHER},
        {"format": "mxfp4", "data": "exponents", "dtype": "bf16", **TOGETHER},
        # Woven rows that end inside a run of 128 columns, gate and up in one tile, codes that are no whole words.
        {"format": "mxfp4", "dtype": "bf16", "H": 160, "I": 96, "bias": True, **TOGETHER},
        {"format": "mxfp4", "dtype": "bf16", "H": 96, "I": 160, "activation": "swiglu_oai", **IN_PAIRS},
        {"format": "int4_group", "data": "exact", "dtype": "fp16", "I": 384, **IN_PAIRS},
        {"format": "int4_group", "dtype": "bf16", "layout": "gate_up_proj:transposed", **IN_PAIRS},
        {"format": "mxfp4", "dtype": "bf16", "layout": "down_proj:transposed", **TOGETHER},
        {"format": "int4_group", "dtype": "bf16", "layout": "gate_up_proj:unit", "T": 33, "E": 1, "k": 1},
        {"format": "mxfp4", "data": "largest_code", "dtype": "fp32", "T": 3},
        {"format": "fp8_block", "H": 200, "I": 72, "dtype": "bf16", "activation": "gelu_tanh", "T": 5},
        {"format": "fp8_channel", "data": "nan_code", "dtype": "bf16", "T": 7},
        {"format": "fp8_block", "layout": "down_scale:transposed", "bias": True, "data": "exact", "T": 7},
    ],
    "triton:fp8_group128": [
        *(
            {"format": "fp8_block", "dtype": "bf16", "bias": True, "H": 200, "I": 200, **size}
            for size in (WALKED, ONE_SLOT_A_TILE, MADE_BEFORE)
        ),
        {"format": "fp8_block", "dtype": "bf16", "data": "outlier", "map": "alternate", **MADE_BEFORE},
        {"format": "fp8_channel", "dtype": "fp16", "data": "token_nan", **ONE_SLOT_A_TILE},
        {"format": "fp8_block", "dtype": "bf16", "H": 200, "I": 200, "activation": "swiglu_oai", **TOGETHER},
        {"format": "fp8_block", "dtype": "bf16", "data": "token_nan", **TOGETHER},
        # Whole blocks: on a Hopper GPU the kernel with warps that copy.
        {"format": "fp8_block", "dtype": "bf16", "H": 256, "I": 128, "masked": "some", **TOGETHER},
        {"format": "fp8_channel", "dtype": "fp16", "data": "zero_rows", "masked": "some", **TOGETHER},
        {"format": "fp8_block", "dtype": "fp32", "data": "outlier", "T": 6},
    ],
}
GIVEN = [pytest.param(spec, QuantizedCase(**fields), id=f"{spec}-{n}") for spec, all_of in CASES.items()
         for n, fields in enumerate(all_of)]  # fmt: skip

COMPILE = """
from triton.tools.tensor_descriptor import TensorDescriptor
from moe_harness.impls.triton import _few_codes, _fp8_hopper, _quantized_operands, _quantized_product as q
from moe_harness.impls.triton import _quantized_tile, _slot_product
from moe_harness.impls.triton.configs import Shape, Tiling
from moe_harness.impls.triton.quantized_plans import Plan, rules

E, H, I, k, bf16, fp8 = 128, 2048, 768, 8, torch.bfloat16, torch.float8_e4m3fn
found = []
strides = lambda t: [*(n * t.shape[-1] for n in ((t.shape[1],) if t.dim() == 3 else ())), t.shape[-1], 1]
for module in (q, _few_codes, _fp8_hopper, _quantized_operands, _slot_product):
    module.launch = lambda kernel, grid, *given, **constants: found.append(
        kernel.warmup(*given, grid=grid, **constants))
    module.early_start = module.on_hopper = lambda device: True
    module.descriptor_strides = strides
_quantized_tile.tile_source = lambda t, block, wanted: (TensorDescriptor(t, list(t.shape), strides(t), block), True)

def matrix(rows, columns, format, bias):
    codes = fp8 if format == "fp8_block" else torch.uint8
    width = columns if format == "fp8_block" else columns // 2
    run = 32 if format == "mxfp4" else 128
    by = {"fp8_block": torch.float32, "int4_group": bf16, "mxfp4": torch.uint8}[format]
    scale = torch.empty(E, rows // (128 if format == "fp8_block" else 1), columns // run, dtype=by)
    biases = torch.empty(E, rows) if bias else None
    return q.Matrix(torch.empty(1, rows, width, dtype=codes).expand(E, -1, -1), scale, biases, format)

for format, quantize, tokens, bias in (
    ("fp8_block", True, 0, True), ("fp8_block", True, 1, True), ("mxfp4", False, 1, True),
    ("fp8_block", True, 4096, True), ("fp8_block", True, 4096, False), ("int4_group", False, 64, True),
    ("mxfp4", False, 1024, True),
):
    plan = rules(Shape(E, H, I, k), format, tokens * k, quantize)
    if not tokens:
        tokens, plan = 1, Plan(True, False, Tiling(1, 4, 128), Tiling(1, 8, 128))
    ids = torch.empty(tokens, k, dtype=torch.int64)
    ints = None if plan.few else torch.empty(3 * E, dtype=torch.int32)
    routing = q.Routing(ids, None, ints, ints)
    x = torch.empty(tokens, H, dtype=bf16)
    before = _quantized_operands.quantise if quantize else _quantized_operands.weave
    rows = before(x) if plan.ahead else q.Rows(x)
    act = q.quantized_product(rows, matrix(2 * I, H, format, bias), routing, plan.gate_up, tokens * k, bf16,
                              activation="silu", quantize=quantize, codes=quantize and plan.ahead and not plan.few)
    q.quantized_product(act, matrix(H, I, format, bias), routing, plan.down, tokens * k, bf16, quantize=quantize)
for kernel in found:
    text = kernel.asm["ptx"]
    print(kernel.metadata.shared, ".local" in text, *sorted({word for word in text.split() if "mma_async" in word}))
"""
SHARED_MEMORY = 232448  # bytes a program may have


def judged(test: Callable[..., None]) -> Callable[..., None]:
    """Run on a GPU or interpreted; what compiles alone needs neither."""
    for mark in runnable:
        test = mark(test)
    return test


@judged
@pytest.mark.parametrize(("spec", "case"), GIVEN)
def test_small_cases_pass(spec: str, case: QuantizedCase) -> None:
    trial = Trial(load("quantized_experts", spec), DEVICE)
    call = trial.build(case)
    assert not trial.judge(call, trial.invoke(call)).findings


@judged
def test_what_does_not_fit_is_refused() -> None:
    trial = Trial(load("quantized_experts", "triton"), DEVICE)
    call = trial.build(QuantizedCase(T=2, format="int4_group"))
    for name, wrong in (("gate_up_scale", None), ("down_scale", call.args["down_scale"][:, :-1]),
                        ("gate_up_proj", call.args["gate_up_proj"].float())):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=name.replace("_scale", "_proj")):
            trial.subject.function(*(call.args | {name: wrong}).values(), **call.keywords)
    other = load("quantized_experts", "triton:fp8_group128").function
    with pytest.raises(NotImplementedError, match="fp8_block"):
        other(*call.args.values(), **call.keywords)


@pytest.mark.parametrize(("offset", "engine"), [(0, True), (1, False)])
def test_the_copy_engine_reads_whole_words_alone(monkeypatch: pytest.MonkeyPatch, offset: int, engine: bool) -> None:
    """It takes codes of a single expert at any stride, but the kernel makes words of single bytes itself."""
    asked = []
    monkeypatch.setattr(_quantized_tile, "tile_source", lambda t, block, wanted: (asked.append(wanted), (t, False))[1])
    codes = torch.empty(1 << 14, dtype=torch.uint8).as_strided((1, 128, 64), ((1 << 13) + offset, 64, 1))
    matrix = Matrix(codes, torch.empty(1, 128, 1), None, "int4_group")
    _, constants = constants_of(Rows(torch.empty(4, 128)), matrix, Tiling(16, 64, 128), torch.bfloat16, "", False)
    assert asked == [engine] and constants["WORDS"] is engine


def test_products_compile_for_hopper() -> None:
    told = for_hopper(COMPILE)
    lines = [line.split() for line in told.splitlines()]
    kernels = [set(words[2:]) for words in lines]
    assert all(int(words[0]) <= SHARED_MEMORY and words[1] == "False" for words in lines), told
    wide = "wgmma.mma_async.sync.aligned.m64n{}k{}.f32.{}.{}"
    e4m3, bf16 = (lambda n: {wide.format(n, 32, "e4m3", "e4m3")}), (lambda n: {wide.format(n, 16, "bf16", "bf16")})
    quantise: set[str] = set()
    walked: list[set[str]] = [set(), set()]
    slot_by_slot = [quantise, e4m3(16), e4m3(16), bf16(16), bf16(16)]
    in_tiles, by_copiers = [quantise, e4m3(64), e4m3(128)], [quantise, e4m3(128), e4m3(128)]
    woven = [*in_tiles, *by_copiers, set[str](), bf16(16), bf16(16), set[str](), bf16(64), bf16(64)]
    assert kernels == [*walked, *slot_by_slot, *woven]
