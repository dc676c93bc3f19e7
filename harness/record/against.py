"""`--baseline FILE` of a command: what it found is compared at once with what was recorded."""

from pathlib import Path
from typing import Any

from moe_harness.harness.core.errors import EXIT_FAIL, EXIT_PASS
from moe_harness.harness.record import store, view
from moe_harness.harness.record.compare import compare
from moe_harness.harness.record.line import lines


def against(baseline: Path, result: Any, status: int) -> int:
    """Print what differs from the recorded run; the command's status, or that of a regression where it had passed.

    Only what was run now is compared: a file may hold many other results.

    Raises:
        UsageError, CannotJudge: there is no such file, or nothing in it of what was run.
    """
    from rich.console import Console

    new, old = store.newest(lines(result)), store.newest(store.read(baseline))
    found = compare({key: line for key, line in old.items() if key in new}, new)
    view.show(found, Console())
    return EXIT_FAIL if status == EXIT_PASS and found.regressed else status
