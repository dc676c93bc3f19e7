"""The page on the architecture shows the code as it is."""

import pytest

from moe_harness.suites.docs import architecture


def test_the_page_is_drawn_from_the_imports_of_today() -> None:
    text = architecture.PAGE.read_text()
    without_sizes = [line for line in architecture.rewritten(text).splitlines() if not line.startswith("| `")]
    assert without_sizes == [line for line in text.splitlines() if not line.startswith("| `")], (
        "run python -m moe_harness.suites.docs.architecture"
    )
    assert architecture.picture() in text and architecture.rooms().count("\n| `") == text.count("\n| `")


def test_a_step_that_nothing_joins_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architecture, "WAY", (("core.pairwise", ""), ("report.html", "")))
    with pytest.raises(ValueError, match=r"report\.html is imported by no step before it"):
        architecture.picture()
