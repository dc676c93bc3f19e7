"""A controller that is killed in the middle leaves a result that nobody can take for a good one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from moe_harness.harness.ranks import judge
from moe_harness.harness.report.results import exit_status
from moe_harness.suites import outcome_log

ROOT = Path(__file__).resolve().parents[2]
SLOW = """
import time, pytest
@pytest.mark.parametrize("n", range(50))
def test_one(n):
    time.sleep(0.1)
"""


def _kill_once(command: list[str], enough: Callable[[], bool]) -> None:
    """Start a controller and kill it as soon as `enough` says so."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 120
    while process.poll() is None and not enough():
        assert time.monotonic() < deadline, "nothing was written"
        time.sleep(0.02)
    assert process.poll() is None, "it came to its end before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_check_is_no_pass(tmp_path: Path) -> None:
    """Even where the file holds a good result of an earlier run."""
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"schema": 1, "verdict": "pass", "coverage": {"executed": 1}}))

    def judged() -> int:
        return json.loads(file.read_text()).get("interrupted", False) and sum(
            check["cases"] for check in json.loads(file.read_text())["checks"]
        )

    command = ["-m", "moe_harness", "check", "--stage", "dispatcher", "--impl", "dispatchers:naive"]
    _kill_once([*command, "--json", str(file)], lambda: judged() >= 5)
    result = json.loads(file.read_text())
    assert result["verdict"] == "error" and result["interrupted"] and exit_status([result]) == 3
    left = {entry["what"]: entry["cases"] for entry in result["coverage"]["skipped"]}
    ids = judge.planned("dispatcher", "dispatchers:naive", (1, 2, 3, 4))
    planned = Counter(case.split("/")[1] for case in ids)
    done = {check["name"]: check["cases"] for check in result["checks"]}
    assert {name: left[name] + done.get(name, 0) for name in planned} == planned


def test_a_killed_suite_lacks_cells(tmp_path: Path) -> None:
    suite, file = tmp_path / "test_slow.py", tmp_path / "ledger.jsonl"
    suite.write_text(SLOW)
    command = ["-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "-p", "conftest", "--ledger", str(file)]
    _kill_once([*command, str(suite)], lambda: file.exists() and file.read_text().count('"cell"') >= 3)
    outcomes, wrong = outcome_log.read(file)
    assert 3 <= outcomes["passed"] < 50
    assert len([line for line in wrong if line.startswith("missing: ")]) == 50 - outcomes["passed"]
    assert "the run did not come to its end" in wrong


def test_a_whole_ledger(tmp_path: Path) -> None:
    """Failed, missing and absent passes are wrong; a skipped cell beside a passed one is not."""
    file = tmp_path / "ledger.jsonl"
    written = outcome_log.OutcomeLog(file, ["a", "b"])
    written.add("a", "passed", 0.1)
    written.add("b", "skipped", 0.0, "needs 8 CUDA devices")
    written.finish()
    assert outcome_log.read(file)[1] == [] and outcome_log.main(file) == 0
    written = outcome_log.OutcomeLog(file, ["a", "b"])
    written.add("b", "failed", 0.1)
    assert outcome_log.read(file)[1] == [
        "missing: a",
        "failed: b",
        "the run did not come to its end",
        "no cell has passed",
    ]
    assert outcome_log.main(file) == 1
