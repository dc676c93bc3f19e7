"""The judge in Python: `check(kernel, "experts")` in a notebook, a script or a test of one's own.

It does what `moe-harness check` does and takes function objects too, those of a notebook and of `__main__` included.
"""

import html
import io
import multiprocessing
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_harness.harness.commands import options
from moe_harness.harness.core.errors import CannotJudge, UsageError
from moe_harness.harness.core.functions import spec_of
from moe_harness.harness.report import Progress, Result, dumps, failure_text
from moe_harness.harness.report.html import render
from moe_harness.harness.report.results import Failure, verdict_of
from moe_harness.harness.report.terminal import print_report

__all__ = ["CannotJudge", "Judgement", "UsageError", "check"]
FRAME = '<iframe srcdoc="{page}" style="width: 100%; height: {height}px; border: 0"></iframe>'


@dataclass(frozen=True)
class Judgement:
    """What a run found; `result` is the document of --json, a notebook shows the page of --html."""

    result: Result

    @property
    def verdict(self) -> str:
        """pass, fail, unsupported or error."""
        return verdict_of(self.result)

    @property
    def passed(self) -> bool:
        """Whether every check passed: `assert check(kernel, "experts").passed`."""
        return self.verdict == "pass"

    @property
    def failures(self) -> list[Failure]:
        """Each failed case with message, place, cause and replay line."""
        return self.result["failures"]

    def raise_if_failed(self) -> "Judgement":
        """This judgement, where it passed.

        Raises:
            AssertionError: a check failed, or nothing could be judged; the message is that of the first failure.
        """
        if not self.passed:
            told = self.result.get("error") or "supports none of the stage's core cases"
            first = failure_text(dict(self.failures[0])) if self.failures else told
            raise AssertionError(f"{self.verdict}: {first}")
        return self

    def write_html(self, path: str | Path) -> None:
        """Write the page that `--html` writes."""
        Path(path).write_text(render([self.result]), encoding="utf-8")

    def write_json(self, path: str | Path) -> None:
        """Write the document that `--json` writes."""
        Path(path).write_text(dumps([self.result]), encoding="utf-8")

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        print_report([self.result], Console(file=text, width=100))
        return text.getvalue()

    def __repr__(self) -> str:
        cases = self.result["coverage"]["executed"]
        return f"<{self.verdict} of {self.result['impl']}: {cases} cases, {len(self.failures)} failures>"

    def _repr_html_(self) -> str:
        return FRAME.format(page=html.escape(render([self.result]), quote=True), height=620)


def check(
    implementation: Callable | str,
    stage: str,
    *,
    device: str = "cpu",
    dtypes: Iterable[str] | str = (),
    profile: str = "quick",
    configs: Iterable[str] | str = (),
    checks: Iterable[str] | str = (),
    seed: int = 0,
    ranks: Iterable[int] | None = None,
    timeout: float = 60.0,
    quiet: bool = False,
) -> Judgement:
    """Judge a function (for the stages over many ranks, a class) or what a spec names.

    Every list may also be one string with commas.  A function that no other process could import is kept in
    `.moe_harness/functions/`, so that the replay lines of its failures work.

    Args:
        implementation: the object, or a spec as --impl takes it.
        stage: one of `moe-harness list`.
        ranks: world sizes, 1, 2, 3 and 4 for the stages that run over ranks alone; a model is judged over ranks where
            they are given, and on one device otherwise.
        timeout: seconds one case may take.
        quiet: no progress on standard error.

    Raises:
        UsageError: an unknown name, another signature, a function that cannot be carried to another process.
        CannotJudge: it cannot be imported, or the device is not there.
    """
    from moe_harness.harness.process.start import fork_server
    from moe_harness.harness.run import session

    if multiprocessing.current_process().daemon:
        raise CannotJudge("check() is called while a judging process imports the file; "
                          'put the call under if __name__ == "__main__":')  # fmt: skip
    stage = options.one_of("stage", stage, options.ALL_STAGES)
    request = options.request(stage, device, _list(dtypes), profile, _list(configs), seed)
    worlds = options.worlds_of(stage, None if ranks is None else [",".join(map(str, ranks))])
    chosen = options.chosen_checks(stage, request, _list(checks), bool(worlds))
    asked = session.RunOptions(request.dtypes if _list(dtypes) else None, timeout, chosen)
    spec = implementation if isinstance(implementation, str) else spec_of(implementation)
    fork_server()
    with _progress(quiet) as progress:
        return Judgement(session.judge(stage, spec, request, asked, progress, worlds=worlds))


def _list(values: Iterable[str] | str) -> list[str]:
    return [values] if isinstance(values, str) else list(values)


def _progress(quiet: bool) -> Any:
    return nullcontext() if quiet else Progress()
