"""Causes of wrong models: each change of the reference is told apart from the others, and strangers' models by it."""

from functools import lru_cache
from pathlib import Path

import pytest
import torch

from moe_harness.harness.core.case import parse_id
from moe_harness.harness.core.contracts import load
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.stages.model.cases import ModelCase
from moe_harness.harness.stages.model.causes import PROMPTS, ModelReply, Suspect, _explaining, _suspects, explain
from moe_harness.harness.stages.model.changes import AROUND, IN_LAYERS
from moe_harness.harness.stages.model.stage import Question, ask
from moe_harness.reference.model import Model, State
from moe_harness.suites.model import wrong_models

FILE = Path(wrong_models.__file__)
FAMILIES = ("qwen3_moe", "qwen2_moe", "deepseek_v2", "qwen3_next")


@lru_cache(maxsize=8)
def question(family: str, variant: str) -> tuple[ModelCase, Question]:
    case = ModelCase(variant=variant, family=family, B=2, L=9, theta=50000.0)
    return case, ask(case)


def seen(what: str, family: str, variant: str) -> ModelReply | None:
    """What the changed reference gives, in fp32; None where the family has nothing of the kind."""
    case, asked = question(family, variant)
    model = Suspect(what).model(Model(asked.keys, {name: weight.double() for name, weight in asked.weights.items()}))
    if model is None:
        return None
    try:
        if variant == "logits":
            return ModelReply(case, asked, model(asked.ids).float())
        layers = [model.layer(i, stream.double(), State()) for i, stream in enumerate(asked.streams)]
        return ModelReply(case, asked, torch.cat(layers).float())
    except KeyError:
        return None


@pytest.mark.parametrize("what", [*IN_LAYERS, *AROUND])
@torch.no_grad()
def test_a_change_is_told_apart(what: str) -> None:
    """In some family it alone explains its own results; in those tried before it is among what explains them."""
    variant = "layers" if what in IN_LAYERS else "logits"
    for family in FAMILIES:
        reply = seen(what, family, variant)
        if reply is None:
            continue
        told = {suspect.what for suspect, _ in _explaining(reply, _suspects(reply), float("inf"))}
        assert what in told or not told, (family, told)  # not told at all: it changes nothing here
        if told == {what}:
            return
    raise AssertionError("no family tells it apart")


@pytest.mark.parametrize("variant", ["layers", "logits", "tokens"])
def test_a_right_model_has_no_cause(variant: str) -> None:
    """Asked as if it had failed."""
    assert causes("right", variant) == []


def causes(name: str, variant: str, family: str = "qwen3_moe") -> list[str]:
    new = ",new=8" if variant == "tokens" else ""
    case = parse_id(f"model/numeric/variant={variant},B=5,family={family}{new}")[2]
    return [cause["fault"] for cause in explain(Trial(load("model", f"{FILE}:{name}"), "cpu"), case, 600)]


WRONG = {
    "gate_and_up_swapped": "mlp: experts: gate and up swapped",
    "norms_swapped": "attention: input norm: the weight of the mlp's norm",
    "key_norm_for_query_norm": "attention: qkv: q's and k's norms swapped",
    "theta_ignored": "attention: rope: theta 500000",
    "one_expert_less": "mlp: router: one expert too few",
    "experts_shifted": "mlp: experts: the first two swapped",
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("variant", ["layers", "logits"])
def test_a_wrong_model_has_its_cause(name: str, variant: str) -> None:
    assert causes(name, variant) == [WRONG[name]]


def test_a_fault_of_one_layer_has_its_place() -> None:
    assert causes("last_layer_lost", "logits") == ["attention: o_proj: nothing is added, in layer 1 alone"]


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("first_prompt_token_lost", "the first token of a prompt is lost"),
        ("padded_without_a_mask", "shorter prompts are padded on the left with token 0, which is seen"),
    ],
)
def test_wrong_tokens_have_their_cause(name: str, cause: str) -> None:
    assert causes(name, "tokens") == [cause]


@torch.no_grad()
def test_a_cause_of_wrong_tokens_explains_so_many_of_them() -> None:
    """Fewer come about by chance, or by a rounding."""
    case = ModelCase(variant="tokens", B=3, L=9, new=8)
    asked = ask(case)
    assert asked.tokens is not None
    got, turned = asked.tokens.flip(0), Suspect("answers are in the reverse order of the prompts")
    wrong = int((got != asked.tokens).sum())
    assert wrong
    for telling, told in ((wrong, True), (wrong + 1, False)):
        assert bool(_explaining(ModelReply(case, asked, got, telling), [turned], float("inf"))) is told


@pytest.mark.parametrize("name", ["one_layer_scaled", "epsilon_too_large"])
def test_what_no_change_explains_has_no_cause(name: str) -> None:
    assert causes(name, "layers") == []


def test_no_change_leaves_a_prompt_empty() -> None:
    """Of one token there is none to lose."""
    assert all(prompt for asked in PROMPTS.values() for prompt in asked([[3], [4]]))
