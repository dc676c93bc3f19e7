"""The cause of a failure is found where a stage yields several tensors, or writes into its operands."""

import pytest
import torch
from torch import Tensor

from moe_harness.harness.core.case import parse_id
from moe_harness.harness.core.catalogue import get
from moe_harness.harness.core.contracts import Declarations, Subject
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.core.stage import find_stage
from moe_harness.harness.diagnosis.candidates import results
from moe_harness.harness.diagnosis.search import explain

SECONDS = 60.0  # whatever else the machine does


def layer_norm(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None):
    """As PyTorch has it, in other steps than those of the catalogue."""
    total = x if residual is None else x + residual
    out = torch.nn.functional.layer_norm(total.float(), total.shape[-1:], weight.float(), None, eps).to(x.dtype)
    return out if residual is None else (out, total)


def told(stage: str, function, case: str) -> list[str]:
    trial = Trial(Subject(stage, "kernel", function, Declarations.of(function), None), "cpu")
    return [entry["fault"] for entry in explain(trial, parse_id(f"{stage}/numeric/{case}")[2], SECONDS)]


@pytest.mark.parametrize("case", ["lead=5", "lead=9,H=128,residual=1"])
def test_a_stranger_s_layer_norm_is_named_with_a_residual_too(case: str) -> None:
    assert told("rms_norm", layer_norm, case)[:1] == ["layer_norm"]


@pytest.mark.parametrize("name", ["neighbours_turned", "keys_not_turned", "keys_kept_as_values", "minus_one_wraps"])
def test_what_is_written_in_place_tells_the_cause(name: str) -> None:
    fault = get(name)
    assert told("rope_cache", fault.function, "T=9,slots=some")[:1] == [name]


def test_a_suspect_leaves_the_caches_as_it_found_them() -> None:
    stage = find_stage("rope_cache")
    call = stage.build(parse_id("rope_cache/numeric/T=9")[2], "cpu")
    before = [call.args[name].clone() for name in ("key_cache", "value_cache")]
    (found,) = results(stage, get("turned_the_other_way"), [call])
    after = [call.args[name] for name in ("key_cache", "value_cache")]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert not torch.equal(found[1], before[0])
