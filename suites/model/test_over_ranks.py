"""The stage `model` over ranks: what is right passes, each mistake of a stranger fails with its cause in words."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from moe_harness.harness.commands.app import app
from moe_harness.harness.core.case import parse_id
from moe_harness.harness.core.errors import UsageError
from moe_harness.harness.core.plan import Request
from moe_harness.harness.ranks import judge
from moe_harness.harness.report.results import verdict_of
from moe_harness.harness.run import session
from moe_harness.harness.run.session import RunOptions
from moe_harness.harness.stages.model.rank_task import _are_tokens
from moe_harness.harness.stages.model.spread import form
from moe_harness.suites.model.strangers_over_ranks import SAID

CASES = [case for case, _ in SAID.values()]
FILE = Path(__file__).parent / "strangers_over_ranks.py"


@pytest.mark.parametrize("spec", ["qwen3_moe", f"{FILE}:right"])
def test_right_models_pass(spec: str) -> None:
    cases = tuple(dict.fromkeys([CASES[0].replace("R=2", "R=1"), *CASES]))
    result = session.judge("model", spec, Request(), RunOptions(cases=cases), worlds=(1, 2))
    assert verdict_of(result) == "pass", result["failures"][:2]
    assert result["judged"] == 1 and result["coverage"]["axes"]["R"] == {"1": 1, "2": 6}


def test_the_cases_are_those_of_a_run() -> None:
    planned = judge.planned("model", "qwen3_moe", (1, 2, 4))
    assert {str(parse_id(case)[2]) for case in CASES} <= {str(parse_id(case)[2]) for case in planned}
    assert {parse_id(case)[2].R for case in planned} == {1, 2, 4}


@pytest.mark.parametrize("name", SAID)
def test_a_mistake_is_failed_with_its_cause(name: str) -> None:
    case, words = SAID[name]
    findings = judge.judge(f"{FILE}:{name}", case).findings
    assert findings, f"{name} survives {case}"
    told = " ".join([findings[0].message, *(cause["fault"] for cause in findings[0].diagnosis)])
    assert words in told, findings[0]


@pytest.mark.parametrize("shared", ["", "ep=1,"])
def test_sums_in_symmetric_memory_are_right_and_leave_no_other(shared: str) -> None:
    pytest.importorskip("triton")
    loader = FILE.with_name("symmetric_sums.py")
    verdict = judge.judge(f"{loader}:load_model", f"model/over_ranks/variant=logits,B=1,L=5,R=2,{shared}seed=0")
    assert verdict.passed, verdict.findings or verdict.unsupported
    calls = [call.op for call in verdict.traces[0]]
    assert "all_reduce" not in calls and "all_gather" in " ".join(calls)


def test_what_is_no_model_is_failed_by_what_it_lacks() -> None:
    for name, words in (("seeds_by_rank", "no method generate"), ("head_not_gathered", "cannot be called")):
        (finding, *_) = judge.judge("moe_harness.suites.model.wrong_models:nothing", SAID[name][0]).findings
        assert words in finding.message


@pytest.mark.parametrize(
    ("tokens", "is_so"),
    [([[0, 9], [3, 4]], True), (torch.tensor([[0, 9], [3, 4]]), True), (((1, 2), (3, 4)), True),
     ([[0, 10], [3, 4]], False), ([[-1, 2], [3, 4]], False), ([[1, 2]], False), ([[1, 2], [3]], False),
     ([[1, 2], [3, 4, 5]], False), ([[1, 2], ["a", 4]], False), ([[1, 2], [None, 4]], False), ([1, 2], False),
     (None, False)],
)  # fmt: skip
def test_tokens_are_as_many_numbers_below_the_vocabulary_as_were_asked_for(tokens: object, is_so: bool) -> None:
    assert _are_tokens(tokens, prompts=2, new=2, vocabulary=10) is is_so


@pytest.mark.parametrize(
    ("got", "cause"),
    [(None, "only some ranks have the result"), (torch.zeros(3, 5, 26), "shards of the vocabulary are not gathered"),
     (torch.zeros(3, 5, 25), "shards of the vocabulary are not gathered"), (torch.zeros(3, 5, 51), None),
     (torch.zeros(()), None), ([[1, 2]], None)],
)  # fmt: skip
def test_a_result_of_another_form_has_its_cause_where_that_is_known(got: object, cause: str | None) -> None:
    asked = SimpleNamespace(keys={"vocab_size": 51})
    told = [entry["fault"] for entry in form(got, asked, 2)]  # type: ignore[arg-type]
    assert told == [] if cause is None else len(told) == 1 and cause in told[0]


def test_what_supports_half_of_it_is_told_so() -> None:
    """Cut experts alone pass, one device alone is unsupported."""
    cut = tuple(SAID[name][0].replace("ep=1,", "") for name in ("seeds_by_rank", "head_not_gathered"))
    whole = (SAID["experts_reduced_twice"][0],)
    result = session.judge("model", f"{FILE}:cuts_only", Request(), RunOptions(cases=cut + whole), worlds=(2,))
    assert verdict_of(result) == "pass" and result["coverage"]["unsupported"][0]["cases"] == 1
    result = session.judge("model", f"{FILE}:on_one_device", Request(), RunOptions(cases=cut), worlds=(2,))
    assert verdict_of(result) == "unsupported" and "'group'" in result["coverage"]["unsupported"][0]["reason"]


def test_the_command(tmp_path: Path) -> None:
    """Verdict, exit status and replay as everywhere; ranks are refused where a stage has none."""
    run, file = CliRunner(), tmp_path / "result.json"
    told = run.invoke(app, ["check", "--stage", "experts", "--impl", "torch:loop", "--ranks", "2"])
    assert isinstance(told.exception, UsageError) and "judged on one device" in str(told.exception)
    arguments = ["--stage", "model", "--impl", f"{FILE}:head_not_gathered", "--ranks", "2", "-x", "--json", str(file)]
    assert run.invoke(app, ["check", *arguments]).exit_code == 1
    result = json.loads(file.read_text())
    assert result["verdict"] == "fail" and result["stage"] == "model"
    case = result["failures"][0]["case"]
    assert run.invoke(app, ["replay", case, "--impl", f"{FILE}:head_not_gathered"]).exit_code == 1
    assert run.invoke(app, ["replay", case, "--impl", f"{FILE}:right"]).exit_code == 0
