"""The matrix of the night: every way of running is in it, one that was not judged is told, and none is passed over."""

import json

import pytest

from moe_harness.harness.core import registry
from moe_harness.harness.core.errors import CannotJudge
from moe_harness.suites.accuracy import nightly


def test_every_batch_size_and_dispatcher_is_run():
    names = [name for name, _ in nightly.ways(2)]
    assert {f"batch-{size}" for size in (1, 2, 3, 4, 8, 64)} | {"tp-2"} < set(names)
    assert sum(name.startswith("ep-2-") for name in names) == len(registry.registered("dispatcher")) > 5
    assert [name for name, _ in nightly.ways(1)] == [name for name in names if name.startswith("batch-")]


@pytest.mark.parametrize(
    ("verdicts", "status"),
    [(["pass", "pass"], 0), (["pass", "fail", "error"], 1), (["pass", "error"], 3), (["pass", "inconclusive"], 3),
     ([], 3)],
)  # fmt: skip
def test_the_status_is_that_of_the_worst(verdicts, status):
    assert nightly.verdict_status(verdicts) == status


def test_a_way_without_answers_is_told_and_no_pass(tmp_path, monkeypatch, capsys):
    """answer goes on after a way that fails; judge tells of it."""
    monkeypatch.setattr(nightly, "_gate", lambda *arguments: 3 if "--tp" in arguments else 0)
    assert nightly.answer(tmp_path, "cpu", 2, 60) == 3
    told = json.loads((tmp_path / "answered.json").read_text())
    assert [name for name, way in told.items() if way["status"]] == ["tp-2"]
    assert set(told) == {"baseline", *(name for name, _ in nightly.ways(2))}

    def result(asked, baseline, candidate, margin):
        if "tp-2" in candidate.name:
            raise CannotJudge("there is no file")
        return {"verdict": "pass", "drop": 0, "interval": [0, 0], "margin": margin, "reasons": [], "p": 1}

    monkeypatch.setattr("moe_harness.harness.gate.steps.make_result", result)
    assert nightly.judge(tmp_path) == 3
    assert "tp-2: not judged: there is no file" in capsys.readouterr().out
