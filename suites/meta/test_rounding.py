"""The bounds: values are the references', sigmas are calibrated, limits follow from the false alarms wanted."""

from importlib import import_module
from math import log, sqrt

import pytest
import torch

from moe_harness.harness.core import bounds
from moe_harness.harness.core.catalogue import get
from moe_harness.harness.core.contracts import Declarations, Subject
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.core.plan import Request, plan
from moe_harness.harness.core.stage import find_stage
from moe_harness.harness.process.worker import explain_id, judge_id
from moe_harness.harness.stages.experts.bound import experts_bound
from moe_harness.harness.stages.experts.faults import _steps as right
from moe_harness.harness.stages.experts.faults import precision
from moe_harness.harness.stages.grouped_linear.bound import grouped_linear_bound
from moe_harness.harness.stages.moe_block.bound import _routing_variance
from moe_harness.harness.stages.moe_block.faults import _steps as blocks
from moe_harness.harness.stages.quantized_experts.faults import _steps as quantized
from moe_harness.harness.stages.shared_expert_gate.bound import gate_bound
from moe_harness.harness.stages.shared_expert_gate.faults import _steps as gates
from moe_harness.reference.experts import activate
from moe_harness.reference.moe_block import RoutingRule
from moe_harness.reference.router import combine_weights, expert_scores

STAGES = ("experts", "grouped_linear", "shared_expert_gate", "moe_block")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def numeric_cases():
    for stage in STAGES:
        yield from [p for p in plan(stage, Request()) if p.check in ("numeric", "contract")][::5]


@pytest.mark.parametrize("planned", list(numeric_cases()), ids=lambda planned: planned.id)
def test_the_value_of_a_bound_is_the_references(planned):
    """The bound walks the same steps with variances beside them; a mistake in either would otherwise go unseen."""
    module = find_stage(planned.case.stage)
    call = module.build(planned.case, "cpu")
    reference = getattr(import_module(f"moe_harness.reference.{planned.case.stage}"), planned.case.stage)
    args = {name: widened(value) for name, value in call.args.items()}
    keywords = {name: widened(value) for name, value in call.keywords.items()}
    value = reference(*args.values(), **keywords)
    bound = module.expect(call, None)
    assert not value.numel() or float(bound.z(value).abs().max()) < bounds.SAME_IN_FP64
    off = bound.z(value + bound.variance.sqrt() * 2 * bounds.SAME_IN_FP64).abs()
    assert bool((off > bounds.SAME_IN_FP64).all())  # a reference that differs by two millionths of a sigma is seen


def widened(value):
    if isinstance(value, dict):
        return {name: widened(member) for name, member in value.items()}
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("dtype", DTYPES)
def test_ulp_is_the_distance_to_the_next_number(dtype):
    values = torch.cat([torch.linspace(0.9, 4.1, 300), torch.tensor([1.0, 2.0, 0.5, 1000.0, 3e4])]).to(dtype)
    above = torch.nextafter(values, torch.full_like(values, torch.inf))
    assert torch.equal(bounds.ulp(values, dtype), above.double() - values.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_variance_of_a_store_is_measured(dtype):
    values = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    measured = (values.to(dtype).double() - values).square().mean()
    assert float(measured / bounds.store(values, dtype).mean()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("terms", [16, 256, 4096])
def test_a_sequential_fp32_sum_stays_under_its_variance(terms):
    generator = torch.Generator().manual_seed(terms)
    products = torch.randn(2000, terms, generator=generator)
    running = torch.zeros(2000)
    for column in products.T:
        running = running + column
    measured = (running.double() - products.double().sum(1)).square().mean()
    bound = bounds.accumulation(terms) * products.double().square().sum(1).mean()
    assert 0.02 < float(measured / bound) < 1.0


def test_limits_follow_from_the_false_alarms_wanted():
    limit = bounds.max_limit()
    assert 2 * bounds.ELEMENTS_PER_RUN * 2.718281828 ** (-(limit**2) / 2) == pytest.approx(bounds.FALSE_ALARMS)
    assert limit == pytest.approx(sqrt(2 * log(2 * bounds.ELEMENTS_PER_RUN / bounds.FALSE_ALARMS)))
    assert bounds.rms_limit(1) > bounds.rms_limit(64) > bounds.rms_limit(100_000) > 1.0
    assert bounds.rms_limit(100_000) < 1.07
    assert bounds.rms_limit(0) == bounds.rms_limit(1)  # an empty row has no source, and no limit below that of one
    assert bounds.rms_limit(1000, shared_dof=3, shared_share=0.5) > bounds.rms_limit(1000)


@pytest.mark.parametrize(
    "name", ["expert_output", "gate_up", "activation", "weighted", "partial_sum", "routing_weight"]
)
def test_every_rounding_adds_to_the_variance(name):
    module = find_stage("experts")
    case = next(p.case for p in plan("experts", Request()) if p.check == "numeric" and p.case.dtype == "bf16")
    call = module.build(case, "cpu")
    without, with_it = module.expect(call, ()), module.expect(call, (name,))
    assert bool((with_it.variance >= without.variance * (1 - 1e-9)).all())
    assert float(with_it.variance.mean() / without.variance.mean()) > 1.02


# Share of what the bound adds for a rounding that the rounding itself comes to.  "weighted" is permitted before the
# second product and after it, and happens once; the running sums' sizes are bounded by the last.
MEASURED = {"gate_up": 1.0, "activation": 1.0, "expert_output": 1.0, "routing_weight": 1.0,
            "weighted": 0.5, "partial_sum": 0.56}  # fmt: skip


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_what_a_rounding_adds_is_what_it_does(name, activation):
    """Too wide a bound fails nobody who is right, so only a measurement sees it."""
    random = torch.Generator().manual_seed(7)
    hidden = torch.randn(256, 128, generator=random).bfloat16()
    gate_up, down = (torch.randn(8, *size, generator=random).mul(0.1).bfloat16() for size in ((192, 128), (128, 96)))
    weights, ids = torch.rand(256, 4, generator=random) + 0.1, torch.rand(256, 8, generator=random).argsort(-1)[:, :4]
    data = hidden, gate_up, down, weights, ids
    error = experts_rounded(name, *data, activation) - experts_rounded("", *data, activation)
    without, with_it = (experts_bound(*data, activation=activation, expert_map=None, declared=declared)
                        for declared in ((), (name,)))  # fmt: skip
    measured = error.square().mean() / (with_it.variance - without.variance).mean()
    assert float(measured) == pytest.approx(MEASURED[name], rel=0.12)


def experts_rounded(name, hidden, gate_up, down, weights, ids, activation):
    """The layer in fp64, with bf16 at the one place that `name` tells."""

    def at(place, values):
        return bf16(values) if place == name else values

    out, weights = torch.zeros(hidden.shape, dtype=torch.float64), at("routing_weight", weights.double())
    for slot, chosen in enumerate(ids.T):
        for expert in chosen.unique().tolist():
            tokens = (chosen == expert).nonzero()[:, 0]
            gate, up = at("gate_up", hidden[tokens].double() @ gate_up[expert].double().T).chunk(2, -1)
            inner = at("activation", at("activation", activate(gate, activation)) * up)
            output = at("expert_output", inner @ down[expert].double().T)
            term = at("weighted", weights[tokens, slot, None] * output)
            out[tokens] = at("partial_sum", out[tokens] + term) if slot else term
    return out


def bf16(values):
    return values.float().bfloat16().double()


@pytest.mark.parametrize("unequal", [0.0, 1.0, 2.0])
def test_the_mean_square_of_a_row_varies_as_its_sources_say(unequal):
    """64 hidden values whose variances spread by e^unequal behind 256 elements; chi-squared would have 2 / 256."""
    random = torch.Generator().manual_seed(5)
    down, spread = (torch.randn(size, generator=random, dtype=torch.float64) for size in ((256, 64), (64,)))
    of_hidden, squares = (unequal * spread).exp(), down.square()
    variance = (of_hidden @ squares.T)[None]
    noise = torch.randn(20_000, 64, generator=random, dtype=torch.float64) * of_hidden.sqrt()
    mean_squares = ((noise @ down.T).square() / variance).mean(1)
    concentrated = (of_hidden * squares.mean(0)).square().sum()[None]
    sources = bounds.sources_of(variance, torch.zeros_like(variance), concentrated)
    assert float(mean_squares.var()) == pytest.approx(2 / float(bounds.independent(sources, 256)), rel=0.15)


def test_the_bound_of_a_gate_is_what_its_roundings_do():
    random = torch.Generator().manual_seed(3)
    hidden, weight, output = (torch.randn(s, generator=random).bfloat16() for s in ((2000, 8), (1, 8), (2000, 16)))
    bound = gate_bound(hidden, weight, output, declared=())
    gate = bf16(bf16(hidden.double() @ weight.double().T).sigmoid())
    measured = (gate * output.double() - bound.value).square().mean() / bound.shared.mean()
    assert float(measured) == pytest.approx(1.0, rel=0.12)


@pytest.mark.parametrize("biased", [False, True])
def test_the_bound_of_a_grouped_linear_is_what_its_roundings_do(biased):
    random = torch.Generator().manual_seed(4)
    x, weight, bias = (torch.randn(s, generator=random).bfloat16() for s in ((300, 64), (3, 80, 64), (3, 80)))
    sizes = torch.tensor([100, 100, 100])
    bound = grouped_linear_bound(x, weight, sizes, bias=bias if biased else None, declared=())
    product = torch.einsum("esk,enk->esn", x.double().view(3, 100, 64), weight.double())
    out = bf16(bf16(product) + bias.double()[:, None] if biased else product).reshape(300, 80)
    assert float((out - bound.value).square().mean() / bound.variance.mean()) == pytest.approx(1.0, rel=0.12)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_errors_of_logits_move_routing_weights_as_the_bound_says(scoring, renormalize):
    """A weight moves by its own expert's error, less that of what normalises it, of which its own is a part."""
    random = torch.Generator().manual_seed(5)
    logits = torch.randn(30, 8, generator=random, dtype=torch.float64)
    of_logits = 1e-8 * (torch.rand(30, 8, generator=random, dtype=torch.float64) + 0.1)
    ids = logits.topk(3).indices

    def weights_of(logits):
        scores = expert_scores(logits, scoring)
        return combine_weights(scores, ids.expand(*scores.shape[:-1], 3), renormalize=renormalize,
                               routed_scaling_factor=1.0)  # fmt: skip

    weights, rule = weights_of(logits), RoutingRule(3, scoring, renormalize)
    own, common = _routing_variance(logits, of_logits, ids, weights, rule)
    noise = torch.randn(20_000, 30, 8, generator=random, dtype=torch.float64) * of_logits.sqrt()
    measured = (weights_of(logits + noise) / weights - 1).square().mean(0)
    own = own / weights.square()
    share = weights if renormalize or scoring == "softmax" else torch.zeros_like(weights)
    assert torch.allclose(measured, own * (1 - 2 * share) + common, rtol=0.08, atol=0.0)


def _sums_slots_in_16_bits(*call, **options):
    """Each slot is added to what the output holds by then, in the inputs' dtype."""
    return precision.slots_summed_in_the_inputs_dtype(*call, **options)


def _sums_by_expert_in_16_bits(x, *call, **options):
    """The same in the order of the experts' numbers, as a loop over them does."""

    def combine(slots, weights, ids):
        order = ids.argsort(1)
        slots = slots.gather(1, order[..., None].expand_as(slots))
        total = torch.zeros_like(slots[:, 0], dtype=x.dtype)
        for slot, weight in zip(slots.unbind(1), weights.gather(1, order).unbind(1), strict=True):
            total = (total.to(slot.dtype) + weight[:, None] * slot).to(x.dtype)
        return total.to(slots.dtype)

    return right.run(x, *call, **options, combine=combine)


def _sums_slots_in_32_bits(x, *call, **options):
    """Right, with every rounding but that of partial sums."""

    def combine(slots, weights, ids):
        share = (weights.to(x.dtype).float()[..., None] * slots.to(x.dtype).float()).to(x.dtype)
        return share.float().sum(1).to(slots.dtype)

    return right.run(x, *call, **options, combine=combine)


FROM_THREE = {3, 4, 5, 6, 8}  # slots
FROM_TWO = {2, *FROM_THREE}
OTHERS = ("gate_up", "activation", "expert_output", "weighted", "routing_weight")


@pytest.mark.parametrize(
    ("kernel", "rounds", "seen"),
    [
        (_sums_slots_in_16_bits, (), FROM_TWO),
        (_sums_slots_in_16_bits, ("gate_up", "activation", "routing_weight"), FROM_TWO),
        (_sums_slots_in_16_bits, ("weighted",), FROM_THREE),  # with two slots it rounds what is permitted, and no more
        (_sums_slots_in_16_bits, OTHERS, FROM_THREE),
        (_sums_by_expert_in_16_bits, OTHERS, FROM_THREE),
        (_sums_slots_in_16_bits, (*OTHERS, "partial_sum"), set()),
        (_sums_slots_in_32_bits, OTHERS, set()),
    ],
)
def test_a_sum_over_few_slots_in_16_bits_is_seen_beside_every_other_declared_rounding(kernel, rounds, seen):
    declared = Declarations(dtypes=("fp16", "bf16"), rounds=rounds)
    trial = Trial(Subject("experts", "kernel.py:kernel", kernel, declared, None), "cpu")
    cases = [p for p in plan("experts", Request(dtypes=("fp16", "bf16"))) if p.case.data == "partial_sums"]
    assert {p.case.k for p in cases} == FROM_TWO
    status = {p.id: judge_id(trial, p.id).status for p in cases}
    assert status == {p.id: "failed" if p.case.k in seen else "passed" for p in cases}


SPLIT = {  # a depth whose shares are added in 16 bits; what is right
    "experts": ("depth_split_in_16_bits", right.run), "moe_block": ("depth_split_in_16_bits_in_block", blocks.run),
    "quantized_experts": ("depth_of_codes_split_in_16_bits", quantized.run),
    "shared_expert_gate": ("dot_product_split_in_16_bits", gates.run),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("stage", SPLIT)
def test_a_depth_whose_shares_are_added_in_16_bits_fails_in_three_shapes_and_is_told(stage, dtype):
    """Beside every permitted rounding, which says nothing of sums over depth; the same kernel with wide sums passes."""
    fault, wide = SPLIT[stage]
    planned = [p for p in plan(stage, Request(dtypes=(dtype,))) if p.case.data == "deep_sums"]
    for function, status in ((get(fault).function, "failed"), (wide, "passed")):
        trial = Trial(Subject(stage, "kernel.py:kernel", function, Declarations(), None), "cpu")
        assert {p.id: judge_id(trial, p.id).status for p in planned} == dict.fromkeys((p.id for p in planned), status)
        if status == "failed":
            assert [entry["fault"] for entry in explain_id(trial, planned[0].id, 5.0).diagnosis] == [fault]
    assert len({p.case.shape() for p in planned}) >= 3


@pytest.mark.parametrize("stage", SPLIT)
def test_a_gpu_is_asked_for_deep_sums_too_and_torch_adds_no_shares_in_16_bits_meanwhile(stage):
    settings, seen = torch.backends.cuda.matmul, []

    def watching(*call, **options):
        seen.append((settings.allow_bf16_reduced_precision_reduction, settings.allow_fp16_reduced_precision_reduction))
        return SPLIT[stage][1](*call, **options)

    before = settings.allow_bf16_reduced_precision_reduction, settings.allow_fp16_reduced_precision_reduction
    here, there = (
        [p for p in plan(stage, Request(device=device)) if p.case.data == "deep_sums"] for device in ("cpu", "cuda")
    )
    assert {p.id for p in here} == {p.id for p in there}
    trial = Trial(Subject(stage, "kernel.py:kernel", watching, Declarations(), None), "cpu")
    assert judge_id(trial, here[0].id).status == "passed"
    assert set(seen) == {(False, False)}
    assert before == (settings.allow_bf16_reduced_precision_reduction, settings.allow_fp16_reduced_precision_reduction)


SUMMED = {
    "experts": ("slots_summed_in_the_inputs_dtype", right.run),
    "quantized_experts": ("slots_added_in_the_inputs_dtype", quantized.run),
    "moe_block": ("slots_summed_in_the_inputs_dtype_in_block", blocks.run),
}


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("stage", SUMMED)
def test_a_sum_over_slots_in_16_bits_fails_in_three_shapes_of_each_kind_and_is_told(stage, dtype):
    """Of each format and each dtype: many kernels have one.  The same kernel with a wide sum passes all of them."""
    fault, wide = SUMMED[stage]
    planned = [p for p in plan(stage, Request(dtypes=(dtype,))) if p.case.data == "partial_sums" and p.case.k > 2]
    declared = Declarations(rounds=("activation", "weighted"))
    for function, status in ((get(fault).function, "failed"), (wide, "passed")):
        trial = Trial(Subject(stage, "kernel.py:kernel", function, declared, None), "cpu")
        assert {p.id: judge_id(trial, p.id).status for p in planned} == dict.fromkeys((p.id for p in planned), status)
        if status == "failed":
            assert [entry["fault"] for entry in explain_id(trial, planned[0].id, 5.0).diagnosis] == [fault]
    kinds = {getattr(p.case, "format", "") for p in planned}
    shapes = {kind: {p.case.shape() for p in planned if getattr(p.case, "format", "") == kind} for kind in kinds}
    assert all(len(found) >= 3 for found in shapes.values())
