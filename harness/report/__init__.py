"""How a run is told to people and to programs: live progress, the final table, JSON and one HTML page.

Nothing here imports torch, and the HTML page's template engine is imported only when a page is written.
"""

from harness.report.failure import failure_text
from harness.report.progress import Progress
from harness.report.results import Result, dumps, exit_status, to_json
from harness.report.terminal import print_report

__all__ = ["Progress", "Result", "dumps", "exit_status", "failure_text", "print_report", "to_json"]
