"""The report tells everything that a result holds: no failure hidden, no line cut, nothing executed by a browser."""

import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from moe_harness.harness.report import Progress, dumps, exit_status, failure_text, print_report, to_json
from moe_harness.harness.report.figures import histogram
from moe_harness.harness.report.html import render

HOSTILE = "<script>alert(1)</script> [bold red]x[/] \" ' &amp; {{ 7 * 7 }}"
LONG_REPLAY = (
    f"moe-harness replay 'experts/{','.join(f'axis{index}=value{index}' for index in range(30))}' --impl my.py:f"
)


def check(name: str = "numeric", **counts: Any) -> dict[str, Any]:
    return {
        "name": name,
        "cases": 10,
        "failed": 0,
        "unsupported": 0,
        "skipped": 0,
        "seconds": 1.0,
        "worst": 0.4,
    } | counts


def failure(**changes: Any) -> dict[str, Any]:
    return {
        "check": "numeric",
        "case": "experts/T=33,H=64,seed=7",
        "message": "element is 31 sigma from the reference",
        "headroom": 12.3,
        "where": {"token": 5, "expert": [3, 1], "column": 17},
        "looks_like": ["rows of expert 3 only"],
        "diagnosis": [{"fault": "gate_up_swapped", "evidence": "explains the output to 0.9 sigma"}],
        "replay": LONG_REPLAY,
        "heatmap": {"rows": "tokens", "columns": "columns", "values": [[0.1, 12.3], [None, 0.0]]},
    } | changes


def result(**changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "verdict": "pass",
        "stage": "experts",
        "impl": "my.py:fused",
        "checks": [check()],
        "failures": [],
        "coverage": {"executed": 10, "unsupported": [], "skipped": [], "axes": {"dtype": {"bf16": 10}}},
    } | changes


def failed(*failures: dict[str, Any], **changes: Any) -> dict[str, Any]:
    found = list(failures or [failure()])
    return result(verdict="fail", failures=found, checks=[check(failed=len(found))], **changes)


def printed(*results: dict[str, Any], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_report(results, console)
    return console.file.getvalue()


def flat(text: str) -> str:
    """The text with every run of white space as one blank, so that wrapping does not matter."""
    return " ".join(text.split())


# exit status and JSON


@pytest.mark.parametrize(
    ("results", "status"),
    [
        ([result()], 0),
        ([result(), result()], 0),
        ([failed()], 1),
        ([result(), failed(), result(verdict="error")], 1),
        ([result(verdict="error", error="cannot be imported")], 3),
        ([result(), result(verdict="unsupported")], 3),
        ([result(coverage={"executed": 0, "unsupported": [], "skipped": [], "axes": {}})], 3),
        ([result(interrupted=True)], 3),
        ([failed(interrupted=True)], 1),
        ([], 3),
        ([{}], 3),
    ],
)
def test_exit_status(results: list[dict[str, Any]], status: int) -> None:
    assert exit_status(results) == status


@pytest.mark.parametrize("claimed", [{"failures": [failure()]}, {"checks": [check(failed=1)]}])
def test_a_failure_outweighs_a_claimed_pass(claimed: dict[str, Any]) -> None:
    assert to_json([result(**claimed)])["verdict"] == "fail"
    assert exit_status([result(**claimed)]) == 1


def test_one_result_is_the_document_itself() -> None:
    assert to_json([result()]) == result()


def test_several_results_are_summed_and_kept_whole() -> None:
    refused = {"executed": 5, "unsupported": [{"reason": "only silu", "cases": 2, "example": "a"}], "skipped": []}
    other = failed(impl="other.py:f", coverage=refused)
    document = to_json([result(coverage=refused), other])
    assert document["impl"] == ["my.py:fused", "other.py:f"]
    assert document["verdict"] == "fail"
    assert document["checks"] == [check(cases=20, failed=1, seconds=2.0) | {"judged": 20, "reasons": []}]
    assert document["failures"] == [failure(impl="other.py:f")]
    assert document["coverage"]["executed"] == 10
    assert document["coverage"]["unsupported"] == [{"reason": "only silu", "cases": 4, "example": "a"}]
    assert document["runs"][1] == other
    assert refused["unsupported"][0]["cases"] == 2, "the results themselves must stay as they were"


def test_json_text_is_strict_and_equals_the_document() -> None:
    text = dumps([failed(failure(headroom=math.inf, where={"z": math.nan}))])
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert document["failures"][0]["headroom"] is None
    assert document["failures"][0]["where"] == {"z": None}
    assert "[0.1, 12.3]" in text, "a row of a heat map should take one line"


# terminal


@pytest.mark.parametrize("width", [40, 80, 200])
def test_replay_line_is_never_wrapped_or_cut(width: int) -> None:
    assert LONG_REPLAY in printed(failed(), width=width).splitlines()
    assert LONG_REPLAY in failure_text(failure()).splitlines()


@pytest.mark.parametrize("width", [60, 80])
def test_everything_of_a_failure_is_printed(width: int) -> None:
    text = flat(printed(failed(), width=width))
    for part in ("31 sigma from the reference", "experts/T=33,H=64,seed=7", "token 5, expert [3, 1], column 17"):
        assert part in text
    for part in ("12.3 times the bound", "rows of expert 3 only", "gate_up_swapped: explains the output", "FAIL"):
        assert part in text


def test_long_names_and_reasons_are_not_cut() -> None:
    reason = "NotImplementedError: " + " ".join(f"word{index}" for index in range(40))
    refused = [{"reason": reason, "cases": 3, "example": "experts/T=1"}]
    ledger = {"executed": 10, "unsupported": refused, "skipped": [], "axes": {}}
    name = "a/very/long/path/" + "deep/" * 20 + "kernel.py:fused"
    text = printed(result(coverage=ledger, impl=name), result(impl="b" * 90))
    assert reason in flat(text)
    assert name in text.replace("\n", "")
    assert f"[1] {name}" in text.splitlines()
    assert "…" not in re.sub(r"─.*|.*─", "", text)


def test_unsupported_and_skipped_are_listed_with_reasons() -> None:
    ledger = {
        "executed": 10,
        "unsupported": [{"reason": "ValueError: only silu", "cases": 12, "example": "experts/act=gelu_tanh"}],
        "skipped": [{"what": "graph replay", "reason": "needs CUDA", "cases": 4}],
        "axes": {"E": {str(value): 1 for value in range(1, 40)}},
    }
    text = flat(printed(result(coverage=ledger)))
    assert "12 cases: ValueError: only silu (e.g. experts/act=gelu_tanh)" in text
    assert "4 cases: graph replay, needs CUDA" in text
    assert "39 values from 1 to 39" in text


def test_similar_failures_are_grouped_and_counted() -> None:
    alike = [failure(case=f"experts/T={index}") for index in range(10)]
    odd = failure(case="experts/T=99", looks_like=["one column"])
    text = flat(printed(failed(*alike, odd)))
    assert text.count("FAIL numeric") == 2
    assert "experts/T=99" in text, "a failure of another kind must be among those shown"
    assert "and 9 more in numeric; all of them look like one shown here" in text


def test_markup_in_messages_is_printed_as_it_is() -> None:
    assert flat(HOSTILE) in flat(printed(failed(failure(message=HOSTILE)), width=200))
    assert flat(HOSTILE) in flat(printed(result(verdict="error", error=HOSTILE, impl=HOSTILE), width=200))


def test_empty_run_and_bare_results_are_reported() -> None:
    assert "nothing was judged" in printed()
    assert "ERROR" in printed({"impl": "my.py:f", "verdict": "error", "error": "no attribute 'f'"})
    assert "nothing was executed" in printed(result(checks=[], coverage=None))


def test_side_by_side_matrix_has_a_verdict_for_each() -> None:
    text = flat(printed(result(), failed(impl="other.py:f"), result(impl="third", checks=[check("laws")])))
    assert "numeric 10 passed 1 of 10 failed not run" in text
    assert "verdict PASS FAIL PASS" in text


# progress


def progress_output(clock: Any = None, **console: Any) -> tuple[Progress, io.StringIO]:
    stream = io.StringIO()
    kwargs = {} if clock is None else {"clock": clock}
    return Progress(Console(file=stream, width=80, **console), **kwargs), stream


def test_plain_progress_is_sparse_and_shows_the_first_failure_only() -> None:
    progress, stream = progress_output()
    with progress:
        progress.start("my.py:f", {"numeric": 100, "laws": 50})
        for name, cases in (("numeric", 100), ("laws", 50)):
            for index in range(cases):
                progress.advance(name, "failed" if index < 2 and name == "laws" else "passed")
                if index < 2 and name == "laws":
                    progress.failure(failure(message=f"message {index}"))
    text = stream.getvalue()
    assert "message 0" in text
    assert "message 1" not in text
    assert LONG_REPLAY in text.splitlines()
    assert "laws: 50 cases, 2 failed" in text
    assert "150/150 cases, 2 failed" in text
    assert len(text.splitlines()) < 20


def test_plain_progress_speaks_in_a_long_check() -> None:
    now = [0.0]
    progress, stream = progress_output(clock=lambda: now[0])
    with progress:
        progress.start("my.py:f", {"numeric": 1000})
        for _ in range(100):
            now[0] += 1.0
            progress.advance("numeric", "passed")
    lines = [line for line in stream.getvalue().splitlines() if "left" in line]
    assert len(lines) == 6
    assert "15/1000 cases, 1.0 cases/s, 0:15 elapsed, 16:25 left" in lines[0]


def test_live_progress_survives_a_wrong_plan_and_markup() -> None:
    progress, stream = progress_output(force_terminal=True)
    with progress:
        progress.start(HOSTILE, {"numeric": 1, "empty": 0})
        for _ in range(3):
            progress.advance("numeric", "unsupported")
        progress.advance("unplanned", "skipped")
        progress.note(HOSTILE)
    assert "4/4 cases" in stream.getvalue()


# page


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_escapes_whatever_the_user_wrote() -> None:
    entry = failure(
        check=HOSTILE,
        case=HOSTILE,
        message=HOSTILE,
        where={HOSTILE: HOSTILE},
        looks_like=[HOSTILE],
        diagnosis=[{"fault": HOSTILE, "evidence": HOSTILE}],
        replay=HOSTILE,
        heatmap={"rows": HOSTILE, "columns": HOSTILE, "values": [[1.0]]},
    )
    ledger = {
        "executed": 1,
        "unsupported": [{"reason": HOSTILE, "cases": 1, "example": HOSTILE}],
        "skipped": [{"what": HOSTILE, "reason": HOSTILE, "cases": 1}],
        "axes": {HOSTILE: {HOSTILE: 1}},
    }
    more = {"versions": {HOSTILE: HOSTILE}, "observations": [{"name": HOSTILE, "text": HOSTILE}], "error": HOSTILE}
    page = Page(render([failed(entry, impl=HOSTILE, stage=HOSTILE, coverage=ledger, **more)]))
    assert page.tags.count("script") == 1, "the page's own script only"
    assert page.text.count(HOSTILE) >= 15
    assert "49" not in page.text


def test_page_asks_for_nothing_from_outside() -> None:
    page = Page(render([failed(), result(impl="other.py:f")]))
    assert page.links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)


def test_page_holds_every_failure_and_its_replay_line() -> None:
    lines = [f"moe-harness replay 'experts/seed={index}' --impl my.py:f" for index in range(20)]
    page = Page(render([failed(*(failure(replay=line) for line in lines))]))
    assert all(line in page.text for line in lines)
    assert page.tags.count("img") == 20


@pytest.mark.parametrize("results", [[], [{}], [{"verdict": "error", "error": "no such file", "coverage": None}]])
def test_page_of_an_empty_run(results: list[dict[str, Any]]) -> None:
    text = flat(Page(render(results)).text)
    assert "Nothing was judged" in text or "nothing was executed" in text or "no such file" in text


def test_histogram_marks_what_is_beyond_the_limits() -> None:
    spec = {"edges": [-math.inf, -2, -1, 0, 1, 2, None], "counts": [1, 5, 20, 20, 5, 1], "limit": 2.0}
    drawn = histogram({"z_histogram": spec, "elements": 52})
    assert drawn is not None
    assert [bar["beyond"] for bar in drawn["bars"]] == [True, False, False, False, False, True]
    assert len(drawn["lines"]) == 2
    assert histogram({"z_histogram": {"edges": [], "counts": []}}) is None
    assert histogram({}) is None


def test_histogram_of_absolute_values_may_have_an_open_last_bin() -> None:
    drawn = histogram({"z_histogram": {"edges": [0.0, 1.0, 2.0], "counts": [683, 272, 45]}})
    assert drawn is not None
    assert drawn["one_sided"]
    assert [round(bar["expected"]) for bar in drawn["bars"]] == [683, 272, 43]


@pytest.mark.parametrize("limit", [None, 7.0])
@pytest.mark.parametrize(
    "values", [[], [[]], [[None, math.nan]], [[0.0]], [[math.inf, 1.0]], [[1e30, 1.5]], [[1e9, -1.0]]]
)
def test_any_heat_map_can_be_drawn(values: list[list[float | None]], limit: float | None) -> None:
    drawing = {"rows": "tokens", "columns": "columns", "values": values, "limit": limit}
    assert "12.3 times the bound" in render([failed(failure(heatmap=drawing))])


def test_report_imports_nothing_heavy() -> None:
    code = "import sys, moe_harness.harness.report, moe_harness.harness.report.html; "
    code += "print({'torch', 'jinja2', 'matplotlib'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def test_a_cause_is_told_once_and_what_was_not_asked_for_its_own_is_counted() -> None:
    """Of a sampler without its temperature twelve failures stood there in full, of four checks one cause each."""
    unasked = {"diagnosis": [], "looks_like": []}
    text = flat(printed(failed(
        failure(message="m1"), failure(message="m2", **unasked), failure(check="special", message="m3"),
        failure(check="special", message="m4", **unasked), failure(check="laws", message="m5", **unasked),
        failure(check="laws", message="m6", **unasked), failure(check="memory", message="m5", **unasked),
        failure(check="special", message="died", where=None, **unasked),
    )))  # fmt: skip
    assert re.findall(r": (m\d|died)\b", text) == ["m1", "died", "m5"]
    assert "and 1 more in numeric, gate_up_swapped among them" in text
    assert "and 2 more in special, gate_up_swapped among them" in text
    assert "1 more in memory, as shown above" in text


def test_many_clusters_are_counted() -> None:
    one = {"cause": None, "kinds": ["wrong values"], "condition": "k=1", "failed": 3, "passed": 0, "passed_without": 9}
    clusters = [one | {"case": f"c{n}", "replay": f"replay c{n}"} for n in range(8)]
    text = flat(printed(failed(failure()) | {"clusters": clusters}))
    assert "5. wrong values" in text and "6. wrong" not in text and "and 9 cases in 3 more clusters" in text
