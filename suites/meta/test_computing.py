"""The rounding report, on implementations whose way of computing is known."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from moe_harness.harness.core.contracts import ROUNDINGS, load
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.diagnosis.numerics_probes import accumulators, how_it_computes, operand_bits, stores

RIGHT = Path(__file__).parent / "right"
STAGES = "moe_harness.harness.stages"
GATES = f"{STAGES}.shared_expert_gate.faults.gates"


def trial(stage: str, spec: str) -> Trial:
    return Trial(load(stage, spec), "cpu")


def right(stage: str, name: str) -> Trial:
    return trial(stage, f"{RIGHT / stage}.py:{name}")


def stored(subject: Trial, dtype: str) -> set[str]:
    """The roundings found; every one of the contract must have been decided."""
    found = stores(subject, dtype)
    assert set(found) == set(ROUNDINGS)
    return {name for name, yes in found.items() if yes}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("loop_fp32", set()),
        ("double_inside", set()),
        ("round_every_stage", set(ROUNDINGS)),
        ("running_sum_over_slots", {"partial_sum"}),
        ("slots_in_reverse", {"weighted"}),
        ("weight_in_model_dtype", {"routing_weight"}),
        ("sorted_and_grouped", {"activation"}),
        ("round_gate_up", {"gate_up", "expert_output"}),
    ],
)
def test_stores_are_found(name: str, wanted: set[str], dtype: str) -> None:
    assert stored(right("experts", name), dtype) == wanted


@pytest.mark.parametrize("name", ["loop", "batched", "grouped_mm"])
def test_torch_rounds_as_it_declares(name: str) -> None:
    subject = trial("experts", f"torch:{name}")
    assert stored(subject, "bf16") == set(subject.subject.declared.rounds or ())


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("name", ["eager", "grouped_mm", "batched_mm"])
def test_transformers_rounds_within_what_is_declared(name: str) -> None:
    subject = trial("experts", f"transformers:{name}")
    found = stored(subject, "bf16")
    assert {"gate_up", "activation", "expert_output"} <= found <= set(subject.subject.declared.rounds or ())


@pytest.mark.parametrize(
    ("name", "bits", "block"),
    [("sequential_chunks", 24, 16), ("split_k", 24, 48), ("double_inside", None, None)],
)
def test_accumulators_are_found(name: str, bits: int | None, block: int | None) -> None:
    for found in accumulators(right("experts", name), "bf16").values():
        assert found == {"bits": bits, "block": block}


def test_a_bf16_accumulator_shows_in_its_product_alone() -> None:
    found = accumulators(trial("experts", f"{STAGES}.experts.faults.precision:bf16_accumulator"), "bf16")
    assert found["the first product"] == {"bits": 8, "block": 16}
    assert found["the second product"]["bits"] == 24


@pytest.mark.parametrize(
    ("stage", "spec", "bits"),
    [
        ("grouped_linear", "torch:loop", 24),
        ("grouped_linear", f"{STAGES}.grouped_linear.faults.products:silent_tf32", 11),
        ("experts", f"{STAGES}.experts.faults.precision:undeclared_tf32", 11),
        ("experts", f"{STAGES}.experts.faults.precision:fp32_computed_in_bf16", 8),
    ],
)
def test_bits_of_fp32_operands(stage: str, spec: str, bits: int) -> None:
    assert operand_bits(trial(stage, spec)) == bits


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("loop_fp32", "by ascending expert"),
        ("slots_in_reverse", "from the last to the first"),
        ("running_sum_over_slots", "in their order"),
    ],
)
def test_order_of_the_slots(name: str, words: str) -> None:
    assert f"sums the slots of a token one after the other, {words}" in how_it_computes(right("experts", name))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sequential_chunks", "accumulates the products in fp32 (24 bits), 16 terms at a time"),
        ("running_sum_over_slots", "accumulates the products in fp32 (24 bits), no neighbouring terms beforehand"),
        ("double_inside", "more than 27 bits, or in an order in which none are lost. In fp32 it accumulates"),
    ],
)
def test_accumulators_are_told_in_words(name: str, words: str) -> None:
    told = how_it_computes(right("experts", name))
    assert words in told
    assert "sums the slots of a token in " not in told, "that the running sum is stored is told already"


def test_what_is_narrower_in_one_place_is_told_there() -> None:
    told = how_it_computes(trial("experts", f"{STAGES}.experts.faults.precision:bf16_accumulator"))
    assert "the first product in bf16 (8 bits), 16 terms at a time; accumulates the second product in fp32" in told
    told = how_it_computes(trial("grouped_linear", f"{STAGES}.grouped_linear.faults.products:silent_tf32"))
    assert "rounds the operands of products to 11 bits (fp16 or tf32)" in told.partition("In fp32")[2]
    assert "rounds the operands" not in told.partition("In fp32")[0]


def test_the_paragraph_claims_only_what_was_probed() -> None:
    assert how_it_computes(right("experts", "only_bf16")).startswith("In bf16 it ")
    assert "fp16" not in how_it_computes(right("experts", "only_bf16"))


def test_an_implementation_that_refuses_every_probe_is_said_nothing_about() -> None:
    def refuses(*args: object, **keywords: object) -> None:
        raise NotImplementedError("nothing")

    subject = trial("grouped_linear", "torch:loop")
    refusing = Trial(type(subject.subject)("grouped_linear", "x", refuses, subject.subject.declared, None), "cpu")
    assert how_it_computes(refusing) == ""


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("fp32_inside", set()), ("gate_in_model_dtype", {"logit", "gate"}), ("by_tanh", set()), ("chunked_dot", set())],
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_stores_of_a_gate_are_found(name: str, wanted: set[str], dtype: str) -> None:
    found = stores(right("shared_expert_gate", name), dtype)
    assert set(found) == {"logit", "gate"}
    assert {stored for stored, yes in found.items() if yes} == wanted


@pytest.mark.parametrize(("spec", "bits"), [("torch:loop", 24), (f"{GATES}:bf16_dot_product", 8)])
def test_accumulator_of_a_gate_is_found(spec: str, bits: int) -> None:
    subject = trial("shared_expert_gate", spec)
    assert accumulators(subject, "bf16")["the product"]["bits"] == bits


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lowest_index_first", "In bf16, fp16 and fp32 it takes the lower ids among equal scores"),
        ("highest_index_first", "takes the higher ids among equal scores"),
        ("weights_in_logit_dtype", "returns weights in bf16."),
        ("weights_rounded_early", "weights in fp32 that hold no more bits than bf16. In fp16 it"),
        ("softmax_by_hand", "returns weights in fp32, computed in fp32."),
    ],
)
def test_a_router_is_described(name: str, words: str) -> None:
    assert words in how_it_computes(right("router", name))


def test_scores_off_by_more_than_fp32_are_told() -> None:
    def coarse(router_logits, *, top_k, **options):
        weights, ids = router_logits.double().softmax(-1).topk(top_k)
        return (weights * 1.001).float(), ids

    given = trial("router", "torch:loop").subject
    subject = Trial(type(given)("router", "given", coarse, given.declared, None), "cpu")
    assert "off by 0.001 of their size" in how_it_computes(subject)
