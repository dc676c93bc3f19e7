"""The stage `model` judges: right models pass, each wrong one fails, and what cannot be asked is said."""

import pytest
import torch

from moe_harness.fixtures import checkpoints
from moe_harness.harness.core.contracts import load
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.core.plan import Request, plan
from moe_harness.harness.process.worker import judge_id
from moe_harness.harness.stages.model import noise
from moe_harness.harness.stages.model.cases import ModelCase
from moe_harness.harness.stages.model.noise import logit_bound
from moe_harness.harness.stages.model.stage import ask
from moe_harness.reference.model import Model
from moe_harness.suites.model import wrong_models

FILE = "moe_harness.suites.model.wrong_models"
WRONG = [
    "gate_and_up_swapped", "norms_swapped", "key_norm_for_query_norm", "theta_ignored", "epsilon_too_large",
    "never_renormalised", "one_expert_less", "experts_shifted", "last_layer_lost", "first_prompt_token_lost",
    "padded_without_a_mask", "not_greedy", "one_token_short", "backwards", "one_layer_scaled",
]  # fmt: skip
CASES = [
    "model/numeric/variant=layers,seed=3", "model/numeric/variant=logits,seed=4", "model/numeric/variant=tokens,new=6",
    "model/numeric/variant=logits,dtype=bf16,seed=5", "model/numeric/variant=layers,dtype=bf16,seed=6",
    "model/numeric/variant=tokens,dtype=bf16,new=6,seed=7",
]  # fmt: skip


def statuses(spec: str, cases: list[str] = CASES) -> dict[str, str]:
    trial = Trial(load("model", spec), "cpu")
    return {case: judge_id(trial, case).status for case in cases}


@pytest.mark.parametrize("spec", [f"{FILE}:right", "transformers", "transformers:grouped_mm"])
def test_right_models_pass(spec: str) -> None:
    if spec.startswith("transformers"):
        pytest.importorskip("transformers")
    assert set(statuses(spec).values()) == {"passed"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_model_fails(name: str, dtype: str) -> None:
    found = statuses(f"{FILE}:{name}", [case for case in CASES if ("bf16" in case) == (dtype == "bf16")])
    assert "failed" in found.values(), found
    assert set(found.values()) <= {"failed", "passed"}, found


def test_a_wrong_layer_is_named() -> None:
    trial = Trial(load("model", f"{FILE}:one_layer_scaled"), "cpu")
    finding = judge_id(trial, "model/numeric/variant=layers,seed=3").findings[0]
    assert finding.where["layer"] == 1, finding


def test_a_model_without_layers_is_unsupported_there_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(wrong_models.Model, "layer")
    found = statuses(f"{FILE}:right", CASES[:3])
    assert list(found.values()) == ["unsupported", "passed", "passed"]


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "failed"), (ValueError, "unsupported")])
def test_what_a_loaded_model_raises_is_its_own(monkeypatch: pytest.MonkeyPatch, error: type, status: str) -> None:
    """Never an error of the judge, whichever method of the model it comes from."""

    def raises(*given: object, **options: object) -> None:
        raise error("not today")

    for method in ("layer", "__call__", "generate"):
        monkeypatch.setattr(wrong_models.Model, method, raises)
    assert set(statuses(f"{FILE}:right", CASES[:3]).values()) == {status}


def test_what_is_no_model_is_failed_by_what_it_lacks() -> None:
    """Not the judge's error."""
    answers = [judge_id(Trial(load("model", f"{FILE}:nothing"), "cpu"), case) for case in CASES[:3]]
    assert [answer.status for answer in answers] == ["unsupported", "failed", "failed"]
    assert "cannot be called" in str(answers[1].findings) and "no method generate" in str(answers[2].findings)


def test_most_of_what_is_planned_can_be_judged() -> None:
    """No case's data leave less than half of its positions to be judged; CannotJudge would say so."""
    trial = Trial(load("model", f"{FILE}:right"), "cpu")
    for planned in plan("model", Request(dtypes=("bf16",)))[::3]:
        answer = judge_id(trial, planned.id)
        assert answer.status == "passed", answer
        told = answer.record.observations.get("share judged", "100 %")
        assert int(told.split()[0]) >= 50


FAMILIES = ("deepseek_v2", "deepseek_v2_lite", "qwen3_omni_moe_talker_text", "qwen3_next")
WRONG_IN = {
    "halves_turned": FAMILIES[:2], "latent_not_normed": FAMILIES[:2], "yarn_not_sharp": FAMILIES[:2],
    "key_parts_in_another_order": FAMILIES[:1], "angles_not_scaled": FAMILIES[1:2],
    "group_limit_ignored": FAMILIES[:1], "routed_scale_forgotten": FAMILIES[:1], "weights_renormalised": FAMILIES[:2],
    "shared_expert_twice": FAMILIES[:2], "shared_expert_twice_behind_its_gate": FAMILIES[2:3],
    "shared_expert_ungated": FAMILIES[2:3], "gate_half_open": FAMILIES[2:3],
    "memory_does_not_fade": FAMILIES[3:], "convolved_backwards": FAMILIES[3:],
}  # fmt: skip
FURTHER = ("variant=layers", "variant=layers,dtype=bf16", "variant=tokens,L=17,new=4")


@pytest.mark.parametrize("family", FAMILIES)
def test_further_families_are_judged(family: str) -> None:
    """The right engine passes, transformers too where it has the family, and each wrong model fails."""
    cases = [f"model/numeric/{rest},family={family},seed={5 + place}" for place, rest in enumerate(FURTHER)]
    assert set(statuses(f"{FILE}:right", cases).values()) == {"passed"}
    if "talker" not in family:
        pytest.importorskip("transformers")
        assert set(statuses("transformers", cases).values()) == {"passed"}
    for name in (name for name, families in WRONG_IN.items() if family in families):
        assert fails(f"{FILE}:{name}", cases), name


def fails(spec: str, cases: list[str]) -> bool:
    """Whether a case fails, and none before it does otherwise than pass."""
    for case in cases:
        (status,) = statuses(spec, [case]).values()
        assert status in ("failed", "passed"), (spec, case, status)
        if status == "failed":
            return True
    return False


def test_of_dense_models_in_bf16_enough_can_be_judged() -> None:
    """Of four random prompts none had certain tokens for long: 55 to 65 %, where less than 50 % are an error."""
    question = ask(ModelCase(variant="tokens", family="qwen3", dtype="bf16", B=5, new=8, seed=26))
    assert question.certain is not None and float(question.certain.double().mean()) >= 0.75


def test_runs_at_once_are_as_far_apart_as_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = checkpoints.config("qwen3", num_hidden_layers=2)
    model, ids = Model(keys, checkpoints.tensors(keys)), torch.arange(2 * 50).view(2, 50) % keys["vocab_size"]
    at_once = logit_bound(model, ids, torch.float32).sigma
    monkeypatch.setattr(noise, "ELEMENTS", 1)
    alone = logit_bound(model, ids, torch.float32).sigma
    assert torch.allclose(at_once.mean(-1), alone.mean(-1), rtol=0.4)
    assert float(at_once.mean()) == pytest.approx(float(alone.mean()), rel=0.05)


def test_each_run_rounds_its_own_angles() -> None:
    """They have no row of their own, and of a dozen runs at once all would have one rounding."""
    rounded = noise.RandomRounding(torch.bfloat16, 64, rows=12, seed=0)("angle", torch.full((5, 4), 100.0).double())
    assert rounded.shape == (12, 5, 4) and bool((rounded[0] != rounded[1:]).all())
