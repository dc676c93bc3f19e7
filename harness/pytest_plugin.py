"""pytest over any implementation: `pytest --pyargs moe_harness.suites.experts --impl my_kernel.py:fused -n auto`.

A suite is a function per check that takes the fixture `verdict` and has the marker `stage`; the plugin gives it one
test per case and runs what the command runs, in the same isolated processes.

In everybody else's sessions it is nothing but its options, which all start with --impl: nothing of this project is
imported before a test asks for it, and without the marker a fixture called `verdict` is somebody else's.
"""

from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from moe_harness.harness.core.plan import Planned
    from moe_harness.harness.pytest_session import PluginSession

SESSION = pytest.StashKey["PluginSession"]()
FIXTURES = {"verdict", "falsify"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of `moe-harness check`, with names that no other plugin has."""
    group = parser.getgroup("moe-harness", "judging Mixture-of-Experts implementations")
    group.addoption(
        "--impl", action="append", default=[], help="implementation: name, module:function, file.py:function"
    )
    group.addoption("--impl-device", default="cpu", help="where it is judged: cpu or cuda")
    group.addoption("--impl-dtype", action="append", default=[], help="only these dtypes")
    group.addoption("--impl-profile", default="quick", help="how many cases: quick, full or exhaustive")
    group.addoption("--impl-config", action="append", default=[], help="add the shapes of a released model")
    group.addoption("--impl-seed", type=int, default=0, help="other data, other combinations")
    group.addoption("--impl-timeout", type=float, default=60.0, help="seconds one case may take")
    group.addoption("--impl-json", type=Path, help="write the result here, as moe-harness check --json does")
    group.addoption("--impl-html", type=Path, help="write a page here, as moe-harness check --html does")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "stage(name, *specs): judge this stage of a Mixture-of-Experts layer, by default of these implementations",
    )


def pytest_unconfigure(config: pytest.Config) -> None:
    if (session := config.stash.get(SESSION, None)) is not None:
        session.close()


def session_of(config: pytest.Config) -> "PluginSession":
    """What this pytest process judges with; made, and its parts imported, when first asked for."""
    if SESSION not in config.stash:
        from moe_harness.harness.pytest_session import PluginSession

        config.stash[SESSION] = PluginSession(config)
    return config.stash[SESSION]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test per implementation and case for functions that take `verdict`, per implementation for `falsify`."""
    wanted, marker = FIXTURES & set(metafunc.fixturenames), metafunc.definition.get_closest_marker("stage")
    if not wanted or marker is None or "judged" not in metafunc.fixturenames:
        return
    values = session_of(metafunc.config).parameters(metafunc, marker, searching="falsify" in wanted)
    metafunc.parametrize("judged", list(values.values()), ids=list(values))


@pytest.fixture
def judged(request: pytest.FixtureRequest) -> "tuple[str, str, Planned | None]":
    """(stage, implementation, check and case), by parametrisation."""
    if not hasattr(request, "param"):
        raise pytest.UsageError(f"{request.node.nodeid} takes verdict or falsify of moe-harness and needs the marker "
                                "pytest.mark.stage(name), name being experts, router, ...")  # fmt: skip
    return request.param


@pytest.fixture
def verdict(judged: "tuple[str, str, Planned]", request: pytest.FixtureRequest) -> Callable[[], None]:
    """Calling it judges one case and fails, skips or passes the test."""

    def judge() -> None:
        __tracebackhide__ = True
        session_of(request.config).judge(request.node, *judged)

    return judge


@pytest.fixture
def falsify(judged: tuple[str, str, None], request: pytest.FixtureRequest) -> Callable[[], None]:
    """Calling it lets Hypothesis search for a case that fails, and fails the test with the smallest."""

    def search() -> None:
        __tracebackhide__ = True
        session_of(request.config).search(request.node, *judged[:2])

    return search


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """The answer goes with the report, which xdist carries to the terminal, and not into JUnit's file."""
    report = yield
    session = item.config.stash.get(SESSION, None)
    if session is not None and call.when == "call":
        report.moe_harness = session.answers.pop(item.nodeid, None)  # type: ignore[attr-defined]
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tests that were all skipped are no success: what could not be judged, xdist or not, ends as the command does."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    reports = [report for group in terminal.stats.values() for report in group] if terminal else []
    heard = [answer for report in reports if (answer := getattr(report, "moe_harness", None)) is not None]
    if heard:
        status = session_of(session.config).exit_status(heard)
        session.exitstatus = session.exitstatus or status


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table and the ledger of every implementation judged, xdist or not; JSON and HTML where asked for."""
    if (session := config.stash.get(SESSION, None)) is not None and session.results:
        session.summarize(terminalreporter)
