"""Try a random sample of small edits of reference/ and harness/, and count those that the suites notice.

    cosmic-ray init cosmic-ray.toml SESSION && cr-filter-operators SESSION cosmic-ray.toml
    python -m moe_harness.suites.mutation.run SESSION [--count N] [--seed N] [--minutes N] [--workers N] [--json FILE]

The same command goes on where it was stopped.  The suites that judge the sample must be green on the tree as it is, and
their time there sets the time limit.  Every worker edits a copy of the tree of its own.

cosmic-ray's own distribution over HTTP is not used: a run of the suites of more than five minutes (its client's limit)
and a worker that is not up yet both end as results without an outcome, which cr-rate counts as noticed.
"""

import argparse
import ast
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.testing import run_tests
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkItem, WorkResult

from moe_harness.suites.mutation import report
from moe_harness.suites.mutation.selection import suites_of

PYTEST = (
    f"{sys.executable} -m pytest -x -q -p no:cacheprovider -p no:xdist -m 'not gpu and not multigpu and not accuracy'"
)
BASELINE_LIMIT = 3600.0  # seconds for one entry of the selection on the tree as it is
SLACK, TIMES = 120.0, 5.0  # an edit may take this longer: seconds, and times the tree as it is
TIMED_OUT = "timeout"  # the whole output that cosmic-ray gives a run that it stopped


def main() -> None:
    """Run the sample and write the report; exit status 1 where the suites fail on the tree as it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("session", type=Path)
    parser.add_argument("--count", type=int, default=300, help="mutants to try (300)")
    parser.add_argument("--seed", type=int, default=int(f"{date.today():%Y%m%d}"), help="of the sample (the date)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further mutant after so long")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (one per core)")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    if not options.session.exists():
        sys.exit(f"{options.session} does not exist: make it by cosmic-ray init cosmic-ray.toml {options.session}")
    started = time.monotonic()
    with use_db(options.session, WorkDB.Mode.open) as session, workers(options.workers) as pool:
        everything = mutants(session)
        sample = random.Random(options.seed).sample(everything, min(options.count, len(everything)))
        results = dict(session.results)
        waiting = [item for item in sample if item.job_id not in results]
        seconds = baseline(pool, {entry for item in waiting for entry in suites_of(path_of(item))})
        for item, result in tried(pool, waiting, seconds, started + 60 * options.minutes):
            session.set_result(item.job_id, result)
            results[item.job_id] = result
        found = report.Report.of(
            [row(item, results[item.job_id]) for item in sample if item.job_id in results],
            seed=options.seed, mutants=len(everything), seconds=round(time.monotonic() - started),
            workers=options.workers,
        )  # fmt: skip
    print(found.text())
    if options.json:
        options.json.write_text(found.dumps())


def mutants(session: WorkDB) -> list[WorkItem]:
    """What the filters left and behaviour can tell, in an order that repeats."""
    skipped = {job for job, result in session.results if result.worker_outcome == WorkerOutcome.SKIPPED}
    left = [item for item in session.work_items if item.job_id not in skipped]
    left = [item for item in left if not in_annotation(item) and not is_size(item)]
    return sorted(left, key=lambda item: str(item.mutations[0]))


def path_of(item: WorkItem) -> str:
    return item.mutations[0].module_path.as_posix()


def is_size(item: WorkItem) -> bool:
    """A number in a list of cases: another size or seed is another data set, as good as the first."""
    return path_of(item).endswith("/cases.py") and item.mutations[0].operator_name == "core/NumberReplacer"


def in_annotation(item: WorkItem) -> bool:
    """An edit of a type, which Python refuses or nobody reads."""
    place = item.mutations[0].start_pos
    return any(start <= place < end for start, end in annotations(path_of(item)))


@cache
def annotations(path: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """((line, column) of the start, of the end) of the annotations of a module."""
    nodes = list(ast.walk(ast.parse(Path(path).read_text())))
    found = [getattr(node, name, None) for node in nodes for name in ("annotation", "returns")]
    return [((a.lineno, a.col_offset), (a.end_lineno, a.end_col_offset)) for a in found if a is not None]


@contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that each stand in a copy of the tree."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        context = multiprocessing.get_context("spawn")
        copies = context.Queue()
        for number in range(count):
            copies.put(f"{folder}/{number}")
        with ProcessPoolExecutor(count, context, initializer=settle, initargs=(os.getcwd(), copies)) as pool:
            yield pool


def settle(tree: str, copies: Any) -> None:
    """Copy the tree and stand in it; what is imported comes from there, through the links of moe_harness/ as well."""
    copy, left_out = copies.get(), shutil.ignore_patterns(".git", ".tox", ".venv", "__pycache__", "*.egg-info")
    shutil.copytree(tree, copy, symlinks=True, ignore=left_out)
    os.chdir(copy)
    os.environ |= {"PYTHONPATH": copy, "OMP_NUM_THREADS": "1"}


def baseline(pool: ProcessPoolExecutor, entries: Iterable[str]) -> dict[str, float]:
    """Seconds of every entry on the tree as it is.

    Raises:
        SystemExit: one fails, with the end of its output.
    """
    runs = {pool.submit(timed, entry): entry for entry in entries}
    seconds = {}
    for run in as_completed(runs):
        outcome, output, seconds[runs[run]] = run.result()
        if outcome != TestOutcome.SURVIVED:
            pool.shutdown(cancel_futures=True)
            sys.exit(f"{output[-3000:]}\npytest {runs[run]} fails on the tree as it is: mend that first")
        print(f"{seconds[runs[run]]:6.0f} s  {runs[run]}", flush=True)
    return seconds


def timed(entry: str) -> tuple[TestOutcome, str, float]:
    started = time.monotonic()
    outcome, output = run_tests(f"{PYTEST} {entry}", BASELINE_LIMIT)
    return outcome, output, time.monotonic() - started


def tried(
    pool: ProcessPoolExecutor, items: list[WorkItem], seconds: dict[str, float], end: float
) -> Iterator[tuple[WorkItem, WorkResult]]:
    """Results as they come.  What was begun before `end` is finished, or the slow ones would be missing."""
    runs = {}
    for item in items:
        entries = suites_of(path_of(item))
        limit = SLACK + TIMES * sum(seconds[entry] for entry in entries)
        runs[pool.submit(mutate_and_test, item.mutations, command(entries), limit)] = item
    for done, run in enumerate(as_completed(runs), 1):
        if run.cancelled():
            continue
        if time.monotonic() > end:
            for other in runs:
                other.cancel()
        result = run.result()
        print(f"{done}/{len(runs)} {path_of(runs[run])}: {outcome_of(result)}", flush=True)
        yield runs[run], result


def command(entries: tuple[str, ...]) -> str:
    """All entries, one after the other until one fails."""
    return f'sh -c "{" && ".join(f"{PYTEST} {entry}" for entry in entries)}"'


def outcome_of(result: WorkResult) -> str:
    """killed, survived, timeout; or error where the edit could not be tried."""
    if result.worker_outcome != WorkerOutcome.NORMAL or result.test_outcome == TestOutcome.INCOMPETENT:
        return "error"
    if result.output == TIMED_OUT:
        return "timeout"
    return str(result.test_outcome.value) if result.test_outcome else "error"


def row(item: WorkItem, result: WorkResult) -> report.Row:
    mutation = item.mutations[0]
    return report.Row(path_of(item), mutation.start_pos[0], mutation.operator_name, outcome_of(result),
                      result.diff or "", mutation.definition_name or "")  # fmt: skip


if __name__ == "__main__":
    main()
