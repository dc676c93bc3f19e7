"""What the pytest plugin does once a test asks for it: plan, judge in worker processes, put the results together."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, NoReturn

import pytest

from moe_harness.harness import report
from moe_harness.harness.commands import options
from moe_harness.harness.core.contracts import STAGES
from moe_harness.harness.core.errors import HarnessError, Lacks, UsageError
from moe_harness.harness.core.findings import Answer, Finding, restored
from moe_harness.harness.core.plan import EXAMPLES, ON_CUDA_ONLY, Planned, Request, plan
from moe_harness.harness.process.pool import EXPLAINED, Pool
from moe_harness.harness.run.result_builder import Listener, ResultBuilder, add_cause, failure_of


class PluginSession:
    """One pytest process: its options, a worker process per implementation, and the answers not yet reported."""

    def __init__(self, config: pytest.Config):
        self.options = chosen = config.option
        try:
            self.request = options.request("experts", chosen.impl_device, chosen.impl_dtype, chosen.impl_profile,
                                           chosen.impl_config, chosen.impl_seed)  # fmt: skip
            self.specs = options.specs(chosen.impl) if chosen.impl else ()
            options.writable(chosen.impl_json)
            options.writable(chosen.impl_html)
            options.at_least("--impl-seed", chosen.impl_seed, 0)
            options.at_least("--impl-timeout", chosen.impl_timeout, 1)
        except UsageError as error:
            raise pytest.UsageError(str(error)) from None
        self.accepted: set[str] = set()  # stages for which --impl-config has cases, or is not given
        self.pools: dict[tuple[str, str], Pool] = {}
        self.lacking: dict[tuple[str, str], HarnessError] = {}  # implementations that cannot be judged, and why
        self.answers: dict[str, dict[str, Any]] = {}  # of each test, until its report takes it along
        self.results: list[report.Result] = []  # once all is judged

    def close(self) -> None:
        for pool in self.pools.values():
            pool.__exit__()

    def parameters(self, metafunc: pytest.Metafunc, marker: pytest.Mark, *, searching: bool) -> dict[str, tuple]:
        """The values of `judged` under their ids; a function named after no check judges the cases of all."""
        if not marker.args or marker.args[0] not in STAGES:
            raise pytest.UsageError(f"{metafunc.definition.nodeid} has the marker stage{marker.args!r}, "
                                    f"but should name one of {', '.join(STAGES)}")  # fmt: skip
        stage, check = marker.args[0], metafunc.function.__name__.removeprefix("test_")
        self.accept_config(stage)
        specs = self.specs or marker.args[1:] or tuple(getattr(metafunc.module, "IMPLEMENTATIONS", ()))
        if searching:
            return {spec: (stage, spec, None) for spec in specs}
        planned = plan(stage, self.request)
        if check in {p.check for p in planned} | {"property"}:
            return {f"{spec}-{p.case.id()}": (stage, spec, p) for spec in specs for p in planned if p.check == check}
        return {f"{spec}-{p.check}-{p.case.id()}": (stage, spec, p) for spec in specs for p in planned}

    def accept_config(self, stage: str) -> None:
        """Raises UsageError where --impl-config adds no case to a stage, as the command does; once for each stage."""
        if stage in self.accepted:
            return
        try:
            options.config_has_cases(stage, self.request, False, "--impl-config")
        except UsageError as error:
            raise pytest.UsageError(str(error)) from None
        self.accepted.add(stage)

    def judge(self, item: pytest.Item, stage: str, spec: str, planned: Planned) -> None:
        """Judge one case; ends as the test does."""
        __tracebackhide__ = True
        if planned.check in ON_CUDA_ONLY and self.request.device != "cuda":
            self.leave_out(item, stage, spec, "needs --impl-device cuda")
        pool = self.pool(item, stage, spec)
        loaded = pool.workers[0].loaded
        if planned.case.dtype not in loaded.dtypes:
            self.leave_out(item, stage, spec, f"{planned.case.dtype} is not among the declared dtypes")
        if (why := pool.cannot_run(planned)) is not None:
            self.leave_out(item, stage, spec, why)
        self.conclude(item, stage, spec, pool.judge_one(planned.id))

    def search(self, item: pytest.Item, stage: str, spec: str) -> None:
        """Let Hypothesis search; what it finds is told by its smallest case."""
        __tracebackhide__ = True
        from moe_harness.harness.run import property_search

        pool = self.pool(item, stage, spec)
        profile, dtypes = self.request.profile, pool.workers[0].loaded.dtypes
        answers = property_search.falsify(
            pool.drawn(dtypes), pool.ask_drawn, examples=EXAMPLES[profile], start=self.request.seed,
            seconds=pool.search_seconds[profile],
        )  # fmt: skip
        for answer in answers:
            if answer.fails or answer.lacks:
                self.conclude(item, stage, spec, answer)

    def leave_out(self, item: pytest.Item, stage: str, spec: str, why: str, status: int = 0) -> NoReturn:
        """Skip the test of a case that nobody judges; `status`, where that is an error, is the one to end with."""
        __tracebackhide__ = True
        self.answers[item.nodeid] = {"stage": stage, "spec": spec, "answer": None, "why": why, "status": status}
        pytest.skip(why)

    def conclude(self, item: pytest.Item, stage: str, spec: str, answer: Answer) -> None:
        """Turn an answer into the test's outcome, and keep it for the report."""
        __tracebackhide__ = True
        self.answers[item.nodeid] = {"stage": stage, "spec": spec, "answer": asdict(answer)}
        if answer.lacks:
            self.lacking[stage, spec] = Lacks(answer.reason or "")
        if answer.status == "error":
            pytest.skip(f"could not be judged: {answer.reason}")
        if answer.status == "unsupported":
            pytest.skip(f"unsupported: {answer.reason}")
        if answer.status == "skipped":
            pytest.skip(answer.reason or "")
        if answer.status == "passed":
            return
        finding, pool = (answer.findings or [Finding(answer.reason or "")])[0], self.pools[stage, spec]
        replay = ResultBuilder(stage, spec, self.request, Listener()).replay_line([answer.judged])
        failure = failure_of(answer.judged, finding, replay)
        if finding.where and pool.explained < EXPLAINED:
            add_cause(failure, pool.explain(answer.judged))
        pytest.fail(report.failure_text(dict(failure)), pytrace=False)

    def pool(self, item: pytest.Item, stage: str, spec: str) -> Pool:
        """The worker process for an implementation, started when first asked for; where it cannot be, a skip."""
        __tracebackhide__ = True
        key = stage, spec
        if key not in self.pools and key not in self.lacking:
            pool = Pool(stage, spec, self.request.device, 1, self.options.impl_timeout)
            try:
                pool.start()
                self.pools[key] = pool
            except HarnessError as error:
                pool.__exit__()
                self.lacking[key] = error
        if key in self.lacking:
            self.leave_out(item, stage, spec, str(self.lacking[key]), self.lacking[key].exit_status)
        return self.pools[key]

    def exit_status(self, heard: Iterable[dict[str, Any]]) -> int:
        """That of `moe-harness check` for what was judged: a run that skipped everything is no success."""
        heard = list(heard)
        self.results = results_of(heard, self.request)
        if any(told.get("status") == UsageError.exit_status for told in heard):
            return UsageError.exit_status
        return report.exit_status(self.results)

    def summarize(self, terminal: Any) -> None:
        """Table and ledger of every implementation; JSON and HTML where asked for."""
        from rich.console import Console

        from moe_harness.harness.report.html import write_html
        from moe_harness.harness.report.terminal import checks_table, clusters, emit, ledger, verdict

        terminal.section("moe-harness")
        console = Console(file=terminal._tw._file)
        for result in self.results:
            head = f"{result['stage']}  {result['impl']}"
            coverage = {**result["coverage"], "axes": {}}
            parts = [head, *clusters(result["clusters"]), checks_table(result["checks"]), *ledger(coverage)]
            emit(console, [*parts, *(verdict(dict(result)) if result["verdict"] not in ("pass", "fail") else [])])
        for line in report.annotations(self.results):
            terminal.line(line)
        if self.options.impl_json:
            self.options.impl_json.write_text(report.dumps(self.results))
        if self.options.impl_html:
            write_html(self.results, self.options.impl_html)


def results_of(heard: Iterable[dict[str, Any]], request: Request) -> list[report.Result]:
    """The answers of all tests, put together as the command puts them together."""
    accounts: dict[tuple[str, str], ResultBuilder] = {}
    left_out: dict[tuple[str, str], str] = {}
    for told in heard:
        key = told["stage"], told["spec"]
        account = accounts.setdefault(key, ResultBuilder(*key, request, Listener()))
        if told["answer"] is not None:
            account.take(restored(told["answer"]))
        elif told["status"]:
            account.error = told["why"]
        else:
            left_out.setdefault(key, told["why"])
    for key, account in accounts.items():
        if not account.answered:
            account.error = account.error or left_out[key]
        account.partial = not _core_was_asked_for(key[0], account)
    return [account.result() for account in accounts.values()]


def _core_was_asked_for(stage: str, account: ResultBuilder) -> bool:
    """Whether all cases of one part of the core, such as a dtype, were among the tests that ran."""
    whole: dict[str, bool] = {}
    for planned in plan(stage, account.request):
        case = planned.case
        if planned.check == account.core_check and case.core() and case.rows():
            whole[case.part()] = whole.get(case.part(), True) and planned.id in account.answered
    return any(whole.values())
