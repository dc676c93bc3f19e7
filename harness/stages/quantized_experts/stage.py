"""The stage `quantized_experts`: data whose faults show, and what a right result is."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import Bound
from moe_harness.harness.core.call import INTS, Builder, Call
from moe_harness.harness.core.contracts import Declarations
from moe_harness.harness.core.stage import Declared, Truths
from moe_harness.harness.stages.experts import deep_sums, exact, partial_sums, routing
from moe_harness.harness.stages.experts.stage import Experts
from moe_harness.harness.stages.quantized_experts import encoding, special
from moe_harness.harness.stages.quantized_experts.bound import quantized_experts as bound_of
from moe_harness.harness.stages.quantized_experts.cases import FP8, QuantizedCase
from moe_harness.reference.quantized_experts import dequantised

EXACT = ("exact", "codes")  # data on which every rounding is exact; of activations to codes as well
GATE_PARTS = 16  # columns among which the 48 of an exact gate is shared: 3 is a value of every format
# Size of the hidden states where the activation clamps: a twelfth of gate and up lies beyond 7.  So large is the second
# bias then: beside outputs of such hidden values, rounded to codes, one of 0.5 is lost.
CLAMPED = 3.0
PLAIN = 1.5  # and elsewhere: |gate| around 1 to 4


class QuantizedExperts(Experts):
    """The routed experts, with weights as codes and scales."""

    def build(self, case: QuantizedCase, device: str) -> Call:  # type: ignore[override]
        """The call of a case.  Masked slots carry NaN weights or large ones: neither may show."""
        draw = Builder(case, device)
        expert_map, local = routing.expert_map(case)
        topk_ids = routing.masked(case, routing.ids(case, draw), draw)
        paired = case.data == "partial_sums"
        if paired:
            topk_ids = partial_sums.pair_up(topk_ids, case.E, draw)
        topk_weights = routing.weights(case, draw)
        experts, hidden, inner = len(local), case.H, case.I
        if case.data in (*EXACT, "deep_sums") or paired:
            gates = "signs" if case.data != "codes" else "halves" if case.format in FP8 else "alike"
            counted = partial_sums.others(topk_ids, case.E) if paired else topk_ids  # those that add to a result
            x, gate_up, down, topk_weights = exact.draw(
                case, draw, counted, topk_weights, expert_map, local, GATE_PARTS, gates
            )
            if paired:
                partial_sums.oppose(gate_up, down)
                partial_sums.weigh(case, topk_ids, topk_weights)
            if case.data == "deep_sums":
                deep_sums.spread_codes(case, gate_up, down)
            first, second = (encoding.exact(matrix, case.format, draw) for matrix in (gate_up, down))
            if paired:
                _enlarge(second, partial_sums.BITS[case.dtype])
            biases = _whole_biases(case, experts, draw)
        else:
            clamped = case.activation == "swiglu_oai"
            x = draw.large_normal(case.T, hidden, scale=CLAMPED if clamped else PLAIN)
            first = encoding.drawn(experts, 2 * inner, hidden, case.format, draw, hidden**-0.5)
            second = encoding.drawn(experts, hidden, inner, case.format, draw, inner**-0.5)
            first_bias = draw.large_normal(experts, 2 * inner, scale=0.5)
            biases = first_bias, draw.large_normal(experts, hidden, scale=CLAMPED if clamped else 0.5)
            special.make(case, x, first, second, topk_ids, topk_weights)
        hidden_slots = (topk_ids < 0) & (draw.uniform(*topk_ids.shape) < 0.5)
        topk_weights = topk_weights.masked_fill(topk_ids < 0, 3.0).masked_fill(hidden_slots, float("nan"))
        ints = INTS[case.ints]

        def kept(name: str, values: Tensor | None) -> Tensor | None:
            return None if values is None else draw.place(name, values, values.dtype)

        args = {
            "hidden_states": draw.place("hidden_states", x),
            "gate_up_proj": kept("gate_up_proj", first[0]),
            "gate_up_scale": kept("gate_up_scale", first[1]),
            "down_proj": kept("down_proj", second[0]),
            "down_scale": kept("down_scale", second[1]),
            "topk_weights": draw.place("topk_weights", topk_weights, torch.float32 if case.weights == "fp32" else None),
            "topk_ids": draw.place("topk_ids", topk_ids, ints),
        }
        keywords = {
            "format": case.format,
            "activation": case.activation,
            "expert_map": None if expert_map is None else draw.place("expert_map", expert_map, ints),
            "gate_up_bias": draw.place("gate_up_bias", biases[0]) if case.bias else None,
            "down_bias": draw.place("down_bias", biases[1]) if case.bias else None,
        }
        return Call(case, args, keywords, draw.arena)

    def undeclared(self, call: Call, declared: Declarations) -> str | None:
        """Why an implementation does not take this call by its own word."""
        formats = declared.extra.get("formats")
        if formats is not None and call.keywords["format"] not in formats:
            return f"declares the formats {', '.join(formats)}, not {call.keywords['format']}"
        return None

    def expect(self, call: Call, declared: Declared) -> Bound:
        """What a right result may be, within the permitted roundings and those of activations that are declared."""
        return bound_of(*call.args.values(), **call.keywords, declared=declared, quantizes=_quantizes(call))

    def one_result(self, case: Any, declared: Declarations) -> bool:
        """Activations that become codes are rounded whatever they are."""
        return not declared.extra.get("quantizes")

    def truth(self, call: Call, declared: Declared) -> Truths | None:
        """Exact data are exact for activations that are not quantised.

        With data "codes" the activations of a row are codes at its scale, be that a power of two or not: what remains
        is the arithmetic in fp32, and that the scale is itself rounded there.  For int8 that holds where all are alike,
        24 being no code beside 48.
        """
        exact_data, quantizes = call.case.data in EXACT, _quantizes(call)
        case: Any = call.case
        if case.data in ("partial_sums", "deep_sums"):
            exact_data = quantizes is None and (case.data == "deep_sums" or partial_sums.is_exact(case, declared))
        if not exact_data or (quantizes is not None and call.case.data == "exact"):
            return self.expect(call, declared)
        if quantizes is None:
            return self.exact_value(call)
        if quantizes == "int8_token" and call.keywords["format"] in FP8:
            return self.expect(call, declared)
        operands = call.args | {"hidden_states": call.args["hidden_states"].float()}
        return bound_of(*operands.values(), **call.keywords, declared=(), quantizes=None)

    def exact_value(self, call: Call) -> Tensor:
        """The only right result of an exact case, [T, H] in fp64; act(g) is g there."""
        a, k = call.args, call.keywords
        return exact.value(
            a["hidden_states"], _Matrices(a["gate_up_proj"], a["gate_up_scale"], k["format"]),
            _Matrices(a["down_proj"], a["down_scale"], k["format"]), a["topk_weights"], a["topk_ids"],
            activation=k["activation"], expert_map=k["expert_map"], gate_up_bias=k["gate_up_bias"],
            down_bias=k["down_bias"],
        )  # fmt: skip

    def place_of(self, call: Call, row: int, column: int) -> dict[str, Any]:
        return super().place_of(call, row, column) | {"format": call.keywords["format"]}


@dataclass
class _Matrices:
    """What codes and scales stand for, of one expert at a time: all in fp64 are eight times their codes."""

    codes: Tensor
    scale: Tensor | None
    format: str

    def __getitem__(self, expert: Any) -> Any:
        return dequantised(self.codes[expert], None if self.scale is None else self.scale[expert], self.format)


STAGE = QuantizedExperts()


def _quantizes(call: Call) -> str | None:
    """How the implementation of the call says that it quantises activations."""
    found = () if call.declared is None else call.declared.extra.get("quantizes", ())
    return found[0] if found else None


def _enlarge(matrix: special.Matrix, bits: int) -> None:
    """Make the matrix of the first expert 2^bits times as large and the last one's twice that, in place."""
    codes, scale = matrix
    for expert, power in ((0, bits), (-1, bits + 1)):
        if scale is None:
            codes[expert] *= 2.0**power
        elif scale.dtype == torch.uint8:  # exponents
            scale[expert] += power
        else:
            scale[expert] *= 2.0**power


def _whole_biases(case: QuantizedCase, experts: int, draw: Builder) -> tuple[Tensor, Tensor]:
    """Small integers: of gates -3 to -1, of up rows 0, of outputs -1 to 1; with them no output grows beyond 51."""
    first = draw.integers(-3, 0, (experts, 2 * case.I)).float()
    first[:, case.I :] = 0
    return first, draw.integers(-1, 2, (experts, case.H)).float()
