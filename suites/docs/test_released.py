"""docs/released.md is what its data say, and what it tells to run can be run."""

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_harness.harness.core.case import parse_id
from moe_harness.harness.core.registry import registered
from moe_harness.suites.adapters import standins
from moe_harness.suites.docs import released

FOUND = [found for library in released.files() for found in library["findings"]]
ROUTERS = "vllm.model_executor.layers.fused_moe.router"
REPRODUCERS = sorted(released.REPRODUCERS.glob("*.py"))


def test_the_page_equals_the_data() -> None:
    assert released.PAGE.read_text() == released.page(), "run python -m moe_harness.suites.docs.released"


def test_ratios_are_those_of_the_times() -> None:
    first = next(library for library in released.files() if library["library"] == "vllm")["timed"][0]
    assert released.timed(first)[-1].split(" | ")[1:3] == ["1.40", "1.16"]


@pytest.mark.parametrize("found", [f for f in FOUND if "case" in f], ids=lambda found: found["case"])
def test_a_replay_line_names_a_case_and_an_implementation(found: dict[str, str]) -> None:
    stage = found["case"].partition("/")[0]
    assert found["spec"] in registered(stage)
    assert parse_id(found["case"])[:2] == tuple(found["case"].split("/")[:2])


def test_every_defect_has_a_reproducer_without_this_project() -> None:
    named = {found["reproducer"] for found in FOUND if "reproducer" in found}
    assert named == {path.name for path in REPRODUCERS}
    assert all("reproducer" in found for found in FOUND if found["kind"].startswith("defect"))
    for path in REPRODUCERS:
        text = path.read_text()
        modules = {n.module.partition(".")[0] for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)}
        assert modules == {"vllm"} and len(text.splitlines()) <= 20, path


@pytest.mark.parametrize("path", REPRODUCERS, ids=lambda path: path.stem)
def test_a_reproducer_passes_on_a_library_that_is_right_and_fails_on_one_that_is_not(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU over a stand-in, fewer tokens: the script itself is right, whatever the library does on a GPU."""
    script = path.read_text().replace('"cuda"', '"cpu"')
    for many, few in (("5_000_000", "50"), ("4_194_303", "20"), ("4_194_304", "21")):
        script = script.replace(many, few)
    standins.vllm(monkeypatch)
    exec(compile(script, path, "exec"), {})
    for name in ("fused_topk", "fused_topk_bias", "grouped_topk"):
        monkeypatch.setattr(sys.modules[f"{ROUTERS}.{name}_router"], name, _wrong(name))
    with pytest.raises(AssertionError):
        exec(compile(script, path, "exec"), {})
    assert capsys.readouterr().out


def _wrong(name: str) -> Callable[..., Any]:
    """That router with what is reported of it."""
    right = getattr(sys.modules[f"{ROUTERS}.{name}_router"], name)

    def router(*given: Any, **more: Any) -> Any:
        bias = more.get("e_score_correction_bias")
        if bias is not None and not bias.is_contiguous():  # read as if it were
            more["e_score_correction_bias"] = bias.as_strided(bias.shape, (1,))
        weights, ids, *rest = right(*given, **more)
        if name == "fused_topk":
            ids = ids.roll(1, 0)  # those of another row
        elif name == "fused_topk_bias":
            ids = ids[:, :1].expand_as(ids)
        return weights, ids, *rest

    return router
