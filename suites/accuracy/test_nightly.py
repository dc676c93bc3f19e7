"""The matrix of the night: every way of running is in it, one that was not judged is told, and none is passed over."""

import json
from pathlib import Path

import pytest

from moe_harness.harness.core.errors import CannotJudge
from moe_harness.harness.gate.exchange import Answer
from moe_harness.harness.gate.judging import Side
from moe_harness.harness.gate.task import STRICT, Asked, Row
from moe_harness.suites.accuracy import nightly


def planned(device, devices):
    return {way.name: way.left_out for way in nightly.ways(device, devices)}


def test_every_batch_size_and_every_dispatcher_of_the_engine_is_run():
    names = planned("cuda", 2)
    assert {f"batch-{size}" for size in (1, 2, 3, 4, 8, 64)} | {"baseline", "tp-2", "transformers-triton"} < set(names)
    spread = {name.removeprefix("ep-2-") for name in names if name.startswith("ep-2-")}
    assert {"naive", "local_allreduce", "allgather_reducescatter", "all_to_all", "masked", "symmetric"} < spread
    assert not spread & {"megatron", "torchtitan"}  # which the engine does not take
    lacking = {name for name, lacks in names.items() if lacks and not name.endswith("-deepep")}  # may not be installed
    assert lacking == {"ep-4-symmetric", "tp-8"} | {name for name in names if name.startswith("ep-8")} - {"ep-8-deepep"}


def test_four_and_eight_ranks_are_asked_where_at_most_two_share_a_gpu():
    spread = {name for name in planned("cuda", 2) if name.startswith(("tp-4", "tp-8", "ep-4", "ep-8"))}
    assert len(spread) == 2 * len([name for name in planned("cuda", 2) if name.startswith("ep-2")]) + 2
    for devices, left_out in ((1, spread), (4, {"ep-8-symmetric"}), (8, set())):
        lacking = {name for name, lacks in planned("cuda", devices).items() if lacks}
        assert {name for name in lacking & spread if not name.endswith("-deepep")} == {
            name for name in left_out if not name.endswith("-deepep")
        }
    assert {way.form for way in nightly.ways("cuda", 8) if way.name in spread} == {"wide"}


def test_what_a_machine_has_not_is_left_out_by_name():
    alone = planned("cuda", 1)
    few = {name for name, lacking in alone.items() if lacking and not name.startswith(("tp-4", "tp-8", "ep-4", "ep-8"))}
    assert few == {"ep-2-symmetric", "ep-2-deepep"}
    assert "there is 1" in alone["ep-2-symmetric"]
    assert {name for name, lacking in planned("cpu", 0).items() if lacking} - set(alone) == set()
    assert planned("cpu", 0)["transformers-triton"] == "Triton's kernels need a GPU"


@pytest.mark.parametrize(
    ("verdicts", "status"),
    [(["pass", "pass"], 0), (["pass", "fail", "error"], 1), (["pass", "error"], 3), (["pass", "inconclusive"], 3),
     ([], 3)],
)  # fmt: skip
def test_the_status_is_that_of_the_worst(verdicts, status):
    assert nightly.verdict_status(verdicts) == status


def test_a_way_without_answers_is_told_and_no_pass(tmp_path, monkeypatch, capsys):
    """answer goes on after a way that fails; judge tells of it."""
    monkeypatch.setattr(nightly, "_answer", lambda *arguments, gpu: 3 if arguments[-1].endswith("tp-2.jsonl") else 0)
    assert nightly.answer(tmp_path, "cpu", list(nightly.ways("cpu", 0)), 60, jobs=2) == 3
    told = json.loads((tmp_path / "answered.json").read_text())
    assert [name for name, way in told.items() if way.get("status")] == ["tp-2"]
    assert list(told) == list(planned("cpu", 0))

    def scored(asked, answers):
        if "tp-2" in answers[0].name:
            raise CannotJudge("there is no file")
        return Asked("arithmetic"), [side(40)]

    monkeypatch.setattr("moe_harness.harness.gate.steps.scored", scored)
    assert nightly.judge(tmp_path) == 3
    said = capsys.readouterr().out
    assert "tp-2: not judged: there is no file" in said and "ep-2-symmetric: left out: its 2 ranks" in said


def test_ways_of_one_process_are_spread_over_the_gpus_and_ranks_see_all(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(nightly, "_answer", lambda *said, gpu: given.update({Path(said[-1]).stem: gpu}) or 0)
    nightly.answer(tmp_path, "cuda", list(nightly.ways("cuda", 2)), 60, jobs=3, gpus=["2", "5"])
    assert {given[name] for name in given if "tp-2" in name or name.startswith("ep-2")} == {None}
    alone = [given[name] for name in ("baseline", "batch-1", "batch-2", "batch-3")]
    assert sorted(alone) == ["2", "2", "5", "5"]


def side(count, lost=()):
    answer = Answer("", "", 3, "stop")
    return Side("x", [Row(i, "d", "p", {STRICT: i not in lost}, {STRICT: True}, answer) for i in range(count)])


def test_parts_are_judged_one_by_one():
    count, asked = 4 * 133, Asked("arithmetic")
    assert nightly.parts(asked, side(count - 1), side(count - 1)) is None
    assert nightly.parts(asked, side(count), side(count)) == {"pass": 20}
    found = nightly.parts(asked, side(count), side(count, {7}))  # decides nothing where it is among those drawn
    assert found == {"pass": 20 - found["inconclusive"], "inconclusive": found["inconclusive"]}
    assert 0 < found["inconclusive"] < 12
    assert nightly.parts(asked, side(count), side(count, range(0, count, 9))) == {"fail": 20}


def test_null_comparisons_are_resampled():
    """Nothing differs: never a fall.  As many won as lost: within the nominal share.  A real fall: nearly always."""
    assert nightly.falls(1319, 0, 0) == 0
    assert nightly.falls(1319, 26, 26) <= nightly.NULLS * 0.05
    assert nightly.falls(1319, 80, 20) > nightly.NULLS * 0.9


@pytest.mark.parametrize(
    ("verdict", "wanted", "told"),
    [("pass", "pass", "pass"), ("fail", "pass", "fail"), ("fail", "fail", "pass"), ("pass", "fail", "fail"),
     ("inconclusive", "fail", "inconclusive"), ("error", "pass", "error")],
)  # fmt: skip
def test_a_planted_fault_that_passes_fails_the_night(verdict, wanted, told):
    assert nightly.seen(verdict, wanted) == told
