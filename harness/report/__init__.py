"""How a run is told to people and to programs: live progress, the final table, JSON and one HTML page.

Nothing here imports torch, and the HTML page's template engine is imported only when a page is written.
"""

from moe_harness.harness.report.progress import Progress
from moe_harness.harness.report.results import Result, dumps, exit_status, to_json
from moe_harness.harness.report.terminal import print_report
from moe_harness.harness.report.words import annotations, failure_text

__all__ = [
    "Progress", "Result", "annotations", "dumps", "exit_status", "failure_text", "print_report", "to_json",
]  # fmt: skip
