"""Cases of the stage `quantized_experts`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any, ClassVar, Self

from moe_harness.harness.core import boundaries as at
from moe_harness.harness.core.case import Case, crossed
from moe_harness.harness.core.plan import Request, on_cuda, pairwise
from moe_harness.harness.stages.experts.cases import MAPS, MASKS, ROUTINGS, ExpertsCase
from moe_harness.harness.stages.quantized_experts.contract import FORMATS

FP8 = ("fp8_block", "fp8_channel")
SCALED = FORMATS[1:]
ACTIVATIONS = ("silu", "gelu_tanh", "swiglu_oai")
STEP = {"int4_group": 128, "mxfp4": 32}  # sizes are multiples of it, where groups may not be cut
OPERANDS = (
    "hidden_states", "gate_up_proj", "gate_up_scale", "down_proj", "down_scale", "topk_weights", "topk_ids",
    "expert_map", "gate_up_bias", "down_bias",
)  # fmt: skip
TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 257)
# What each kind of special data needs of the format; none: any.
SPECIALS: dict[str, tuple[str, ...]] = {
    "token_nan": (), "token_inf": (), "unused_expert_nan": SCALED, "tiny": (), "huge": (), "zero_rows": (),
    "outlier": (), "scale_zero": ("fp8_block", "fp8_channel", "int8_channel", "int4_group"),
    "subnormal_codes": FP8, "largest_code": SCALED, "nan_code": FP8, "scale_nan": (*FP8, "int8_channel"),
    "exponents": ("mxfp4",), "signed_weights": (), "uneven_scales": SCALED,
    "outside_fp16": SCALED,
}  # fmt: skip
OF_CODES = ("largest_code", "subnormal_codes", "exponents", "uneven_scales")
OF_TOKENS = (
    "token_permutation", "expert_relabelling", "slot_permutation", "batch_split", "row_alone", "weight_linearity",
    "power_of_two", "masked_is_zero_weight", "duplicates_add", "padding_nan", "unused_expert_removed", "tiny_weights",
)  # fmt: skip
OF_SCALES = ("codes_against_scale", "scale_into_input", "columns_permuted", "blocks_permuted", "down_negated")
LAWS = (*OF_TOKENS, *OF_SCALES)


@dataclass(frozen=True, kw_only=True)
class QuantizedCase(ExpertsCase):
    stage: ClassVar[str] = "quantized_experts"
    H: int = 256
    I: int = 128  # noqa: E741 - the field's own letter
    E: int = 6
    format: str = "fp8_block"
    bias: bool = False

    def core(self) -> bool:
        """Formats and activations are the implementation's choice."""
        return not self.layout and not self.optional and self.masked == self.map == "none" and self.ints == "int64"

    def part(self) -> str:
        return f"{self.format}, {self.activation}, {self.dtype}"

    def resized(self) -> Self:
        return self.but(T=2 * self.T + 1, H=self.H + 128, I=self.I + 128, seed=self.seed + 1)


CaseType = QuantizedCase


def plan(request: Request) -> dict[str, Iterable[Case]]:
    """Cases of every check, in the order in which they are judged."""
    return {
        "contract": _contract(request),
        "exact": _exact(request),
        "numeric": _numeric(request),
        "sentinels": _sentinels(request),
        "layouts": _layouts(request),
        "memory": _memory(request),
        "special": [*_special(request), *_special_in_shapes(request), *_partial_sums(request), *_deep_sums(request)],
        "laws": _laws(request),
        "determinism": _repeats(request),
        "batch_invariance": _repeats(request),
        "leak": [QuantizedCase(T=64, E=2, format=f, dtype=request.dtypes[-1]) for f in FORMATS[1:2]],
        **_cuda_cases(request),
    }


def _contract(request: Request) -> Iterator[Case]:
    for format in FORMATS:
        yield from crossed(QuantizedCase, T=5, format=format, dtype=request.dtypes)
        last = request.dtypes[-1]
        yield QuantizedCase(T=0, format=format, dtype=last)
        yield QuantizedCase(T=7, format=format, dtype=last, variant="defaults")
        yield QuantizedCase(T=7, format=format, dtype=last, activation="swiglu_oai", bias=True)
        yield QuantizedCase(T=7, format=format, dtype=last, activation="gelu_tanh", weights="model")
        yield QuantizedCase(T=7, format=format, dtype=last, ints="int32", optional=True)
        yield QuantizedCase(T=6, E=1, k=1, format=format, dtype=last)


def _exact(request: Request) -> Iterator[Case]:
    dtypes = cycle(request.dtypes)
    formats = cycle(SCALED)
    for tokens in TOKENS:  # a kernel chosen by T
        yield QuantizedCase(T=tokens, format=next(formats), data="exact", dtype=next(dtypes))
    for format in FORMATS:
        for width, inner in ((256, 128), (384, 256), (512, 384)) + request.pick((), ((1024, 512), (128, 640))):
            for bias in (False, True):
                yield QuantizedCase(T=33, H=width, I=inner, format=format, bias=bias, data="exact", dtype=next(dtypes))
    for experts, top_k in ((128, 8), (256, 8), (32, 4), (60, 4), (3, 2), (1, 1)):
        for tokens in (3, 40):
            yield QuantizedCase(T=tokens, E=experts, k=top_k, format=next(formats), data="exact", dtype=next(dtypes))
    # a block is cut, gate and up share one
    for width, inner in ((200, 72), (160, 96), (136, 200), (264, 130), (129, 65)):
        for format in ("plain", *FP8, "int8_channel"):
            yield QuantizedCase(T=21, H=width, I=inner, format=format, data="exact", dtype=next(dtypes))
    for width, inner in ((96, 160), (64, 32), (288, 96), (160, 192)):
        yield QuantizedCase(T=21, H=width, I=inner, format="mxfp4", data="exact", dtype=next(dtypes))
    axes = {"format": SCALED, "activation": ("silu", "gelu_tanh"), "routing": ROUTINGS, "masked": MASKS, "map": MAPS,
            "weights": ("fp32", "model"), "bias": (False, True), "dtype": request.dtypes}  # fmt: skip
    tokens_of = request.shuffled(TOKENS[1:])
    for row in pairwise(axes, request.seed):
        yield QuantizedCase(T=next(tokens_of), H=256, I=256, E=8, k=3, data="exact", **row)
    for format in SCALED:  # activations that are codes at their scale
        for tokens, activation in ((5, "silu"), (40, "gelu_tanh")):
            yield QuantizedCase(T=tokens, I=256, format=format, data="codes", activation=activation, dtype=next(dtypes))
    yield QuantizedCase(T=21, H=200, I=72, data="codes", dtype=next(dtypes))
    for shape in request.configs:
        for format in request.pick(_shipped(shape), SCALED):
            yield from _of_model(request, shape, format, T=4, data="exact")


def _numeric(request: Request) -> Iterator[Case]:
    for format in FORMATS:
        for dtype in request.dtypes:
            for activation in ACTIVATIONS:
                bias = activation == "swiglu_oai"
                yield QuantizedCase(T=48, H=384, I=256, format=format, dtype=dtype, activation=activation, bias=bias)
        last = request.dtypes[-1]
        for tokens, width, inner in ((1, 256, 128), (4, 512, 256), (33, 128, 384), (130, 256, 256)):
            yield QuantizedCase(T=tokens, H=width, I=inner, format=format, dtype=last, bias=True)
            yield QuantizedCase(T=tokens, H=width, I=inner, format=format, dtype=last, activation="swiglu_oai")
    for format in ("plain", *FP8, "int8_channel"):
        for width, inner in ((200, 72), (160, 96), (264, 130)):
            yield QuantizedCase(T=40, H=width, I=inner, format=format, dtype=request.dtypes[-1])
    for width, inner in ((96, 160), (288, 96)):
        yield QuantizedCase(T=40, H=width, I=inner, format="mxfp4", dtype=request.dtypes[-1], activation="swiglu_oai")
    yield from _gelu(request)
    for shape in request.configs:
        for format in request.pick(_shipped(shape), SCALED):
            yield from _of_model(request, shape, format, T=4, bias=format == "mxfp4")


def _gelu(request: Request) -> Iterator[Case]:
    """In the other shapes of `_numeric`, which has it in one."""
    for format, tokens, width, inner in (
        ("plain", 20, 96, 160),
        ("fp8_channel", 33, 128, 384),
        ("int8_channel", 9, 80, 24),
    ):
        yield QuantizedCase(T=tokens, H=width, I=inner, format=format, dtype=request.dtypes[-1], activation="gelu_tanh")


def _shipped(shape: Any) -> tuple[str, ...]:
    """The format of the model's weights, or two for one that has them in 16 bits alone."""
    return (shape.format,) if shape.format else SCALED[:1] + SCALED[-1:]


def _of_model(request: Request, shape: Any, format: str, **fields: Any) -> Iterator[Case]:
    """The model's own sizes, where the format has them."""
    step = STEP.get(format, 1)
    if shape.hidden_size % step == 0 and shape.intermediate_size % step == 0:
        act = {"swiglu_clamped": "swiglu_oai", "gelu_pytorch_tanh": "gelu_tanh"}.get(shape.activation, "silu")
        if fields.get("data") == "exact" and act == "swiglu_oai":
            act = "silu"
        yield QuantizedCase(
            H=shape.hidden_size, I=shape.intermediate_size, E=shape.num_experts, k=shape.top_k, format=format,
            activation=act, dtype=request.dtypes[-1], map=request.map_for(shape), **fields,
        )  # fmt: skip


def _sentinels(request: Request) -> Iterator[Case]:
    dtypes, formats = cycle(request.dtypes), cycle(SCALED)
    for masked in ("some", "rows", "all", "one"):
        for kind in MAPS:
            for data in ("exact", "normal"):
                yield QuantizedCase(
                    T=19, k=3, masked=masked, map=kind, format=next(formats), bias=True, dtype=next(dtypes), data=data
                )
    twice: dict[str, Any] = {"routing": "duplicates", "masked": "some", "bias": True, "data": "exact"}
    yield from crossed(QuantizedCase, T=19, k=3, map=MAPS, format=SCALED, dtype=request.dtypes[-1], **twice)


def _layouts(request: Request) -> Iterator[Case]:
    formats, shapes = cycle(SCALED), cycle(((13, 5, 256, 256), (9, 4, 384, 128), (17, 7, 128, 384)))
    for operand in OPERANDS:
        for kind in at.LAYOUTS:
            weights = "scale" in operand or "proj" in operand
            for _ in range(3 if weights else 1):
                tokens, experts, width, inner = next(shapes)
                sizes: dict[str, Any] = {"T": 1, "E": 1, "k": 1} if kind == "unit" else {"T": tokens, "E": experts}
                yield QuantizedCase(
                    **sizes, layout=f"{operand}:{kind}", format=next(formats), bias=True, dtype=request.dtypes[-1],
                    H=width, I=inner, map="alternate" if operand == "expert_map" else "none",
                    data="normal" if weights and kind == "expanded" else "exact",  # codes of one, scales of another
                )  # fmt: skip


def _memory(request: Request) -> Iterator[Case]:
    for format in SCALED:
        yield QuantizedCase(T=9, format=format, dtype=request.dtypes[-1])
        yield QuantizedCase(T=33, H=384, format=format, masked="rows", bias=True, activation="swiglu_oai",
                            dtype=request.dtypes[-1])  # fmt: skip
    yield QuantizedCase(T=20, H=200, I=72, format="fp8_block", map="block", dtype=request.dtypes[-1])


def _special(request: Request) -> Iterator[Case]:
    for data, formats in SPECIALS.items():
        dtypes = request.dtypes_of(data)[-1:]
        yield from crossed(QuantizedCase, T=20, format=formats or FORMATS, data=data, dtype=dtypes, I=256)
        if data in OF_CODES:  # where a code's last bit shows
            yield from crossed(QuantizedCase, T=20, format=formats, data=data, dtype=request.dtypes[0], I=256)


def _special_in_shapes(request: Request) -> Iterator[Case]:
    formats = cycle(FORMATS)
    for data, known in SPECIALS.items():
        for tokens, inner, experts, top_k in ((33, 128, 4, 3), (7, 256, 12, 2)):
            fields: dict[str, Any] = {"T": tokens, "I": inner, "E": experts, "k": top_k}
            one = (known[tokens % len(known)] if known else next(formats),)
            # What a code means is another matter in each format, and its last bit shows in fp32.
            dtypes = request.dtypes[:1] if data in OF_CODES else request.dtypes_of(data)[-1:]
            yield from crossed(
                QuantizedCase, data=data, format=known if data in OF_CODES else one, dtype=dtypes, **fields
            )


def _partial_sums(request: Request) -> Iterator[Case]:
    """In each format three shapes: many implementations have a single one."""
    for tokens, width, experts, top_k in ((17, 256, 16, 3), (9, 128, 7, 4), (33, 128, 20, 8)):
        sizes: dict[str, Any] = {"T": tokens, "H": width, "E": experts, "k": top_k}
        yield from crossed(QuantizedCase, format=FORMATS, dtype=request.narrow(), data="partial_sums", **sizes)


def _deep_sums(request: Request) -> Iterator[Case]:
    for tokens, width, inner, experts, top_k in ((17, 128, 256, 6, 2), (40, 256, 512, 4, 2), (3, 128, 384, 8, 4)):
        sizes: dict[str, Any] = {"T": tokens, "H": width, "I": inner, "E": experts, "k": top_k}
        yield from crossed(QuantizedCase, format=FORMATS, dtype=request.narrow(), data="deep_sums", **sizes)


def _laws(request: Request) -> Iterator[Case]:
    formats, dtypes = cycle(SCALED), cycle(request.dtypes)
    for law in OF_TOKENS:
        for _ in range(2):
            yield QuantizedCase(T=18, E=9, k=3, format=next(formats), bias=law not in ("padding_nan",), variant=law,
                                dtype=next(dtypes))  # fmt: skip
    for law in OF_SCALES:
        for format in SCALED:
            if law != "codes_against_scale" or format in ("fp8_block", "fp8_channel", "mxfp4"):
                yield QuantizedCase(T=18, H=384, I=256, format=format, variant=law, dtype=request.dtypes[-1])
        yield QuantizedCase(
            T=5, E=2, H=256, I=256, format="mxfp4", variant=law, dtype=next(dtypes)
        )  # to be interpreted


def _repeats(request: Request) -> Iterator[Case]:
    yield from crossed(QuantizedCase, T=37, E=8, k=4, format=SCALED, dtype=request.dtypes[-1], bias=True)
    yield QuantizedCase(T=130, E=4, k=1, format="fp8_block", dtype=request.dtypes[-1], routing="last")


def _cuda_cases(request: Request) -> dict[str, Iterable[Case]]:
    small = crossed(QuantizedCase, T=(1, 8, 64), format=SCALED, E=16, k=4, dtype=request.dtypes[-1], bias=True)
    large = [
        QuantizedCase(T=16, H=4096, I=1024, E=300, k=8, routing="last", data="exact", format="fp8_block",
                      dtype=request.dtypes[-1]),
    ]  # fmt: skip
    return on_cuda(small, large)
