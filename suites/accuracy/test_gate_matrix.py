"""The matrix of what the gate sees: each way of seeing a fault says yes and no, and the page is that of the data."""

import json
from pathlib import Path

import pytest

from moe_harness.harness.core import registry
from moe_harness.harness.gate.answerers import Settings
from moe_harness.harness.gate.exchange import Gold
from moe_harness.harness.proof import gate_matrix
from moe_harness.harness.proof.gate_matrix import counts, expected_by_accuracy, floor, kept, seen
from moe_harness.harness.proof.gate_matrix_bench import Measured, Planted, Questions, compared
from moe_harness.harness.proof.gate_matrix_view import page

DOCS = Path(__file__).resolve().parents[2] / "docs"
LEAST = {"mean": 0.01, "largest": 0.1}


def measured(shifts=(), lost=0):
    golds = [Gold(-1.0 - i / 100 + (shifts[i] if i < len(shifts) else 0.0), (), (), ()) for i in range(24)]
    return Measured(golds, [i >= lost for i in range(12)], [f"answer {i}" for i in range(12)])


def row(found):
    return {"kind": "fault", "layer": None, **compared(measured(), found)}


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (measured(), set()),
        (measured(lost=4), set()),  # four losses of twelve are not significant
        (measured(lost=5), {"by_accuracy"}),
        (measured([-0.02 - i / 1e4 for i in range(24)]), {"by_mean", "by_gold"}),
        (measured([-0.002 - i / 1e5 for i in range(24)]), set()),  # significant, and no more than right ones move
        (measured([0.02] * 24), set()),  # better than the baseline
        (measured([-0.2]), {"by_single", "by_gold"}),  # one answer of 24: no test of the mean sees it
        (measured([-0.09]), set()),
        (measured([float("nan")]), {"by_gold"}),
    ],
)
def test_each_way_of_seeing_says_yes_and_no(found, wanted):
    told = seen(row(found), LEAST)
    assert {name for name, value in told.items() if value} == wanted


def test_right_implementations_set_the_floor():
    rows = [row(measured([-0.001])), row(measured([0.002])), {"error": "refused"}]
    least = floor(rows)
    assert least["largest"] == pytest.approx(gate_matrix.NOISE * 0.002)
    assert least["mean"] == pytest.approx(gate_matrix.NOISE * 0.002 / 24)


def test_the_steps_without_a_fault_count_as_right():
    """Otherwise each fault that the model does not show would differ from all right ones in its last bits."""
    for stage, spec in gate_matrix.STEPS.items():
        assert spec in {planted.name for planted in gate_matrix.rights(None) if planted.stage == stage}
        assert registry.find(stage, spec).__name__ == "run"


def test_equal_numbers_are_equal_in_every_bit():
    assert measured().bits == measured().bits
    assert measured([1e-12]).bits != measured().bits
    other = Measured(measured().golds, measured().right, ["other"] * 12)
    assert other.bits != measured().bits  # a fault that shows in decoding alone


def test_an_interrupted_matrix_goes_on_under_the_same_settings_alone(tmp_path):
    file = tmp_path / "m.json"
    about = {"schema": 2, "documents": 24, "generated": 12, "seed": 1, "identity": {"model": "a"}}
    assert kept(file, about) == []
    file.write_text(json.dumps({**about, "rows": [{"kind": "right", "name": "b"}, {"kind": "fault", "name": "c"}]}))
    assert [row["name"] for row in kept(file, about)] == ["c"]
    for change in ({"seed": 2}, {"documents": 12}, {"identity": {"model": "b"}}):
        assert kept(file, about | change) == []


PLANTED = {"seen": (measured(lost=9), "other"), "absent": (measured(), "own"), "raises": (None, None)}


@pytest.fixture
def asked_of(monkeypatch):
    """A matrix of three faults and one right implementation in four layers; what was measured is noted."""

    def planted(kind, names):
        return lambda layer=None: [Planted(kind, name, "experts", layer) for name in names]

    told = {"generated": 12, "identity": {"model": "a"}}
    monkeypatch.setattr(gate_matrix, "about", lambda asked: (told, "as it is", 4))
    monkeypatch.setattr(gate_matrix, "rights", planted("right", ["own"]))
    monkeypatch.setattr(gate_matrix, "faults", planted("fault", PLANTED))
    done = []

    def each(asked, left, ends=0.0):
        for one in left:
            done.append((asked.seed, one.name, one.layer))
            found, bits = PLANTED.get(one.name, (measured([0.001]), "own"))
            if found is None:
                yield {**vars(one), "error": "ValueError: no"}, None
            else:
                yield {**vars(one), **compared(measured(), found)}, bits

    return each, done


@pytest.fixture
def kills(tmp_path):
    file = tmp_path / "kills.json"
    checks = {"numeric": {"status": "killed"}, "laws": {"status": "survived"}}
    file.write_text(json.dumps({"rows": [{"fault": "seen", "checks": checks}]}))
    return file


def test_a_matrix_is_what_was_planted_in_all_layers_and_what_shows_there_in_one(asked_of, kills, tmp_path):
    each, done = asked_of
    asked, keep = Questions(Settings(None), 24, seed=7), tmp_path / "matrix.json"
    found = gate_matrix.run(asked, 60.0, keep, kills, each)
    assert done == [
        (8, "own", None), (7, "own", None), (7, "own", 2), *((7, name, None) for name in PLANTED), (7, "seen", 2)
    ]  # fmt: skip
    rows = {(row["name"], row["layer"]): row for row in found["rows"]}
    assert [rows[name, None]["present"] for name in ("own", *PLANTED)] == [False, True, False, None]
    assert [rows[name, None]["checks"] for name in ("own", *PLANTED)] == [None, ["numeric"], None, None]
    assert rows["seen", None]["by_accuracy"] and not rows["absent", None]["by_gold"]
    assert found["planned"] == 3 and found["floor"]["largest"] == pytest.approx(gate_matrix.NOISE * 0.001)
    assert found["seen"] == counts(found["rows"]) and found["seen"]["all_layers"]["by_accuracy"] == 1
    assert json.loads(keep.read_text()) == found


def test_a_matrix_that_was_interrupted_measures_no_fault_twice(asked_of, kills, tmp_path):
    each, done = asked_of
    asked, keep = Questions(Settings(None), 24, seed=7), tmp_path / "matrix.json"
    whole = gate_matrix.run(asked, 60.0, keep, kills, each)
    first = [row for row in whole["rows"] if row["name"] != "absent"]
    keep.write_text(json.dumps({**whole, "rows": first}))
    done.clear()
    again = gate_matrix.run(asked, 60.0, keep, kills, each)
    assert [name for seed, name, _ in done if seed == 7] == ["own", "own", "absent"]
    assert sorted(map(str, again["rows"])) == sorted(map(str, whole["rows"])) and again["seen"] == whole["seen"]


def test_what_raised_is_counted_apart():
    rows = [row(found) | {"present": True, "checks": ["numeric"]} for found in (measured(), measured(lost=9))]
    rows = [r | seen(r, LEAST) for r in rows] + [{"kind": "fault", "layer": None, "error": "x", "present": None}]
    found = counts(rows)["all_layers"]
    assert (found["faults"], found["raised"], found["by_accuracy"], found["by_neither"]) == (2, 1, 1, 1)
    assert found["by_checks"] == 2


def test_what_fewer_questions_would_have_shown_is_the_mean_over_draws():
    """Five lost answers of five are the fewest that McNemar's test calls significant."""
    rows = [{"discordant": [12, 0]}, {"discordant": [4, 0]}, {"discordant": [6, 0]}, {"discordant": [12, 0]}]
    assert expected_by_accuracy(rows, 4, 12) == 0
    assert expected_by_accuracy(rows, 5, 12) == pytest.approx(2 + 6 / 792)  # all five among the six: 6 of 792 draws
    assert expected_by_accuracy(rows, 12, 12) == 3
    assert expected_by_accuracy([{"discordant": [6, 6]}], 12, 12) == 0


def test_the_page_is_that_of_the_data():
    result = json.loads((DOCS / "gate_matrix_held_out.json").read_text())
    assert page(result) == (DOCS / "gate_matrix.md").read_text()
    assert counts(result["rows"]) == result["seen"]
    assert all(seen(row, result["floor"]).items() <= row.items() for row in result["rows"])
