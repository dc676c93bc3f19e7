"""Live progress of a run: a bar per check where there is a terminal, a few plain lines where there is none.

The first failure of each implementation is printed at once and in full; the rest are counted until the final report.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moe_harness.harness.report.terminal import emit, failure_block

STATUSES = ("passed", "failed", "unsupported", "skipped")
PLAIN_INTERVAL = 15.0  # seconds between plain lines, which end up in logs that somebody reads
BAR_WIDTH = 24
MARK_STYLES = {"failed": "bold red", "unsupported": "yellow", "skipped": "dim"}


class CheckProgress:
    """How far one check is."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.counts = dict.fromkeys(STATUSES, 0)

    @property
    def done(self) -> int:
        """Cases that came to an end, whatever the end."""
        return sum(self.counts.values())

    def add(self, status: str) -> None:
        """One more case; a plan that was too small grows, since a bar past its end helps nobody."""
        self.counts[status] += 1
        self.total = max(self.total, self.done)

    def marks(self) -> str:
        """`2 failed, 3 unsupported`; empty where everything passed."""
        return ", ".join(f"{self.counts[status]} {status}" for status in STATUSES[1:] if self.counts[status])


class Progress:
    """Context manager around a run.

    Call `start` for each implementation, `advance` after each case, `failure` for each failed case.
    Everything goes to standard error unless a console is given, so that a report on standard output stays clean.
    """

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or Console(stderr=True)
        self.clock = clock
        self.impl = ""
        self.tallies: dict[str, CheckProgress] = {}
        self.failures = 0
        self.started = self.spoken = clock()
        self.live: Live | None = None

    def __enter__(self) -> "Progress":
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            # Standard output is the report's, so rich must not redirect it into a display on standard error.
            self.live = Live(
                console=self.console,
                get_renderable=self.view,
                refresh_per_second=5,
                transient=True,
                redirect_stdout=False,
            )
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish()
        if self.live is not None:
            self.live.stop()
            self.live = None

    def start(self, impl: str, plan: dict[str, int]) -> None:
        """Begin an implementation; `plan` gives the cases expected of each check."""
        self.finish()
        self.impl, self.failures = impl, 0
        self.tallies = {check: CheckProgress(total) for check, total in plan.items()}
        self.started = self.spoken = self.clock()
        if self.live is None:
            self.say(f"{impl}: {sum(plan.values())} cases in {len(plan)} checks")

    def advance(self, check: str, status: str) -> None:
        """One case of `check` ended; `status` is passed, failed, unsupported or skipped."""
        tally = self.tallies.setdefault(check, CheckProgress(0))
        tally.add(status)
        if self.live is not None:
            return
        if tally.done == tally.total and tally.total > 1:
            self.say(f"  {check}: {tally.done} cases, {tally.marks() or 'all passed'}")
        elif self.clock() - self.spoken >= PLAIN_INTERVAL:
            self.say(f"  {self.pace()}")

    def failure(self, failure: dict[str, Any]) -> None:
        """A case failed: the first is shown in full at once."""
        self.failures += 1
        if self.failures == 1:
            emit(self.console, failure_block(failure))

    def note(self, text: str) -> None:
        """A line that stays on the screen."""
        self.say(text)

    def finish(self) -> None:
        """Close the implementation in hand with one line that stays."""
        if self.tallies:
            self.say(f"{self.impl}: {self.pace(ended=True)}")
        self.tallies = {}

    def say(self, text: str) -> None:
        """Print a line above the live display, without markup: names and messages are not ours."""
        self.spoken = self.clock()
        self.console.print(Text(text), soft_wrap=True)

    def pace(self, *, ended: bool = False) -> str:
        """`312/600 cases, 2 failed, 41.2 cases/s, 0:07 elapsed, 0:07 left`."""
        tallies = list(self.tallies.values())
        done, total = sum(tally.done for tally in tallies), sum(tally.total for tally in tallies)
        failed = sum(tally.counts["failed"] for tally in tallies)
        elapsed = max(self.clock() - self.started, 1e-9)
        parts = [f"{done}/{total} cases", f"{failed} failed" if failed else "", f"{done / elapsed:.1f} cases/s"]
        parts.append(f"{minutes(elapsed)} elapsed")
        if done and not ended:
            parts.append(f"{minutes((total - done) * elapsed / done)} left")
        return ", ".join(part for part in parts if part)

    def view(self) -> Group:
        """The live display; drawn by rich's own thread, which is why it works on copies."""
        grid = Table.grid(padding=(0, 1))
        for overflow in ("fold", "crop", "crop", "fold"):
            grid.add_column(overflow=overflow)
        for check, tally in list(self.tallies.items()):
            count = Text(f"{tally.done}/{tally.total}", justify="right")
            grid.add_row(Text(f"  {check}"), bar(tally), count, marks(tally))
        if not self.tallies:
            return Group()
        return Group(Text(self.impl, style="bold"), grid, Text(f"  {self.pace()}", style="dim"))


def bar(tally: CheckProgress) -> ProgressBar:
    """A bar that turns red with the first failure."""
    style = "red" if tally.counts["failed"] else "green"
    return ProgressBar(
        total=max(tally.total, 1), completed=tally.done, width=BAR_WIDTH, complete_style=style, finished_style=style
    )


def marks(tally: CheckProgress) -> Text:
    """What did not pass, in its colour."""
    found = [Text(f"{tally.counts[status]} {status}", style=style) for status, style in MARK_STYLES.items()]
    shown = [text for text, status in zip(found, MARK_STYLES, strict=True) if tally.counts[status]]
    return Text(", ").join(shown)


def minutes(seconds: float) -> str:
    """m:ss, or h:mm:ss."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
