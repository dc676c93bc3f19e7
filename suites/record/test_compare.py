"""Runs compared: what got worse is found, what did not is left alone, and what cannot be compared is refused."""

import copy
import json

import numpy as np
import pytest
from scipy import stats

from moe_harness.harness.core.errors import CannotJudge, UsageError
from moe_harness.harness.record import history, line, store, view
from moe_harness.harness.record.compare import compare, judged_times

ROUNDS, TIMES = 11, 10  # of each time, as `bench` takes them; in each run


def check_line(**change):
    verdicts = {"numeric": {"verdict": "pass", "cases": 100, "judged": 100},
                "layouts": {"verdict": "pass", "cases": 40, "judged": 40}}  # fmt: skip
    return {
        "schema": 1, "kind": "check", "name": "experts triton", "recorded": "2026-11-28T12:00:00+00:00", "command": "",
        "environment": {"device": "NVIDIA H200", "versions": {}, "commit": "a" * 40, "dirty": False}, "source": "s",
        "verdicts": verdicts, "statistics": {"z": {"rms": 0.9, "elements": 50_000}}, **change,
    }  # fmt: skip


def bench_line(times, device="NVIDIA H200", scale=1.0):
    return check_line(
        kind="bench", verdicts={}, statistics={},
        times={f"{i} tokens": {"rounds": [scale * t for t in r], "floor": 10 * scale} for i, r in enumerate(times)},
        environment={"device": device, "versions": {}},
    )  # fmt: skip


def gate_line(right, prompt="p"):
    documents = [{"doc_hash": f"d{i}", "prompt_hash": f"{prompt}{i}", "right": bool(r)} for i, r in enumerate(right)]
    return check_line(kind="gate", verdicts={}, statistics={}, documents=documents, margin=0.02)


def between(old, new):
    return compare(store.newest([old]), store.newest([new]))


def levels(found):
    return [change.level for change in found.changes]


def with_verdict(check, **change):
    changed = copy.deepcopy(check_line())
    changed["verdicts"][check] |= change
    return changed


def test_a_run_equals_itself():
    found = between(check_line(), check_line())
    assert (found.changes, found.regressed, found.compared) == ((), False, 1)


@pytest.mark.parametrize(
    ("change", "level"),
    [({"verdict": "fail"}, "regression"), ({"verdict": "unsupported", "judged": 0}, "regression"),
     ({"verdict": "error"}, "regression"), ({"judged": 99}, "regression"), ({"judged": 120, "cases": 120}, None)],
)  # fmt: skip
def test_a_verdict_or_a_case_that_was_lost_is_a_regression(change, level):
    found = between(check_line(), with_verdict("numeric", **change))
    assert levels(found) == ([level] if level else [])
    assert found.regressed == bool(level)


def test_a_verdict_that_was_won_is_none():
    assert levels(between(with_verdict("numeric", verdict="fail"), check_line())) == ["improvement"]


def test_what_was_judged_in_neither_run_is_neither_better_nor_worse():
    """A run that broke off is no improvement on one that judged nothing."""
    undecided = [with_verdict("numeric", verdict=verdict, judged=0) for verdict in ("unsupported", "error")]
    assert levels(between(*undecided)) == levels(between(*undecided[::-1])) == ["note"]


def test_a_comparison_is_refused_where_nothing_could_be_compared():
    other = [bench_line([[10.0] * 5], device) | {"name": "a"} for device in ("NVIDIA H200", "NVIDIA H100")]
    assert between(*other).refused and not between(check_line(), check_line()).refused
    whole = [store.newest([line, check_line()]) for line in other]
    assert levels(compare(*whole)) == ["refused"] and not compare(*whole).refused
    worse = [store.newest([other[0], check_line()]), store.newest([other[1], with_verdict("numeric", verdict="fail")])]
    assert compare(*worse).regressed and not compare(*worse).refused


def test_a_check_or_a_result_that_is_gone_is_a_regression_and_a_new_one_is_not():
    fewer = copy.deepcopy(check_line())
    del fewer["verdicts"]["layouts"]
    assert levels(between(check_line(), fewer)) == ["regression"]
    assert levels(between(fewer, check_line())) == ["note"]
    both = [check_line(), check_line(name="router triton")]
    assert levels(compare(store.newest(both), store.newest(both[:1]))) == ["regression"]


@pytest.mark.parametrize(
    ("rms", "elements", "warned"),
    [(1.05, 50_000, True), (0.95, 50_000, False), (1.05, 200, False), (0.7, 50_000, True)],
)
def test_a_z_that_moved_beyond_its_sampling_error_is_a_warning(rms, elements, warned):
    new = check_line(statistics={"z": {"rms": rms, "elements": elements}})
    found = between(check_line(), new)
    assert levels(found) == (["warning"] if warned else [])
    assert not found.regressed


def gpu_like(random_numbers, scale=1.0):
    """Rounds as a quiet GPU gives them: half a per cent of noise, a drift of the run, now and then one that is late."""
    drift = random_numbers.normal(0, 0.003)
    noise = random_numbers.normal(drift, 0.005, ROUNDS) + (random_numbers.random(ROUNDS) < 0.03) * 0.2
    return list(scale * 100 * np.exp(noise))


def runs(random_numbers, scale=1.0):
    return bench_line([gpu_like(random_numbers, scale if i == 0 else 1.0) for i in range(TIMES)])


def test_runs_of_the_same_thing_are_not_called_slower():
    """200 A/A pairs of ten times each: false alarms at most 5 %."""
    random_numbers = np.random.default_rng(0)
    alarms = sum(between(runs(random_numbers), runs(random_numbers)).regressed for _ in range(200))
    assert alarms <= 10
    assert stats.binomtest(alarms, 200, 0.05, alternative="greater").pvalue > 0.05


def test_a_slowdown_of_five_per_cent_is_found():
    random_numbers = np.random.default_rng(1)
    found = [between(runs(random_numbers), runs(random_numbers, 1.05)) for _ in range(50)]
    assert sum(comparison.regressed for comparison in found) >= 45
    assert all(change.case == "0 tokens" for comparison in found for change in comparison.changes)


@pytest.mark.parametrize("missing", ["test", "effect", "size"])
def test_each_condition_of_a_slowdown_is_needed(missing, monkeypatch):
    """Without it, something that is no slowdown is called one."""
    from moe_harness.harness.record import compare as module

    random_numbers = np.random.default_rng(2)
    many = random_numbers.normal(100, 1, 2000)
    old, new = {
        "test": ([100.0, 100.1, 100.2], [104.0, 104.1, 104.2]),  # three rounds show nothing at this level
        "effect": (list(random_numbers.normal(100, 1, 200)), [*random_numbers.normal(104.5, 1, 160), *[80.0] * 40]),
        "size": (list(many), list(many * 1.02)),
    }[missing]
    assert judged_times(old, new) is None
    for name, value in {"test": {"ALPHA": 1.0, "FAMILY": 1.0}, "effect": {"MOSTLY": 0.0}, "size": {"SLOWER": 1.0}}[
        missing
    ].items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "spread", lambda rounds: 0.0)
    assert judged_times(old, new) == "regression"


def test_a_machine_that_is_noisy_is_given_its_spread():
    random_numbers = np.random.default_rng(3)
    old, new = (list(random_numbers.normal(mean, 10, 60)) for mean in (100, 108))
    assert judged_times(old, new) is None


def test_times_are_compared_as_multiples_of_the_floor_of_their_run():
    random_numbers = np.random.default_rng(4)
    times = [gpu_like(random_numbers) for _ in range(3)]
    assert levels(between(bench_line(times), bench_line(times, scale=1.2))) == []


def test_times_of_another_device_are_refused():
    times = [[100.0 + i for i in range(11)]]
    found = between(bench_line(times), bench_line([[t * 2 for t in times[0]]], device="NVIDIA H100"))
    assert levels(found) == ["refused"]


def test_answers_are_paired_by_document():
    right = [1] * 300
    lost = [0] * 20 + [1] * 280
    assert levels(between(gate_line(right), gate_line(lost))) == ["regression"]
    assert levels(between(gate_line(lost), gate_line(right))) == ["note"]
    assert levels(between(gate_line(right), gate_line(right))) == []
    turned = gate_line(lost)
    turned["documents"].reverse()
    assert levels(between(gate_line(lost), turned)) == []


def test_answers_to_other_words_are_refused():
    assert levels(between(gate_line([1] * 9), gate_line([0] * 9, prompt="q"))) == ["refused"]


def test_answers_to_other_questions_are_refused_and_fewer_are_a_regression():
    other = gate_line([1] * 9)
    for document in other["documents"]:
        document["doc_hash"] += " of another seed"
    assert levels(between(gate_line([1] * 9), other)) == ["refused"]
    assert levels(between(gate_line([1] * 9), gate_line([1] * 8))) == ["regression"]
    assert levels(between(gate_line([1] * 8), gate_line([1] * 9))) == []


def test_answers_of_another_checkpoint_are_refused():
    first, second = (gate_line(right) | {"model": model} for right, model in (([1] * 300, "a"), ([0] * 300, "b")))
    assert levels(between(first, second)) == ["refused"]
    assert levels(between(first, second | {"model": "a"})) == ["regression"]


def test_runs_with_nothing_in_common_are_not_compared():
    with pytest.raises(CannotJudge, match="nothing in common"):
        between(check_line(), check_line(name="router torch"))


CHECK = {
    "schema": 1, "verdict": "pass", "stage": "router", "impl": "torch:loop", "device": "cpu", "dtypes": ["fp32"],
    "seed": 0,
    "checks": [{"name": "numeric", "cases": 10, "failed": 0, "unsupported": 2, "skipped": 0}],
    "statistics": {"z_histogram": {"edges": [0.0, 1.0, 2.0, None], "counts": [3, 1, 0]}, "elements": 4},
}  # fmt: skip
BENCH = {
    "stage": "experts", "model": {"name": "qwen3"}, "ep_size": 1, "dtype": "bf16", "device": "NVIDIA H100",
    "copy_bandwidth": 1.0, "matrix_rate": 2.0, "launch": 3.0, "versions": {}, "command": "c", "stopped": "",
    "timings": [
        {"spec": "a", "tokens": 8, "median": 2.0, "low": 1.0, "high": 3.0, "floor": 0.5, "refused": "",
         "rounds": [1.0, 2.0, 3.0]},
        {"spec": "b", "tokens": 8, "median": 0.0, "floor": 0.0, "refused": "no"},
    ],
}  # fmt: skip
GATE = {
    "schema": 1, "kind": "gate", "task": "arithmetic", "candidate": "c", "verdict": "pass", "documents": 1,
    "margin": 0.02,
    "about": {"candidate": {"identity": {"source": "s", "model": "m", "device": "x86_64"}}},
    "rows": [{"doc_hash": "d", "prompt_hash": "p", "candidate": {"right": True, "gold": -0.1}}],
}  # fmt: skip


FAULTS = {"rows": [{"fault": "a"}, {"fault": "b"}], "survivors": ["b"], "seed": 0}


def test_a_matrix_of_faults_is_kept_by_fault():
    (found,) = line.lines(FAULTS)
    assert found["verdicts"] == {"a": {"verdict": "pass"}, "b": {"verdict": "fail"}}
    assert levels(between(line.lines(FAULTS | {"survivors": []})[0], found)) == ["regression"]


def test_lines_hold_what_the_commands_found():
    (checked,) = line.lines(CHECK)
    assert checked["verdicts"]["numeric"] == {"verdict": "pass", "cases": 10, "judged": 8}
    assert checked["statistics"]["z"] == {"rms": pytest.approx(((3 * 0.25 + 2.25) / 4) ** 0.5), "elements": 4}
    assert {"versions", "commit", "dirty", "device"} <= set(checked["environment"])
    assert checked["source"]
    first, second = line.lines(BENCH)
    assert first["times"] == {"8 tokens": {"rounds": [1.0, 2.0, 3.0], "floor": 0.5}}
    assert (second["times"], second["verdicts"]["8 tokens"]["verdict"]) == ({}, "unsupported")
    assert first["environment"]["device"] == "NVIDIA H100" and first["ceilings"]["launch"] == 3.0
    (gate,) = line.lines(GATE)
    assert gate["model"] == "m"
    assert gate["documents"] == [{"doc_hash": "d", "prompt_hash": "p", "right": True, "gold": -0.1}]
    assert len(line.lines([CHECK, BENCH, GATE])) == 4


@pytest.mark.parametrize("nothing", [{"some": 1}, [], 3, [CHECK, {"x": 1}]])
def test_json_of_something_else_is_refused(nothing):
    with pytest.raises(UsageError, match="no result of check, bench, gate or faults"):
        line.lines(nothing)


def test_a_file_gives_back_its_lines_and_the_newest_of_each(tmp_path):
    file = tmp_path / "runs.jsonl"
    for seed in (0, 1):
        store.append(file, line.lines(CHECK | {"seed": seed}))
    found = store.read(file)
    assert [entry["seed"] for entry in found] == [0, 1]
    assert next(iter(store.newest(found).values()))["seed"] == 1
    plain = tmp_path / "check.json"
    plain.write_text(json.dumps(CHECK))
    assert store.read(plain)[0]["name"] == found[0]["name"]


@pytest.mark.parametrize(
    ("text", "error"), [("", UsageError), ("{}\n{}\n", UsageError), ('{"schema": 1, "ki', CannotJudge)]
)
def test_a_file_of_something_else_is_refused(tmp_path, text, error):
    file = tmp_path / "runs.jsonl"
    file.write_text(text)
    with pytest.raises(error):
        store.read(file)
    with pytest.raises(UsageError, match="there is no file"):
        store.read(tmp_path / "absent")


def test_a_comparison_is_told_in_words_as_a_page_and_as_a_picture(tmp_path):
    from rich.console import Console

    old, new = check_line(), with_verdict("layouts", verdict="fail")
    found = between(old, new)
    console = Console(record=True, width=150)
    view.show(found, console)
    text = console.export_text()
    assert "regression" in text and "layouts" in text and "1 result compared: 1 regression" in text
    view.write_html(found, store.newest([old]), store.newest([new]), tmp_path / "c.html")
    assert "<td>layouts</td>" in (tmp_path / "c.html").read_text()
    pytest.importorskip("matplotlib")
    times = bench_line([[100.0 + i for i in range(11)]])
    history.draw([old, new, times, times | {"recorded": "2026-11-29T12:00:00+00:00"}], tmp_path / "h.svg")
    assert (tmp_path / "h.svg").stat().st_size > 2000


def test_a_history_counts_what_was_judged_and_marks_what_failed():
    """Checks that a machine cannot make are not failed ones, and a bench has times and no share."""
    passed = check_line()
    passed["verdicts"]["graph_replay"] = {"verdict": "unsupported", "cases": 3, "judged": 0}
    times, shares = history.series([passed, with_verdict("numeric", verdict="fail"), gate_line([1, 0])])
    assert times == {}
    (points, answers) = shares.values()
    assert [(point.value, point.failed) for point in (*points, *answers)] == [(1.0, False), (0.5, True), (0.5, False)]
    timed, none = history.series(line.lines(BENCH))
    assert [point.value for points in timed.values() for point in points] == [4.0] and "a" not in "".join(none)
