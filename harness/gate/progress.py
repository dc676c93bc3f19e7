"""How far the answers are: a bar in a terminal, a line now and then elsewhere; on standard error."""

import math
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from moe_harness.harness.report.progress import PLAIN_INTERVAL, minutes


class Answered:
    """Call it with the questions answered, of how many, and the seconds left."""

    def __init__(self, spec: str, console: Console | None = None):
        self.spec, self.console = spec, console or Console(stderr=True)
        self.spoken = -math.inf
        self.bar: Progress | None = None

    def __enter__(self) -> "Answered":
        if self.console.is_terminal:
            columns = (TextColumn(self.spec, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console, redirect_stdout=False)
            self.bar.add_task("", total=None)
            self.bar.start()
        return self

    def __call__(self, answered: int, of: int, left: float) -> None:
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=answered, total=of)
        elif answered == of or time.monotonic() - self.spoken > PLAIN_INTERVAL:
            self.spoken = time.monotonic()
            rest = f", {minutes(left)} left" if math.isfinite(left) and left > 0 else ""
            line = f"{self.spec}: {answered} of {of} questions answered{rest}"
            self.console.print(Text(line), soft_wrap=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
