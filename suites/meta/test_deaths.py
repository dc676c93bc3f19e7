"""A crash costs the cases like it and no others, and the result says what was judged and why the rest was not."""

from pathlib import Path

from moe_harness.harness.core.plan import Request, plan
from moe_harness.harness.process.deaths import OF_A_CHECK, OF_A_RUN, Deaths
from moe_harness.harness.run.session import RunOptions, judge


def after(*died: str, lived: tuple[str, ...] = ()) -> Deaths:
    found = Deaths()
    for case_id in lived:
        found.note(case_id, died=False)
    for case_id in died:
        found.note(case_id, died=True)
    return found


def test_a_kind_that_died_twice_is_left_out_and_nothing_else() -> None:
    found = after("experts/exact/T=5,masked=some,routing=last", "experts/exact/T=9,masked=some")
    assert "masked=some" in (found.why_not("experts/numeric/T=64,masked=some,E=3") or "")
    assert found.why_not("experts/exact/T=5,routing=last") is None
    assert found.why_not("experts/exact/T=5,masked=rows") is None


def test_a_kind_of_which_a_case_lived_is_not_to_blame() -> None:
    found = after("experts/exact/T=5,masked=some", "experts/exact/T=9,masked=some", lived=("experts/laws/masked=some",))
    assert found.why_not("experts/exact/T=3,masked=some") is None


def test_a_wrong_guess_is_taken_back() -> None:
    """Both died with routing=last first; a third shows that it is the mask."""
    both = ("experts/exact/masked=some,routing=last", "experts/exact/masked=some,routing=last,T=3")
    found = after(*both, "experts/exact/masked=some,T=9")
    assert set(found.blamed()) == {"masked=some"}
    assert found.why_not("experts/exact/routing=last") is None


def test_a_size_is_a_kind_too_but_the_last_to_be_blamed() -> None:
    assert set(after("experts/exact/T=1,E=7", "experts/exact/T=1,E=8").blamed()) == {"T=1"}
    assert set(after("experts/exact/T=1,map=block", "experts/exact/T=1,map=block").blamed()) == {"map=block"}


def test_crashes_that_nothing_explains_end_a_check_and_then_the_run() -> None:
    found = after(*(f"experts/exact/T={n}" for n in range(OF_A_CHECK)))
    assert found.why_not("experts/exact/T=99") and found.why_not("experts/numeric/T=99") is None
    whole = after(*(f"experts/check{n // 3}/T={n}" for n in range(OF_A_RUN)))
    assert "16 crashes" in (whole.why_not("experts/other/") or "")


ABORTS = """
import os
from moe_harness.impls.torch.experts import loop

def experts(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    if (topk_ids < 0).any():
        os.abort()
    return loop(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, activation=activation,
                expert_map=expert_map)
"""


def test_one_kind_of_bad_input_hides_no_other_check(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(ABORTS)
    planned = [p for p in plan("experts", Request(dtypes=("fp32",))) if p.check in ("contract", "sentinels", "numeric")]
    asked = RunOptions(cases=tuple(p.id for p in planned if p.check != "numeric" or p.case.steps() < 40))
    result = judge("experts", f"{tmp_path / 'kernel.py'}:experts", Request(dtypes=("fp32",)), asked)
    by_name = {check["name"]: check for check in result["checks"]}
    assert by_name["contract"]["judged"] == by_name["contract"]["cases"]
    assert by_name["numeric"]["judged"] > 0.6 * by_name["numeric"]["cases"]
    assert by_name["sentinels"]["skipped"] > by_name["sentinels"]["failed"] > 0
    for check in result["checks"]:
        told = sum(entry["cases"] for entry in check["reasons"])
        assert told == check["cases"] - check["judged"] == check["skipped"] + check["unsupported"]
        assert all(entry["reason"].strip() for entry in check["reasons"])
    assert any("masked=" in entry["reason"] for entry in by_name["sentinels"]["reasons"])
    assert result["verdict"] == "fail" and 0 < result["judged"] < 1


REFUSES = """
def gate(hidden_states, gate_weight, shared_output):
    if len(hidden_states) != 33:
        raise NotImplementedError("33 rows only")
    return (hidden_states @ gate_weight.T).sigmoid() * shared_output
"""


def test_pass_needs_every_case_of_the_core(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(REFUSES)
    spec = f"{tmp_path / 'kernel.py'}:gate"
    result = judge("shared_expert_gate", spec, Request(dtypes=("fp32",)), RunOptions())
    assert result["verdict"] == "unsupported" and result["judged"] < 0.2
