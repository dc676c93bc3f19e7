"""pytest over any implementation: `pytest suites/experts --impl my_kernel.py:fused -n auto`.

A suite is a function per check that takes the fixture `verdict`; the plugin gives it one test per case and runs what
the command runs, in the same isolated processes.  It adds nothing to other people's test runs but its options.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from moe_harness.harness.cases import plan
from moe_harness.harness.cases.plans import ON_CUDA_ONLY, Planned
from moe_harness.harness.cases.request import PROFILES, Request
from moe_harness.harness.contracts import DEVICES, DTYPES, STAGES
from moe_harness.harness.errors import HarnessError

if TYPE_CHECKING:
    from moe_harness.harness.report import Result

POOLS = pytest.StashKey[dict[tuple[str, str], Any]]()
ANSWER = "moe-harness"  # the user property that carries an answer from an xdist worker to the terminal
EXAMPLES = {"quick": 100, "full": 500, "exhaustive": 3000}


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of `moe-harness check`, with names that no other plugin has."""
    group = parser.getgroup("moe-harness", "judging Mixture-of-Experts implementations")
    group.addoption(
        "--impl", action="append", default=[], help="implementation: name, module:function, file.py:function"
    )
    group.addoption("--impl-device", default="cpu", choices=DEVICES, help="where it is judged")
    group.addoption(
        "--impl-dtype", action="append", default=[], choices=DTYPES, help="only this dtype; may be repeated"
    )
    group.addoption("--profile", default="quick", choices=PROFILES, help="how many cases")
    group.addoption("--impl-seed", type=int, default=0, help="other data, other combinations")
    group.addoption("--impl-timeout", type=float, default=60.0, help="seconds one case may take")
    group.addoption("--impl-json", type=Path, help="write the result here, as moe-harness check --json does")
    group.addoption("--impl-html", type=Path, help="write a page here, as moe-harness check --html does")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "stage(name): the suite judges this stage; its tests are named after the checks")
    config.stash[POOLS] = {}


def pytest_unconfigure(config: pytest.Config) -> None:
    for pool in config.stash.get(POOLS, {}).values():
        pool.__exit__()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test per implementation and case for functions that take `verdict`, per implementation for `falsify`."""
    names = {"verdict", "falsify"} & set(metafunc.fixturenames)
    if not names:
        return
    marker = metafunc.definition.get_closest_marker("stage")
    if marker is None or marker.args[0] not in STAGES:
        raise pytest.UsageError(f"{metafunc.definition.nodeid} takes {names.pop()} and needs the marker stage(name), "
                                f"name being one of {', '.join(STAGES)}")  # fmt: skip
    stage, check = marker.args[0], metafunc.function.__name__.removeprefix("test_")
    specs = metafunc.config.option.impl or list(getattr(metafunc.module, "IMPLEMENTATIONS", []))
    if "falsify" in names:
        metafunc.parametrize("judged", [(stage, spec, None) for spec in specs], ids=specs)
        return
    planned = [p for p in plan(stage, _request(metafunc.config)) if p.check == check]
    values = [(stage, spec, p) for spec in specs for p in planned]
    metafunc.parametrize("judged", values, ids=[f"{spec}-{p.case.id()}" for _, spec, p in values])


def _request(config: pytest.Config) -> Request:
    options = config.option
    dtypes = tuple(options.impl_dtype) or DTYPES
    return Request(options.profile, options.impl_device, dtypes, (), options.impl_seed)


@pytest.fixture
def judged(request: pytest.FixtureRequest) -> tuple[str, str, Planned | None]:
    """(stage, implementation, check and case), by parametrisation."""
    return request.param


@pytest.fixture
def verdict(judged: tuple[str, str, Planned], request: pytest.FixtureRequest) -> Callable[[], None]:
    """Calling it judges one case and fails, skips or passes the test."""
    stage, spec, planned = judged

    def judge() -> None:
        __tracebackhide__ = True
        if planned.check in ON_CUDA_ONLY and request.config.option.impl_device != "cuda":
            pytest.skip("needs --impl-device cuda")
        pool = pool_for(request.config, stage, spec)
        if planned.case.dtype not in pool.workers[0].loaded["declared"]["dtypes"]:
            pytest.skip(f"{planned.case.dtype} is not among the declared dtypes")
        conclude(request, spec, pool.judge_one(planned.id))

    return judge


@pytest.fixture
def falsify(judged: tuple[str, str, None], request: pytest.FixtureRequest) -> Callable[[], None]:
    """Calling it lets Hypothesis search for a case that fails, and fails the test with the smallest."""
    stage, spec, _ = judged

    def search() -> None:
        __tracebackhide__ = True
        from moe_harness.harness import strategies

        pool, config = pool_for(request.config, stage, spec), request.config.option
        answers: dict[str, dict[str, Any]] = {}

        def judge(case: Any) -> bool:
            answers[case.id()] = answer = pool.judge_one(Planned("property", case).id)
            return answer["status"] not in ("failed", "died")

        dtypes = tuple(pool.workers[0].loaded["declared"]["dtypes"])
        smallest = strategies.search(stage, dtypes, judge, examples=EXAMPLES[config.profile], start=config.impl_seed,
                                     out_of_time=lambda: False)  # fmt: skip
        if smallest is not None:
            conclude(request, spec, answers[smallest.id()])

    return search


def conclude(request: pytest.FixtureRequest, spec: str, answer: dict[str, Any]) -> None:
    """Turn an answer into the test's outcome, and keep it for the report."""
    __tracebackhide__ = True
    from moe_harness.harness.pool import EXPLAINED
    from moe_harness.harness.report import failure_text

    request.node.user_properties.append((ANSWER, {"spec": spec, "answer": answer}))
    if answer["status"] == "unsupported":
        pytest.skip(f"unsupported: {answer['reason']}")
    if answer["status"] == "skipped":
        pytest.skip(answer["reason"])
    if answer["status"] == "passed":
        return
    finding = (answer["findings"] or [{"message": answer["reason"], "headroom": None}])[0]
    pool = pool_for(request.config, answer["id"].split("/")[0], spec)
    if pool.explained < EXPLAINED:
        pool.explain(answer.get("judged", answer["id"]), finding)
    device = request.config.option.impl_device
    replay = f"moe-harness replay '{answer['id']}' --impl {spec}" + ("" if device == "cpu" else f" --device {device}")
    case = {"check": answer["id"].split("/")[1], "case": answer["id"], "replay": replay}
    pytest.fail(failure_text({**finding, **case}), pytrace=False)


def pool_for(config: pytest.Config, stage: str, spec: str) -> Any:
    """The worker process for an implementation, one per pytest process, started when first asked for."""
    from moe_harness.harness.pool import Pool, prepare

    pools = config.stash[POOLS]
    if (stage, spec) not in pools:
        prepare()
        pool = Pool(stage, spec, config.option.impl_device, 1, config.option.impl_timeout)
        try:
            pool.start()
        except HarnessError as error:
            pool.__exit__()
            pytest.exit(str(error), returncode=error.exit_status)
        pools[stage, spec] = pool
    return pools[stage, spec]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table and the ledger of every implementation judged, xdist or not; JSON and HTML where asked for."""
    reports = [report for group in terminalreporter.stats.values() for report in group]
    results = results_of(reports, _request(config))
    if not results:
        return
    from moe_harness.harness import report
    from moe_harness.harness.report.html import write_html
    from moe_harness.harness.report.terminal import checks_table, emit, ledger

    terminalreporter.section("moe-harness")
    from rich.console import Console

    console = Console(file=terminalreporter._tw._file)
    for result in results:
        emit(
            console,
            [
                f"{result['stage']}  {result['impl']}",
                checks_table(result["checks"]),
                *ledger({**result["coverage"], "axes": {}}),
            ],
        )
    if config.option.impl_json:
        config.option.impl_json.write_text(report.dumps(results))
    if config.option.impl_html:
        write_html(results, config.option.impl_html)


def results_of(reports: Iterable[Any], request: Request) -> "list[Result]":
    """The answers that test reports carry, put together as the command puts them together."""
    from moe_harness.harness.account import Account, Listener

    accounts: dict[tuple[str, str], Account] = {}
    for one in reports:
        for name, value in getattr(one, "user_properties", ()):
            if name != ANSWER or one.when != "call":
                continue
            key = value["answer"]["id"].split("/")[0], value["spec"]
            if key not in accounts:
                accounts[key] = Account(*key, request, Listener())
            accounts[key].take(value["answer"])
    return [account.result() for account in accounts.values()]
