"""The bounds: values are the references', sigmas are calibrated, limits follow from the false alarms wanted."""

from importlib import import_module
from math import log, sqrt

import pytest
import torch

from harness import rounding
from harness.cases import plan
from harness.cases.request import Request
from harness.stages import stage_module

STAGES = ("experts", "grouped_linear", "shared_expert_gate", "moe_block")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def numeric_cases():
    for stage in STAGES:
        yield from [p for p in plan(stage, Request()) if p.check in ("numeric", "contract")][::5]


@pytest.mark.parametrize("planned", list(numeric_cases()), ids=lambda planned: planned.id)
def test_the_value_of_a_bound_is_the_references(planned):
    """The bound walks the same steps with variances beside them; a mistake in either would otherwise go unseen."""
    module = stage_module(planned.case.stage)
    call = module.build(planned.case, "cpu")
    reference = getattr(import_module(f"reference.{planned.case.stage}"), planned.case.stage)
    args = {name: widened(value) for name, value in call.args.items()}
    keywords = {name: widened(value) for name, value in call.keywords.items()}
    value = reference(*args.values(), **keywords)
    bound = module.expect(call, None)
    assert not value.numel() or float(bound.z(value).abs().max()) < rounding.SAME_IN_FP64
    off = bound.z(value + bound.variance.sqrt() * 2 * rounding.SAME_IN_FP64).abs()
    assert bool((off > rounding.SAME_IN_FP64).all())  # a reference that differs by two millionths of a sigma is seen


def widened(value):
    if isinstance(value, dict):
        return {name: widened(member) for name, member in value.items()}
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("dtype", DTYPES)
def test_ulp_is_the_distance_to_the_next_number(dtype):
    values = torch.cat([torch.linspace(0.9, 4.1, 300), torch.tensor([1.0, 2.0, 0.5, 1000.0, 3e4])]).to(dtype)
    above = torch.nextafter(values, torch.full_like(values, torch.inf))
    assert torch.equal(rounding.ulp(values, dtype), above.double() - values.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_variance_of_a_store_is_measured(dtype):
    values = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    measured = (values.to(dtype).double() - values).square().mean()
    assert float(measured / rounding.store(values, dtype).mean()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("terms", [16, 256, 4096])
def test_a_sequential_fp32_sum_stays_under_its_variance(terms):
    generator = torch.Generator().manual_seed(terms)
    products = torch.randn(2000, terms, generator=generator)
    running = torch.zeros(2000)
    for column in products.T:
        running = running + column
    measured = (running.double() - products.double().sum(1)).square().mean()
    bound = rounding.accumulation(terms) * products.double().square().sum(1).mean()
    assert 0.02 < float(measured / bound) < 1.0


def test_limits_follow_from_the_false_alarms_wanted():
    limit = rounding.max_limit()
    assert 2 * rounding.ELEMENTS_PER_RUN * 2.718281828 ** (-(limit**2) / 2) == pytest.approx(rounding.FALSE_ALARMS)
    assert limit == pytest.approx(sqrt(2 * log(2 * rounding.ELEMENTS_PER_RUN / rounding.FALSE_ALARMS)))
    assert rounding.rms_limit(1) > rounding.rms_limit(64) > rounding.rms_limit(100_000) > 1.0
    assert rounding.rms_limit(100_000) < 1.07
    assert rounding.rms_limit(1000, shared_dof=3, shared_share=0.5) > rounding.rms_limit(1000)


@pytest.mark.parametrize(
    "name", ["expert_output", "gate_up", "activation", "weighted", "partial_sum", "routing_weight"]
)
def test_every_rounding_adds_to_the_variance(name):
    module = stage_module("experts")
    case = next(p.case for p in plan("experts", Request()) if p.check == "numeric" and p.case.dtype == "bf16")
    call = module.build(case, "cpu")
    without, with_it = module.expect(call, ()), module.expect(call, (name,))
    assert bool((with_it.variance >= without.variance * (1 - 1e-9)).all())
    assert float(with_it.variance.mean() / without.variance.mean()) > 1.02
