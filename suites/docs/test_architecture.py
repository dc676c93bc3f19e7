"""The page on the architecture shows the code as it is."""

import pytest

from moe_harness.suites.docs import architecture, walk

MOST_FILES, MOST_CLIMBS = 20, 6


def test_the_page_is_drawn_from_the_imports_of_today() -> None:
    text = architecture.PAGE.read_text()
    without_sizes = [line for line in architecture.rewritten(text).splitlines() if not line.startswith("| `")]
    assert without_sizes == [line for line in text.splitlines() if not line.startswith("| `")], (
        "run python -m moe_harness.suites.docs.architecture"
    )
    assert architecture.picture() in text and architecture.rooms().count("\n| `") == text.count("\n| `")


def test_a_step_that_nothing_joins_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architecture, "WAY", (("core.case", ""), ("report.html", "")))
    with pytest.raises(ValueError, match=r"report\.html is imported by no step before it"):
        architecture.picture()


def test_the_walk_from_a_spec_to_a_verdict_is_short() -> None:
    """Whoever follows one case opens so many files in the controlling process, and so many in the one that judges."""
    walks = [walk.of_controller(*walk.EXAMPLE), walk.of_process(*walk.EXAMPLE)]
    assert [sorted(each.files) for each in walks if len(each.files) > MOST_FILES] == []
    assert {"run/session.py", "process/pool.py"} <= walks[0].files and "core/compare.py" in walks[1].files
    climbs = {climb for each in walks for climb in each.climbs()}
    assert ("core/stage.py", "stages/shared_expert_gate/stage.py") in climbs and len(climbs) <= MOST_CLIMBS


def test_a_run_that_does_not_pass_is_no_walk() -> None:
    with pytest.raises(RuntimeError, match="does not exist"):
        walk.of_controller("shared_expert_gate", "torch:nobody", walk.EXAMPLE[2])
