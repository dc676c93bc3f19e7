"""What the pytest plugin does once a test asks for it: plan, judge in worker processes, put the results together."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import pytest

from moe_harness.harness import report
from moe_harness.harness.commands import options
from moe_harness.harness.core.contracts import STAGES
from moe_harness.harness.core.errors import HarnessError, UsageError
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
        except UsageError as error:
            raise pytest.UsageError(str(error)) from None
        self.pools: dict[tuple[str, str], Pool] = {}
        self.answers: dict[str, dict[str, Any]] = {}  # of each test, until its report takes it along

    def close(self) -> None:
        for pool in self.pools.values():
            pool.__exit__()

    def parameters(self, metafunc: pytest.Metafunc, marker: pytest.Mark, *, searching: bool) -> dict[str, tuple]:
        """The values of `judged` under their ids; a function named after no check judges the cases of all."""
        if not marker.args or marker.args[0] not in STAGES:
            raise pytest.UsageError(f"{metafunc.definition.nodeid} has the marker stage{marker.args!r}, "
                                    f"but should name one of {', '.join(STAGES)}")  # fmt: skip
        stage, check = marker.args[0], metafunc.function.__name__.removeprefix("test_")
        specs = self.specs or marker.args[1:] or tuple(getattr(metafunc.module, "IMPLEMENTATIONS", ()))
        if searching:
            return {spec: (stage, spec, None) for spec in specs}
        planned = plan(stage, self.request)
        if check in {p.check for p in planned} | {"property"}:
            return {f"{spec}-{p.case.id()}": (stage, spec, p) for spec in specs for p in planned if p.check == check}
        return {f"{spec}-{p.check}-{p.case.id()}": (stage, spec, p) for spec in specs for p in planned}

    def judge(self, item: pytest.Item, stage: str, spec: str, planned: Planned) -> None:
        """Judge one case; ends as the test does."""
        __tracebackhide__ = True
        if planned.check in ON_CUDA_ONLY and self.request.device != "cuda":
            pytest.skip("needs --impl-device cuda")
        pool = self.pool(stage, spec)
        loaded = pool.workers[0].loaded
        if planned.case.dtype not in loaded.dtypes:
            pytest.skip(f"{planned.case.dtype} is not among the declared dtypes")
        if (why := pool.cannot_run(planned)) is not None:
            pytest.skip(why)
        self.conclude(item, stage, spec, pool.judge_one(planned.id))

    def search(self, item: pytest.Item, stage: str, spec: str) -> None:
        """Let Hypothesis search; what it finds is told by its smallest case."""
        __tracebackhide__ = True
        from moe_harness.harness.run import property_search

        pool = self.pool(stage, spec)
        profile, dtypes = self.request.profile, pool.workers[0].loaded.dtypes
        answers = property_search.falsify(
            pool.drawn(dtypes), pool.ask_drawn, examples=EXAMPLES[profile], start=self.request.seed,
            seconds=pool.search_seconds[profile],
        )  # fmt: skip
        for answer in answers:
            if answer.fails:
                self.conclude(item, stage, spec, answer)

    def conclude(self, item: pytest.Item, stage: str, spec: str, answer: Answer) -> None:
        """Turn an answer into the test's outcome, and keep it for the report."""
        __tracebackhide__ = True
        self.answers[item.nodeid] = {"spec": spec, "answer": asdict(answer)}
        if answer.status == "unsupported":
            pytest.skip(f"unsupported: {answer.reason}")
        if answer.status == "skipped":
            pytest.skip(answer.reason or "")
        if answer.status == "passed":
            return
        finding, pool = (answer.findings or [Finding(answer.reason or "")])[0], self.pool(stage, spec)
        replay = ResultBuilder(stage, spec, self.request, Listener()).replay_line([answer.judged])
        failure = failure_of(answer.judged, finding, replay)
        if finding.where and pool.explained < EXPLAINED:
            add_cause(failure, pool.explain(answer.judged))
        pytest.fail(report.failure_text(dict(failure)), pytrace=False)

    def pool(self, stage: str, spec: str) -> Pool:
        """The worker process for an implementation, started when first asked for."""
        if (stage, spec) not in self.pools:
            pool = Pool(stage, spec, self.request.device, 1, self.options.impl_timeout)
            try:
                pool.start()
            except HarnessError as error:
                pool.__exit__()
                pytest.exit(str(error), returncode=error.exit_status)
            self.pools[stage, spec] = pool
        return self.pools[stage, spec]

    def summarize(self, terminal: Any, heard: Iterable[dict[str, Any]]) -> None:
        """Table and ledger of every implementation; JSON and HTML where asked for."""
        from rich.console import Console

        from moe_harness.harness.report.html import write_html
        from moe_harness.harness.report.terminal import checks_table, clusters, emit, ledger

        results = results_of(heard, self.request)
        terminal.section("moe-harness")
        console = Console(file=terminal._tw._file)
        for result in results:
            head = f"{result['stage']}  {result['impl']}"
            coverage = {**result["coverage"], "axes": {}}
            emit(console, [head, *clusters(result["clusters"]), checks_table(result["checks"]), *ledger(coverage)])
        for line in report.annotations(results):
            terminal.line(line)
        if self.options.impl_json:
            self.options.impl_json.write_text(report.dumps(results))
        if self.options.impl_html:
            write_html(results, self.options.impl_html)


def results_of(heard: Iterable[dict[str, Any]], request: Request) -> list[report.Result]:
    """The answers of all tests, put together as the command puts them together."""
    accounts: dict[tuple[str, str], ResultBuilder] = {}
    for told in heard:
        answer = restored(told["answer"])
        key = answer.id.split("/")[0], told["spec"]
        if key not in accounts:
            accounts[key] = ResultBuilder(*key, request, Listener())
        accounts[key].take(answer)
    return [account.result() for account in accounts.values()]
