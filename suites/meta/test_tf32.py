"""tf32 where it is declared: every way that tensor cores read their operands passes, anything coarser does not.

The products are emulated on the CPU: operands of fp32 are cut toward zero (as the hardware does with them) or rounded
to nearest (as a conversion does) to 10 bits behind the leading one, and summed in fp32.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_harness.harness.core.bounds import max_limit
from moe_harness.harness.core.compare import against_bound
from moe_harness.harness.core.stage import find_stage
from moe_harness.harness.stages.experts.cases import ExpertsCase
from moe_harness.harness.stages.experts.faults import _steps as experts
from moe_harness.harness.stages.grouped_linear.cases import GroupedLinearCase
from moe_harness.harness.stages.moe_block.cases import FAMILIES, MoeBlockCase
from moe_harness.harness.stages.shared_expert_gate.cases import GateCase
from moe_harness.reference import moe_block as block
from moe_harness.reference.grouped_linear import row_experts

Product = Callable[[Tensor, Tensor], Tensor]
Cut = Callable[[Tensor], Tensor]
DECLARED = ("tf32",)


def kept(bits: int, *, nearest: bool) -> Cut:
    """fp32 with so many bits behind the leading one."""
    dropped = 23 - bits

    def convert(values: Tensor) -> Tensor:
        codes = values.float().view(torch.int32) + (1 << dropped - 1 if nearest else 0)
        return (codes & -(1 << dropped)).view(torch.float32)

    return convert


def product(rows: Cut, weight: Cut) -> Product:
    return lambda x, w: rows(x.float()) @ weight(w.float()).T


def same(values: Tensor) -> Tensor:
    return values


cut, near = kept(10, nearest=False), kept(10, nearest=True)
bf16, nine = kept(7, nearest=True), kept(9, nearest=False)

# (first product, second product) of an expert
RIGHT = {
    "both cut": (product(cut, cut), product(cut, cut)),
    "both to nearest": (product(near, near), product(near, near)),
    "weights cut": (product(same, cut), product(same, cut)),
    "rows cut": (product(cut, same), product(cut, same)),
    "rows to nearest, weights cut": (product(near, cut), product(near, cut)),
    "first cut, second in fp32": (product(cut, cut), product(same, same)),
    "first in fp32, second cut": (product(same, same), product(cut, cut)),
    "first cut, second to nearest": (product(cut, cut), product(near, near)),
    "first to nearest, second cut": (product(near, near), product(cut, cut)),
    "all in fp32": (product(same, same), product(same, same)),
}
WRONG = {
    "operands of bf16": (product(bf16, bf16), product(bf16, bf16)),
    "rows of bf16": (product(bf16, cut), product(bf16, cut)),
    "second product of bf16": (product(cut, cut), product(bf16, bf16)),
    "cut to 9 bits": (product(nine, nine), product(nine, nine)),
    "what is cut is cut again": (lambda x, w: product(cut, cut)(x, w) * (1 - 2**-10), product(cut, cut)),
    "last column of H lost": (lambda x, w: product(cut, cut)(x[:, :-1], w[:, :-1]), product(cut, cut)),
    "last column of I lost": (product(cut, cut), lambda x, w: product(cut, cut)(x[:, :-1], w[:, :-1])),
}
SHAPES = [
    ExpertsCase(T=t, H=h, I=i, E=e, k=k, activation=a, seed=n)
    for n, (t, h, i, e, k, a) in enumerate([
        (1, 1, 1, 1, 1, "silu"), (5, 2, 3, 2, 2, "gelu_tanh"), (3, 33, 16, 4, 2, "silu"), (17, 64, 48, 8, 2, "silu"),
        (64, 192, 96, 8, 3, "gelu_tanh"), (24, 768, 256, 4, 2, "silu"), (100, 96, 48, 16, 8, "silu"),
        (90, 129, 257, 8, 4, "gelu_tanh"), (2, 512, 600, 4, 4, "silu"), (33, 1024, 64, 2, 1, "silu"),
    ])
]  # fmt: skip
LARGE = [case for case in SHAPES if case.T * case.H > 4000]  # enough elements to see a bit more in every product


def headroom(case: ExpertsCase, products: tuple[Product, Product], declared: tuple[str, ...] = DECLARED) -> float:
    """Largest statistic over its limit; more than 1 is a failure."""
    stage = find_stage("experts")
    call = stage.build(case, "cpu")
    out = experts.run(*call.args.values(), **call.keywords, first=products[0], second=products[1])
    return against_bound(stage, call, stage.expect(call, declared), out).worst


@pytest.mark.parametrize("how", RIGHT)
def test_every_way_to_read_operands_as_tf32_passes_with_room(how: str) -> None:
    """A GPU sums in other orders; of these emulations the largest measures 0.73, over 119 shapes."""
    assert max(headroom(case, RIGHT[how]) for case in SHAPES) < 0.8


@pytest.mark.parametrize("how", WRONG)
def test_anything_coarser_fails(how: str) -> None:
    found = [headroom(case, WRONG[how]) for case in LARGE]
    assert min(found) > 1, found


@pytest.mark.parametrize("how", ["both cut", "both to nearest", "weights cut"])
def test_tf32_fails_where_it_is_not_declared(how: str) -> None:
    assert all(headroom(case, RIGHT[how], ()) > 10 for case in SHAPES if case.H > 2)


def test_a_bias_of_one_sign_is_no_error_up_to_where_it_leads() -> None:
    """The drift of truncated products is several sigmas: as a variance it would have hidden errors of that size."""
    stage = find_stage("experts")
    call = stage.build(SHAPES[5], "cpu")
    bound = stage.expect(call, DECLARED)
    low, high = bound.drift
    furthest = bound.value + torch.where(high > -low, high, low)
    assert float(((furthest - bound.value) / bound.variance.sqrt()).abs().max()) > max_limit() / 2
    assert float(bound.z(furthest).abs().max()) < 1e-6
    assert float(bound.z(bound.value - (furthest - bound.value)).abs().max()) > max_limit() / 2


# ------------------------------------------------------------------------------------------- the other stages' products


@pytest.mark.parametrize("convert", [cut, near])
@pytest.mark.parametrize("case", [GroupedLinearCase(S=70, K=129, N=200, E=3), GroupedLinearCase(S=9, K=1, N=8, E=2)])
def test_grouped_linear_passes(case: GroupedLinearCase, convert: Cut) -> None:
    stage = find_stage("grouped_linear")
    call = stage.build(case, "cpu")
    x, weight, sizes = call.args.values()
    owners = row_experts(sizes)
    out = torch.stack([product(convert, convert)(row[None], weight[e])[0] for row, e in zip(x, owners, strict=True)])
    assert against_bound(stage, call, stage.expect(call, DECLARED), out).worst < 0.8
    assert against_bound(stage, call, stage.expect(call, ()), out).findings


def test_the_columns_of_a_row_share_the_errors_of_what_is_cut_and_no_others() -> None:
    """Seven operands cut make 64 columns err together; the roundings of fp32 are each column's own."""
    stage = find_stage("grouped_linear")
    call = stage.build(GroupedLinearCase(S=9, K=7, N=64, E=2), "cpu")
    assert bool((stage.expect(call, DECLARED).sources[:, 0] <= 7).all())
    assert bool(stage.expect(call, ()).sources[:, 0].isinf().all())


@pytest.mark.parametrize("convert", [cut, near])
def test_the_gate_passes(convert: Cut) -> None:
    stage = find_stage("shared_expert_gate")
    call = stage.build(GateCase(lead="70", H=256, D=96), "cpu")
    hidden, weight, shared = call.args.values()
    out = product(convert, convert)(hidden, weight).sigmoid() * shared
    assert against_bound(stage, call, stage.expect(call, DECLARED), out).worst < 0.8
    assert against_bound(stage, call, stage.expect(call, ()), out).findings


@pytest.mark.parametrize("convert", [cut, near])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_passes_its_router_too(family: str, convert: Cut) -> None:
    stage = find_stage("moe_block")
    call = stage.build(MoeBlockCase(family=family, T=33, H=192, I=64, shared=80, E=16, k=4), "cpu")
    out = block_by(product(convert, convert), *call.args.values())
    assert against_bound(stage, call, stage.expect(call, DECLARED), out).worst < 0.8
    assert against_bound(stage, call, stage.expect(call, ()), out).findings
    lost = block_by(lambda x, w: product(convert, convert)(x[:, :-1], w[:, :-1]), *call.args.values())
    assert against_bound(stage, call, stage.expect(call, DECLARED), lost).findings


def block_by(multiply: Product, x: Tensor, weights: dict[str, Tensor], config: dict) -> Tensor:
    """A block all of whose products are made by `multiply`."""

    def mlp(rows: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return multiply(block.activate(multiply(rows, gate), "silu") * multiply(rows, up), down)

    routing_weights, ids = block.routing(multiply(x, weights["gate.weight"]), weights, config)
    gate_up, down = weights["experts.gate_up_proj"], weights["experts.down_proj"]
    out = experts.run(x, gate_up, down, routing_weights, ids, first=multiply, second=multiply)
    for prefix in ("shared_expert", "shared_experts"):
        if f"{prefix}.down_proj.weight" in weights:
            term = mlp(x, *(weights[f"{prefix}.{name}"] for name in block.SHARED_EXPERT))
            gate = weights.get("shared_expert_gate.weight")
            out = out + (term if gate is None else multiply(x, gate).sigmoid() * term)
    return out
