"""What `generate` promises beside greedy tokens: kept by right engines, and each broken promise is told."""

from pathlib import Path

import pytest
import torch

from moe_harness.harness import commands
from moe_harness.harness.core import bounds
from moe_harness.harness.core.contracts import load
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.core.plan import Request, plan
from moe_harness.harness.process.worker import judge_id
from moe_harness.harness.stages.model.cases import SERVED
from moe_harness.harness.stages.model.served import HEAT, SEEDS, _distance, _wrong
from moe_harness.suites.model.planted import FAULTS
from moe_harness.suites.model.wrong_served import SAID

PLANNED = list(plan("model", Request(dtypes=("bf16",))))
CASES = {variant: [p.id for p in PLANNED if p.case.variant == variant] for variant in SERVED}
RIGHT = [
    "moe_harness.suites.model.wrong_models:right", "transformers",
    f"{Path(commands.__file__).parent / 'templates' / 'model_torch.py'}:load_model",
]  # fmt: skip


@pytest.mark.parametrize("spec", RIGHT)
def test_a_right_engine_keeps_them(spec: str) -> None:
    if spec == "transformers":
        pytest.importorskip("transformers")
    trial = Trial(load("model", spec), "cpu")
    for case in (case for variant in SERVED for case in CASES[variant]):
        answer = judge_id(trial, case)
        assert answer.status == "passed", answer


@pytest.mark.parametrize("name", SAID)
def test_a_broken_promise_is_told(name: str) -> None:
    variant, words = SAID[name]
    trial = Trial(load("model", f"moe_harness.suites.model.wrong_served:{name}"), "cpu")
    answers = [judge_id(trial, case) for case in CASES[variant]]
    assert any(answer.status == "failed" and words in str(answer.findings) for answer in answers), answers


OF_THE_ENGINE = {
    "nothing_left_to_compute_of_a_known_prompt": "stops", "tables_of_the_step_before_stay": "stops",
    "matched_prefix_counts_as_the_root": "again",
}  # fmt: skip


@pytest.mark.parametrize("name", OF_THE_ENGINE)
def test_published_bugs_of_prefix_caches_are_seen_from_outside(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[name].plant(monkeypatch)
    trial = Trial(load("model", "moe_harness.suites.model.wrong_models:right"), "cpu")
    assert any(judge_id(trial, case).status == "failed" for case in CASES[OF_THE_ENGINE[name]])


@pytest.mark.parametrize(
    ("got", "words"),
    [
        ([4, 5], None), ([4, 5, 6], None), ([4, 5, 6, 7], "goes on with 7"), ([4], "ends after 1"),
        ([4, 5, 7], "new token 2 is 7"), ([4, 9, 6], "new token 1 is 9"), ([], "ends after 0"),
    ],
)  # fmt: skip
def test_a_row_may_end_with_the_stop_token_or_before_it(got: list[int], words: str | None) -> None:
    told = _wrong(got, [4, 5, 6, 8], [True] * 4, ends=(6,))
    assert told is None if words is None else words in str(told)


def test_what_is_uncertain_is_not_judged() -> None:
    assert _wrong([4, 1, 2], [4, 5, 6], [True, False, False], ends=(5,)) is None


def test_right_draws_are_never_far() -> None:
    """Draws with one number for all prompts of a call are as right as those with one for each."""
    generator = torch.Generator().manual_seed(5)
    log_p = (4 * torch.randn(16, 128, generator=generator, dtype=torch.float64) / HEAT).log_softmax(-1)
    for together in (False, True):
        for _ in range(200):
            uniform = torch.rand(SEEDS, 1 if together else 16, generator=generator, dtype=torch.float64).expand(-1, 16)
            tokens = torch.searchsorted(log_p.exp().cumsum(-1), uniform.T.contiguous()).T.clamp(max=127)
            assert abs(_distance(log_p, tokens)[0]) < 0.75 * bounds.student_limit(SEEDS - 1)
