"""`--baseline FILE` of a command: what it found is compared at once with what was recorded."""

from pathlib import Path
from typing import Any

from moe_harness.harness.core.errors import EXIT_CANNOT_JUDGE, EXIT_FAIL, EXIT_PASS
from moe_harness.harness.record import store, view
from moe_harness.harness.record.compare import compare
from moe_harness.harness.record.line import lines


def against(baseline: Path, result: Any, status: int) -> int:
    """Print what differs from the recorded run; the command's status, or where it had passed that of a regression, or
    of a comparison that was refused.

    Only what was run now is compared: a file may hold many other results.

    Raises:
        UsageError, CannotJudge: there is no such file, or nothing in it of what was run.
    """
    from rich.console import Console

    new, old = store.newest(lines(result)), store.newest(store.read(baseline))
    found = compare({key: line for key, line in old.items() if key in new}, new)
    view.show(found, Console())
    if status != EXIT_PASS:
        return status
    return EXIT_FAIL if found.regressed else EXIT_CANNOT_JUDGE if found.refused else EXIT_PASS
